"""The page about a fusion: it holds what the report holds, loads nothing, and escapes what it shows."""

from __future__ import annotations

import base64
import dataclasses
import importlib.util
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from builders import Page, make_report
from conftest import make_texts
from matplotlib.patches import Rectangle

from lf_hf import FusedLlamaForCausalLM, FusionReport
from lf_hf.cli import main
from lf_hf.report import figures
from lf_hf.report.page import report_sections, write_page
from lf_hf.report.report import CalibrationInfo, FittedLayer, FusionStep, HealedText, HealingInfo, HealingPoint
from lf_hf.text.mmlu import SUBJECTS

HOSTILE = '<script>alert("x")</script> $\\frac$ "org"'


@pytest.fixture(scope="module")
def reports(base: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, FusionReport]:
    """A real report of each method."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("\n\n".join(make_texts(400)), encoding="utf-8")
    settings: dict[str, Any] = {"num_fusions": 2, "perplexity_tokens": 300, "calibration_tokens": 1024}
    made = {}
    for method in ("neural_alignment", "mka", "truncate", "refit"):
        calibration = None if method == "neural_alignment" else text
        model = FusedLlamaForCausalLM.from_pretrained_fused(base, method=method, calibration=calibration, **settings)
        assert model.fusion_report is not None
        made[method] = model.fusion_report
    settings |= {"method": "refit", "selection": "groups", "max_divergence": 10.0, "calibration_length": 64}
    del settings["num_fusions"]
    model = FusedLlamaForCausalLM.from_pretrained_fused(base, calibration=text, **settings)
    assert model.fusion_report is not None
    made["within a budget"] = model.fusion_report
    return made


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
def test_a_page_shows_what_its_method_measured(
    reports: dict[str, FusionReport], method: str, names: list[str], tmp_path: Path
) -> None:
    report = reports[method]
    write_page(report, tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    shown = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert shown == ["cost_and_gain", "layer_map", *names, "writing", "figures", "steps", "settings"]
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == len(names) + 2
    for picture in pictures:
        assert picture["alt"]
        source = str(picture["src"]).removeprefix("data:image/svg+xml;base64,")
        assert ElementTree.fromstring(base64.b64decode(source)).tag.endswith("svg")
    text = " ".join(page.text.split())
    for part in ("5 → 3", *(f"from {p.dense:.4g} to {p.fused:.4g}" for p in report.perplexities), *report.notes):
        assert part in text
    assert all(f"divergence {judged.divergence:.4g} nats" in text for judged in report.perplexities)
    assert all(" ".join(continuation.fused.split()) in text for continuation in report.continuations)


def test_a_page_loads_nothing_and_runs_nothing(reports: dict[str, FusionReport], tmp_path: Path) -> None:
    hostile = dataclasses.replace(reports["neural_alignment"], base=HOSTILE, notes=[HOSTILE])
    write_page(hostile, tmp_path / "page.html")
    content = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(content)
    assert page.text.count(HOSTILE) == 3  # title, heading and note
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"} == set()
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert str(attributes.get("src", "data:")).startswith("data:") and "href" not in attributes
    assert not re.search(r"url\(|@import|https?://", content)


def test_the_same_report_gives_the_same_page(reports: dict[str, FusionReport], tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_page(reports["mka"], tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_reports_hold_what_the_pictures_need(reports: dict[str, FusionReport], tmp_path: Path) -> None:
    aligned, refitted = reports["neural_alignment"], reports["refit"]
    assert aligned.sample_labels == list(SUBJECTS) and reports["mka"].sample_labels is None
    for report in (aligned, refitted):
        assert report.influences is not None and len(report.influences) == 5 and min(report.influences) > 0
    assert refitted.influences is not None
    step = refitted.steps[0]
    assert step.influence == refitted.influences[step.pair[1]] == min(refitted.influences[2:-1])
    assert reports["truncate"].influences is None
    aligned.save(tmp_path)
    assert FusionReport.load(tmp_path) == aligned


def test_reports_that_lack_later_fields_are_read(reports: dict[str, FusionReport]) -> None:
    values = reports["mka"].to_dict()
    del values["influences"], values["sample_labels"]
    assert FusionReport.from_dict(values) == dataclasses.replace(reports["mka"], influences=None)


def test_groups_say_how_much_of_each_layer_is_where() -> None:
    steps = [FusionStep([2], [3], 0.75, 0.25), FusionStep([1], [2, 3], 0.6, 0.4)]
    report = make_report(steps=steps, fitted_layers=[], layers_before=5, layers_after=3)
    assert report.groups == [{0: 1}, {1: 0.6, 2: pytest.approx(0.3), 3: pytest.approx(0.1)}, {4: 1}]
    dropped = make_report(steps=[FusionStep([3], [4], 1.0, 0.0)], fitted_layers=[], layers_before=5, layers_after=4)
    assert dropped.groups[-1] == {3: 1, 4: 0}
    selected = make_report(
        steps=[FusionStep([1], [2], 1.0, 0.0, channels_kept=[10, 30])],
        fitted_layers=[FittedLayer([1, 2], None, [8, 32], 0.5, 0.1)],
        layers_before=4,
        layers_after=3,
    )
    assert selected.groups[1] == {1: 0.2, 2: 0.8}
    refitted_less = dataclasses.replace(selected, fitted_layers=[])
    assert refitted_less.groups[1] == {1: 0.25, 2: 0.75}


def test_pictures_show_the_figures_of_the_report(reports: dict[str, FusionReport]) -> None:
    report = reports["neural_alignment"]
    [image] = figures.similarity_heatmap(report).axes[0].get_images()
    np.testing.assert_allclose(np.asarray(image.get_array()), np.array(report.similarity))
    panels = figures.manifolds(report).axes
    assert [panel.get_title() for panel in panels[:5]] == [f"layer {n}" for n in range(5)]
    offsets = np.asarray(panels[2].collections[0].get_offsets())  # (N, 2)
    assert report.embeddings is not None
    for axis in range(2):
        assert list(offsets[:, axis].argsort()) == list(np.array(report.embeddings)[2, :, axis].argsort())
    numbers = [text.get_text() for text in figures.layer_map(report).axes[0].texts]
    assert sorted(int(number) for number in numbers if number.isdigit()) == sorted([*range(5), *range(3)])


def test_pictures_of_costs_frame_what_was_fused_and_show_what_was_measured(reports: dict[str, FusionReport]) -> None:
    report = reports["within a budget"]
    axis = figures.group_costs(report).axes[0]
    values = np.asarray(axis.get_images()[0].get_array())  # rows: groups of 2, 3, ... layers
    for cost in report.group_costs:
        assert values[cost.last - cost.first - 1, cost.first] == pytest.approx(max(cost.divergence, 1e-6))
    frames = [(frame.get_x() + 0.5, frame.get_y() + 2.5) for frame in axis.patches if isinstance(frame, Rectangle)]
    assert frames == [(min(group), len(group)) for group in report.groups if len(group) > 1]
    axis = figures.cost_curve(report).axes[0]
    curve, budget, chosen = axis.get_lines()
    assert list(np.asarray(curve.get_ydata())) == report.predicted
    assert report.budget is not None and set(np.asarray(budget.get_ydata())) == {report.budget.allowed}
    assert set(np.asarray(chosen.get_xdata())) == {len(report.steps)}
    measured = {tuple(point) for point in np.asarray(axis.collections[0].get_offsets()).tolist()}
    assert measured == {(trial.num_fusions, trial.divergence) for trial in report.budget.tried}


def test_a_healed_model_s_page_has_the_curve_and_what_changed(tmp_path: Path) -> None:
    curve = [HealingPoint(step, {"a": 2.0 - step, "b": 1.0}) for step in (0, 1)]
    judged = [HealedText("docs", 4000, 30.0, 12.0, 1.25, 0.5, 0.5, 0.75)]
    text = [CalibrationInfo("a text", 2, 1024)]
    healed = HealingInfo({"train": "fused"}, text, 1.0, 10, 1, 1, "read from disk", curve, judged, 60.0)
    report = make_report(healed=healed)
    axis = figures.healing_curve(report).axes[0]
    *lines, kept = axis.get_lines()
    assert [list(np.asarray(line.get_ydata())) for line in lines] == [[2.0, 1.0], [1.0, 1.0]]
    assert set(np.asarray(kept.get_xdata())) == {1}
    write_page(report, tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert {"healing_curve", "healed"} <= {attributes.get("id") for _, attributes in page.tags}
    shown = " ".join(re.sub("<.*?>", " ", (tmp_path / "page.html").read_text("utf-8")).split())
    for part in ("1,024 of a text", "read from disk", "6.1 30 12 x 1.97", "0 1.25 0.5", "100.0% 50.0% 75.0% -25.0%"):
        assert part in shown, part


def test_command(reports: dict[str, FusionReport], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports["refit"].save(tmp_path)
    assert main(["report", str(tmp_path), "--png", str(tmp_path / "png")]) == 0
    printed = capsys.readouterr().out.split()
    assert printed[0] == str(tmp_path / "fusion_report.html")
    assert len(printed) == 5 and all(Path(file).read_bytes().startswith(b"\x89PNG") for file in printed[1:])
    assert main(["report", str(tmp_path), "--html", str(tmp_path / "a.html")]) == 0
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "fusion_report.html").read_bytes()
    assert main(["report", str(tmp_path / "png")]) == 1
    assert "holds no fusion_report.json" in capsys.readouterr().err


def test_a_page_or_pictures_nowhere_get_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_report().save(tmp_path)
    (tmp_path / "file").touch()
    before = set(tmp_path.iterdir())
    wrong = [("--html", tmp_path), ("--html", tmp_path / "no" / "page.html"), ("--png", tmp_path / "file")]
    for option, place in wrong:
        assert main(["report", str(tmp_path), option, str(place)]) == 1
        said = capsys.readouterr().err
        assert f"'{place}' cannot be written (" in said and f"give another place by {option}." in said
        assert set(tmp_path.iterdir()) == before


def test_without_the_extra_one_sentence_says_what_to_install(
    reports: dict[str, FusionReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(ValueError, match=r'^Pictures and pages need matplotlib; run `pip install "lf_hf\[plot\]"`\.$'):
        report_sections(reports["mka"])
