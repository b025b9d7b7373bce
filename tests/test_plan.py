"""The plan of a fusion says what the fusion then does and what memory is free, and refuses what fusing refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_texts, make_tokenizer, pickled
from transformers import LlamaConfig

from lf_hf import FusionConfig, fuse_checkpoint
from lf_hf.checkpoint.weights import weights_size
from lf_hf.inputs.dry_run import DryRun, plan_fusion
from lf_hf.runtime import memory

TIED: dict[str, Any] = {"tie_word_embeddings": True, "attention_bias": True, "dtype": torch.bfloat16}


@pytest.mark.parametrize(("method", "shape"), [("truncate", {}), ("refit", TIED)])
def test_a_fusion_does_what_its_plan_says(
    make_base: Callable[..., str], method: str, shape: dict[str, Any], tmp_path: Path
) -> None:
    texts = make_texts(100)
    base = make_base(**shape)
    config = FusionConfig(2, method, calibration_tokens=1024, perplexity_tokens=512)
    said = plan_fusion(base, config, calibration=texts).summary()
    report = fuse_checkpoint(base, tmp_path / "out", config, calibration=texts)
    assert f"layers: {report.layers_before} -> {report.layers_after} (-40.0%)" in said
    assert f"parameters: {report.parameters_before:,} -> {report.parameters_after:,} (" in said
    if config.selection == "last":
        assert [layer.layers for layer in report.fused_layers] == [[2, 3, 4]]
        assert "layers that become one: 2 to 4, numbered from 0" in said
    else:
        assert "layers that become one: chosen while fusing" in said
    [sizes] = re.findall(r"bytes on disk: ([\d,]+) -> ([\d,]+) ", said)
    before, after = (int(size.replace(",", "")) for size in sizes)
    assert before == weights_size(Path(base))
    assert 0 <= weights_size(tmp_path / "out") - after < 20_000  # the header


@pytest.mark.parametrize("low_memory", [True, False])
def test_a_budget_has_a_plan_for_one_fusion(base: str, low_memory: bool) -> None:
    config = FusionConfig(method="refit" if low_memory else "healed", max_divergence=0.1)
    plan = plan_fusion(base, config, calibration=make_texts(3000), low_memory=low_memory)
    assert 0 < plan.plan.peak["cpu"] < 1 << 31 and "layers: 5 -> 4 " in plan.summary()
    assert "as the budget allows" in plan.summary() and ("healing: on" in plan.summary()) == (not low_memory)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_fusions": 9},
        {"out": "taken"},
        {"calibration": ["too", "few"]},
        {"device_map": "cuda:99", "low_memory": True},
        {"heal_tokens": 2048, "method": "truncate", "calibration": ["too little to heal on"]},
    ],
)
def test_it_refuses_what_fusing_refuses(
    base: str, arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").mkdir()
    Path("taken", "config.json").touch()
    given: dict[str, Any] = {"num_fusions": 1, "base": base, "out": "out", "low_memory": False} | arguments
    given["config"] = FusionConfig(**{name: given.pop(name) for name in FusionConfig.known if name in given})
    with pytest.raises((ValueError, OSError), match=r"\.$") as planning:
        plan_fusion(**given)
    with pytest.raises(planning.type, match=f"^{re.escape(str(planning.value))}$"):
        fuse_checkpoint(**given)


def test_a_large_model_that_is_not_downloaded_yet_is_planned(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    shape |= {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192}
    config = LlamaConfig(vocab_size=128256, **shape)
    config.dtype, snapshot = "bfloat16", tmp_path / "models--you--model" / "snapshots" / "0"
    config.save_pretrained(snapshot)
    make_tokenizer().save_pretrained(snapshot)
    (tmp_path / "models--you--model" / "refs").mkdir()
    (tmp_path / "models--you--model" / "refs" / "main").write_text("0")

    def plan(method: str = "truncate", **given: Any) -> DryRun:
        config = FusionConfig(4, method, perplexity_tokens=0)
        return plan_fusion("you/model", config, cache_dir=str(tmp_path), **given)

    four = plan()
    assert "32 -> 28 (-12.5%)" in four.summary() and "8,030,261,248 -> 7,157,813,248 (-10.9%)" in four.summary()
    assert "not on this machine yet" in four.notes[0]
    assert "disk" in four.plan.weights or four.plan.peak["cpu"] > 15 * 2**30  # as this machine has room
    low = plan(low_memory=True).plan.peak["cpu"]
    assert 1 < low / 2**30 < 8
    squares = 2 * 4 * 17920**2  # Gram matrices of the channels that a fit chooses from, in float32
    assert plan("refit", low_memory=True).plan.peak["cpu"] > low + squares


def test_a_pickled_base_is_planned(make_base: Callable[..., str]) -> None:
    base = make_base()
    pickled(Path(base))
    config = FusionConfig(1, "truncate", perplexity_tokens=0)
    assert plan_fusion(base, config, use_safetensors=False, device_map={"": "cpu"}).notes == []


def test_what_a_user_should_know_is_noted(
    make_base: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, out = FusionConfig(1, "truncate", perplexity_tokens=0), tmp_path / "out"
    monkeypatch.setattr("lf_hf.runtime.numerics.computes_bfloat16", lambda: False)
    base = make_base(dtype=torch.bfloat16)
    assert plan_fusion(base, config, out=out, dtype="float32").notes == []
    fuse_checkpoint(base, out, config)
    assert "no instructions for bfloat16" in caplog.text
    caplog.clear()
    said = plan_fusion(base, config, out=out).summary()
    assert f"note: {str(out)!r} holds a fused model, which would be replaced." in said
    assert "This CPU has no instructions for bfloat16" in caplog.text
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 20))
    with pytest.raises(ValueError, match=r"1\.0 MiB are free on cpu, and fusing, .*, takes .* there at least; give a"):
        fuse_checkpoint(base, tmp_path / "else", config)


@pytest.mark.parametrize(
    ("groups", "file"),
    [
        ("0::/\n", "memory.max"),
        ("0::/system.slice/job_7/step_0\n", "system.slice/job_7/memory.max"),
        ("5:devices:/\n4:memory:/slurm/job_7\n", "memory/slurm/memory.limit_in_bytes"),
    ],
)
def test_a_container_or_job_has_what_is_left_of_its_limit(
    groups: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, own = torch.device("cpu"), tmp_path / "cgroup"
    monkeypatch.setattr(memory, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_GROUPS", own)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2 << 40))
    assert memory.free_memory(device) == 2 << 40
    own.write_text(groups)
    limit = tmp_path / file
    limit.parent.mkdir(parents=True, exist_ok=True)
    for said, least, most in (("max", 2 << 40, 2 << 40), (str(1 << 40), 1 << 39, 1 << 40), ("4096", 0, 0)):
        limit.write_text(f"{said}\n")
        assert least <= memory.free_memory(device) <= most
