"""Sweeps: what they measure, that they go on where they stopped, and what they make of the results."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from builders import make_point, no_warnings
from conftest import ROOT, make_texts, make_tokenizer
from lm_eval.tasks import TaskManager
from run_faults import Answers
from transformers import AutoModelForCausalLM

import lf_hf
from lf_hf import FusionConfig
from lf_hf.cli import main
from lf_hf.evaluate.curve import sweep_curve
from lf_hf.evaluate.evaluation import Evaluation
from lf_hf.evaluate.points import DENSE, HEALED, RESULTS, Point, Score, read_points
from lf_hf.evaluate.results import Results
from lf_hf.evaluate.sweep import sweep
from lf_hf.evaluate.tables import results_rows, stability_rows
from lf_hf.settings import METHODS

TASKS = ["mmlu_sample_anatomy", "mmlu_sample_virology"]
SETTINGS: dict[str, Any] = {"perplexity_tokens": 300, "calibration_tokens": 1024}


@pytest.fixture(scope="module", autouse=True)
def _one_task_index() -> Iterator[None]:
    """lm-eval takes seconds to look through all its tasks; here are ours alone."""
    index = TaskManager(include_path=str(lf_hf.tasks_path()), include_defaults=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lf_hf.evaluate.evaluation.TaskManager", lambda **_: index)
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(make_texts(150)), encoding="utf-8")
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


class Kept(Answers):
    """Answers that stand for lm-eval's, and keep the models."""

    models: ClassVar[list[Any]] = []
    most = 99  # after which there is an interruption

    def scores(self, model: Any, tokenizer: Any) -> dict[str, Score]:
        if len(self.models) == self.most:
            raise KeyboardInterrupt
        self.models.append(model)
        return super().scores(model, tokenizer)


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that are judged by such, without pictures."""
    Kept.models.clear()
    monkeypatch.setattr("lf_hf.evaluate.evaluation.Evaluation", Kept)
    monkeypatch.setattr("lf_hf.evaluate.results.missing_plot_packages", lambda: "none wanted")
    return Kept.models


def without_seconds(points: list[Point]) -> list[dict[str, Any]]:
    return [{**vars(point), "seconds": None} for point in points]


# What is measured


@pytest.mark.parametrize(
    ("methods", "settings"),
    [
        ([method for method in METHODS if method != "healed"], {}),  # refit chooses groups anew at each level
        (["refit"], {"selection": "least_influence"}),
        (["mka"], {"selection": "least_influence", "refit": "down_proj"}),
    ],
)
def test_points_are_what_single_runs_give(
    methods: list[str],
    settings: dict[str, Any],
    run: Callable[..., list[Point]],
    judged: list[Any],
    base: str,
    text: Path,
    tmp_path: Path,
) -> None:
    """Bit for bit, though a level goes on from the one below; and the base stays as it is."""
    settings = {"perplexity_tokens": 100, "calibration_tokens": 1024} | settings
    dense, *fused = run(tmp_path, methods=methods, settings=settings)
    assert [(point.num_fusions, point.method) for point in (dense, *fused)] == [
        (0, DENSE),
        *itertools.product((1, 2), methods),
    ]
    models = {(model.fusion_report.config["method"], len(model.model.layers)): model for model in judged[1:]}
    for point in fused:
        config = FusionConfig(point.num_fusions, point.method, **settings)
        alone, model = lf_hf.from_pretrained_fused(base, config, calibration=text), models[point.method, point.layers]
        assert equal(model, alone) and alone.fusion_report is not None
        report = dataclasses.replace(alone.fusion_report, seconds={})
        assert report == dataclasses.replace(model.fusion_report, seconds={}) and len(report.perplexities) == 2
        assert point.perplexities == {info.name: info.fused for info in report.perplexities}
        assert point.divergences == {info.name: info.divergence for info in report.perplexities}
        assert point.agreements == {info.name: info.agreement for info in report.perplexities}
        assert dense.perplexities == {info.name: info.dense for info in report.perplexities}
        assert (point.layers, point.parameters) == (report.layers_after, report.parameters_after)
        assert point.config == config.to_dict()
    assert equal(judged[0], AutoModelForCausalLM.from_pretrained(base)) and judged[0].config.num_hidden_layers == 5


def equal(model: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_scores_are_those_of_lm_eval(whole: tuple[Path, list[Point]], base: str, text: Path) -> None:
    model = lf_hf.from_pretrained_fused(base, FusionConfig(2, "refit", **SETTINGS), calibration=text)
    assert Evaluation(TASKS).scores(model, make_tokenizer()) == whole[1][-1].scores


@pytest.mark.usefixtures("judged")
def test_healed_points_are_beside_those_that_are_not(run: Callable[..., list[Point]], tmp_path: Path) -> None:
    levels: dict[str, Any] = {"num_fusions": [1], "methods": ["truncate"]}
    heal = {"settings": SETTINGS | {"heal_tokens": 4096}}
    points = run(tmp_path / "healed", **levels, **heal)
    assert [point.method for point in points] == [DENSE, "truncate", "truncate, healed"]
    assert points[2].divergences["docs"] < points[1].divergences["docs"]
    others = run(tmp_path / "healed", **levels, **heal, heal_cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*/text.json"))) == 1
    assert others[:2] == points[:2] and others[2].key != points[2].key
    assert others[2].perplexities == pytest.approx(points[2].perplexities, rel=0.05)
    with pytest.raises(ValueError, match="heal_cache is for healed points"):
        run(tmp_path / "alone", **levels, heal_cache=tmp_path / "cache")


# Interruptions, and several processes


def test_an_interrupted_sweep_goes_on_where_it_stopped(
    run: Callable[..., list[Point]], judged: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = {"methods": ["truncate", "mka"]}
    whole = run(tmp_path / "whole", **quick)
    assert len(judged) == 5

    with monkeypatch.context() as patch:
        patch.setattr(Kept, "most", 7)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", **quick)
    assert len(read_points(tmp_path / "out" / RESULTS)) == 2
    assert len((tmp_path / "out" / "results.csv").read_text().splitlines()) == 3
    with (tmp_path / "out" / RESULTS).open("ab") as file:
        file.write(b'{"key": "01')  # a line that was cut short
    points = run(tmp_path / "out", **quick)
    assert len(judged) == 5 + 2 + 3 and without_seconds(points) == without_seconds(whole)
    assert run(tmp_path / "out", **quick) == points and len(judged) == 10
    run(tmp_path / "out", methods=["mka"], num_fusions=[1], limit=1)  # another question, so another answer
    assert len(judged) == 12


@pytest.mark.usefixtures("_one_task_index")
def test_a_base_that_differs_in_its_middle_is_another_one(
    make_base: Callable[..., str], tmp_path: Path, judged: list[Any]
) -> None:
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


@pytest.mark.usefixtures("judged")
def test_the_base_in_a_hub_s_cache_is_the_same_base(run: Callable[..., list[Point]], base: str, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "models--you--model" / "snapshots" / "0")
    (tmp_path / "models--you--model" / "refs").mkdir()
    (tmp_path / "models--you--model" / "refs" / "main").write_text("0")
    settings: dict[str, Any] = {"num_fusions": [1], "methods": ["truncate"], "tasks": TASKS, "settings": SETTINGS}
    there = sweep("you/model", tmp_path / "out", **settings, cache_dir=str(tmp_path))
    here = run(tmp_path / "here", num_fusions=[1], methods=["truncate"], calibration=None)
    assert [point.key for point in there] == [point.key for point in here]


def test_the_processes_of_a_launch_share_the_points_and_what_is_missing_is_made_later(
    make_base: Callable[..., str], text: Path, tmp_path: Path, judged: list[Any]
) -> None:
    options = (
        "--num-fusions 1,2 --methods truncate,refit --selection least_influence --tasks task --perplexity-tokens 100"
    )
    options += f" --calibration-tokens 1024 --calibration {text}"
    words = ["sweep", make_base(num_hidden_layers=6), str(tmp_path / "out"), *options.split()]
    launch = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node 2".split()]
    environment = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(ROOT / "tests" / "run_swept.py"), *words],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    names = ["dense 6", *(f"{method} {layers}" for method in ("refit", "truncate") for layers in (4, 5))]
    judgements = re.findall(r"judged (\w+ \d) in process ([01])", done.stdout)
    assert sorted(name for name, _ in judgements) == names and {process for _, process in judgements} == {"0", "1"}
    assert done.stdout.count("Stability") == 1  # one speaks
    assert {file.name for file in (tmp_path / "out").iterdir()} == {RESULTS, "results.csv", "results.md"}

    whole = read_points(tmp_path / "out" / RESULTS)
    lines = (tmp_path / "out" / RESULTS).read_bytes().splitlines(keepends=True)
    kept = b"".join(line for line in lines if b'"method": "refit"' not in line)  # as a process leaves it that dies
    (tmp_path / "out" / RESULTS).write_bytes(kept)
    assert main(words) == 0 and len(judged) == 2
    assert (tmp_path / "out" / RESULTS).read_bytes().startswith(kept)
    mended = read_points(tmp_path / "out" / RESULTS)
    assert without_seconds([mended[key] for key in whole]) == without_seconds([*whole.values()])


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": []}, "tasks must be a list with one entry at least"),
        ({"num_fusions": [1, 9]}, "num_fusions must be 1 to 4"),
        ({"methods": ["mka", "mkaa"]}, "did you mean 'mka'"),
        ({"settings": {"ratio_beta": "x"}}, "ratio_beta must be"),
        ({"calibration": "none.txt"}, "none.txt"),
        ({"limit": 2.5}, "limit must be a number of questions, whole, or their share below 1, got 2.5"),
        ({"limit": 0}, "limit must be a number of questions"),
        ({"limit": math.nan}, "limit must be a number of questions"),
        ({"batch_size": "many"}, "batch_size must be an integer of at least 1, auto, or auto:N, got 'many'"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(
    run: Callable[..., list[Point]], tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        run(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_user_s_own_tables_stay(run: Callable[..., list[Point]], tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text("mine")
    with pytest.raises(ValueError, match=r"holds results\.csv, but no results\.jsonl, so they may be yours; choose"):
        run(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["results.csv"]
    assert (tmp_path / "results.csv").read_text() == "mine"


# Tables and the picture


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
    last = points[-1]
    assert f"| {last.divergences['docs']:.4g} |" in document and f"| {last.agreements['docs']:.1%} |" in document
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (folder / "curve.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("score", "levels", "quantity", "worst"),
    [
        (Score("acc", 0.0, 0.01), {1: 0.6, 4: 0.5, 15: 0.55}, "task", (0.1, 1, 4)),
        (Score("acc", 0.0, 0.01), {1: 0.5, 4: 0.6}, "task", (0.0, None, None)),
        (Score("bits_per_byte", 0.0, None, False), {1: 1.0, 2: 3.0}, "task", (2.0, 1, 2)),
        (
            Score("word_perplexity", 0.0, None),
            {1: 20.0, 4: 400.0, 15: 100.0},
            "log word_perplexity, task",
            (math.log(20), 1, 4),
        ),
    ],
)
def test_stability_follows_from_the_scores(
    score: Score, levels: dict[int, float], quantity: str, worst: tuple[Any, ...]
) -> None:
    points = [
        dataclasses.replace(
            make_point("mka", level, 0.0, None), scores={"task": dataclasses.replace(score, value=value)}
        )
        for level, value in levels.items()
    ]
    values = [math.log(value) if score.is_perplexity else value for value in levels.values()]
    step = f"{worst[0]:.4f} ({worst[1]} -> {worst[2]})" if worst[0] else "none"
    spread = [f"{np.std(values, ddof=1):.4f}", f"{np.ptp(values):.4f}"]
    assert stability_rows(points) == [["mka", quantity, *spread, step]]
    assert sweep_curve(points).axes[0].get_yscale() == ("log" if score.is_perplexity else "linear")
    assert stability_rows(points[:1]) == []


def test_what_is_missing_or_no_number_leaves_the_tables(tmp_path: Path) -> None:
    """As of a task that a newer lm-eval renamed, or of a model that has collapsed."""
    points = [
        dataclasses.replace(make_point(DENSE, 0, math.inf, 10.0)),
        dataclasses.replace(make_point("mka", 1, math.nan, math.inf)),
        dataclasses.replace(make_point("mka", 4, 0.5, 11.0), scores={"another": Score("acc", 0.5, None)}),
        make_point("refit", 8, math.nan, 12.0),
    ]
    results = Results(tmp_path, "a base", [point.key for point in points])
    with no_warnings():
        for point in points:
            results.add(point)
        results.complete()
        figure = sweep_curve(points)
    assert {file.name for file in tmp_path.iterdir()} == {
        RESULTS,
        "results.csv",
        "results.md",
        "curve.png",
        "curve.svg",
    }
    head, *rows = results_rows(points)
    assert head[5:8] == ["mmlu_5shot", "another", "perplexity, docs"]
    assert [row[6:8] for row in rows] == [["-", "10"], ["-", "inf"], ["0.5000", "11"], ["-", "12"]]
    assert stability_rows(points) == []
    # What is finite nowhere has no panel.
    assert [axis.get_ylabel() for axis in figure.axes] == ["acc, another", "perplexity, docs (log scale)"]
    [legend] = figure.legends  # above the panels
    assert {label.get_text() for label in legend.get_texts()} == {"mka", "refit", "dense", "infinite"}


def test_the_dense_model_alone_gets_no_curve(tmp_path: Path) -> None:
    results = Results(tmp_path, "a base", ["dense0"])
    with no_warnings():
        results.add(make_point(DENSE, 0, 0.66))
        results.complete()
    assert {file.name for file in tmp_path.iterdir()} == {RESULTS, "results.csv", "results.md"}


def test_healed_points_are_a_dashed_line_of_their_method_s_colour() -> None:
    names = [method + healed for method in ("neural_alignment", "mka", "truncate", "refit") for healed in ("", HEALED)]
    points = [make_point(DENSE, 0, 0.5), *(make_point(name, 1, 0.4) for name in names)]
    lines = {str(line.get_label()): line for line in sweep_curve(points).axes[0].get_lines()}
    for name in names[::2]:
        assert lines[name].get_color() == lines[name + HEALED].get_color()
        assert (lines[name].get_linestyle(), lines[name + HEALED].get_linestyle()) == ("-", "--")
    assert len({lines[name].get_color() for name in names}) == 4


def test_command(
    whole: tuple[Path, list[Point]], base: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(whole[0], tmp_path / "out")
    options = ["--methods", "mka, refit", "--tasks", ",".join(TASKS), "--calibration", text]
    for name, value in SETTINGS.items():
        options += [f"--{name.replace('_', '-')}", value]
    before = (out / RESULTS).read_bytes()
    assert main([str(a) for a in ("sweep", base, out, "--num-fusions", "1, 2", *options)]) == 0
    assert (out / RESULTS).read_bytes() == before  # all of it was there
    printed = capsys.readouterr().out
    for point in whole[1]:
        assert all(f"{value:.4g}" in printed for value in point.perplexities.values())
    assert "standard deviation" in printed and "log perplexity" in printed
