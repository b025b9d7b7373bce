"""Budgets: as many layers are fused as what they cost allows."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama, make_texts, make_tokenizer, same, tensors
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny_models import divergence, measure_and_fuse, measured_text, tiny_model
from torch.nn.functional import cross_entropy

from lf_hf import FusionConfig, fuse_checkpoint
from lf_hf.choose.budget import search
from lf_hf.decoder.decoder import Decoder
from lf_hf.measure.dense import measure
from lf_hf.pipeline import fuse
from lf_hf.report.data import BudgetTrial
from lf_hf.report.report import FusionReport
from lf_hf.text.calibration import Corpus
from lf_hf.text.packing import split_held_out

TEXTS = make_texts(60)
SETTINGS: dict[str, Any] = {"calibration_length": 64, "calibration_tokens": 1024, "perplexity_tokens": 0}


@torch.no_grad()
def predicted(model: Any, text: list[torch.Tensor]) -> tuple[torch.Tensor, float]:
    """Logits of all next tokens, and the mean loss of those that come."""
    logits = torch.cat([model(sequence[None]).logits[0, :-1].double() for sequence in text])
    return logits, float(cross_entropy(logits, torch.cat([sequence[1:] for sequence in text])))


@pytest.mark.parametrize(
    ("model_type", "level", "settings"),
    [
        ("llama", "max_divergence", {"method": "truncate"}),
        ("llama", "max_perplexity_ratio", {"method": "truncate"}),
        ("gemma3_text", "max_divergence", {"method": "refit", "selection": "least_influence"}),
        ("smollm3", "max_divergence", {"method": "refit", "selection": "groups"}),
    ],
)
def test_a_budget_is_kept_by_the_result_and_used_up(model_type: str, level: str, settings: dict[str, Any]) -> None:
    tokenizer, corpus = make_tokenizer(), Corpus({text: text for text in TEXTS})
    dense = tiny_model(model_type, num_hidden_layers=6)
    given: dict[str, Any] = {**SETTINGS, **settings, level: 1e9}
    config = FusionConfig(**given)
    measured = measure(Decoder(dense), tokenizer, config, None, corpus)

    def fused(config: FusionConfig) -> tuple[Any, FusionReport]:
        decoder = Decoder(dense).copy()
        report = fuse(decoder, tokenizer, config, measured, base="tiny")
        return decoder.model, report

    smallest, everything = fused(config)
    most = 5 if config.selection == "last" else 3
    assert everything.layers_after == len(smallest.model.layers) == 6 - most
    assert everything.budget is not None
    allowed = 1.1 if "ratio" in level else everything.budget.tried[-1].divergence / 2
    model, report = fused(FusionConfig(**given | {level: allowed}))
    text = measured.text
    assert report.budget is not None and text is not None
    aside, _ = split_held_out(text.given, max(1, len(text.given) // 8))
    (expected, before), (found, after) = predicted(dense, aside), predicted(model, aside)
    at = {trial.num_fusions: trial for trial in report.budget.tried}
    number = report.layers_before - report.layers_after
    assert report.budget.tokens == sum(map(len, aside))
    assert report.calibration[-1].tokens + report.budget.tokens == text.source.tokens  # nothing is fitted to the latter
    assert at[number].divergence == pytest.approx(divergence(expected, found), rel=1e-3)
    assert at[number].perplexity_ratio == pytest.approx(math.exp(after - before), rel=1e-4)
    assert at[number].costs(level) <= allowed < at[number + 1].costs(level)
    assert report.config[level] == allowed and report.config["num_fusions"] is None
    assert f"{level}={allowed:g} on" in report.summary()
    assert FusionReport.from_dict(report.to_dict()) == report


def test_a_budget_that_nothing_meets_is_said_and_leaves_the_model_as_it_was() -> None:
    model, tokenizer = make_llama(), make_tokenizer()
    before = [parameter.clone() for parameter in model.parameters()]
    config = FusionConfig(method="truncate", max_divergence=1e-30, **SETTINGS)
    uneven = str(tokenizer.decode(tokenizer(TEXTS[0])["input_ids"][:80]))
    assert not split_held_out([torch.ones(64), torch.ones(16)], 1)[0]  # of which the first one has more than half
    found = r"max_divergence=1e-30 allows no fusion: with 1 it is \S+; raise it\."
    for texts, message in ((TEXTS, found), ([uneven], "A budget needs two sequences of calibration text")):
        corpus = Corpus({text: text for text in texts})
        with pytest.raises(ValueError, match=message):
            measure_and_fuse(model, config, None, corpus)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert len(model.model.layers) == model.config.num_hidden_layers == 5


@pytest.mark.parametrize(("sequences", "tokens"), [(24, 192), (256, 2048)])
def test_a_budget_that_few_tokens_decide_says_so(
    sequences: int, tokens: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("lf_hf"), "propagate", True)
    config = FusionConfig(method="truncate", max_divergence=1e9, perplexity_tokens=0)
    measured = measured_text(list(torch.arange(64).repeat(sequences, 1)))
    report = fuse(Decoder(make_llama()), make_tokenizer(), config, measured, base="tiny")
    assert report.budget is not None and report.budget.tokens == tokens
    notes = [note for note in report.notes if "judged on only 192 tokens" in note and "give 16,000 tokens" in note]
    assert len(notes) == (tokens < 2000) and [text for text in caplog.messages if "judged on" in text] == notes


def test_low_memory_finds_the_same_within_a_budget(make_base: Callable[..., str], tmp_path: Path) -> None:
    base = make_base(num_hidden_layers=6)
    settings: dict[str, Any] = {"method": "refit", "selection": "groups", "max_divergence": 0.3}
    for name, low_memory in (("low", True), ("high", False)):
        fuse_checkpoint(base, tmp_path / name, calibration=TEXTS, low_memory=low_memory, **SETTINGS, **settings)
    assert same(tensors(tmp_path / "low"), tensors(tmp_path / "high"))
    assert {file.name for file in tmp_path.iterdir()} == {"low", "high"}


def test_held_out_text_is_of_every_kind() -> None:
    """Also where kinds take turns, one every so many sequences or tokens."""
    aside, rest = split_held_out([torch.tensor([number]) for number in range(240)], 30)
    assert sorted(map(int, aside + rest)) == list(range(240)) and len(aside) == 30
    for period in range(2, 9):
        assert {int(sequence) % period for sequence in aside} == set(range(period))
    aside, _ = split_held_out([torch.zeros(512), *[torch.ones(128)] * 4] * 48, 16)
    assert 4 <= sum(int(sequence[0]) for sequence in aside) <= 12


@given(st.lists(st.floats(1e-6, 2.0) | st.just(math.inf), min_size=1, max_size=60), st.floats(1e-4, 10.0))
def test_a_few_trials_find_the_last_number_that_is_allowed(growth: list[float], allowed: float) -> None:
    costs = list(itertools.accumulate(growth))  # of 1, 2, ... fusions
    assume(costs[0] <= allowed)

    def attempt(count: int) -> tuple[BudgetTrial, int]:
        if costs[count - 1] == math.inf:
            raise ValueError("So many cannot be made.")
        return BudgetTrial(count, costs[count - 1], 1.0), count

    found, tried = search("max_divergence", allowed, len(costs), attempt)
    assert found == sum(cost <= allowed for cost in costs)
    assert len(tried) <= 4 + math.ceil(math.log2(len(costs) + 1))


def test_why_more_layers_cannot_be_fused_is_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attempt(count: int) -> tuple[BudgetTrial, str]:
        if count > 1:
            raise ValueError("The fit is not stable.")
        return BudgetTrial(count, 0.1, 1.1), "fused"

    monkeypatch.setattr(logging.getLogger("lf_hf"), "propagate", True)
    assert search("max_divergence", 1.0, 4, attempt)[0] == "fused"
    assert "fusions cannot be made (The fit is not stable); fewer are tried." in caplog.text
