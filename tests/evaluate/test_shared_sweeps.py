"""Processes that run one sweep at the same time share its points, whatever happens to one of them."""

from __future__ import annotations

import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import pytest
from conftest import ROOT, make_texts
from run_faults import Answers

from lf_hf.cli import main
from lf_hf.evaluate import evaluation
from lf_hf.evaluate.points import RESULTS, Score, read_points

POINTS = {"dense 6", *(f"{method} {layers}" for method in ("truncate", "refit") for layers in (5, 4))}


@pytest.fixture
def words(make_base: Callable[..., str], tmp_path: Path) -> list[str]:
    (tmp_path / "text.txt").write_text("\n\n".join(make_texts(400)))
    options = "--num-fusions 1,2 --methods truncate,refit --tasks task --perplexity-tokens 100"
    options += " --calibration-tokens 1024 --calibration"
    return [
        "sweep",
        make_base(num_hidden_layers=6),
        str(tmp_path / "out"),
        *options.split(),
        str(tmp_path / "text.txt"),
    ]


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that this process judges, by answers that stand for lm-eval's here too."""
    models: list[Any] = []

    class Kept(Answers):
        def scores(self, model: Any, tokenizer: Any) -> dict[str, Score]:
            models.append(model)
            return super().scores(model, tokenizer)

    monkeypatch.setattr(evaluation, "Evaluation", Kept)
    monkeypatch.setattr("lf_hf.evaluate.tables.missing_plot_packages", lambda: "no pictures")
    return models


def start(folder: Path, end: str, words: list[str], rank: int | None = None, launcher: str = "") -> Popen[str]:
    environment = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    if rank is not None:
        environment |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    program = [sys.executable, *launcher.split(), str(ROOT / "tests" / "run_swept.py"), str(folder), end, *words]
    return Popen(program, stdout=PIPE, stderr=PIPE, text=True, env={**os.environ, **environment})


def ended(process: Popen[str]) -> tuple[int, list[str], str]:
    """Exit code, the models that it judged, and all that it said."""
    out, err = process.communicate(timeout=240)
    judged = [line.split(" ", 1)[1] for line in out.splitlines() if line.startswith(("0 ", "1 ", "None "))]
    return process.returncode, judged, out + err


def results(folder: Path) -> list[dict[str, Any]]:
    points = read_points(folder / "out" / RESULTS).values()
    return sorted(
        ({**vars(point), "seconds": None} for point in points), key=lambda point: (point["method"], point["layers"])
    )


def test_two_processes_share_the_points_of_one(words: list[str], judged: list[Any], tmp_path: Path) -> None:
    assert main(words) == 0 and len(judged) == len(POINTS)
    methods = [point.method for point in read_points(tmp_path / "out" / RESULTS).values()]
    assert len([*itertools.groupby(methods)]) == 3  # one method after the other
    alone = results(tmp_path)
    assert {f"{point['method']} {point['layers']}" for point in alone} == POINTS
    (tmp_path / "out").rename(tmp_path / "alone")

    first, second = map(ended, [start(tmp_path, "lives", words, rank) for rank in (0, 1)])
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert first[1] and second[1] and Counter([*first[1], *second[1]]) == Counter(POINTS)
    assert results(tmp_path) == alone
    for name in ("results.csv", "results.md"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "alone" / name).read_text()
    assert "Stability" in first[2] and "Stability" not in second[2]  # one speaks
    assert {file.name for file in (tmp_path / "out").iterdir()} == {RESULTS, "results.csv", "results.md"}


def test_what_a_killed_process_was_at_is_made_by_the_other(words: list[str], tmp_path: Path) -> None:
    first, second = map(ended, [start(tmp_path, "dies", words, rank) for rank in (0, 1)])
    assert (first[0], second[0]) == (0, -9), first[2]
    lost = second[1][-1]
    assert Counter([*first[1], *second[1]]) == Counter([*POINTS, lost])
    assert len(results(tmp_path)) == len(POINTS)


def test_a_launch_that_ends_early_names_what_is_missing_and_goes_on_when_run_again(
    words: list[str], judged: list[Any], tmp_path: Path
) -> None:
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2"
    code, _, said = ended(start(tmp_path, "dies", words, launcher=torchrun))
    missing = len(POINTS) - len(results(tmp_path))
    assert code and missing
    [sentence] = [line for line in said.splitlines() if "Not there yet: " in line]
    assert "refit at 2" in sentence and "run the sweep again" in sentence
    there = (tmp_path / "out" / RESULTS).read_bytes()
    assert main(words) == 0 and len(judged) == missing and len(results(tmp_path)) == len(POINTS)
    assert (tmp_path / "out" / RESULTS).read_bytes().startswith(there)
