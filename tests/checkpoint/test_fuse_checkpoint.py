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


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def fuse(base: str, out: Path, **kwargs: Any) -> FusionReport:
    settings: dict[str, Any] = {"num_fusions": 2, "calibration": make_texts(), "perplexity_tokens": 0}
    settings |= {"calibration_length": 64, "calibration_tokens": 1024} | kwargs
    return fuse_checkpoint(base, out, **settings)


@pytest.mark.parametrize(
    ("settings", "overrides"),
    [
        ({"method": "neural_alignment"}, {"attention_bias": True, "mlp_bias": True}),
        ({"method": "mka", "selection": "groups", "refit": "down_proj"}, {}),
        ({"method": "truncate"}, {}),
        ({"method": "refit", "perplexity_tokens": 200}, {}),
        ({"method": "refit"}, {"tie_word_embeddings": True, "dtype": torch.bfloat16}),
    ],
)
def test_both_paths_write_the_same_tensors(
    settings: dict[str, Any], overrides: dict[str, Any], make_base: Callable[..., str], tmp_path: Path
) -> None:
    low, high = tmp_path / "low", tmp_path / "high"
    base = make_base(**overrides)
    reports = [fuse(base, out, low_memory=out == low, max_shard_bytes=30_000, **settings) for out in (low, high)]
    assert len(list(low.glob("model-*.safetensors"))) > 1 and equal(tensors(low), tensors(high))
    assert (low / "config.json").read_text() == (high / "config.json").read_text()
    one, other = (report.to_dict() | {"seconds": None} for report in reports)
    assert one == other


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


def test_reads_a_sharded_base(base: str, tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path / "base", max_shard_size="40KB")
    make_tokenizer().save_pretrained(tmp_path / "base")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    fuse(base, tmp_path / "whole", method="mka")
    fuse(str(tmp_path / "base"), tmp_path / "out", method="mka")
    assert equal(tensors(tmp_path / "whole"), tensors(tmp_path / "out"))


def test_reads_a_file_larger_than_memory(make_base: Callable[..., str], tmp_path: Path) -> None:
    base = make_base()
    fuse(base, tmp_path / "plain", method="mka")
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
    fuse(base, tmp_path / "large", method="mka")
    assert equal(tensors(tmp_path / "plain"), tensors(tmp_path / "large"))


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
    assert equal(tensors(tmp_path / "plain"), before)


def test_a_head_that_the_config_ties_but_that_differs_is_kept(make_base: Callable[..., str], tmp_path: Path) -> None:
    base = make_base(tie_word_embeddings=False)
    config = json.loads(Path(base, "config.json").read_text())
    Path(base, "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    reports = [fuse(base, tmp_path / str(low), low_memory=low, perplexity_tokens=200) for low in (True, False)]
    low, high = tensors(tmp_path / "True"), tensors(tmp_path / "False")
    assert equal(low, high)
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
    assert equal(low, high)
    assert "lm_head.weight" not in low


def test_text_that_the_model_writes_is_the_same_layer_by_layer(base: str, tmp_path: Path) -> None:
    def written(name: str, **kwargs: Any) -> dict[str, torch.Tensor]:
        report = fuse(base, tmp_path / name, method="refit", calibration=None, calibration_tokens=1024, **kwargs)
        assert report.calibration[0].source.endswith("text by the model itself")
        return tensors(tmp_path / name)

    low, high = written("low"), written("high", low_memory=False)
    with TwoDevices():
        device = written("device", device_map="cuda:1")
    assert equal(low, high) and equal(low, device)
