"""The plan of a fusion says what the fusion then does and what memory is free, and refuses what fusing refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_texts, make_tokenizer
from transformers import LlamaConfig

from lf_hf import FusionConfig, fuse_checkpoint
from lf_hf.checkpoint.weights import weights_size
from lf_hf.estimate import Plan, plan_fusion
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
        assert [step.pair for step in report.steps] == [(3, 4), (2, 3)]
        assert "4 into 3, then 3 into 2; layer 2 then replaces 2 to 4" in said
    else:
        assert "chosen while fusing, on calibration text" in said
    [sizes] = re.findall(r"bytes on disk: ([\d,]+) -> ([\d,]+) ", said)
    before, after = (int(size.replace(",", "")) for size in sizes)
    assert before == weights_size(Path(base))
    assert 0 <= weights_size(tmp_path / "out") - after < 20_000  # the header


@pytest.mark.parametrize(
    "settings",
    [
        {"num_fusions": 2, "method": "neural_alignment"},
        {"max_divergence": 0.1, "method": "mka"},
        {"max_perplexity_ratio": 1.2, "method": "truncate"},
        {"max_divergence": 0.1, "method": "refit", "perplexity_tokens": 0, "low_memory": True},
        {"max_perplexity_ratio": 1.2, "method": "healed"},
        {"num_fusions": 2, "method": "truncate", "heal_tokens": 4096},
    ],
)
def test_every_combination_has_a_plan(base: str, settings: dict[str, Any]) -> None:
    given = dict(settings)
    config = FusionConfig.taken_from(given, None)
    plan = plan_fusion(base, config, calibration=make_texts(3000), **given)
    assert 0 < plan.memory < 1 << 31 and "layers: 5 -> " in plan.summary()
    assert ("as the budget allows" in plan.summary()) == config.within_budget
    assert ("with low memory: cannot be used here" in plan.summary()) == bool(config.heal_tokens)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_fusions": 9},
        {"out": "taken"},
        {"calibration": ["too", "few"]},
        {"device_map": "cuda:99", "low_memory": True},
        {"heal_tokens": 2048, "low_memory": True, "method": "truncate"},
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

    def plan(*, low_memory: bool = False, dtype: str = "auto", **settings: Any) -> Plan:
        given: dict[str, Any] = {"method": "truncate", "perplexity_tokens": 0}
        config = FusionConfig(4, **given | settings)
        return plan_fusion("you/model", config, low_memory=low_memory, dtype=dtype, cache_dir=str(tmp_path))

    four = plan()
    assert "32 -> 28 (-12.5%)" in four.summary() and "8,030,261,248 -> 7,157,813,248 (-10.9%)" in four.summary()
    assert "not on this machine yet" in four.notes[0]
    assert 15 < four.memory / 2**30 < 20 and 1 < plan(low_memory=True).memory / 2**30 < 8
    assert plan(dtype="float32").memory > 1.8 * four.memory
    squares = 2 * 4 * 17920**2 / 2**30  # Gram matrices of the channels that a fit chooses from, in float32
    pairs, groups = (plan(method="refit", low_memory=True, selection=name) for name in ("least_influence", "groups"))
    assert squares + 0.8 < pairs.memory / 2**30 < 3 * squares < groups.memory / 2**30 + squares


def test_what_a_user_should_know_is_noted(
    make_base: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, out = FusionConfig(1, "truncate", perplexity_tokens=0), tmp_path / "out"
    monkeypatch.setattr("lf_hf.runtime.numerics.computes_bfloat16", lambda: False)
    base = make_base(dtype=torch.bfloat16)
    assert plan_fusion(base, config, out=out, dtype="float32").notes == []
    fuse_checkpoint(base, out, config)
    assert "no instructions for bfloat16" in caplog.text
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 20))
    said = plan_fusion(base, config, out=out).summary()
    assert f"note: {str(out)!r} holds a fused model, which would be replaced." in said
    assert "note: This CPU has no instructions for bfloat16" in said
    assert "note: 1.0 MiB of memory are free now, less than the " in said


MIB = 1 << 20
V2 = "memory.max", "memory.current"
V1 = "memory.limit_in_bytes", "memory.usage_in_bytes"


def group(names: tuple[str, str], limit: int, used: int | str, stat: str = "anon 5") -> dict[str, str]:
    in_use = f"{used * MIB}" if isinstance(used, int) else used
    return {names[0]: f"{limit * MIB}\n", names[1]: in_use, "memory.stat": stat}


CACHE = f"anon 5\nactive_file {MIB}\ninactive_file {2 * MIB}\n"
TOTAL = f"active_file 7\ninactive_file 7\ntotal_active_file {MIB}\ntotal_inactive_file {2 * MIB}"


@pytest.mark.parametrize(
    ("cgroup", "groups", "left"),
    [
        ("", {}, []),
        ("0::/slurm/job\n", {"slurm/job": group(V2, 1000, 300, CACHE), "slurm": group(V2, 700, 500)}, [703, 200]),
        ("0::/docker/8c1f\n", {"": group(V2, 100, 40, CACHE)}, [63]),  # the path is the host's, not the container's
        ("4:cpu,memory:/docker/8c1f\n", {"memory": group(V1, 100, 40, TOTAL)}, [63]),
        ("\nnonsense\n0::/job\n", {"job": group(V2, 100, 40, "anon x\nactive_file")}, [60]),
        ("0::/job\n", {"job": group(V2, 100, 40) | {"memory.high": f"{90 * MIB}\n"}}, [50]),
        ("0::/job\n", {"job": group(V2, 100, "many\n")}, []),
    ],
)
def test_a_job_has_what_is_left_of_each_limit_above_it(
    cgroup: str, groups: dict[str, dict[str, str]], left: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And on the whole the least of that and of the machine's memory."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(cgroup)
    for name, files in groups.items():
        folder = tmp_path / "sys/fs/cgroup" / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            (folder / file).write_text(content)
    found = memory.left_to_control_groups(tmp_path)
    assert found == [size * MIB for size in left]
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=250 * MIB))
    monkeypatch.setattr(memory, "left_to_control_groups", lambda: found)
    assert memory.free_memory(torch.device("cpu")) == min([250, *left]) * MIB
