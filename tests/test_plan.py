"""The plan of a fusion says what the fusion then does, refuses what it refuses, and reads no weights."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import GGUF, make_texts, make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from two_devices import OTHER, TwoDevices

from lf_hf import FusionConfig, fuse_checkpoint
from lf_hf.checkpoint.weights import weights_size
from lf_hf.estimate import FusionPlan, plan_fusion

TEXTS = make_texts(100)
TIED: dict[str, Any] = {"tie_word_embeddings": True, "attention_bias": True, "dtype": torch.bfloat16}


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        (TIED, {"method": "truncate"}),
        ({}, {"method": "refit"}),
        (TIED, {"method": "mka", "selection": "least_influence", "alignment": "neurons", "refit": "down_proj"}),
        (TIED, {"method": "refit", "selection": "groups"}),
    ],
)
def test_a_fusion_does_what_its_plan_says(
    make_base: Callable[..., str], settings: dict[str, Any], shape: dict[str, Any], tmp_path: Path
) -> None:
    base = make_base(**shape)
    config = FusionConfig(2, **settings, calibration_tokens=1024, perplexity_tokens=512)
    plan = plan_fusion(base, config, calibration=TEXTS)
    report = fuse_checkpoint(base, tmp_path / "out", config, calibration=TEXTS)
    for name in ("layers_before", "layers_after", "parameters_before", "parameters_after"):
        assert getattr(plan, name) == getattr(report, name)
    assert plan.pairs == ([step.pair for step in report.steps] if config.selection == "last" else None)
    assert plan.bytes_before == weights_size(base, {})
    assert 0 <= weights_size(tmp_path / "out", {}) - plan.bytes_after < 20_000  # the header


@pytest.mark.parametrize("fast", [True, False])
def test_a_cpu_without_bfloat16_is_said_beforehand(
    make_base: Callable[..., str], tmp_path: Path, fast: bool, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr("lf_hf.runtime.numerics.computes_bfloat16", lambda: fast)
    base, config = make_base(dtype=torch.bfloat16), FusionConfig(1, method="truncate", perplexity_tokens=0)
    assert plan_fusion(base, config, dtype="float32").notes == []
    assert any("no instructions for bfloat16" in note for note in plan_fusion(base, config).notes) != fast
    fuse_checkpoint(base, tmp_path / "out", config)
    assert ("no instructions for bfloat16" in caplog.text) != fast


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_fusions": 9},
        {"num_fusions": 3, "method": "refit"},
        {"base": "{tmp}/none"},
        {"out": "{tmp}/taken"},
        {"calibration": "{tmp}/none.txt"},
        {"calibration": ["too", "few"]},
        {"samples_per_subject": 1, "entropy_neighbors": 57},
        {"gguf_file": "x.gguf", "low_memory": True},
        {"device_map": "auto", "low_memory": True},
        {"device_map": "cuda:99", "low_memory": True},
        {"load_in_8bit": True, "low_memory": False},
        {"heal_tokens": 2048, "low_memory": True, "method": "truncate"},
        {"heal_tokens": 2048, "method": "truncate", "calibration": ["too little to heal on"]},
    ],
)
def test_it_refuses_what_fusing_refuses(base: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").touch()
    arguments = {
        name: value.format(tmp=tmp_path) if isinstance(value, str) else value for name, value in arguments.items()
    }
    names = FusionConfig.field_names()
    config = FusionConfig(**{"num_fusions": 1} | {name: arguments.pop(name) for name in names if name in arguments})
    base = arguments.pop("base", base)
    defaults: dict[str, Any] = {"out": str(tmp_path / "out"), "low_memory": False}
    arguments = defaults | arguments
    with pytest.raises(ValueError, match=r"\.$") as planning:
        plan_fusion(base, config, **arguments)
    with pytest.raises(ValueError, match=f"^{re.escape(str(planning.value))}$"):
        fuse_checkpoint(base, config=config, **arguments)


@pytest.fixture(scope="module")
def eight_billion(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint that is all header: its weights are a hole in the file."""
    folder = tmp_path_factory.mktemp("8b")
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        parameters = dict(LlamaForCausalLM(config).named_parameters())
    header, size = {}, 0
    for name, parameter in parameters.items():
        end = size + 2 * parameter.numel()
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [size, end]}
        size = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_large_model_is_planned_without_reading_it(eight_billion: str) -> None:
    def plan(dtype: str = "bfloat16", **settings: Any) -> FusionPlan:
        return plan_fusion(eight_billion, FusionConfig(**{"num_fusions": 4} | settings), dtype=dtype)

    def gib(size: int | None) -> float:
        assert size is not None
        return size / 2**30

    four = plan()
    assert four.parameters_before == 8_030_261_248
    assert four.pairs == [(30, 31), (29, 30), (28, 29), (27, 28)]
    assert 15 < gib(four.memory) < 20 and 3 < gib(four.low_memory) < 8
    text = four.summary()
    assert "32 -> 28 (-12.5%)" in text and "7,157,813,248 (-10.9%)" in text
    assert "31 into 30, then 30 into 29" in text and "layer 27 then replaces 27 to 31" in text

    wide = plan("float32")
    assert wide.memory > 1.8 * four.memory and wide.bytes_after == 2 * four.bytes_after
    refit = plan(method="refit")
    squares = 2 * 4 * 17920**2 / 2**30  # Gram matrices of the channels that a fit chooses from, in float32
    assert squares + 0.8 < gib(refit.low_memory) < 3 * squares
    assert "chosen while fusing, on calibration text: the layer of least influence joins the one" in refit.summary()
    # Each estimate measures the machine anew, so only large differences say anything.
    assert plan(perplexity_tokens=400_000).seconds[0] > 5 * four.seconds[0]


