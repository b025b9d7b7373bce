"""Loading a base or a fused checkpoint: what transformers loads is loaded, and what cannot be right gets a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import GGUF, QUICK
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lf_hf import FusedLlamaForCausalLM, FusionReport, fuse_checkpoint
from lf_hf.checkpoint.base import Base

UP = "model.layers.1.mlp.up_proj.weight"


def in_memory(base: str, out: Path, **kwargs: Any) -> None:
    FusedLlamaForCausalLM.from_pretrained_fused(base, **QUICK | kwargs).save_pretrained(out)


def from_folder_to_folder(base: str, out: Path, **kwargs: Any) -> None:
    fuse_checkpoint(base, out, **QUICK | kwargs)


def linked(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).symlink_to(file)
    return to


def test_files_that_are_links_are_read(base: str, fused: Path, tmp_path: Path) -> None:
    for fuse in (in_memory, from_folder_to_folder):
        fuse(str(linked(Path(base), tmp_path / fuse.__name__)), tmp_path / "out")
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == (fused / "model.safetensors").read_bytes()
    assert FusedLlamaForCausalLM.from_pretrained(linked(fused, tmp_path / "links")).fusion_report is not None


@pytest.mark.parametrize("content", ["", '{"base": 3}', "\xff"])
def test_a_damaged_or_newer_report_keeps_no_weights_from_loading(
    content: str, fused: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(fused, tmp_path / "model"))
    (folder / "fusion_report.json").write_text(content, encoding="latin-1")
    monkeypatch.setattr("lf_hf.checkpoint.classes.logger.parent.propagate", True)
    for kind in (FusedLlamaForCausalLM, AutoModelForCausalLM):
        caplog.clear()
        assert kind.from_pretrained(folder).fusion_report is None
        [warning] = [message for message in caplog.messages if "fusion_report.json" in message]
        assert warning.endswith("; the model is loaded without its report.") and "\n" not in warning
    with pytest.raises(ValueError, match=r"fusion_report\.json"):
        FusionReport.load(folder)


@pytest.mark.parametrize("kind", [FusedLlamaForCausalLM, AutoModelForCausalLM])
def test_an_adapter_is_followed_to_its_model(kind: Any, fused: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = FusedLlamaForCausalLM.from_pretrained(fused)
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    adapted.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
    loaded = kind.from_pretrained(tmp_path)
    assert isinstance(loaded, FusedLlamaForCausalLM) and loaded.fusion_report is not None
    ids = torch.arange(20)[None]
    assert torch.equal(loaded(ids).logits, adapted(ids).logits)
    assert not torch.equal(loaded(ids).logits, FusedLlamaForCausalLM.from_pretrained(fused)(ids).logits)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_weights_that_are_no_floats_are_refused(dtype: torch.dtype, base: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(base, tmp_path / "base"))
    held = load_file(copy / "model.safetensors")
    held |= {UP: held[UP].to(dtype), "position_ids": torch.arange(3)}  # of which the latter may be integers
    save_file(held, copy / "model.safetensors", metadata={"format": "pt"})
    message = rf"'{UP}' in 'model.safetensors' holds numbers of type \w+, not plain floats; convert the weights to bfl"
    for fuse in (in_memory, from_folder_to_folder, lambda name, _: FusedLlamaForCausalLM.from_pretrained(name)):
        with pytest.raises(ValueError, match=message):
            fuse(str(copy), tmp_path / "out")


def projections(model: torch.nn.Module) -> set[str]:
    return {type(module).__name__ for name, module in model.named_modules() if name.endswith("_proj")}


def test_a_gguf_base_is_read_once_as_plain_floats_wherever_there_is_a_kernel(
    gguf_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Newer transformers leaves weights packed where it finds a kernel; here it finds a stand-in, and Llama's names.

    Reading the file takes a minute for a large vocabulary.
    """
    quantizer = pytest.importorskip("transformers.quantizers.quantizer_gguf")
    names = pytest.importorskip("transformers.integrations.gguf.gguf_conversion_mapping")
    norms = {"output_norm": "model.norm", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    renamed = [names.WeightRenaming(rf"\b{name}\.", f"{norm}.") for name, norm in norms.items()]
    monkeypatch.setitem(names.GGUF_ARCHS, "llama", lambda _: names.DENSE_DECODER_RENAMINGS + renamed)
    monkeypatch.setattr(quantizer, "get_gguf_kernel", lambda: SimpleNamespace(supports=lambda _: True))
    loading: dict[str, Any] = {"gguf_file": GGUF.name, "dtype": "bfloat16"}
    assert projections(LlamaForCausalLM.from_pretrained(gguf_folder, **loading)) == {"GgufLinear"}
    gguf = pytest.importorskip("gguf")
    reader = Mock(side_effect=gguf.GGUFReader)
    monkeypatch.setattr(gguf, "GGUFReader", reader)
    base = Base.open(gguf_folder, loading)
    assert len(base.tokenizer()) == base.config.vocab_size
    llama = base.load()
    assert projections(llama) == {"Linear"}
    assert all(parameter.is_floating_point() for parameter in llama.parameters())
    assert reader.call_count == 1 and gguf.GGUFReader is reader


def test_another_family_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match=r"no config.json of a 'llama' model, as FusedLlama.* but one of type 'gpt2'"):
        FusedLlamaForCausalLM.from_pretrained(tmp_path)


def test_a_plain_checkpoint_knows_what_was_fused(fused: Path, tmp_path: Path) -> None:
    FusedLlamaForCausalLM.from_pretrained(fused).save_pretrained(tmp_path / "plain", plain=True)
    opened = FusedLlamaForCausalLM.from_pretrained(tmp_path / "plain")
    assert opened.config.fusion == FusedLlamaForCausalLM.from_pretrained(fused).config.fusion is not None


def test_arguments_of_transformers_pass(base: str) -> None:
    given: dict[str, Any] = {"attn_implementation": "eager", "low_cpu_mem_usage": True, "use_cache": False}
    given |= {"max_position_embeddings": 128, "torch_dtype": "bfloat16", "weights_only": True, "max_memory": None}
    model = FusedLlamaForCausalLM.from_pretrained_fused(base, **QUICK, **given)
    assert model.config._attn_implementation == "eager" and model.dtype == torch.bfloat16
    assert model.config.use_cache is False and model.config.max_position_embeddings == 128


def test_gguf_without_its_package_is_named(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(ValueError, match="needs the gguf package"):
        Base.open(base, {"gguf_file": "x.gguf"})
