"""The main job on a real checkpoint and real MMLU questions, through the real command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GGUF, ROOT
from lm_eval.api.instance import Instance

import lf_hf
from lf_hf.evaluate.lm_eval_model import FusedLM

TASK = "mmlu_5shot_anatomy"  # real prompts of 5 shots, not long ones


def test_mmlu_with_four_fusions(gguf_folder: str, mmlu_dir: Path, tmp_path: Path) -> None:
    settings = {"num_fusions": 4, "perplexity_tokens": 256, "sample_length": 64, "fused_dir": tmp_path / "fused"}
    source = {"pretrained": gguf_folder, "gguf_file": GGUF.name, **settings}
    model_args = ",".join(f"{name}={value}" for name, value in source.items())
    command = [sys.executable, "-m", "lm_eval", "--model", "fused_llama", "--model_args", model_args, "--limit", "1"]
    data = json.dumps({"mmlu_dir": str(mmlu_dir)})
    command += ["--tasks", TASK, "--include_path", str(lf_hf.tasks_path()), "--metadata", data, "--log_samples"]
    command += ["--output_path", str(tmp_path / "results")]
    on_the_cpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # as what it is compared with below
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=on_the_cpu, timeout=1200)
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

    # What it kept is no GGUF any more; opened by itself it answers alike.
    lm = FusedLM(str(tmp_path / "fused"), device="cpu")
    assert lm.config.model_type == "llama" and not hasattr(lm.config, "quantization_config")
    assert len(lm.model.model.layers) == 26 and lm.model.num_parameters() == after
    [samples] = tmp_path.glob(f"results/*/samples_{TASK}_*.jsonl")
    first = json.loads(samples.read_text(encoding="utf-8").splitlines()[0])
    requests = [tuple(first["arguments"][f"gen_args_{n}"][f"arg_{k}"] for k in (0, 1)) for n in range(4)]
    again = lm.loglikelihood([Instance("loglikelihood", {}, request, n) for n, request in enumerate(requests)])
    assert [value for value, _ in again] == pytest.approx([float(said[0][0]) for said in first["resps"]], abs=1e-4)
