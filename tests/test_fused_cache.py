"""A model that was fused and kept is used again where it is made of the same, and what differs is said.

Fusions are counted, as what is found again looks like what is made again.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import files, make_llama, make_texts, make_tokenizer, pickled, same, save_base
from huggingface_hub import cached_assets_path
from test_saving import no_privileges
from tokenizers import normalizers

import lf_hf
from lf_hf import FusedLlamaForCausalLM, pipeline
from lf_hf.checkpoint.saving import locked_folder
from lf_hf.inputs.fusion import load_needed
from lf_hf.text.hub import GENERAL

SETTINGS: dict[str, Any] = {"num_fusions": 2, "perplexity_tokens": 0}


@pytest.fixture
def fusions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one with each fusion."""
    fuse, names = pipeline.fuse, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        names.append(kwargs["base"])
        return fuse(*args, **kwargs)

    monkeypatch.setattr(pipeline, "fuse", counted)
    return names


def load(base: str | Path, fused_dir: Path, **kwargs: Any) -> FusedLlamaForCausalLM:
    arguments: dict[str, Any] = {"calibration": make_texts()} | SETTINGS | kwargs
    return FusedLlamaForCausalLM.from_pretrained_fused(base, fused_dir=fused_dir, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"variant": "fp16"},
        {"use_safetensors": False},
        {"output_loading_info": True},
        {"device_map": "auto", "max_memory": "cpu=2GiB"},
    ],
)
def test_what_was_fused_is_loaded(arguments: dict[str, Any], tmp_path: Path, fusions: list[str]) -> None:
    """A base is known by its content, and what is true of it alone does not matter for the result."""
    base, fused = tmp_path / "base", tmp_path / "fused"
    save_base(base)
    if variant := arguments.get("variant"):
        (base / "model.safetensors").rename(base / f"model.{variant}.safetensors")
    if "use_safetensors" in arguments:
        pickled(base)
    first = load(base, fused, **arguments)
    (base / "consolidated.safetensors").write_bytes(b"in a format of its publisher's, which nothing here reads")
    for name in ("training_config.json", "token_counts.json"):
        (base / name).write_text("{}")  # which transformers does not read
    second = load(base.rename(tmp_path / "of another name"), fused, **arguments)
    assert len(fusions) == 1 and same(first, second) and not second.training
    assert first.fusion_report == second.fusion_report and second.tokenizer is not None
    assert first.name_or_path == second.name_or_path == str(fused)  # which adapters name as their base
    assert first.config.to_diff_dict() == second.config.to_diff_dict()
    assert same(first, FusedLlamaForCausalLM.from_pretrained(fused))


