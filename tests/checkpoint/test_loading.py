"""Loading a base or a fused checkpoint: what transformers loads is loaded, and what cannot be right gets a sentence."""

from __future__ import annotations

import builtins
import json
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import GGUF
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lf_hf import FusedLlamaForCausalLM, FusionReport, fuse_checkpoint
from lf_hf.checkpoint.base import Base

UP = "model.layers.1.mlp.up_proj.weight"
QUICK: dict[str, Any] = {"num_fusions": 1, "method": "truncate", "perplexity_tokens": 0}


def in_memory(base: str, out: Path, **kwargs: Any) -> None:
    FusedLlamaForCausalLM.from_pretrained_fused(base, **QUICK | kwargs).save_pretrained(out)


def from_folder_to_folder(base: str, out: Path, **kwargs: Any) -> None:
    fuse_checkpoint(base, out, **QUICK | kwargs)


both = pytest.mark.parametrize("fuse", [in_memory, from_folder_to_folder])
Fuse = Callable[..., None]


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8")


def edit_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    held = load_file(file)
    change(held)
    save_file(held, file, metadata={"format": "pt"})


@pytest.fixture
def copy(base: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "base"))


@pytest.fixture(scope="module")
def fused(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fused checkpoint that tests only read."""
    folder = tmp_path_factory.mktemp("fused") / "model"
    in_memory(base, folder)
    return folder


def linked(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).symlink_to(file)
    return to


@both
def test_files_that_are_links_are_read(fuse: Fuse, base: str, tmp_path: Path) -> None:
    fuse(base, tmp_path / "plain")
    fuse(str(linked(Path(base), tmp_path / "links")), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "plain" / "model.safetensors"
    ).read_bytes()
    links = linked(tmp_path / "out", tmp_path / "fused links")
    assert FusedLlamaForCausalLM.from_pretrained(links).fusion_report is not None


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


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_no_floats_are_refused(dtype: torch.dtype, copy: Path, fused: Path, tmp_path: Path) -> None:
    def change(held: dict[str, torch.Tensor]) -> None:
        held |= {UP: held[UP].to(dtype), "position_ids": torch.arange(3)}  # of which the latter may be integers

    edit_tensors(copy / "model.safetensors", change)
    message = rf"'{UP}' in 'model.safetensors' holds numbers of type \w+, not plain floats; convert the weights to bfl"
    for fuse in (in_memory, from_folder_to_folder):
        with pytest.raises(ValueError, match=message):
            fuse(str(copy), tmp_path / "out")
    saved = Path(shutil.copytree(fused, tmp_path / "fused"))
    edit_tensors(saved / "model.safetensors", change)
    with pytest.raises(ValueError, match=message):
        FusedLlamaForCausalLM.from_pretrained(saved)


def projections(model: torch.nn.Module) -> set[str]:
    return {type(module).__name__ for name, module in model.named_modules() if name.endswith("_proj")}


def test_a_gguf_base_is_plain_floats_wherever_there_is_a_kernel(
    gguf_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Newer transformers leaves weights packed where it finds a kernel; here it finds a stand-in, and Llama's names."""
    quantizer = pytest.importorskip("transformers.quantizers.quantizer_gguf")
    names = pytest.importorskip("transformers.integrations.gguf.gguf_conversion_mapping")
    norms = {"output_norm": "model.norm", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    renamed = [names.WeightRenaming(rf"\b{name}\.", f"{norm}.") for name, norm in norms.items()]
    monkeypatch.setitem(names.GGUF_ARCHS, "llama", lambda _: names.DENSE_DECODER_RENAMINGS + renamed)
    monkeypatch.setattr(quantizer, "get_gguf_kernel", lambda: SimpleNamespace(supports=lambda _: True))
    [file] = Path(gguf_folder).glob("*Q4_1.gguf")
    loading: dict[str, Any] = {"gguf_file": file.name, "dtype": "bfloat16"}
    assert projections(LlamaForCausalLM.from_pretrained(gguf_folder, **loading)) == {"GgufLinear"}
    llama = Base.open(gguf_folder, loading).load()
    assert projections(llama) == {"Linear"}
    assert all(parameter.is_floating_point() for parameter in llama.parameters())


def test_a_gguf_file_is_parsed_once(gguf_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the config, the tokenizer and the weights together; it takes a minute for a large vocabulary."""
    gguf = pytest.importorskip("gguf")
    reader = Mock(side_effect=gguf.GGUFReader)
    monkeypatch.setattr(gguf, "GGUFReader", reader)
    base = Base.open(gguf_folder, {"gguf_file": GGUF.name, "dtype": "bfloat16"})
    assert len(base.tokenizer()) == base.load().config.vocab_size
    assert reader.call_count == 1 and gguf.GGUFReader is reader


# Raw errors where one sentence belongs


def config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **values)


def a_folder_instead_of(name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return edit


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "no key-value heads": (config(num_key_value_heads=0), "has a config from which no Llama can be built"),
    "unknown rope": (
        config(rope_parameters={"rope_type": "no", "rope_theta": 1e4}),
        "has a config from which no Llama can be built",
    ),
    "unknown activation": (config(hidden_act="no"), "has a config from which no Llama can be built .*'no'"),
    "a theta in words": (
        config(rope_parameters={"rope_type": "default", "rope_theta": "x"}),
        "has a config from which no Llama can be built",
    ),
    "a start beyond the vocabulary": (config(bos_token_id=320), "has bos_token_id=320, but a vocabulary of 320 tokens"),
    "layers without end": (
        config(num_hidden_layers=10**9),
        "num_hidden_layers=1000000000, but a model has 1 to 10000",
    ),
    "a config that is a folder": (a_folder_instead_of("config.json"), "is no folder with a config.json"),
    "weights that are a folder": (a_folder_instead_of("model.safetensors"), "holds neither model.safetensors nor"),
    "a fused one": (
        config(model_type="fused_llama"),
        "is fused already; fuse its base with .*, or save .* plain=True",
    ),
}


@both
@pytest.mark.parametrize("name", BAD)
def test_a_base_that_cannot_be_used_gets_one_sentence_at_once(
    fuse: Fuse, name: str, copy: Path, tmp_path: Path
) -> None:
    edit, message = BAD[name]
    edit(copy)
    start = time.monotonic()
    with pytest.raises(ValueError, match=message) as error:
        fuse(str(copy), tmp_path / "out")
    assert time.monotonic() - start < 5
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    assert not (tmp_path / "out").exists()


def test_slips_get_one_sentence(base: str, fused: Path, tmp_path: Path) -> None:
    load = FusedLlamaForCausalLM.from_pretrained
    load(fused).save_pretrained(tmp_path / "variant", variant="fp16")
    fuse = partial(FusedLlamaForCausalLM.from_pretrained_fused, base, **QUICK)
    slips: list[tuple[Callable[[], Any], str]] = [
        (lambda: load(fused, subfolder="no"), "no' is no folder with a config.json"),
        (lambda: load(tmp_path / "variant"), r"but model\.fp16\.safetensors; name its variant with variant="),
        (lambda: fuse(subfolder="no"), "no' is no folder with a config.json"),
        (lambda: fuse(device_map={"model": "cpu", "lm_head": "cuda:77"}), "The device 'cuda:77' cannot be used"),
        (lambda: fuse(num_hidden_layers=5), "cannot be fused with another num_hidden_layers"),
        (lambda: fuse(load_in_4bit=True), "cannot be fused with load_in_4bit; fuse it in bfloat16"),
        (lambda: fuse(num_fusion=1), "Unknown argument 'num_fusion'; did you mean 'num_fusions'"),
        (lambda: fuse(banana=1), "cannot be loaded .*unexpected keyword argument 'banana'"),
        (lambda: fuse(dtype="int8"), "dtype must be auto, float32, bfloat16, float16, float64, got 'int8'"),
        (lambda: in_memory(f"{base}/config.json", tmp_path / "out"), "is no folder with a config.json"),
    ]
    for slip, message in slips:
        with pytest.raises(ValueError, match=message):
            slip()


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("gpt2", "is a model of type 'gpt2', and not 'llama' as FusedLlamaForCausalLM needs"),
        ("fused_qwen3", "needs; load it with FusedQwen3ForCausalLM"),
    ],
)
def test_another_family_is_refused_before_weights_are_read(model_type: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ValueError, match=message):
        FusedLlamaForCausalLM.from_pretrained(tmp_path)


def test_a_plain_checkpoint_knows_what_was_fused(fused: Path, tmp_path: Path) -> None:
    FusedLlamaForCausalLM.from_pretrained(fused).save_pretrained(tmp_path / "plain", plain=True)
    opened = FusedLlamaForCausalLM.from_pretrained(tmp_path / "plain")
    assert opened.config.fusion == FusedLlamaForCausalLM.from_pretrained(fused).config.fusion is not None


@both
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_files_that_may_not_be_read_are_not_said_to_be_missing(
    fuse: Fuse, name: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(plain: Any) -> Any:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            if str(path) == f"{base}/{name}":
                raise PermissionError(13, "Permission denied", str(path))
            return plain(path, *args, **kwargs)

        return call

    for where, what in ((builtins, "open"), (Path, "open")):
        monkeypatch.setattr(where, what, refusing(getattr(where, what)))
    with pytest.raises(ValueError, match=r"read.*Permission denied"):
        fuse(base, tmp_path / "out")


def test_arguments_of_transformers_pass(base: str) -> None:
    given: dict[str, Any] = {"attn_implementation": "eager", "low_cpu_mem_usage": True, "use_cache": False}
    given |= {"max_position_embeddings": 128, "torch_dtype": "bfloat16", "weights_only": True, "max_memory": None}
    model = FusedLlamaForCausalLM.from_pretrained_fused(base, **QUICK, **given)
    assert model.config._attn_implementation == "eager" and model.dtype == torch.bfloat16
    assert model.config.use_cache is False and model.config.max_position_embeddings == 128
