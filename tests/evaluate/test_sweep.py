"""Sweeps: what they measure, that they go on where they stopped, and what they make of the results."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import check_golden, make_judged, make_point, no_warnings
from conftest import same
from run_faults import Answers
from transformers import AutoModelForCausalLM

import lf_hf
from lf_hf import FusionConfig
from lf_hf.checkpoint.saving import WORK
from lf_hf.cli import main
from lf_hf.evaluate.curve import sweep_curve
from lf_hf.evaluate.points import DENSE, Point, Score
from lf_hf.evaluate.sweep import sweep
from lf_hf.evaluate.tables import RESULTS, Results, markdown, stability_rows
from lf_hf.report.figures import dense_figures
from lf_hf.settings import METHODS

Run = Callable[..., list[Point]]
Whole = tuple[Path, list[Point]]
TASKS = ["mmlu_sample_anatomy", "mmlu_sample_virology"]
SETTINGS: dict[str, Any] = {"perplexity_tokens": 300, "calibration_tokens": 1024}

pytestmark = pytest.mark.usefixtures("own_tasks")


@pytest.fixture(scope="module")
def run(base: str, text: Path) -> Run:
    given: dict[str, Any] = {"num_fusions": [2, 1], "methods": ["mka", "truncate"], "tasks": TASKS}
    given |= {"calibration": text, "settings": SETTINGS}
    return lambda out, **arguments: sweep(base, out, **given | arguments)


@pytest.fixture(scope="module")
def whole(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A sweep that nothing interrupted, and its folder."""
    folder = tmp_path_factory.mktemp("sweep")
    return folder, run(folder)


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that are judged, by answers that stand for lm-eval's and without pictures."""
    monkeypatch.setattr("lf_hf.evaluate.evaluation.Evaluation", Answers)
    monkeypatch.setattr("lf_hf.evaluate.tables.missing_plot_packages", lambda: "none wanted")
    monkeypatch.setattr(Answers, "judged", [])
    return Answers.judged


def without_seconds(points: list[Point]) -> list[dict[str, Any]]:
    return [{**vars(point), "seconds": None} for point in points]


def test_points_are_what_single_runs_give(run: Run, judged: list[Any], base: str, text: Path, tmp_path: Path) -> None:
    """Bit for bit, though levels share what is measured; and the base stays as it is."""
    methods = [method for method in METHODS if method != "healed"]
    settings: dict[str, Any] = {"perplexity_tokens": 100, "calibration_tokens": 1024}
    dense, *fused = run(tmp_path, methods=methods, settings=settings)
    wanted = [(0, DENSE), *itertools.product((1, 2), methods)]
    assert [(point.num_fusions, point.method) for point in (dense, *fused)] == wanted
    models = {(model.fusion_report.config["method"], len(model.model.layers)): model for model in judged[1:]}
    for point in fused:
        config = FusionConfig(point.num_fusions, point.method, **settings)
        alone: Any = lf_hf.from_pretrained_fused(base, config, calibration=text)
        model = models[point.method, point.layers]
        assert same(model, alone)
        report = dataclasses.replace(alone.fusion_report, seconds={})
        assert report == dataclasses.replace(model.fusion_report, seconds={}) and len(report.perplexities) == 2
        assert point.texts == {info.name: info.figures for info in report.perplexities}
        assert dense.texts == {info.name: dense_figures(info.dense) for info in report.perplexities}
        assert (point.layers, point.parameters) == (report.layers_after, report.parameters_after)
        assert point.config == config.to_dict() and point.scores["task"].value == point.layers
    assert same(judged[0], AutoModelForCausalLM.from_pretrained(base)) and judged[0].config.num_hidden_layers == 5


def test_what_differs_in_healing_alone_is_fused_once(run: Run, judged: list[Any], tmp_path: Path) -> None:
    heal: dict[str, Any] = {"num_fusions": [2], "settings": SETTINGS | {"heal_tokens": 2048}}
    points = run(tmp_path / "both", methods=["healed", "refit"], **heal)
    assert [point.method for point in points] == [DENSE, "refit", "healed", "refit, healed"]
    assert [point.config["heal_tokens"] for point in points if point.config] == [0, 2048, 2048]
    assert same(judged[2], judged[3]) and not same(judged[1], judged[2])
    assert not (tmp_path / "both" / WORK).exists()  # where they lay until they were healed
    lines = {line.get_label(): line for line in sweep_curve(points).axes[0].get_lines()}
    fused, healed = lines["refit"], lines["refit, healed"]
    assert fused.get_color() == healed.get_color() and [fused.get_linestyle(), healed.get_linestyle()] == ["-", "--"]
    [alone] = [point for point in run(tmp_path / "one", methods=["healed"], **heal) if point.method == "healed"]
    [shared] = [point for point in points if point.method == "healed"]
    assert without_seconds([shared]) == without_seconds([alone])
    assert shared.texts == points[-1].texts != points[1].texts


