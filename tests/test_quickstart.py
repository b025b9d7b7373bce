"""The comparison that ends scripts/quickstart."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, make_texts

from lf_hf import fuse_checkpoint


def write_results(folder: Path, accuracy: float, group: str = "group", questions: int = 2) -> None:
    """What lm_eval writes about a group with one member, and about a group without a metric of its own."""
    values = {"alias": "-", "acc,none": accuracy, "acc_stderr,none": "N/A"}
    task = {"alias": "task", "sample_len": 3, "exact,none": 1, "exact_stderr,none": 0.5}
    written = {
        "results": {group: values, "part": values, "bare": {" ": " ", "alias": "bare"}, "a": task},
        "group_subtasks": {group: ["part"], "bare": ["a"]},
        "n-samples": {"part": {"effective": questions}, "a": {"effective": 1000}},
    }
    (folder / "of_lm_eval").mkdir(parents=True)
    (folder / "of_lm_eval" / "results_2026.json").write_text(json.dumps(written))


def test_a_base_and_its_fusions_stand_side_by_side(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"num_fusions": 1, "perplexity_tokens": 256, "calibration_tokens": 1024}
    settings |= {"low_memory": False, "calibration": make_texts(100), "calibration_length": 64}
    write_results(tmp_path / "dense", 0.25)
    reports, fused = [], []
    for n, method in enumerate(("truncate", "refit")):
        reports.append(fuse_checkpoint(base, tmp_path / method, method=method, **settings))
        write_results(tmp_path / "results" / method, 0.5 + n / 4)
        fused.append(f"{method}={tmp_path / method}")
    (tmp_path / "dense").rename(tmp_path / "results" / "dense")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("sys.argv", ["first_look.py", str(tmp_path / "results"), "--fused", *fused])
    runpy.run_path(f"{ROOT}/scripts/first_look.py", run_name="__main__")
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.replace(" (x ", "(x").partition("docs, ")[0].splitlines()]
    rows = {" ".join(words[:-3]): words[-3:] for words in lines if len(words) >= 3}
    assert rows[""] == ["dense", "truncate", "refit"] and rows["layers"] == ["5", "4", "4"]
    assert rows["group"] == ["0.250", "0.500", "0.750"] and rows["a"] == ["1.000"] * 3
    assert "group: 2 questions, too few" in printed and "a: 1000" not in printed
    for of_models in zip(*(report.perplexities for report in reports), strict=True):
        expected = [f"{judged.fused:.4g}(x{judged.ratio:.3g})" for judged in of_models]
        assert rows[f"perplexity, {of_models[0].name}"] == [f"{of_models[0].dense:.4g}", *expected]
        assert of_models[1].label in printed
    assert all(" ".join(told.prompt.split()) in printed for told in reports[1].continuations)


@pytest.mark.parametrize("argument", ["-o", "--output_path=out"])
def test_a_comparison_says_in_advance_that_it_needs_its_own_results(argument: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "BASE"}
    done = subprocess.run([ROOT / "scripts" / "quickstart", argument], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stderr.startswith(f"Without BASE, {argument} cannot be given")
