"""Reports: what they say of a model, what they give away, and what is read back."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import HEALED, make_point, make_report
from conftest import make_llama
from transformers import AutoModelForCausalLM

from lf_hf import FusedLlamaForCausalLM, FusionConfig, FusionReport, fuse_checkpoint
from lf_hf.checkpoint.card import model_card
from lf_hf.evaluate.points import read_points
from lf_hf.evaluate.results import Results
from lf_hf.evaluate.tables import markdown
from lf_hf.families import FAMILIES
from lf_hf.report.notes import collapse_note
from lf_hf.report.page import write_page
from lf_hf.report.records import BudgetInfo, BudgetTrial, FittedLayer, FusionStep, PerplexityInfo
from lf_hf.report.report import CHANGED_NOTE, published_name
from lf_hf.runtime.numerics import weights_digest
from lf_hf.settings import METHODS

SETTINGS: dict[str, Any] = {"perplexity_tokens": 0, "calibration_tokens": 1024, "entropy_neighbors": 20}


def fuse(base: str, text: Path, method: str, **settings: Any) -> FusedLlamaForCausalLM:
    settings = {"num_fusions": 2, **SETTINGS, **settings}
    return FusedLlamaForCausalLM.from_pretrained_fused(base, method=method, calibration=str(text), **settings)


def everywhere(report: FusionReport, folder: Path) -> list[str]:
    """All that is made of a report for people."""
    write_page(dataclasses.replace(report, similarity=None, embeddings=None), folder / "page.html")
    page = (folder / "page.html").read_text("utf-8")
    return [report.summary(), model_card(report, FAMILIES["llama"], plain=True).replace("\\", ""), page]


def test_rows_have_all_figures_of_all_models() -> None:
    assert [row.cells for row in make_report().rows((100, 80))] == [
        ["layers", "32", "28", "-12.5%"],
        ["parameters", "8,030,261,248", "7,157,813,248", "-10.9%"],
        ["bytes on disk", "100", "80", "-20.0%"],
        ["perplexity, docs", "6.1", "30", "x 4.92"],
        ["divergence, docs", "0", "1.25", ""],
        ["agreement, docs", "100.0%", "62.5%", "-37.5%"],
        ["perplexity, reasoning", "5.2", "20", "x 3.85"],  # of an older version, which compared no predictions
    ]
    assert [row.cells for row in make_report(healed=HEALED).rows()][:3] == [
        ["layers", "32", "28", "28", "-12.5%"],
        ["parameters", "8,030,261,248", "7,157,813,248", "7,157,813,248", "-10.9%"],
        ["perplexity, docs", "6.1", "30", "12", "x 1.97"],
    ]


def test_every_view_shows_all_rows(tmp_path: Path) -> None:
    budget = BudgetInfo("max_divergence", 0.5, 1000, [BudgetTrial(3, 0.25, 1.5), BudgetTrial(4, math.inf, 9.0)])
    report = make_report(healed=HEALED, budget=budget)
    for view in everywhere(report, tmp_path):
        for row in report.rows():
            assert all(cell in view for cell in row.cells), row
        sources = [text.source for text in report.perplexities]
        assert all(words in view for words in (budget.summary(), "Mind the gap.", HEALED.summary(), *sources))
    assert "- Layers 27-31 became one layer.\n" in model_card(report, FAMILIES["llama"], plain=True)
    assert "docs: 4,000 tokens of prose; text of its kind was fitted on" in report.summary()
    assert "reasoning: 4,000 tokens of riddles; it was not fitted on\n" in report.summary()


@pytest.mark.parametrize(("fitted", "advice"), [(True, "Fewer fusions"), (False, "method=refit")])
def test_perplexities_that_more_than_double_are_named(fitted: bool, advice: str) -> None:
    broken, sound = make_report().perplexities[0], PerplexityInfo("reasoning", "riddles", 4000, 5.0, 10.0)
    note = collapse_note([broken, sound], fitted=fitted)
    assert note is not None and note.startswith("Perplexity went from 6.1 to 30 (docs): ") and advice in note
    assert "reasoning" not in note and collapse_note([sound], fitted=fitted) is None


def test_groups_say_how_much_of_each_layer_is_where() -> None:
    steps = [FusionStep([2], [3], 0.75, 0.25), FusionStep([1], [2, 3], 0.6, 0.4)]
    report = make_report(steps=steps, fitted_layers=[], layers_before=5, layers_after=3)
    assert report.groups == [{0: 1}, {1: 0.6, 2: pytest.approx(0.3), 3: pytest.approx(0.1)}, {4: 1}]
    selected = make_report(
        steps=[FusionStep([1], [2], 1.0, 0.0, channels_kept=[10, 30])],
        fitted_layers=[FittedLayer([1, 2], None, [8, 32], 0.5, 0.1)],
        layers_before=4,
        layers_after=3,
    )
    assert selected.groups[1] == {1: 0.2, 2: 0.8}
    assert dataclasses.replace(selected, fitted_layers=[]).groups[1] == {1: 0.25, 2: 0.75}


# What is written and read back


def strictly(content: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(content, parse_constant=refuse)


@pytest.mark.parametrize(
    "report",
    [
        make_report(),
        make_report(healed=HEALED, calibration=[], fitted_layers=[], perplexities=[], similarity=None, embeddings=None),
        make_report(perplexities=[PerplexityInfo("docs", "text", 10, 10.0, math.inf)]),
    ],
)
def test_a_report_comes_back_from_strict_json(report: FusionReport, tmp_path: Path) -> None:
    report.save(tmp_path)
    assert FusionReport.load(tmp_path) == FusionReport.from_dict(report.to_dict()) == report
    assert strictly((tmp_path / "fusion_report.json").read_text())["layers_removed_fraction"] == 0.125


def test_infinite_figures_of_a_sweep_come_back_too(tmp_path: Path) -> None:
    point = dataclasses.replace(make_point("mka", 1, math.inf), perplexities={"docs": math.inf, "b": -math.inf})
    Results(tmp_path, "base", [point.key]).add(point)
    strictly((tmp_path / "results.jsonl").read_text())
    assert read_points(tmp_path / "results.jsonl") == {point.key: point}


def test_reports_of_an_older_version_are_read_and_shown(tmp_path: Path) -> None:
    values = make_report().to_dict()
    for name in ("continuations", "influences", "sample_labels", "healed", "budget", "group_costs", "dtype"):
        del values[name]
    for judged in values["perplexities"]:
        del judged["divergence"], judged["agreement"]
    report = FusionReport.from_dict(values)
    assert report.continuations == [] and report.perplexities[0].divergence is None
    for view in everywhere(report, tmp_path):
        assert "agreement, docs" not in view and "What both write" not in view
    config = FusionConfig(num_fusions=1, method="refit").to_dict() | {"from_the_future": 1}
    assert make_report(config=config).settings == config


@pytest.mark.parametrize("method", [name for name in METHODS if name != "healed"])
def test_settings_that_are_not_listed_have_no_effect(method: str, base: str, text: Path) -> None:
    config = FusionConfig(num_fusions=2, method=method, **SETTINGS)
    without = {name: value for name, value in config.to_dict().items() if name not in config.in_effect()}
    other: dict[str, Any] = {name: 2 * value for name, value in without.items() if type(value) in (int, float)}
    other |= {name: value for name, value in {"seed": 7, "rank_normalize": False}.items() if name in without}
    first, second = fuse(base, text, method), fuse(base, text, method, **other)
    assert first.fusion_report is not None and set(first.fusion_report.settings) == config.in_effect().keys()
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


# What is published


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B"),
        ("owner/model-GGUF/model.Q4.gguf", "owner/model-GGUF/model.Q4.gguf"),
        ("/home/me/secret/model.Q4.gguf", "model.Q4.gguf"),
        ("C:\\Users\\me\\model", "model"),
        ("/", "/"),
        ("mine/model", "model"),
        ("./mine/model/", "model"),
        ("mine/model/..", "mine"),
    ],
)
def test_of_a_path_the_last_name_is_published(
    name: str, published: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a relative one, where there is such a folder."""
    (tmp_path / "mine" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert published_name(name) == published == make_report(base=name).base


def test_no_file_of_a_fusion_says_where_its_base_was(base: str, text: Path, tmp_path: Path) -> None:
    fuse(base, text, "refit").save_pretrained(tmp_path / "out")
    fuse_checkpoint(base, tmp_path / "low", num_fusions=1, method="truncate", perplexity_tokens=0)
    for folder in ("out", "low"):
        write_page(FusionReport.load(tmp_path / folder), tmp_path / folder / "page.html")
        for file in (tmp_path / folder).iterdir():
            content = file.read_bytes()
            assert str(Path(base).parent).encode() not in content and str(text.parent).encode() not in content, file
        name = Path(base).name
        assert json.loads((tmp_path / folder / "config.json").read_text())["fusion"]["base"] == name
    assert str(Path(base).parent) not in markdown([], base)


# Models that were changed


def digest(model: torch.nn.Module) -> str | None:
    return weights_digest(model.named_parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_the_digest_is_that_of_the_saved_model_in_any_wider_dtype(
    tied: bool, make_base: Callable[..., str], text: Path, tmp_path: Path
) -> None:
    model = fuse(make_base(tie_word_embeddings=tied, dtype=torch.bfloat16), text, "truncate")
    model.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert digest(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)) == digest(model) is not None


def test_a_change_of_any_parameter_gets_a_note_once() -> None:
    model = make_llama()
    report = make_report(weights_digest=digest(model))
    assert report.of_weights(digest(model)) == report.of_weights(None) == report
    for parameter in model.parameters():
        with torch.no_grad():
            kept = parameter.clone()
            parameter.mul_(1.01)
            changed = report.of_weights(digest(model))
            parameter.copy_(kept)
        assert changed.notes == [CHANGED_NOTE, *report.notes] and changed.of_weights("another") == changed
    assert make_report().of_weights("any") == make_report()  # of an older report nothing is known
    with torch.device("meta"):
        assert digest(make_llama()) is None