@pytest.mark.usefixtures("judged")
def test_a_base_is_known_by_its_content(
    make_base: Callable[..., str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In whatever folder."""
    settings: dict[str, Any] = {"num_fusions": [1], "methods": ["truncate"], "tasks": TASKS}
    settings["settings"] = {"perplexity_tokens": 0}
    base = Path(make_base())
    keys = [point.key for point in sweep(base, tmp_path / "out", **settings)]
    moved = base.rename(tmp_path / "base")
    assert keys == [point.key for point in sweep(moved, tmp_path / "out", **settings)]
    others = [point.key for point in sweep(make_base(hidden_act="gelu"), tmp_path / "out", **settings)]
    assert not {*keys} & {*others}
    assert "also holds 2 points of another base or other arguments; they stay, and tables" in caplog.text


def test_a_user_s_own_tables_stay_and_none_are_made_without_text(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.txt"):
        run(tmp_path / "out", calibration="none.txt")
    assert not (tmp_path / "out").exists()
    (tmp_path / "results.md").write_text("mine")
    with pytest.raises(ValueError, match=r"holds results\.md, but no results\.jsonl, so they may be yours; choose"):
        run(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["results.md"]
    assert (tmp_path / "results.md").read_text() == "mine"


def test_results_do_not_go_into_the_base(run: Run, base: str) -> None:
    before = sorted(Path(base).iterdir())
    with pytest.raises(ValueError, match="is the base; choose another folder"):
        run(base)
    assert sorted(Path(base).iterdir()) == before


def test_what_is_there_is_shown_again(whole: Whole, base: str, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, points = whole
    assert (folder / "results.md").read_text("utf-8") == markdown(points, base)
    before = (folder / RESULTS).read_bytes()
    options = ["--tasks", ",".join(TASKS), "--calibration", str(text)]
    options += "--perplexity-tokens 300 --calibration-tokens 1024".split()
    assert main(["sweep", base, str(folder), "--num-fusions", "1, 2", "--methods", "mka, truncate", *options]) == 0
    assert (folder / RESULTS).read_bytes() == before  # all of it was there
    printed = capsys.readouterr().out
    perplexities = [of_text["perplexity"] for point in points for of_text in point.texts.values()]
    assert all(f"{perplexity:.4g}" in printed for perplexity in perplexities)
    assert "standard deviation" in printed and "log perplexity" in printed


def test_tables_have_all_figures_and_marks_where_there_is_none() -> None:
    """Also as of a task that a newer lm-eval renamed, or of a model that has collapsed."""
    texts = {"docs": make_judged("docs", "prose", 10.0, 20.0, 0.25, 0.875).figures}
    points = [
        dataclasses.replace(make_point(DENSE, 0, 0.5), speedups={"prefill": 1.0, "decoding": 1.0}),
        dataclasses.replace(make_point("mka", 1, 0.25, 20.0), speedups={"prefill": 1.5, "decoding": 1.25}, texts=texts),
        make_point("mka", 4, math.nan, math.inf),
        make_point("refit", 1, 0.5, 11.0),
        make_point("refit", 4, 0.375, 12.0),
        with_scores(make_point("refit", 8, 0.5, 13.0), Score("acc", 0.5, None), "another"),
    ]
    check_golden("sweep.md", markdown(points, "/somewhere/model"))


@pytest.mark.parametrize(
    ("metric", "higher", "levels", "quantity", "worst"),
    [
        ("acc", True, {1: 0.6, 4: 0.5, 15: 0.55}, "task", (0.1, 1, 4)),
        ("acc", True, {1: 0.5, 4: 0.6}, "task", None),
        ("bits_per_byte", False, {1: 1.0, 2: 3.0}, "task", (2.0, 1, 2)),
        ("word_perplexity", True, {1: 20.0, 4: 400.0, 15: 100.0}, "log word_perplexity, task", (math.log(20), 1, 4)),
    ],
)
def test_stability_follows_from_the_scores(
    metric: str, higher: bool, levels: dict[int, float], quantity: str, worst: tuple[float, int, int] | None
) -> None:
    points = [with_scores(make_point("mka", n, 0, None), Score(metric, v, 0.01, higher)) for n, v in levels.items()]
    values = [math.log(value) if "perplexity" in metric else value for value in levels.values()]
    step = f"{worst[0]:.4f} ({worst[1]} -> {worst[2]})" if worst else "none"
    assert stability_rows(points) == [["mka", quantity, f"{np.std(values, ddof=1):.4f}", f"{np.ptp(values):.4f}", step]]
    assert sweep_curve(points).axes[0].get_yscale() == ("log" if "perplexity" in metric else "linear")
    assert stability_rows(points[:1]) == []


def with_scores(point: Point, score: Score, task: str = "task") -> Point:
    return dataclasses.replace(point, scores={task: score})


def test_what_is_missing_or_no_number_is_not_drawn(tmp_path: Path) -> None:
    points = [
        make_point(DENSE, 0, math.inf),
        make_point("mka", 1, math.nan, math.inf),
        with_scores(make_point("mka", 4, 0.5, 11.0), Score("acc", 0.5, None), "another"),
        make_point("refit", 8, math.nan, 12.0),
    ]
    results = Results(tmp_path, "a base", [point.key for point in points])
    for point in points:
        results.add(point)
    with no_warnings():
        results.complete()
        figure = sweep_curve(points)
    written = {"results.md", "curve.png", "curve.svg"}
    assert {file.name for file in tmp_path.iterdir()} == written | {RESULTS}
    assert stability_rows(points) == []
    # What is finite nowhere has no panel.
    assert [axis.get_ylabel() for axis in figure.axes] == ["acc, another", "perplexity, docs (log scale)"]
    [legend] = figure.legends  # above the panels
    assert {label.get_text() for label in legend.get_texts()} == {"mka", "refit", "dense", "infinite"}
