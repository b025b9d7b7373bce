"""The comparison that ends scripts/quickstart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from lf_hf import FusedLlamaForCausalLM


def test_a_base_and_its_fusions_stand_side_by_side(base: str, tmp_path: Path) -> None:
    folders = {}
    settings: dict[str, Any] = {
        "num_fusions": 1,
        "perplexity_tokens": 256,
        "sample_length": 32,
        "calibration_tokens": 1024,
    }
    for method in ("truncate", "refit"):
        model = FusedLlamaForCausalLM.from_pretrained_fused(base, method=method, **settings)
        folders[method] = tmp_path / "fused" / method
        model.save_pretrained(folders[method])
    results = tmp_path / "results"
    for n, name in enumerate(["dense", *folders]):
        (results / name / "of_lm_eval").mkdir(parents=True)
        values = {"alias": "mmlu_sample", "acc,none": 0.25 + n / 100, "acc_stderr,none": "N/A"}
        written = {"results": {"mmlu_sample": values, "part": values}, "group_subtasks": {"mmlu_sample": ["part"]}}
        (results / name / "of_lm_eval" / "results_2026.json").write_text(json.dumps(written))

    fused = [f"{name}={folder}" for name, folder in folders.items()]
    done = subprocess.run(
        [sys.executable, "scripts/first_look.py", str(results), "--base", base, "--fused", *fused],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "100"},
    )
    assert done.returncode == 0, done.stderr
    text, _, continuations = done.stdout.partition("How each goes on from:")
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert lines["dense"].split()[1] == "5"
    assert lines["truncate"].split()[1] == lines["refit"].split()[1] == "4"
    report = FusedLlamaForCausalLM.from_pretrained(folders["refit"]).fusion_report
    assert len(report.perplexities) == 2
    for judged in report.perplexities:
        assert f"{judged.dense:.4g}" in lines["dense"] and f"{judged.fused:.4g}" in lines["refit"]
        assert judged.label in text
    assert "0.250" in lines["dense"] and "0.260" in lines["truncate"] and "0.270" in lines["refit"]
    assert [line.split()[0] for line in continuations.splitlines()[1:4]] == ["dense", *folders]


def test_groups_without_a_metric_show_their_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from first_look import main_scores

    of_task = {"alias": "task", "sample_len": 3, "exact,none": 1, "exact_stderr,none": 0.5}
    results = {"group": {" ": " ", "alias": "group"}, "a": of_task, "b": of_task, "alone": of_task}
    written = {"results": results, "group_subtasks": {"group": ["a", "b"], "alone": []}}
    (tmp_path / "results_2026.json").write_text(json.dumps(written))
    assert main_scores(tmp_path) == {"a": 1, "b": 1, "alone": 1}


@pytest.mark.parametrize("argument", ["-o", "--output_path=out"])
def test_a_comparison_says_in_advance_that_it_needs_its_own_results(argument: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "BASE"}
    done = subprocess.run([ROOT / "scripts" / "quickstart", argument], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stderr.startswith(f"Without BASE, {argument} cannot be given")
