"""Processes that a launcher starts share one fusion, and end with what one process alone would have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from conftest import ROOT, make_texts
from run_launched import SETTINGS

from lf_hf import FusedLlamaForCausalLM


def launched(count: int, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a program in some processes on the CPU, as torchrun starts them."""
    environment = {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    return subprocess.run(
        [*torchrun, *words], capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )


def test_processes_together_find_what_one_does() -> None:
    """Three of them, so that shares are not even."""
    done = launched(3, str(ROOT / "tests" / "run_launched.py"), *SETTINGS)
    results = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert [result["name"] for result in results] == ["refit", *SETTINGS], done.stderr  # refit in memory and on disk
    for result in results:
        assert result["processes"] == 3 and result["digests"] == 1 and result["same choices"], result
        assert result["weights"] < 1e-6 and result["perplexities"] < 1e-6, result


def test_when_one_process_dies_the_others_say_so_and_end() -> None:
    done = launched(2, str(ROOT / "tests" / "run_launched.py"), "dies")
    assert done.returncode
    assert "LostProcessError: Another process of this launch has ended" in done.stderr or "SIGTERM" in done.stderr


def test_the_command_writes_and_speaks_once(make_base: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n\n".join(make_texts(100)))
    out, base = tmp_path / "out", make_base(num_hidden_layers=6)
    options = "--method refit --num-fusions 2 --low-memory --calibration-tokens 2048 --calibration-length 64".split()
    words = ["-m", "lf_hf", "fuse", base, str(out), *options, "--calibration", str(tmp_path / "texts.txt")]
    done = launched(2, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bytes on disk") == 1
    model = FusedLlamaForCausalLM.from_pretrained(out)
    assert model.config.num_hidden_layers == 4 and model.fusion_report.layers_before == 6

    refused = launched(2, *words, "--ridge", "0")
    assert refused.returncode and refused.stderr.count("ridge must be") == 1
