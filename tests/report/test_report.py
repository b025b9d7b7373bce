"""Reports: what they say of a model, what they give away, what is read back; and the page about a fusion."""

from __future__ import annotations

import base64
import dataclasses
import importlib.util
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from builders import HEALED, Page, make_point, make_report, no_warnings
from conftest import make_llama
from matplotlib.patches import Rectangle
from transformers import AutoModelForCausalLM

from lf_hf import FusedLlamaForCausalLM, FusionConfig, FusionReport, fuse_checkpoint
from lf_hf.checkpoint.card import model_card
from lf_hf.cli import main
from lf_hf.evaluate.points import read_points
from lf_hf.evaluate.results import Results
from lf_hf.evaluate.tables import markdown
from lf_hf.families import FAMILIES
from lf_hf.report.notes import damage_notes
from lf_hf.report.page import report_figures, write_page
from lf_hf.report.records import BudgetInfo, BudgetTrial, Continuation, FittedLayer, FusionStep, PerplexityInfo
from lf_hf.report.report import CHANGED_NOTE, published_name
from lf_hf.runtime.numerics import weights_digest
from lf_hf.settings import METHODS
from lf_hf.text.mmlu import SUBJECTS

SETTINGS: dict[str, Any] = {"perplexity_tokens": 0, "calibration_tokens": 1024, "entropy_neighbors": 20}
PHONE = 400  # points: a picture that is wider has letters too small to read at 390 pixels
FEW_PICTURES: dict[str, Any] = {"similarity": None, "embeddings": None}


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
        ["perplexity, reasoning", "5.2", "20", "x 3.85"],
        ["divergence, reasoning", "0", "0.75", ""],
        ["agreement, reasoning", "100.0%", "50.0%", "-50.0%"],
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


def test_perplexities_that_more_than_double_are_named() -> None:
    [judged, _] = make_report().perplexities
    broken = dataclasses.replace(judged, dense=5.0, fused=10.1)
    sound = dataclasses.replace(judged, name="reasoning", dense=5.0, fused=10.0)
    for fitted, advice in ((True, "Fewer fusions"), (False, "method=refit")):
        [note] = damage_notes([broken, sound], fitted=fitted)
        assert note.startswith("Perplexity went from 5 to 10.1 (docs): ") and advice in note
        assert "reasoning" not in note and not damage_notes([sound], fitted=fitted)


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


def strictly(content: str) -> Any:
    return json.loads(content, parse_constant=pytest.fail)  # infinity, and what is no number, are no JSON


