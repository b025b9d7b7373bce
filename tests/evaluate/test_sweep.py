"""Sweeps: what they measure, that they go on where they stopped, and what they make of the results."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import make_point, no_warnings
from conftest import make_texts, make_tokenizer
from lm_eval.tasks import TaskManager
from transformers import LlamaConfig

from lf_hf import FusedLlamaForCausalLM, FusionConfig, measure, tasks_path
from lf_hf.cli import _print, _table, main
from lf_hf.evaluate.curve import sweep_curve
from lf_hf.evaluate.evaluation import Evaluation
from lf_hf.evaluate.points import DENSE, HEALED, Point, Score, read_points
from lf_hf.evaluate.sweep import check_evaluation, is_llama_3_8b, sweep
from lf_hf.evaluate.tables import PUBLISHED, markdown, results_rows, stability, write_tables

TASKS = ["mmlu_sample_anatomy", "mmlu_sample_virology"]
SETTINGS = {"perplexity_tokens": 300, "calibration_tokens": 1024}


@pytest.fixture(scope="module", autouse=True)
def _one_task_index() -> Iterator[None]:
    """lm-eval takes seconds to look through all its tasks; here it does so once."""
    index = TaskManager(include_path=str(tasks_path()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lf_hf.evaluate.evaluation.TaskManager", lambda **_: index)
        yield


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lf_hf.evaluate.tables.missing_plot_packages", lambda: "none wanted")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(make_texts(400)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(base: str, text: Path) -> Callable[..., list[Point]]:
    def run_sweep(out: Path, **arguments: Any) -> list[Point]:
        given: dict[str, Any] = {"num_fusions": [2, 1], "methods": ["mka", "refit"], "tasks": TASKS}
        given |= {"calibration": text, "settings": SETTINGS}
        return sweep(base, out, **given | arguments)

    return run_sweep


@pytest.fixture(scope="module")
def whole(run: Callable[..., list[Point]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Point]]:
    """A sweep that nothing interrupted, and its folder."""
    folder = tmp_path_factory.mktemp("sweep")
    return folder, run(folder)


def without_seconds(points: list[Point]) -> list[dict[str, Any]]:
    return [{**vars(point), "seconds": None} for point in points]


def test_points_are_what_single_runs_give(whole: tuple[Path, list[Point]], base: str, text: Path) -> None:
    points = whole[1]
    assert [(p.method, p.num_fusions) for p in points] == [
        (DENSE, 0),
        *(("mka", 1), ("refit", 1), ("mka", 2), ("refit", 2)),
    ]
    for point in points[1:]:
        config = FusionConfig(point.num_fusions, point.method, perplexity_tokens=300, calibration_tokens=1024)
        model = FusedLlamaForCausalLM.from_pretrained_fused(base, config, calibration=text)
        report = model.fusion_report
        assert report is not None and len(report.perplexities) == 2
        assert point.perplexities == {info.name: info.fused for info in report.perplexities}
        assert point.divergences == {info.name: info.divergence for info in report.perplexities}
        assert point.agreements == {info.name: info.agreement for info in report.perplexities}
        assert points[0].perplexities == {info.name: info.dense for info in report.perplexities}
        assert (point.layers, point.parameters) == (report.layers_after, report.parameters_after)
        assert point.config == config.to_dict()
    assert Evaluation(TASKS).scores(model, make_tokenizer()) == points[-1].scores


@pytest.mark.usefixtures("no_pictures")
def test_by_groups_each_level_has_its_own(
    run: Callable[..., list[Point]], base: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Evaluation, "scores", lambda *_: {"task": Score("acc", 0.5, None)})
    settings = SETTINGS | {"selection": "groups"}
    points = run(tmp_path, num_fusions=[1, 2], methods=["refit"], settings=settings)
    for point in points[1:]:
        config = FusionConfig(point.num_fusions, "refit", **settings)  # type: ignore[arg-type]
        report = FusedLlamaForCausalLM.from_pretrained_fused(base, config, calibration=text).fusion_report
        assert report is not None
        assert point.perplexities == {info.name: info.fused for info in report.perplexities}


@pytest.mark.usefixtures("no_pictures")
def test_healed_points_are_beside_those_that_are_not(
    run: Callable[..., list[Point]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Evaluation, "scores", lambda *_: {"task": Score("acc", 0.5, None)})
    levels: dict[str, Any] = {"num_fusions": [1, 2], "methods": ["truncate"]}
    points = run(tmp_path / "healed", **levels, settings=SETTINGS | {"heal_tokens": 8192})
    assert [point.method for point in points] == [DENSE, *["truncate", "truncate, healed"] * 2]
    assert [(point.config or {}).get("heal_tokens") for point in points] == [None, *[0, 8192] * 2]
    assert points[2].divergences["docs"] < points[1].divergences["docs"]
    cached = {"heal_cache": tmp_path / "cache", "settings": SETTINGS | {"heal_tokens": 8192}}
    others = run(tmp_path / "healed", **levels, **cached)  # with the points that are not healed
    assert len(list((tmp_path / "cache").glob("*/text.json"))) == 1
    for healed, other in zip(points[2::2], others[2::2], strict=True):
        assert healed.key != other.key
        assert other.perplexities == pytest.approx(healed.perplexities, rel=0.05)
    assert others[:2] == points[:2]
    with pytest.raises(ValueError, match="heal_cache is for healed points"):
        run(tmp_path / "alone", **levels, heal_cache=tmp_path / "cache", settings=SETTINGS)
    unhealed = run(tmp_path / "alone", **levels, settings=SETTINGS)
    assert [point.perplexities for point in points[:2] + points[3:4]] == [point.perplexities for point in unhealed]


@pytest.mark.usefixtures("no_pictures")
def test_an_interrupted_sweep_goes_on_where_it_stopped(
    whole: tuple[Path, list[Point]], run: Callable[..., list[Point]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores, calls = Evaluation.scores, []

    def counted(self: Evaluation, *arguments: Any) -> dict[str, Score]:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return scores(self, *arguments)

    monkeypatch.setattr(Evaluation, "scores", counted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert len(read_points(tmp_path / "results.jsonl")) == 2
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 3
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"key": "cut sho')
    points = run(tmp_path)
    assert len(calls) == 3 + 3
    assert without_seconds(points) == without_seconds(whole[1])
    run(tmp_path)
    assert len(calls) == 6
    run(tmp_path, methods=["mka"], num_fusions=[1], limit=1)  # another question, so another answer
    assert len(calls) == 8


@pytest.mark.usefixtures("no_pictures")
def test_the_dense_model_is_measured_once(
    run: Callable[..., list[Point]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def count(name: str) -> None:
        original = getattr(measure, name)

        def counted(*arguments: Any) -> Any:
            calls.append(name)
            return original(*arguments)

        monkeypatch.setattr(measure, name, counted)

    count("sample_distances")
    count("calibration_sequences")
    monkeypatch.setattr(Evaluation, "scores", lambda *_: {"task": Score("acc", 0.5, None)})
    run(tmp_path)
    assert calls == ["sample_distances", "calibration_sequences"]


def test_tables_hold_every_point(whole: tuple[Path, list[Point]]) -> None:
    folder, points = whole
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("docs", "reasoning"):
        assert [float(row[f"perplexity, {name}"]) for row in rows] == [point.perplexities[name] for point in points]
        assert [float(row[f"agreement, {name}"]) for row in rows] == [point.agreements[name] for point in points]
    assert [float(row[TASKS[0]]) for row in rows] == [point.scores[TASKS[0]].value for point in points]
    document = (folder / "results.md").read_text(encoding="utf-8")
    assert document.count("\n| mka | ") == 2 + 4 and "| refit | 2 | 3 | 40.0% |" in document
    assert "Published" not in document
    assert (
        f"| {points[-1].divergences['docs']:.4g} |" in document
        and f"| {points[-1].agreements['docs']:.1%} |" in document
    )
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (folder / "curve.svg").read_text(encoding="utf-8")


def test_of_a_perplexity_task_less_is_better() -> None:
    levels = {1: 20.0, 4: 400.0, 15: 100.0}
    points = [
        dataclasses.replace(make_point("mka", n, 0.0, None), scores={"wikitext": Score("word_perplexity", value, None)})
        for n, value in levels.items()
    ]
    [found] = stability(points)
    assert found.quantity == "log word_perplexity, wikitext"
    assert found.worst_step == pytest.approx(math.log(20)) and (found.worst_from, found.worst_to) == (1, 4)
    assert found.range == pytest.approx(math.log(20))
    [axis] = sweep_curve(points, {}).axes
    assert axis.get_yscale() == "log"


def test_of_a_task_whose_metric_is_to_be_low_less_is_better() -> None:
    points = [
        dataclasses.replace(
            make_point("mka", n, 0.0, None), scores={"task": Score("bits_per_byte", value, None, False)}
        )
        for n, value in ((1, 1.0), (2, 3.0))
    ]
    [found] = stability(points)
    assert found.quantity == "task" and found.worst_step == 2.0


@pytest.mark.usefixtures("no_pictures")
def test_a_base_that_differs_in_its_middle_is_another_one(
    make_base: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = []

    def scores(*_: Any) -> dict[str, Score]:
        judged.append(1)
        return {"task": Score("acc", 0.5, None)}

    monkeypatch.setattr(Evaluation, "scores", scores)
    base = make_base(vocab_size=40_000)  # some megabytes
    settings: dict[str, Any] = {"methods": ["truncate"], "num_fusions": [1], "tasks": TASKS}
    settings["settings"] = {"perplexity_tokens": 0}
    sweep(base, tmp_path, **settings)
    file = Path(base, "model.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    sweep(base, tmp_path, **settings)
    assert len(judged) == 4


def test_stability_follows_from_the_table() -> None:
    levels = PUBLISHED["mka"]
    points = [make_point(DENSE, 0, 0.66), *(make_point("mka", n, value, math.exp(n)) for n, value in levels.items())]
    accuracy, perplexity = stability(points)
    values = np.array(list(levels.values()))
    assert accuracy.quantity == "mmlu_5shot"
    assert accuracy.deviation == pytest.approx(values.std(ddof=1)) and accuracy.range == pytest.approx(np.ptp(values))
    assert accuracy.worst_step == pytest.approx(0.6342 - 0.3)
    assert (accuracy.worst_from, accuracy.worst_to) == (13, 15)
    assert perplexity.quantity == "log perplexity, docs"
    assert perplexity.deviation == pytest.approx(np.std([1, 4, 11, 13, 15], ddof=1))
    assert perplexity.worst_step == pytest.approx(7)
    assert (perplexity.worst_from, perplexity.worst_to) == (4, 11)


def test_scores_that_are_missing_or_no_number_leave_the_tables(tmp_path: Path) -> None:
    """As of a task that a newer lm-eval renamed, or of a model that has collapsed."""
    points = [make_point(DENSE, 0, 0.66), make_point("mka", 1, math.nan), make_point("mka", 4, 0.5)]
    points.append(dataclasses.replace(make_point("mka", 8, 0.4), scores={"another": Score("acc", 0.5, None)}))
    write_tables(tmp_path, points, "a base", published=False)
    assert {file.name for file in tmp_path.iterdir()} == {"results.csv", "results.md", "curve.png", "curve.svg"}
    head, *rows = results_rows(points)
    assert head[5:7] == ["mmlu_5shot", "another"] and [row[6] for row in rows] == ["-", "-", "-", "0.5000"]
    assert [entry.quantity for entry in stability(points)] == ["log perplexity, docs"]


def test_the_dense_model_alone_gets_no_curve(tmp_path: Path) -> None:
    with no_warnings():
        write_tables(tmp_path, [make_point(DENSE, 0, 0.66)], "a base", published=True)
    assert {file.name for file in tmp_path.iterdir()} == {"results.csv", "results.md"}


@pytest.mark.parametrize("limit", [0, 2.5, math.inf, math.nan])
def test_a_limit_is_a_share_or_whole(limit: float) -> None:
    for fine in (None, 0.5, 1, 200.0):
        check_evaluation(fine, None, 1, None)
    with pytest.raises(ValueError, match="limit must be a number of questions, whole, or their share below 1, got"):
        check_evaluation(limit, None, 1, None)


@pytest.mark.parametrize("columns", ["80", "400", ""])
def test_numbers_and_names_of_a_table_stay_whole(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
        monkeypatch.setenv("FORCE_COLOR", "1")  # as a terminal
    points = [make_point("neural_alignment, healed", n, 0.5, 10.0**n) for n in (1, 4)]
    names = {f"text{n}": 1.5 for n in range(12)}
    head, *rows = results_rows([dataclasses.replace(point, perplexities=names) for point in points])
    _print(_table("a title that is longer " * 9 + "[than] the table", head, rows))
    printed = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    lines = [[cell.strip() for cell in re.split(" {2,}", line.strip())] for line in printed.splitlines()]
    assert all(row in lines for row in rows)
    assert {word for name in head for word in name.split()} <= set(printed.split())
    assert "the table" in printed and (head in lines) == (columns != "80")


def test_what_never_gets_worse_has_no_worst_step() -> None:
    points = [make_point("mka", 1, 0.5, None), make_point("mka", 4, 0.6, 3.0)]
    [accuracy] = stability(points)  # of perplexity one level is missing
    assert (accuracy.worst_step, accuracy.worst_from) == (0, None)
    assert stability(points[:1]) == []


def test_published_numbers_stand_beside_llama_3_8b_alone() -> None:
    shape = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, vocab_size=128256)
    assert is_llama_3_8b("meta-llama/Meta-Llama-3-8B", shape) and is_llama_3_8b("/models/base", shape)
    assert not is_llama_3_8b("meta-llama/Meta-Llama-3-8B-Instruct", shape)
    assert not is_llama_3_8b("meta-llama/Llama-2-7b-hf", LlamaConfig())
    points = [make_point(DENSE, 0, 0.66), make_point("mka", 4, 0.6)]
    points[0] = Point(**{**vars(points[0]), "layers": 32})
    assert "| mka | 4 | 0.5470 |" in markdown(points, "base", published=True)
    axis = sweep_curve(points, PUBLISHED).axes[0]
    lines: dict[str, Any] = {str(line.get_label()): line for line in axis.get_lines()}
    assert list(lines["mka, published"].get_xdata()) == pytest.approx([100 * n / 32 for n in PUBLISHED["mka"]])
    assert list(lines["mka, published"].get_ydata()) == list(PUBLISHED["mka"].values())
    others = [dataclasses.replace(point, scores={"mmlu_pro": point.scores["mmlu_5shot"]}) for point in points]
    for figure in (sweep_curve(points, {}), sweep_curve(others, PUBLISHED)):
        assert not any("published" in str(line.get_label()) for line in figure.axes[0].get_lines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": []}, "tasks is empty"),
        ({"num_fusions": [1, 9]}, "num_fusions must be 1 to 4"),
        ({"methods": ["mka", "mkaa"]}, "did you mean 'mka'"),
        ({"settings": {"ratio_beta": "x"}}, "ratio_beta must be"),
        ({"calibration": "none.txt"}, "'none.txt' does not exist"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(
    run: Callable[..., list[Point]], tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_pictures")
def test_a_base_on_the_hub(
    run: Callable[..., list[Point]], base: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Evaluation, "scores", lambda *_: {"task": Score("acc", 0.5, None)})
    shutil.copytree(base, tmp_path / "models--you--model" / "snapshots" / "0")
    (tmp_path / "models--you--model" / "refs").mkdir()
    (tmp_path / "models--you--model" / "refs" / "main").write_text("0")
    settings: dict[str, Any] = {"num_fusions": [1], "methods": ["truncate"], "tasks": TASKS, "settings": SETTINGS}
    there = sweep("you/model", tmp_path / "out", **settings, cache_dir=str(tmp_path))
    here = run(tmp_path / "here", num_fusions=[1], methods=["truncate"], calibration=None)
    assert [point.key for point in there] == [point.key for point in here]
    assert [point.perplexities for point in there] == [point.perplexities for point in here]


def test_a_user_s_own_tables_stay(run: Callable[..., list[Point]], tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text("mine")
    with pytest.raises(ValueError, match=r"holds results\.csv, but no results\.jsonl, so they may be yours; choose"):
        run(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["results.csv"]
    assert (tmp_path / "results.csv").read_text() == "mine"


def test_healed_points_are_a_dashed_line_of_their_method_s_colour() -> None:
    names = [method + healed for method in ("neural_alignment", "mka", "truncate", "refit") for healed in ("", HEALED)]
    points = [make_point(DENSE, 0, 0.5), *(make_point(name, 1, 0.4) for name in names)]
    lines = {str(line.get_label()): line for line in sweep_curve(points, {}).axes[0].get_lines()}
    for name in names[::2]:
        assert lines[name].get_color() == lines[name + HEALED].get_color()
        assert (lines[name].get_linestyle(), lines[name + HEALED].get_linestyle()) == ("-", "--")
    assert len({lines[name].get_color() for name in names}) == 4


def test_a_file_of_something_else_is_named(run: Callable[..., list[Point]], tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text(json.dumps({"accuracy": 1}) + "\n")
    with pytest.raises(ValueError, match=r"Line 1 of .*results\.jsonl' is no result of a sweep"):
        run(tmp_path)


def test_command(
    whole: tuple[Path, list[Point]], base: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(whole[0], tmp_path / "out")
    options = ["--methods", "mka, refit", "--tasks", ",".join(TASKS), "--calibration", text]
    for name, value in SETTINGS.items():
        options += [f"--{name.replace('_', '-')}", value]
    before = (out / "results.jsonl").read_bytes()
    assert main([str(a) for a in ("sweep", base, out, "--num-fusions", "1, 2", *options)]) == 0
    assert (out / "results.jsonl").read_bytes() == before  # all of it was there
    printed = capsys.readouterr().out
    for point in whole[1]:
        assert all(f"{value:.4g}" in printed for value in point.perplexities.values())
    assert "standard deviation" in printed and "log perplexity" in printed
