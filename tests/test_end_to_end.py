"""The main job on a real checkpoint and real MMLU questions, through the real command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GGUF, ROOT
from transformers import AutoConfig

import lf_hf

TASK = "mmlu_5shot_anatomy"  # real prompts of 5 shots, not long ones


def test_mmlu_with_four_fusions(gguf_folder: str, mmlu_dir: Path, tmp_path: Path) -> None:
    settings = {"num_fusions": 4, "perplexity_tokens": 256, "sample_length": 64, "fused_dir": tmp_path / "fused"}
    source = {"pretrained": gguf_folder, "gguf_file": GGUF.name, **settings}
    model_args = ",".join(f"{name}={value}" for name, value in source.items())
    command = [sys.executable, "-m", "lm_eval", "--model", "fused_llama", "--model_args", model_args, "--limit", "1"]
    data = json.dumps({"mmlu_dir": str(mmlu_dir)})
    command += ["--tasks", TASK, "--include_path", str(lf_hf.tasks_path()), "--metadata", data]
    command += ["--output_path", str(tmp_path / "results")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert "|anatomy|" in done.stdout.replace(" ", "")

    [results] = tmp_path.glob("results/*/results_*.json")
    config = json.loads(results.read_text())["config"]
    fusion = config["fusion"]
    assert fusion["pairs"] == [[28, 29], [27, 28], [26, 27], [25, 26]]
    assert all(i + j == pytest.approx(1) and 0.5 < i < 0.74 for i, j in fusion["ratios"])
    assert fusion["layers"] == [30, 26]
    before, after = fusion["parameters"]
    assert (before, after) == (134_515_008, 120_354_624) and config["model_num_parameters"] == after
    assert all(info["dense"] < info["fused"] for info in fusion["perplexities"])

    # What it kept is no GGUF any more.
    kept = AutoConfig.from_pretrained(tmp_path / "fused")
    assert kept.model_type == "fused_llama" and kept.num_hidden_layers == 26
    assert not hasattr(kept, "quantization_config")