@pytest.mark.parametrize(
    "report",
    [
        make_report(),
        make_report(healed=HEALED, calibration=[], fitted_layers=[], perplexities=[], similarity=None, embeddings=None),
        make_report(perplexities=[PerplexityInfo("docs", "text", 10, 10.0, math.inf, "seen", math.inf, 0.5)]),
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
    unknown = config.to_dict() | {"from_the_future": 1}  # of another version all are listed
    assert make_report(config=unknown).settings == unknown


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
def test_the_last_name_is_published(name: str, published: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def digest(model: torch.nn.Module) -> str | None:
    return weights_digest(model.named_parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_the_digest_is_of_what_was_saved(tied: bool, make_base: Callable[..., str], text: Path, tmp_path: Path) -> None:
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


@pytest.fixture(scope="module")
def reports(base: str, text: Path) -> dict[str, Any]:
    """A real report of each method."""
    usual: dict[str, Any] = SETTINGS | {"num_fusions": 2, "calibration": text, "perplexity_tokens": 100}
    ways: dict[str, dict[str, Any]] = {
        "neural_alignment": {"calibration": None},
        "mka": {},
        "truncate": {},
        "refit": {"selection": "least_influence"},
        "within a budget": {"method": "refit", "num_fusions": None, "max_divergence": 10.0, "calibration_length": 64},
    }
    fuse = FusedLlamaForCausalLM.from_pretrained_fused
    return {name: fuse(base, **{"method": name} | usual | more).fusion_report for name, more in ways.items()}


def page_of(report: FusionReport, folder: Path) -> tuple[Page, str]:
    """The page, and all that is to be read on it, in order."""
    write_page(report, folder / "page.html")
    page = Page((folder / "page.html").read_text(encoding="utf-8"))
    return page, " ".join(page.text.split())


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("neural_alignment", ["similarity_heatmap", "manifolds", "along_depth", "matched_cosines"]),
        ("mka", ["similarity_heatmap", "manifolds", "along_depth"]),
        ("truncate", []),
        ("refit", ["along_depth", "fit_errors"]),
        ("within a budget", ["group_costs", "cost_curve", "along_depth", "fit_errors"]),
    ],
)
def test_a_page_shows_what_was_measured(reports: dict[str, Any], method: str, names: list[str], tmp_path: Path) -> None:
    """And loads nothing, and is made again of the same bytes."""
    report = reports[method]
    page, text = page_of(report, tmp_path)
    shown = [attributes["id"] for tag, attributes in page.tags if tag in ("section", "details")]
    assert shown == ["writing", "layer_map", "more_writing", "figures", *names, "steps", "settings"]
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == len(names) + 1
    for picture in pictures:
        assert picture["alt"]
        svg = ElementTree.fromstring(base64.b64decode(str(picture["src"]).removeprefix("data:image/svg+xml;base64,")))
        assert svg.tag.endswith("svg") and float(svg.attrib["width"].removesuffix("pt")) <= PHONE
    assert "5 → 3 layers" in text and all(note in text for note in report.notes)
    assert all(" ".join(continuation.fused.split()) in text for continuation in report.continuations)
    for name, head in (("influence", "influence of j"), ("divergence", "added divergence")):
        of_steps = [value for step in report.steps if (value := getattr(step, name)) is not None]
        assert all(f"{value:.4f}" in text for value in of_steps) and (head in text) == bool(of_steps)
    assert not any("href" in attributes or tag == "script" for tag, attributes in page.tags)
    content = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"url\(|@import|https?://", content) and "prefers-color-scheme: dark" in content
    write_page(report, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == content


def test_the_answers_come_first_then_both_texts_then_the_layers(tmp_path: Path) -> None:
    continuations = [Continuation("Once upon", "a time", "a dime"), Continuation("Two", "three", "four")]
    _, text = page_of(make_report(continuations=continuations, **FEW_PICTURES), tmp_path)
    text = text[text.index("fused with") :]
    parts = ["How much smaller", "10.9 %", "32 → 28", "not measured", "How much worse", "4.92", "3.85", "Mind the gap."]
    parts += ["Once upon", "a time", "a dime", "Which layers became which", "Details", "three"]
    places = [text.replace("\xa0", " ").index(part) for part in parts]
    assert places == sorted(places)


def test_pictures_show_the_figures_of_the_report(reports: dict[str, Any]) -> None:
    report = reports["neural_alignment"]
    drawn = report_figures(report)
    [image] = drawn["similarity_heatmap"].axes[0].get_images()
    np.testing.assert_allclose(np.asarray(image.get_array()), np.array(report.similarity))
    panels = drawn["manifolds"].axes
    assert [panel.get_title() for panel in panels] == [f"layer {n}" for n in range(5)]
    offsets = np.asarray(panels[2].collections[0].get_offsets())  # (N, 2)
    assert report.sample_labels == list(SUBJECTS) and reports["mka"].sample_labels is None
    for axis in range(2):
        assert list(offsets[:, axis].argsort()) == list(np.array(report.embeddings)[2, :, axis].argsort())


def test_pictures_of_costs_frame_what_was_fused_and_show_what_was_measured(reports: dict[str, Any]) -> None:
    report = reports["within a budget"]
    drawn = report_figures(report)
    axis = drawn["group_costs"].axes[0]
    values = np.asarray(axis.get_images()[0].get_array())  # rows: groups of 2, 3, ... layers
    for cost in report.group_costs:
        assert values[cost.last - cost.first - 1, cost.first] == pytest.approx(max(cost.divergence, 1e-6))
    frames = [(frame.get_x() + 0.5, frame.get_y() + 2.5) for frame in axis.patches if isinstance(frame, Rectangle)]
    assert frames == [(min(group), len(group)) for group in report.groups if len(group) > 1]
    axis = drawn["cost_curve"].axes[0]
    curve, budget, chosen = axis.get_lines()
    assert list(np.asarray(curve.get_ydata())) == report.predicted
    assert set(np.asarray(budget.get_ydata())) == {report.budget.allowed}
    assert set(np.asarray(chosen.get_xdata())) == {len(report.steps)}
    measured = {tuple(point) for point in np.asarray(axis.collections[0].get_offsets()).tolist()}
    assert measured == {(trial.num_fusions, trial.divergence) for trial in report.budget.tried}


def test_any_figures_can_be_shown(tmp_path: Path) -> None:
    values = [0.5, math.inf, math.nan]
    judged = [PerplexityInfo(f"$\\frac${value}", "text", 10, 10.0, value, "kin", value, value) for value in values]
    with no_warnings():
        write_page(make_report(perplexities=judged, influences=values * 11, **FEW_PICTURES), tmp_path / "page.html")
        report_figures(make_report(influences=[0.0] * 32, **FEW_PICTURES))
    for name in ("similarity", "embeddings", "influences"):  # fewer than there are layers
        with pytest.raises(ValueError, match=r"The figures for .* do not fit together .*; save the model again"):
            write_page(make_report(**FEW_PICTURES | {name: []}), tmp_path / "page.html")


def test_command(reports: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports["truncate"].save(tmp_path)
    assert main(["report", str(tmp_path), "--png", str(tmp_path / "png")]) == 0
    printed = capsys.readouterr().out.split()
    assert printed == [str(tmp_path / "fusion_report.html"), str(tmp_path / "png" / "layer_map.png")]
    assert Path(printed[1]).read_bytes().startswith(b"\x89PNG")
    assert main(["report", str(tmp_path), "--html", str(tmp_path / "a.html")]) == 0
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "fusion_report.html").read_bytes()
    before = set(tmp_path.iterdir())
    for option, place in (("--html", ""), ("--html", "no/page.html"), ("--png", "a.html")):
        assert main(["report", str(tmp_path), option, str(tmp_path / place)]) == 1
        [said] = capsys.readouterr().err.splitlines()
        assert str(tmp_path) in said and set(tmp_path.iterdir()) == before


def test_without_the_extra_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(ValueError, match=r"^Pictures and pages need matplotlib; run `pip install '\.\[plot\]'`"):
        write_page(make_report(), tmp_path / "page.html")
