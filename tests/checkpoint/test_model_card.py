"""The model card: what it lists of a fusion, and of which text its figures are."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from builders import make_report

from lf_hf import FusionConfig, FusionReport
from lf_hf.checkpoint.card import model_card
from lf_hf.families import FAMILIES
from lf_hf.report.records import CalibrationInfo, Continuation, PerplexityInfo
from lf_hf.report.report import CHANGED_NOTE


def a_report(method: str = "refit", **values: Any) -> FusionReport:
    fields: dict[str, Any] = {"base": "owner/model", "config": FusionConfig(num_fusions=1, method=method).to_dict()}
    fields["calibration"] = [CalibrationInfo("some text", 20, 4096)]
    fields["perplexities"] = [PerplexityInfo("docs", "some documentation", 4000, 10.0, 12.5, "seen", 0.25, 0.875)]
    return make_report(**fields | values)


def card_of(report: FusionReport, *, plain: bool = False) -> str:
    return model_card(report, FAMILIES["llama"], plain=plain)


def settings(card: str) -> set[str]:
    return {line.split("`")[1] for line in card.split("The settings that")[1].splitlines() if line.startswith("| `")}


@pytest.mark.parametrize("method", ["neural_alignment", "mka", "truncate", "refit"])
def test_settings_without_effect_are_not_listed(method: str) -> None:
    listed = settings(card_of(a_report(method)))
    assert listed == FusionConfig(num_fusions=1, method=method).in_effect().keys()
    assert ("kernel_scale" in listed) == (method in ("neural_alignment", "mka"))
    assert ("calibration_tokens" in listed) == (method == "refit")


def test_figures_say_what_they_are_of() -> None:
    card = card_of(a_report())
    assert "| perplexity, docs | 10 | 12.5 | x 1.25 |\n| divergence, docs | 0 | 0.25 |  |\n" in card
    assert "| agreement, docs | 100.0% | 87.5% | -12.5% |" in card
    assert "- docs: 4,000 tokens of some documentation; part of it was fitted on." in card
    assert "- calibration: some text (20 samples, 4096 tokens)" in card
    assert "| layers | 32 | 28 | -12.5% |" in card
    written = card_of(a_report(continuations=[Continuation("def f():", "\n    a | b", "")]))
    assert "| `def f():` | ` `<br>`\xa0\xa0\xa0\xa0a \\| b` | - |" in written
    without = card_of(a_report(perplexities=[], calibration=[]))
    assert "erplexity, " not in without and "calibration:" not in without


def test_figures_of_a_model_that_was_changed_come_after_a_note() -> None:
    report = a_report(weights_digest="one")
    card = card_of(report.of_weights("another"), plain=True)
    assert card.index(f"> {CHANGED_NOTE}") < card.index("| perplexity, docs |")
    assert CHANGED_NOTE not in card_of(report.of_weights("one"), plain=True)


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
    card = card_of(a_report(base=base))
    assert yaml.safe_load(card.split("---\n")[1]).get("base_model") == repository
    assert "/home" not in card and "model" in card
