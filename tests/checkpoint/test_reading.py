"""Reading a base or a fused checkpoint: what transformers loads is loaded, and no file runs code or reaches out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import peft
import pytest
import torch
from conftest import GGUF, QUICK, same, tensors
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lf_hf import FusedLlamaForCausalLM, FusionReport, from_pretrained_fused, fuse_checkpoint
from lf_hf.checkpoint.base import Base

Fuse = Callable[..., Any]
UP = "model.layers.1.mlp.up_proj.weight"


def in_memory(base: str | Path, out: Path, **kwargs: Any) -> None:
    FusedLlamaForCausalLM.from_pretrained_fused(base, **QUICK | kwargs).save_pretrained(out)


def from_folder_to_folder(base: str | Path, out: Path, **kwargs: Any) -> None:
    fuse_checkpoint(base, out, **QUICK | kwargs)


both = pytest.mark.parametrize("fuse", [in_memory, from_folder_to_folder])
either_class = pytest.mark.parametrize("kind", [FusedLlamaForCausalLM, AutoModelForCausalLM])


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8")


def pickled(folder: str | Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    torch.save(load_file(to / "model.safetensors"), to / "pytorch_model.bin")
    (to / "model.safetensors").unlink()
    return to


@pytest.fixture
def copy(base: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "base"))


@pytest.fixture
def saved(fused: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fused, tmp_path / "fused"))


# What could do harm


@both
def test_code_in_a_repository_runs_only_when_asked_for(fuse: Fuse, copy: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (copy / "own.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, PreTrainedTokenizerFast\n"
        "class Config(LlamaConfig): ...\n"
        "class Tokenizer(PreTrainedTokenizerFast): ...\n"
    )
    edit_json(copy / "config.json", auto_map={"AutoConfig": "own.Config"})
    edit_json(copy / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.Tokenizer"]})
    fuse(copy, tmp_path / "out")
    assert not marker.exists()
    AutoTokenizer.from_pretrained(copy, trust_remote_code=True)
    assert marker.exists()  # so it could have
    marker.unlink()

    edit_json(copy / "tokenizer_config.json", tokenizer_class="Own")
    edit_json(copy / "config.json", model_type="own")
    with pytest.raises(ValueError, match=r"No config of a model can be read for .*contains custom code"):
        fuse(copy, tmp_path / "new")
    assert not marker.exists() and not (tmp_path / "new").exists()


def test_a_pickled_base_is_read_only_when_asked_for(base: str, fused: Path, tmp_path: Path) -> None:
    copy = pickled(base, tmp_path / "copy")
    for given in (None, True):
        with pytest.raises(ValueError, match=r"pickled weights can run code .* pass use_safetensors=False"):
            in_memory(copy, tmp_path / "out", use_safetensors=given)
    in_memory(copy, tmp_path / "out", use_safetensors=False)
    assert same(tensors(tmp_path / "out"), tensors(fused))


@either_class
def test_a_pickled_fused_model_is_read_only_when_asked_for(kind: Any, fused: Path, tmp_path: Path) -> None:
    copy = pickled(fused, tmp_path / "copy")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        kind.from_pretrained(copy)
    assert same(kind.from_pretrained(copy, use_safetensors=False), tensors(fused))


@both
def test_names_of_chat_templates_stay_in_the_folder(fuse: Fuse, copy: Path, tmp_path: Path) -> None:
    templates = [{"name": name, "template": "x"} for name in ("default", "../../../stray", str(tmp_path / "stray"))]
    edit_json(copy / "tokenizer_config.json", chat_template=templates)
    with pytest.raises((ValueError, OSError), match="stray"):
        fuse(copy, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"] and not list(tmp_path.parent.glob("stray*"))


@either_class
def test_an_index_of_a_fused_checkpoint_names_its_own_files_alone(kind: Any, saved: Path, fused: Path) -> None:
    (saved / "model.safetensors").unlink()
    for shard in ("../fused/model.safetensors", "sub/model.safetensors", "model.bin", ""):
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors(fused), shard)}
        (saved / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="only safetensors files in its own folder are read"):
            kind.from_pretrained(saved)
    shutil.copy(fused / "model.safetensors", saved)  # beside which no index is looked at
    kind.from_pretrained(saved)


def test_links_are_followed_as_in_the_hub_cache(base: str, fused: Path, tmp_path: Path) -> None:
    home = tmp_path / "models--some--model"
    snapshot = home / "snapshots" / "0123"
    for folder in (home / "blobs", home / "refs", snapshot):
        folder.mkdir(parents=True)
    (home / "refs" / "main").write_text("0123")
    for number, file in enumerate(Path(base).iterdir()):
        shutil.copy(file, home / "blobs" / f"{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    for fuse in (in_memory, from_folder_to_folder):
        for name, given in ((snapshot, {}), ("some/model", {"cache_dir": str(tmp_path)})):
            fuse(name, tmp_path / "out", **given)
            assert same(tensors(tmp_path / "out"), tensors(fused))
    (tmp_path / "links").mkdir()
    for file in fused.iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    assert FusedLlamaForCausalLM.from_pretrained(tmp_path / "links").fusion_report is not None


# What cannot be right


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_weights_that_are_no_floats_are_refused(dtype: torch.dtype, copy: Path, tmp_path: Path) -> None:
    held = tensors(copy)
    held |= {UP: held[UP].to(dtype), "position_ids": torch.arange(3)}  # of which the latter may be integers
    save_file(held, copy / "model.safetensors", metadata={"format": "pt"})
    message = rf"'{UP}' in 'model.safetensors' holds numbers of type \w+, not plain floats; convert the weights to bfl"
    for fuse in (in_memory, from_folder_to_folder, lambda name, _: FusedLlamaForCausalLM.from_pretrained(name)):
        with pytest.raises(ValueError, match=message):
            fuse(copy, tmp_path / "out")


def test_a_folder_of_another_model_or_none_is_refused_before_weights_are_read(saved: Path) -> None:
    """transformers would make a model with weights of its own."""
    edit_json(saved / "config.json", model_type="gpt2")
    with pytest.raises(ValueError, match=r"no config.json of a 'llama' model, as FusedLlama.* but one of type 'gpt2'"):
        FusedLlamaForCausalLM.from_pretrained(saved)
    (saved / "config.json").unlink()
    with pytest.raises((ValueError, OSError), match=r"config\.json"):
        FusedLlamaForCausalLM.from_pretrained(saved)


@either_class
@pytest.mark.parametrize("content", ["", '{"base": 3}', "\xff"])
def test_a_damaged_or_newer_report_keeps_no_weights_from_loading(
    content: str, kind: Any, saved: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (saved / "fusion_report.json").write_text(content, encoding="latin-1")
    monkeypatch.setattr("lf_hf.checkpoint.classes.logger.parent.propagate", True)
    assert kind.from_pretrained(saved).fusion_report is None
    [warning] = [message for message in caplog.messages if "fusion_report.json" in message]
    assert warning.endswith("; the model is loaded without its report.") and "\n" not in warning
    with pytest.raises(ValueError, match=r"fusion_report\.json"):
        FusionReport.load(saved)


# What is loaded


@either_class
def test_an_adapter_is_followed_to_its_model(kind: Any, fused: Path, tmp_path: Path) -> None:
    ids, model = torch.arange(20)[None], FusedLlamaForCausalLM.from_pretrained(fused)
    before = model(ids).logits
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    adapted.save_pretrained(str(tmp_path))
    assert not (tmp_path / "config.json").exists()
    loaded = kind.from_pretrained(tmp_path)
    assert isinstance(loaded, FusedLlamaForCausalLM) and loaded.fusion_report is not None
    assert torch.equal(loaded(ids).logits, adapted(ids).logits) and not torch.equal(loaded(ids).logits, before)


def test_arguments_of_transformers_pass(base: str) -> None:
    given: dict[str, Any] = {"attn_implementation": "eager", "low_cpu_mem_usage": True, "use_cache": False}
    given |= {"max_position_embeddings": 128, "torch_dtype": "bfloat16", "weights_only": True, "max_memory": None}
    model = from_pretrained_fused(base, **QUICK, **given)
    assert model.config._attn_implementation == "eager" and model.dtype == torch.bfloat16
    assert model.config.use_cache is False and model.config.max_position_embeddings == 128


def test_gguf_without_its_package_is_named(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(ValueError, match="needs the gguf package"):
        from_pretrained_fused(base, gguf_file="x.gguf", **QUICK)


def test_a_gguf_base_is_read_once_as_plain_floats_wherever_there_is_a_kernel(
    gguf_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Newer transformers leaves weights packed where it finds a kernel; here it finds a stand-in, and Llama's names.

    Reading the file takes a minute for a large vocabulary.
    """
    gguf = pytest.importorskip("gguf")
    quantizer = pytest.importorskip("transformers.quantizers.quantizer_gguf")
    names = pytest.importorskip("transformers.integrations.gguf.gguf_conversion_mapping")
    norms = {"output_norm": "model.norm", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    renamed = [names.WeightRenaming(rf"\b{name}\.", f"{norm}.") for name, norm in norms.items()]
    monkeypatch.setitem(names.GGUF_ARCHS, "llama", lambda _: names.DENSE_DECODER_RENAMINGS + renamed)
    monkeypatch.setattr(quantizer, "get_gguf_kernel", lambda: SimpleNamespace(supports=lambda _: True))
    loading: dict[str, Any] = {"gguf_file": GGUF.name, "dtype": "bfloat16"}
    packed = LlamaForCausalLM.from_pretrained(gguf_folder, **loading)
    assert type(packed.model.layers[0].mlp.up_proj).__name__ == "GgufLinear"
    monkeypatch.setattr(gguf, "GGUFReader", reader := Mock(side_effect=gguf.GGUFReader))
    base = Base.open(gguf_folder, loading)
    assert len(base.tokenizer()) == base.config.vocab_size
    llama = base.load()
    assert {type(module) for name, module in llama.named_modules() if name.endswith("_proj")} == {torch.nn.Linear}
    assert all(parameter.is_floating_point() for parameter in llama.parameters())
    assert reader.call_count == 1 and gguf.GGUFReader is reader