def test_a_fusion_that_heals_reads_its_calibration_text_once(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []

    def counted(*arguments: Any) -> Any:
        loads.append(arguments)
        return load_needed(*arguments)

    monkeypatch.setattr("lf_hf.inputs.fusion.load_needed", counted)
    settings: dict[str, Any] = {"method": "truncate", "heal_tokens": 1024, "calibration": make_texts(3000)}
    model = load(base, tmp_path / "fused", **settings)
    assert len(loads) == 1 and model.fusion_report is not None and model.fusion_report.healed is not None


@pytest.mark.parametrize("changed", [{"kernel_scale": 4.0}, {"calibration": ["other text"]}, {"calibration": None}])
def test_what_has_no_effect_does_not_fuse_anew(
    changed: dict[str, Any], base: str, tmp_path: Path, fusions: list[str]
) -> None:
    settings: dict[str, Any] = {"method": "truncate", "num_fusions": 1}
    models = [load(base, tmp_path / "fused", **settings | more) for more in ({}, changed)]
    assert len(fusions) == 1 and same(*models)


def test_what_is_judged_otherwise_is_not_fused_anew(
    base: str, tmp_path: Path, fusions: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The report keeps the figures that it has, and a line says with which settings they were measured."""
    monkeypatch.setattr(logging.getLogger("lf_hf"), "propagate", True)
    settings: dict[str, Any] = {"method": "refit", "calibration_tokens": 1024, "calibration_length": 64}
    settings |= {"heal_tokens": 1024, "speed": False}
    first = load(base, tmp_path / "fused", perplexity_tokens=200, **settings)
    caplog.clear()
    second = load(base, tmp_path / "fused", perplexity_tokens=400, **settings | {"speed": True})
    assert len(fusions) == 1 and same(first, second) and second.fusion_report == first.fusion_report
    [line] = caplog.messages
    assert line.endswith("was judged with perplexity_tokens=200 and speed=False; its report keeps those figures.")
    other = load(base, tmp_path / "other", perplexity_tokens=400, **settings)
    assert same(first, other)


def with_other_weights(base: Path) -> None:
    model = make_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] += 1e-3
    model.save_pretrained(base)


def tokenizer_with(normalizer: Any = None, template: str | None = None) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizer
    tokenizer.chat_template = template
    return tokenizer


CHANGES: dict[str, tuple[Callable[[Path], Any] | None, dict[str, Any], str]] = {
    "settings": (None, {"num_fusions": 1, "seed": 3}, "num_fusions=2 instead of 1 and seed=0 instead of 3"),
    "weights": (with_other_weights, {}, "another base"),
    "arguments": (None, {"rms_norm_eps": 0.5}, "another base"),
    "calibration": (None, {"calibration": make_texts(seed=5)}, "other calibration text"),
    "dtype": (None, {"dtype": "bfloat16"}, "another dtype"),
    "tokenizer": (None, {"tokenizer": tokenizer_with(normalizer=normalizers.Replace("layer", "laier"))}, "tokenizer"),
    "chat template": (None, {"tokenizer": tokenizer_with(template="{{ messages[0].content }}")}, "tokenizer"),
}


def test_what_differs_is_said_and_fused_again(
    base: str, tmp_path: Path, fusions: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("lf_hf"), "propagate", True)
    shutil.copytree(base, tmp_path / "base")
    load(str(tmp_path / "base"), tmp_path / "fused")
    assert caplog.messages == []
    for number, (edit, arguments, message) in enumerate(CHANGES.values(), 2):
        caplog.clear()
        if edit:
            edit(tmp_path / "base")
        again = load(str(tmp_path / "base"), tmp_path / "fused", **arguments)
        assert len(fusions) == number
        assert [text for text in caplog.messages if message in text and text.endswith("Fusing, to replace it.")]
    assert same(again, load(str(tmp_path / "base"), tmp_path / "fused", **arguments)) and len(fusions) == number


def test_what_another_run_replaces_while_it_is_read_is_not_used(
    base: str, tmp_path: Path, fusions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, from_pretrained = load(base, tmp_path / "fused"), FusedLlamaForCausalLM.from_pretrained

    def after_another_run(*args: Any, **kwargs: Any) -> Any:
        if len(fusions) == 1:
            load(base, tmp_path / "fused", num_fusions=1)
        return from_pretrained(*args, **kwargs)

    monkeypatch.setattr(FusedLlamaForCausalLM, "from_pretrained", after_another_run)
    assert same(load(base, tmp_path / "fused"), first) and len(fusions) == 3


@pytest.mark.parametrize(("answers_first", "heal_tokens"), [(True, 1024), (False, 0)])
def test_the_default_text_is_the_same_with_and_without_a_hub(
    answers_first: bool,
    heal_tokens: int,
    base: str,
    tmp_path: Path,
    fusions: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """So what took long, as a healing, is not replaced where the hub answers now and did not then, or the reverse."""
    pages = cached_assets_path("lf_hf", GENERAL.repo, GENERAL.commit, assets_dir=tmp_path) / "000_00000.json"
    pages.write_text(json.dumps([{"text": " ".join(make_texts(400))}]))
    settings: dict[str, Any] = {"calibration": None, "method": "refit", "perplexity_tokens": 200}
    settings |= {"calibration_tokens": 1024, "calibration_length": 64, "heal_tokens": heal_tokens}
    monkeypatch.setattr(logging.getLogger("lf_hf"), "propagate", True)
    caplog.set_level(logging.INFO, "lf_hf")
    models = []
    for answers in (answers_first, not answers_first):
        place = tmp_path if answers else os.devnull
        monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", place)
        models.append(load(base, tmp_path / "fused", **settings))
    assert len(fusions) == 1 and same(*models)
    [line] = [message for message in caplog.messages if "what was fused before, on" in message]
    assert ("HuggingFaceFW/fineweb-edu at" in line) == answers_first
    others = settings | {"tokenizer": tokenizer_with(template="{{ messages }}"), "heal_tokens": 0}
    if answers_first:
        with pytest.raises(OSError, match="The hub does not give the default text"):
            load(base, tmp_path / "fused", **others)
    else:
        again = load(base, tmp_path / "fused", **others)
        first_report, second_report = models[0].fusion_report, again.fusion_report
        assert first_report is not None and second_report is not None
        assert len(fusions) == 2 and second_report.calibration == first_report.calibration


def test_what_was_healed_since_is_not_replaced(base: str, tmp_path: Path, fusions: list[str]) -> None:
    load(base, tmp_path / "fused")
    settings: dict[str, Any] = {"tokens": 1024, "length": 64, "batch_tokens": 256, "training_args": {"bf16": False}}
    lf_hf.heal(tmp_path / "fused", tmp_path / "healed", base=base, text=make_texts(1200), **settings)
    before = files(tmp_path / "healed")
    with pytest.raises(ValueError, match="holds a healed model; choose another"):
        load(base, tmp_path / "healed")
    assert fusions == [base] and files(tmp_path / "healed") == before


def test_what_is_finished_loads_at_once(base: str, fusions: list[str]) -> None:
    """While another process holds the folder's lock, and from a disk that cannot be written."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy, fused = shutil.copytree(base, folder / "base"), folder / "fused"
        first = load(copy, fused)
        with locked_folder(fused):
            assert same(first, load(copy, fused))
        for path in (*folder.rglob("*"), folder):
            path.chmod(0o555 if path.is_dir() else 0o444)
        with no_privileges():
            assert same(first, load(copy, fused))
        for path in (folder, copy, fused):
            path.chmod(0o755)
    assert len(fusions) == 1


def fusions_of(base: str, fused: Path) -> int:
    """How many fusions a load took."""
    with patch.object(pipeline, "fuse", wraps=pipeline.fuse) as fuse:
        load(base, fused)
    return fuse.call_count


def test_of_runs_that_start_at_once_one_fuses_and_others_wait(base: str, tmp_path: Path) -> None:
    """In processes, as transformers' loading is not made for threads: it can leave `tie_weights` patched away."""
    together = tmp_path / "fused"
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        assert sum(pool.map(fusions_of, [base] * 2, [together] * 2)) == 1
    assert same(FusedLlamaForCausalLM.from_pretrained(together), load(base, tmp_path / "alone"))
