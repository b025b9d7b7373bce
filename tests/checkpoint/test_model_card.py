"""The model card: what it lists of a fusion, and of which text its figures are."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from lf_hf import FusionConfig, FusionReport
from lf_hf.checkpoint.card import model_card
from lf_hf.families import FAMILIES
from lf_hf.report.records import CalibrationInfo, Continuation, FusionStep, PerplexityInfo
from lf_hf.report.report import CHANGED_NOTE


def make_report(method: str = "refit", base: str = "owner/model", **values: Any) -> FusionReport:
    fields: dict[str, Any] = {
        "base": base,
        "config": FusionConfig(num_fusions=1, method=method).to_dict(),
        "steps": [FusionStep([2], [3], 1.0, 0.0)],
        "fitted_layers": [],
        "layers_before": 5,
        "layers_after": 4,
        "parameters_before": 1000,
        "parameters_after": 900,
        "calibration": [CalibrationInfo("some text", 20, 4096)],
        "perplexities": [PerplexityInfo("docs", "some documentation", 4000, 10.0, 12.5, "seen", 0.25, 0.875)],
        "similarity": None,
        "embeddings": None,
        "seconds": {},
        "versions": {},
        "notes": [],
    }
    return FusionReport(**fields | values)


def settings(card: str) -> set[str]:
    return {line.split("`")[1] for line in card.split("The settings that")[1].splitlines() if line.startswith("| `")}


@pytest.mark.parametrize("method", ["neural_alignment", "mka", "truncate", "refit"])
def test_settings_without_effect_are_not_listed(method: str) -> None:
    listed = settings(model_card(make_report(method), FAMILIES["llama"], plain=False))
    assert listed == FusionConfig(num_fusions=1, method=method).in_effect().keys()
    assert ("kernel_scale" in listed) == (method in ("neural_alignment", "mka"))
    assert ("calibration_tokens" in listed) == (method == "refit")


def test_figures_say_what_they_are_of() -> None:
    card = model_card(make_report(), FAMILIES["llama"], plain=False)
    assert "| perplexity, docs | 10 | 12.5 | x 1.25 |\n| divergence, docs | 0 | 0.25 |  |\n" in card
    assert "| agreement, docs | 100.0% | 87.5% | -12.5% |" in card
    assert "- docs: 4,000 tokens of some documentation; part of it was fitted on." in card
    assert "- calibration: some text (20 samples, 4096 tokens)" in card
    assert "| layers | 5 | 4 | -20.0% |" in card
    written = model_card(
        make_report(continuations=[Continuation("def f():", "\n    a | b", "")]), FAMILIES["llama"], plain=False
    )
    assert "| `def f():` | ` `<br>`\xa0\xa0\xa0\xa0a \\| b` | - |" in written
    without = model_card(make_report(perplexities=[], calibration=[]), FAMILIES["llama"], plain=False)
    assert "erplexity, " not in without and "calibration:" not in without


def test_figures_of_a_model_that_was_changed_come_after_a_note() -> None:
    report = make_report(weights_digest="one")
    card = model_card(report.of_weights("another"), FAMILIES["llama"], plain=True)
    assert card.index(f"> {CHANGED_NOTE}") < card.index("| perplexity, docs |")
    assert CHANGED_NOTE not in model_card(report.of_weights("one"), FAMILIES["llama"], plain=True)


@pytest.mark.parametrize(
    ("base", "repository"),
    [
        ("owner/model", "owner/model"),
        ("owner/model/file.gguf", "owner/model"),
        ("/home/me/model", None),
        ("model", None),
    ],
)
def test_a_folder_is_no_repository(base: str, repository: str | None) -> None:
    card = model_card(make_report(base=base), FAMILIES["llama"], plain=False)
    assert yaml.safe_load(card.split("---\n")[1]).get("base_model") == repository
    assert "/home" not in card and "model" in card
