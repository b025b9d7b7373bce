from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama, make_texts, make_tokenizer
from safetensors.torch import load_file, save_file
from two_devices import TwoDevices

import lf_hf
from lf_hf import FusionConfig, FusionReport, fuse_checkpoint
from lf_hf.estimate import plan_fusion

METHODS = ("neural_alignment", "mka", "truncate", "refit")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def fuse(base: str, out: Path, **kwargs: Any) -> FusionReport:
    settings: dict[str, Any] = {"num_fusions": 2, "calibration": make_texts(), "perplexity_tokens": 200}
    settings |= {"calibration_length": 64, "calibration_tokens": 1024} | kwargs
    return fuse_checkpoint(base, out, **settings)


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        *((method, {}) for method in METHODS),
        ("refit", {"tie_word_embeddings": True, "dtype": torch.bfloat16}),
        ("neural_alignment", {"attention_bias": True, "mlp_bias": True}),
    ],
)
def test_both_paths_write_the_same_tensors(
    method: str, overrides: dict[str, Any], make_base: Callable[..., str], tmp_path: Path
) -> None:
    base = make_base(**overrides)
    reports = [
        fuse(base, tmp_path / str(low_memory), method=method, low_memory=low_memory, max_shard_bytes=30_000)
        for low_memory in (True, False)
    ]
    assert len(list((tmp_path / "True").glob("model-*.safetensors"))) > 1
    low, high = tensors(tmp_path / "True"), tensors(tmp_path / "False")
    assert low.keys() == high.keys()
    assert all(torch.equal(low[name], high[name]) and low[name].dtype == high[name].dtype for name in low)
    a, b = (json.loads((tmp_path / str(low_memory) / "config.json").read_text()) for low_memory in (True, False))
    assert a == b
    a, b = (report.to_dict() | {"seconds": None} for report in reports)
    assert a == b


def test_both_paths_write_the_same_settings_for_generation(base: str, tmp_path: Path) -> None:
    """Also those that older checkpoints have in config.json; what cannot be saved is said before the work."""
    copy = Path(shutil.copytree(base, tmp_path / "base"))
    (copy / "generation_config.json").unlink()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"do_sample": True, "temperature": 0.5, "max_length": 50}))
    low, high = tmp_path / "low", tmp_path / "high"
    for out in (low, high):
        fuse(str(copy), out, method="truncate", low_memory=out == low)
    found = json.loads((low / "generation_config.json").read_text())
    assert found == json.loads((high / "generation_config.json").read_text()) and found["temperature"] == 0.5
    (copy / "generation_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"The generation settings of .* cannot be used"):
        fuse(str(copy), tmp_path / "out", method="truncate")


def test_reads_a_sharded_base(tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path / "base", max_shard_size="40KB")
    make_tokenizer().save_pretrained(tmp_path / "base")
    make_llama().save_pretrained(tmp_path / "whole")
    make_tokenizer().save_pretrained(tmp_path / "whole")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    for name in ("base", "whole"):
        fuse(str(tmp_path / name), tmp_path / f"{name}-out")
    a, b = tensors(tmp_path / "base-out"), tensors(tmp_path / "whole-out")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_reads_a_file_larger_than_memory(make_base: Callable[..., str], tmp_path: Path) -> None:
    base = make_base()
    fuse(base, tmp_path / "plain")
    [file] = Path(base).glob("*.safetensors")
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header, weights = json.loads(content[8:start]), content[start:]
    size = 1 << 42  # a tensor that nothing asks for; the file has a hole in its place
    header["unused"] = {"dtype": "U8", "shape": [size], "data_offsets": [len(weights), len(weights) + size]}
    written = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(written).to_bytes(8, "little") + written + weights)
        out.truncate(out.tell() + size)
    fuse(base, tmp_path / "large")
    a, b = tensors(tmp_path / "plain"), tensors(tmp_path / "large")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("low_memory", [False, True])
