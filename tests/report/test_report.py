from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from builders import make_report

from lf_hf import FusionReport
from lf_hf.checkpoint.card import model_card
from lf_hf.families import FAMILIES
from lf_hf.report.page import write_page
from lf_hf.report.report import BudgetInfo, BudgetTrial, FittedLayer, FusionStep, PerplexityInfo, collapse_note


def test_both_compression_figures() -> None:
    assert make_report().layers_removed_fraction == 0.125
    assert make_report().parameters_removed_fraction == pytest.approx(0.1086, abs=5e-5)


@pytest.mark.parametrize(("fitted", "advice"), [(True, "Fewer fusions"), (False, "method=refit")])
def test_perplexities_that_more_than_double_are_named(fitted: bool, advice: str) -> None:
    broken, sound = make_report().perplexities[0], PerplexityInfo("reasoning", "riddles", 4000, 5.0, 10.0)
    note = collapse_note([broken, sound], fitted=fitted)
    assert note is not None and note.startswith("Perplexity went from 6.1 to 30 (docs): ") and advice in note
    assert "reasoning" not in note and collapse_note([sound], fitted=fitted) is None


def test_round_trip_through_a_folder(tmp_path: Path) -> None:
    for report in (
        make_report(),
        make_report(calibration=[], fitted_layers=[], perplexities=[], similarity=None, embeddings=None),
    ):
        report.save(tmp_path)
        assert FusionReport.load(tmp_path) == report
    assert json.loads((tmp_path / "fusion_report.json").read_text())["layers_removed_fraction"] == 0.125


def test_a_report_that_compares_no_predictions_is_shown_without(tmp_path: Path) -> None:
    values = make_report().to_dict()
    del values["continuations"]
    for judged in values["perplexities"]:
        del judged["divergence"], judged["agreement"]
    report = FusionReport.from_dict(values)
    assert report.continuations == [] and report.perplexities[0].divergence is None
    write_page(report, tmp_path / "page.html")
    for text in (
        report.summary(),
        model_card(report, FAMILIES["llama"], plain=True),
        (tmp_path / "page.html").read_text("utf-8"),
    ):
        assert "agree" not in text and "How it writes" not in text


def test_summary_says_it_in_a_few_lines() -> None:
    summary = make_report().summary()
    assert "32 -> 28 layers (-12.5%)" in summary and "7,157,813,248 parameters (-10.9%)" in summary
    assert "layer 30 <- 30 x 0.6200 + 31 x 0.3800, mean matched cosine 0.010 -> 0.200" in summary
    assert "note: Mind the gap." in summary
    assert "  perplexity, docs: 6.1 -> 30, x 4.92\n  divergence, docs: 0 -> 1.25\n" in summary
    assert "  agreement, docs: 100.0% -> 62.5%, -37.5%\n  perplexity, reasoning: 5.2 -> 20, x 3.85\n" in summary
    assert "agreement, reasoning" not in summary  # of an older version
    assert "  measured on docs: 4,000 tokens of prose; text of its kind was fitted on\n" in summary


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "is not JSON"), (b"\xff", "is not JSON"), (b"{}", "no fusion report"), (b"[]", "no fusion report")],
)
def test_bad_files_get_one_sentence(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "fusion_report.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        FusionReport.load(tmp_path)


@pytest.mark.parametrize(
    "values",
    [
        *({name: []} for name in ("influences", "similarity", "embeddings")),
        {"fitted_layers": [FittedLayer([], None, [], 0.5, 0.2)]},
    ],
)
def test_empty_parts_get_one_sentence(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"no fusion report: {next(iter(values))} has .*; save the model again"):
        FusionReport.from_dict(make_report(**values).to_dict())


def test_a_budget_is_on_the_page_and_on_the_card(tmp_path: Path) -> None:
    budget = BudgetInfo("max_divergence", 0.5, 1000, [BudgetTrial(3, 0.25, 1.5), BudgetTrial(4, math.inf, 9.0)])
    report = make_report(budget=budget)
    write_page(report, tmp_path / "page.html")
    assert budget.summary() in (tmp_path / "page.html").read_text("utf-8")
    assert budget.summary() in model_card(report, FAMILIES["llama"], plain=True).replace("\\", "")


def test_the_card_says_what_became_one_layer_and_leaves_empty_columns_out() -> None:
    card = model_card(make_report(), FAMILIES["llama"], plain=True)
    assert "- Layers 27-31 became one layer.\n\n| layer i | layer j | averaged |\n" in card
    assert "| 30 | 31 | 0.6200 : 0.3800 |\n" in card
    values = {"steps": [FusionStep([30], [31], 1.0, 0.0)], "layers_after": 31, "calibration": []}
    card = model_card(make_report(**values), FAMILIES["llama"], plain=True)
    assert "| layer i | layer j |\n|---|---|\n| 30 | 31 |\n" in card
    assert "## Settings\n\nThe settings that had an effect:\n" in card


def test_a_folder_without_a_report_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no fusion_report\.json"):
        FusionReport.load(tmp_path)