def test_healing_does_not_go_with_low_memory_and_groups_take_more_of_it(base: str) -> None:
    plans = [
        plan_fusion(base, FusionConfig(2, "refit", **settings), calibration=make_texts(2500))
        for settings in ({"heal_tokens": 2048}, {}, {"selection": "groups"})
    ]
    assert plans[0].low_memory is None and "cannot be used here" in plans[0].summary()
    assert plans[1].low_memory is not None and plans[2].low_memory is not None
    assert plans[2].low_memory > plans[1].low_memory


def test_low_memory_on_a_device_is_planned_in_its_memory(eight_billion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lf_hf.estimate.product_speed", lambda *_: 1e14)
    monkeypatch.setattr("lf_hf.estimate.free_memory", lambda _: 1 << 30)  # so that no states are kept there
    config = FusionConfig(4, "refit", perplexity_tokens=0)
    here = plan_fusion(eight_billion, config, low_memory=True)
    with TwoDevices():
        there = plan_fusion(eight_billion, config, low_memory=True, device_map="cuda:1")
    assert there.device == OTHER and there.low_memory is not None and here.low_memory is not None
    layer = 2 * (here.parameters_before - here.parameters_after) // 4
    # Python and its libraries are not there, and one more layer is, which is read ahead.
    assert abs(there.low_memory - here.low_memory - layer + (11 << 26)) < 1 << 20
    assert "peak memory on cuda:1, about" in there.summary() and "1.0 GiB of memory are free now" in there.notes[-1]


def test_too_little_memory_and_a_folder_to_be_replaced_are_said(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = FusionConfig(1, "truncate", perplexity_tokens=0), tmp_path / "out"
    assert plan_fusion(base, config, out=out).notes == []
    fuse_checkpoint(base, out, config)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 20))
    replaced, memory = plan_fusion(base, config, out=out).notes
    assert str(out) in replaced and "1.0 MiB of memory are free now" in memory


def test_a_base_that_is_not_downloaded_yet(base: str, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--you--model" / "snapshots" / "0"
    shutil.copytree(base, snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "models--you--model" / "refs").mkdir()
    (tmp_path / "models--you--model" / "refs" / "main").write_text("0")
    here, there = (
        plan_fusion(name, FusionConfig(1, "truncate"), cache_dir=str(tmp_path)) for name in (base, "you/model")
    )
    assert (there.memory, there.bytes_after) == (here.memory, here.bytes_after)
    assert here.notes == [] and "not on this machine yet" in there.notes[0]


def test_a_base_in_a_gguf_file(gguf_folder: str) -> None:
    plan = plan_fusion(gguf_folder, FusionConfig(1), gguf_file=GGUF.name)
    assert ", 1 fusion. " in plan.summary()
    assert (plan.layers_before, plan.parameters_before) == (30, 134_515_008)
    assert plan.low_memory is None and plan.bytes_before == GGUF.stat().st_size
    assert plan.dtype == torch.float32 and plan.bytes_after == 4 * 130_974_912
