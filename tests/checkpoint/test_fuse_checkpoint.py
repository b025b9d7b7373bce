"""Fusing a folder into another: in memory, layer by layer and on a device the same bits, whatever holds the weights."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import files, make_llama, make_texts, make_tokenizer, same, tensors
from safetensors.torch import save_file

import lf_hf
from lf_hf import FusionConfig, FusionReport, fuse_checkpoint
from lf_hf.inputs.dry_run import plan_fusion


def fuse(base: str | Path, out: Path, **kwargs: Any) -> FusionReport:
    settings: dict[str, Any] = {"num_fusions": 2, "calibration": make_texts(), "perplexity_tokens": 0}
    settings |= {"calibration_length": 64, "calibration_tokens": 1024, "speed": False} | kwargs
    return fuse_checkpoint(base, out, **settings)


@pytest.mark.parametrize(
    ("settings", "overrides"),
    [
        ({"method": "neural_alignment"}, {"attention_bias": True, "mlp_bias": True}),
        ({"method": "truncate"}, {}),
        ({"method": "refit", "perplexity_tokens": 200}, {}),
        ({"method": "refit"}, {"tie_word_embeddings": True, "dtype": torch.bfloat16}),
    ],
)
def test_every_path_writes_the_same_tensors(
    settings: dict[str, Any],
    overrides: dict[str, Any],
    make_base: Callable[..., str],
    tmp_path: Path,
) -> None:
    low, high = (tmp_path / name for name in ("low", "high"))
    base = make_base(**overrides)
    reports = {out: fuse(base, out, low_memory=out == low, max_shard_bytes=30_000, **settings) for out in (low, high)}
    assert len(list(low.glob("model-*.safetensors"))) > 1
    for out, report in reports.items():
        assert same(tensors(low), tensors(out))
        assert (low / "config.json").read_text() == (out / "config.json").read_text()
        # A model on disk would be read for each token of the continuations.
        found: dict[str, Any] = {"seconds": None, "continuations": []}
        assert report.to_dict() | found == reports[low].to_dict() | found
        assert settings["method"] != "refit" or report.calibration[0].source.endswith("text by the model itself")


def test_both_paths_write_the_same_settings_for_generation(base: str, tmp_path: Path) -> None:
    """Also those that older checkpoints have in config.json; what cannot be saved is said before the work."""
    copy = Path(shutil.copytree(base, tmp_path / "base"))
    (copy / "generation_config.json").unlink()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"do_sample": True, "temperature": 0.5, "max_length": 50}))
    found = []
    for low_memory in (True, False):
        fuse(copy, tmp_path / "out", method="truncate", low_memory=low_memory)
        found.append(json.loads((tmp_path / "out" / "generation_config.json").read_text()))
    assert found[0] == found[1] and found[0]["temperature"] == 0.5
    published = {"temperature": 0.9, "top_p": 0.6}  # without do_sample, as of a Vicuna
    (copy / "generation_config.json").write_text(json.dumps(published))
    assert fuse(copy, tmp_path / "out", method="truncate", revision="v2").revision == "v2"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()).items() >= published.items()
    (copy / "generation_config.json").write_text("[1]")
    for low_memory in (True, False):
        with pytest.raises(ValueError, match=r"generation_config.json of .* cannot be used"):
            fuse(copy, tmp_path / "out", method="truncate", low_memory=low_memory)


def test_shards_are_read(base: str, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    make_tokenizer().save_pretrained(sharded)
    make_llama().save_pretrained(sharded, max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    for folder, low_memory in ((base, False), (sharded, True)):
        fuse(folder, tmp_path / str(low_memory), method="mka", low_memory=low_memory)
    assert same(tensors(tmp_path / "True"), tensors(tmp_path / "False"))


@pytest.mark.parametrize("low_memory", [False, True])
def test_the_base_is_not_replaced(base: str, tmp_path: Path, low_memory: bool) -> None:
    plain = tmp_path / "plain"
    fuse(base, plain, method="truncate")
    before = tensors(plain)
    for again in (
        lambda: fuse(plain, plain, low_memory=low_memory),
        lambda: plan_fusion(plain, FusionConfig(1), out=plain, low_memory=low_memory),
        lambda: lf_hf.from_pretrained_fused(plain, num_fusions=1, fused_dir=plain),
    ):
        with pytest.raises(ValueError, match="is the base itself; choose another folder"):
            again()
    assert same(tensors(plain), before)


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_head_that_differs_is_kept(equal: bool, make_base: Callable[..., str], tmp_path: Path) -> None:
    base, low, high = Path(make_base(tie_word_embeddings=True)), tmp_path / "low", tmp_path / "high"
    held = tensors(base)
    head = held["model.embed_tokens.weight"] * (1 if equal else 2)
    save_file(held | {"lm_head.weight": head.clone()}, base / "model.safetensors", metadata={"format": "pt"})
    one, other = (fuse(base, out, low_memory=out == low, perplexity_tokens=200) for out in (low, high))
    assert same(tensors(low), tensors(high)) and ("lm_head.weight" in tensors(low)) != equal
    assert one.perplexities == other.perplexities and one.perplexities
    assert other.continuations and not one.continuations
    settings: dict[str, Any] = {"text": make_texts(1200), "tokens": 1024, "length": 64, "batch_tokens": 256}
    lf_hf.heal(low, tmp_path / "healed", base=base, **settings, training_args={"bf16": False})
    assert equal or torch.equal(tensors(tmp_path / "healed")["lm_head.weight"], head)


def write_all(base: str, out: Path) -> None:
    for kind in ("neural_alignment", "refit"):
        fuse(base, out / kind, method=kind, perplexity_tokens=200)


def test_another_process_writes_the_same_bytes(base: str, tmp_path: Path) -> None:
    write_all(base, tmp_path / "here")
    code = "import pathlib, sys, test_fuse_checkpoint as t; t.write_all(sys.argv[1], pathlib.Path(sys.argv[2]))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", code, base, str(tmp_path / "there")]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    for here in (tmp_path / "here").iterdir():
        there = tmp_path / "there" / here.name
        one, other = files(here), files(there)
        # Which say how many seconds it took.
        assert {name for name in one if one[name] != other[name]} <= {"fusion_report.json", "README.md"}
        assert FusionReport.load(here).to_dict() | {"seconds": 0} == FusionReport.load(there).to_dict() | {"seconds": 0}


OUTER = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
LAYERS = {f"model.layers.{n}": "cpu" for n in range(5)}


@pytest.mark.parametrize(
    "placed",
    [
        {"device_map": {"": "disk"}},
        {"device_map": OUTER | LAYERS | {"model.layers.0": "disk", "model.layers.3": "disk"}},
        {"device_map": OUTER | LAYERS | {"lm_head": "disk"}, "offload_folder": "offload"},
    ],
)
def test_weights_lie_where_accelerate_puts_them(placed: dict[str, Any], base: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "num_fusions": 2,
        "method": "refit",
        "calibration": make_texts(),
        "perplexity_tokens": 0,
    }
    settings |= {"calibration_length": 64, "calibration_tokens": 1024, "speed": False}
    folder = tmp_path / placed.get("offload_folder", "")
    given = placed | ({"offload_folder": folder} if "offload_folder" in placed else {})
    whole = fuse_checkpoint(base, tmp_path / "whole", **settings)
    assert fuse_checkpoint(base, tmp_path / "out", **settings, **given).weights_digest == whole.weights_digest
    assert same(tensors(tmp_path / "out"), tensors(tmp_path / "whole"))
    model: Any = lf_hf.from_pretrained_fused(base, **settings, **given)
    assert any(parameter.is_meta for parameter in model.parameters())
    prompt = torch.tensor([[9, 31, 5]])
    expected: Any = lf_hf.FusedLlamaForCausalLM.from_pretrained(tmp_path / "whole")
    written = [either.generate(prompt, max_new_tokens=8, do_sample=False) for either in (model, expected)]
    assert torch.equal(*written)
    model.save_pretrained(tmp_path / "saved", plain=True)
    assert same(tensors(tmp_path / "saved"), tensors(tmp_path / "whole"))
    assert FusionReport.load(tmp_path / "saved").weights_digest == whole.weights_digest
    del model
    gc.collect()
    assert folder == tmp_path or not list(folder.glob("*"))


def test_a_device_map_that_fits_changes_nothing(base: str, tmp_path: Path) -> None:
    for name, device_map in (("plain", None), ("one", {"": "cpu"}), ("parts", OUTER | LAYERS), ("auto", "auto")):
        fuse(base, tmp_path / name, method="refit", device_map=device_map)
        for file in ("model.safetensors", "config.json"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