def test_the_base_is_not_replaced(base: str, tmp_path: Path, low_memory: bool) -> None:
    """Where it is a plain checkpoint that was fused itself."""
    fuse(base, tmp_path / "plain", plain=True, method="truncate")
    before = tensors(tmp_path / "plain")
    for again in (
        lambda: fuse(str(tmp_path / "plain"), tmp_path / "plain", plain=True, low_memory=low_memory),
        lambda: plan_fusion(tmp_path / "plain", FusionConfig(1), out=tmp_path / "plain", low_memory=low_memory),
        lambda: lf_hf.from_pretrained_fused(tmp_path / "plain", num_fusions=1, fused_dir=tmp_path / "plain"),
    ):
        with pytest.raises(ValueError, match="is the base itself; choose another folder"):
            again()
    after = tensors(tmp_path / "plain")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_head_that_the_config_ties_but_that_differs_is_kept(make_base: Callable[..., str], tmp_path: Path) -> None:
    base = make_base(tie_word_embeddings=False)
    config = json.loads(Path(base, "config.json").read_text())
    Path(base, "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    reports = [fuse(base, tmp_path / str(low_memory), low_memory=low_memory) for low_memory in (True, False)]
    low, high = tensors(tmp_path / "True"), tensors(tmp_path / "False")
    assert low.keys() == high.keys() and all(torch.equal(low[name], high[name]) for name in low)
    assert "lm_head.weight" in low
    assert reports[0].perplexities == reports[1].perplexities and reports[0].perplexities
    assert reports[0].continuations == reports[1].continuations and reports[0].continuations
    model, ids = lf_hf.FusedLlamaForCausalLM.from_pretrained(tmp_path / "True"), torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(model.requires_grad_(False).to_plain()(ids).logits, model(ids).logits)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    settings: dict[str, Any] = {"text": make_texts(1200), "tokens": 1024, "length": 64, "batch_tokens": 256}
    lf_hf.heal(tmp_path / "True", tmp_path / "healed", base=base, **settings, training_args={"bf16": False})
    assert torch.equal(tensors(tmp_path / "healed")["lm_head.weight"], low["lm_head.weight"])


def test_a_head_that_is_stored_beside_equal_embeddings_is_one(make_base: Callable[..., str], tmp_path: Path) -> None:
    base = make_base(tie_word_embeddings=True)
    held = load_file(Path(base, "model.safetensors"))
    head = held["model.embed_tokens.weight"].clone()
    save_file(held | {"lm_head.weight": head}, Path(base, "model.safetensors"), metadata={"format": "pt"})
    for low_memory in (True, False):
        fuse(base, tmp_path / str(low_memory), low_memory=low_memory)
    low, high = tensors(tmp_path / "True"), tensors(tmp_path / "False")
    assert low.keys() == high.keys() and all(torch.equal(low[name], high[name]) for name in low)
    assert "lm_head.weight" not in low


def test_arguments_that_need_the_whole_model_are_refused(base: str, tmp_path: Path) -> None:
    for device_map in ("auto", {"": "cpu"}, "meta"):
        with pytest.raises(ValueError, match=r"layers are read onto one device, so device_map cannot be .*; give cpu"):
            fuse(base, tmp_path / "out", device_map=device_map)
    assert not (tmp_path / "out").exists()


def test_text_that_the_model_writes_is_the_same_layer_by_layer(base: str, tmp_path: Path) -> None:
    def written(name: str, **kwargs: Any) -> dict[str, torch.Tensor]:
        report = fuse(base, tmp_path / name, method="refit", calibration=None, calibration_tokens=1024, **kwargs)
        assert report.calibration[0].source.endswith("text by the model itself")
        return tensors(tmp_path / name)

    low, high = written("low"), written("high", low_memory=False)
    with TwoDevices():
        device = written("device", device_map="cuda:1")
    assert all(torch.equal(low[name], high[name]) and torch.equal(low[name], device[name]) for name in low)
