"""The page about a fusion: it holds what the report holds, loads nothing, and escapes what it shows."""

from __future__ import annotations

import base64
import importlib.util
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from builders import HEALED, Page, make_report, no_warnings
from matplotlib.patches import Rectangle

from lf_hf import FusedLlamaForCausalLM, FusionReport
from lf_hf.cli import main
from lf_hf.report.page import report_figures, write_page
from lf_hf.report.records import Continuation, FusionStep, PerplexityInfo
from lf_hf.text.mmlu import SUBJECTS

PHONE = 400  # points: a picture that is wider has letters too small to read at 390 pixels
FEW_PICTURES: dict[str, Any] = {"similarity": None, "embeddings": None}


@pytest.fixture(scope="module")
def reports(base: str, text: Path) -> dict[str, FusionReport]:
    """A real report of each method."""
    budget = {"selection": "groups", "max_divergence": 10.0, "calibration_length": 64}
    ways: dict[str, dict[str, Any]] = {
        "neural_alignment": {"num_fusions": 2},
        "mka": {"num_fusions": 2, "calibration": text},
        "truncate": {"num_fusions": 2},
        "refit": {"num_fusions": 2, "selection": "least_influence", "calibration": text},
        "within a budget": {"method": "refit", "calibration": text} | budget,
    }
    made = {}
    for name, settings in ways.items():
        given: dict[str, Any] = {"method": name, "perplexity_tokens": 100, "calibration_tokens": 1024} | settings
        report = FusedLlamaForCausalLM.from_pretrained_fused(base, **given).fusion_report
        assert report is not None
        made[name] = report
    return made


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
def test_a_page_shows_what_its_method_measured_and_loads_nothing(
    reports: dict[str, FusionReport], method: str, names: list[str], tmp_path: Path
) -> None:
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


def test_pictures_show_the_figures_of_the_report(reports: dict[str, FusionReport]) -> None:
    report = reports["neural_alignment"]
    drawn = report_figures(report)
    [image] = drawn["similarity_heatmap"].axes[0].get_images()
    np.testing.assert_allclose(np.asarray(image.get_array()), np.array(report.similarity))
    panels = drawn["manifolds"].axes
    assert [panel.get_title() for panel in panels] == [f"layer {n}" for n in range(5)]
    offsets = np.asarray(panels[2].collections[0].get_offsets())  # (N, 2)
    assert report.embeddings is not None
    assert report.sample_labels == list(SUBJECTS) and reports["mka"].sample_labels is None
    for axis in range(2):
        assert list(offsets[:, axis].argsort()) == list(np.array(report.embeddings)[2, :, axis].argsort())


def test_the_map_has_every_layer_inside_its_frame() -> None:
    steps = [FusionStep([n], list(range(n + 1, 37)), 0.625, 0.375) for n in range(35, 23, -1)]
    report = make_report(steps=steps, layers_before=37, layers_after=25, fitted_layers=[], **FEW_PICTURES)
    [axis] = report_figures(report)["layer_map"].axes
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    for label in axis.texts:
        x, y = label.get_position()
        assert left <= x <= right and bottom <= y <= top
    shown = [label.get_text() for label in axis.texts]
    numbers = [int(label) for label in shown if label.isdigit()]
    assert set(numbers) == set(range(37)) and len(numbers) == 37 + 25 + 1  # the fused layer goes on in a second row
    assert len([label for label in shown if label.endswith("%")]) == 13


def test_pictures_of_costs_frame_what_was_fused_and_show_what_was_measured(reports: dict[str, FusionReport]) -> None:
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
    assert report.budget is not None and set(np.asarray(budget.get_ydata())) == {report.budget.allowed}
    assert set(np.asarray(chosen.get_xdata())) == {len(report.steps)}
    measured = {tuple(point) for point in np.asarray(axis.collections[0].get_offsets()).tolist()}
    assert measured == {(trial.num_fusions, trial.divergence) for trial in report.budget.tried}


def test_the_curve_of_a_healing() -> None:
    [axis] = report_figures(make_report(healed=HEALED, **FEW_PICTURES))["healing_curve"].axes
    [line, kept] = axis.get_lines()
    assert list(np.asarray(line.get_ydata())) == [2.0, 1.0] and set(np.asarray(kept.get_xdata())) == {1}


def test_any_figures_can_be_shown(tmp_path: Path) -> None:
    values = [0.0, math.inf, math.nan]
    judged = [PerplexityInfo(f"$\\frac${value}", "text", 10, 10.0, value) for value in values]
    with no_warnings():
        write_page(make_report(perplexities=judged, influences=values * 11, **FEW_PICTURES), tmp_path / "page.html")
        report_figures(make_report(influences=[0.0] * 32, **FEW_PICTURES))


@pytest.mark.parametrize("figures_of", [{}, {"influence": 0.25}, {"divergence": -0.125}])
def test_steps_have_a_column_for_each_figure_that_there_is(figures_of: dict[str, float], tmp_path: Path) -> None:
    steps = [FusionStep([30], [31], 1.0, 0.0, **figures_of)]  # type: ignore[arg-type]
    page_of(make_report(layers_after=31, steps=steps, **FEW_PICTURES), tmp_path)
    section = (tmp_path / "page.html").read_text(encoding="utf-8").split('id="steps"')[1].split("</table>")[0]
    heads = re.findall("<th>(.*?)</th>", section)
    assert len(heads) == section.count("<td>") == 3 + len(figures_of)
    assert all(f"<td>{value:.4f}</td>" in section and name in heads[3] for name, value in figures_of.items())


@pytest.mark.parametrize("name", ["similarity", "embeddings", "influences"])
def test_figures_that_do_not_fit_the_layers_get_one_sentence(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"The figures for .* do not fit together .*; save the model again"):
        write_page(make_report(**FEW_PICTURES | {name: []}), tmp_path / "page.html")


def test_command(reports: dict[str, FusionReport], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
        assert str(tmp_path) in said
    assert set(tmp_path.iterdir()) == before


def test_without_the_extra_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(ValueError, match=r"^Pictures and pages need matplotlib; run `pip install '\.\[plot\]'`"):
        write_page(make_report(), tmp_path / "page.html")
