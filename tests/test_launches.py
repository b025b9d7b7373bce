"""Of the processes that a launcher starts the first one fuses, all heal and evaluate, and one model comes out."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from conftest import make_texts, run_program, save_base, tensors
from run_launched import FITTING, TOKENS

import lf_hf
from lf_hf import FusionReport
from lf_hf.cli import main

ZERO = {"zero_optimization": {"stage": 3}, "gradient_clipping": "auto"}
ZERO |= dict.fromkeys(["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"], "auto")


class Launch(NamedTuple):
    folder: Path
    out: str
    err: str

    @property
    def results(self) -> dict[str, Any]:
        return dict(json.loads(line[7:]) for line in self.out.splitlines() if line.startswith("RESULT "))


def launched(folder: Path, *given: str) -> Launch:
    """Run `run_launched.py` in two processes."""
    done = run_program("run_launched.py", folder, *given, processes=2)
    assert not done.returncode, done.stderr
    return Launch(folder, done.stdout, done.stderr)


def healing(folder: Path, *given: str) -> Launch:
    """Heal in two processes, and in one, what one has fused."""
    base, text = save_base(folder / "base"), folder / "texts.txt"
    text.write_text("\n\n".join(make_texts(1200, seed=5)))
    lf_hf.fuse_checkpoint(base, folder / "fused", method="refit", **FITTING, calibration=str(text))
    launch = launched(folder, "heal", *given)
    lf_hf.heal(folder / "fused", folder / "alone", base=base, text=str(text), tokens=TOKENS)
    return launch


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return healing(tmp_path_factory.mktemp("launch"))


def test_the_first_process_writes_and_speaks_for_all(launch: Launch) -> None:
    """Also where it fails: the others end with it."""
    assert launch.results["codes"] == [2, 1, 0, 1], launch.err
    assert launch.out.count("bytes on disk") == 1
    for sentence in ("ridge must be", "A sweep is one process", "holds a result already"):
        assert launch.err.count(sentence) == 1


def test_a_sharded_student_has_the_gradients_of_a_whole_one(launch: Launch) -> None:
    """By torch's own FSDP2, as accelerate splits nothing on a CPU."""
    sharded, whole = launch.results["figures"]
    assert sharded == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("kind", ["MULTI_CPU", "DEEPSPEED"])
def test_two_processes_heal_as_one_does(kind: str, launch: Launch, tmp_path: Path) -> None:
    """With the same sequences in each step; to rounding, which training amplifies. What was split loads whole."""
    if kind == "DEEPSPEED":
        pytest.importorskip("deepspeed")
        launch = healing(tmp_path, json.dumps({"deepspeed": ZERO}))
    assert launch.results["healed"] == kind, launch.err
    assert ("FSDP is ignored" in launch.err) == (kind == "MULTI_CPU")
    reports: list[Any] = [FusionReport.load(launch.folder / name) for name in ("healed", "alone")]
    for point, of_one in zip(*(report.healed.curve for report in reports), strict=True):
        assert point.step == of_one.step and point.divergences == pytest.approx(of_one.divergences, rel=5e-3)
    for text, of_text in zip(*(report.perplexities for report in reports), strict=True):
        assert text.fused == pytest.approx(of_text.fused, rel=5e-3)
    healed, alone = (tensors(launch.folder / name) for name in ("healed", "alone"))
    torch.testing.assert_close(healed, alone, rtol=0, atol=2e-3)


def test_lm_eval_fuses_once_and_loads_it_in_every_process(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    (tmp_path / "data.jsonl").write_text('{"question": "layer model"}\n{"question": "neuron weight fuse"}\n')
    task: dict[str, Any] = {"task": "choosing", "output_type": "multiple_choice", "doc_to_choice": ["model", "row"]}
    task |= {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}}}
    task |= {"test_split": "test", "doc_to_text": "{{question}}", "doc_to_target": 0}
    (tmp_path / "choosing.yaml").write_text(yaml.safe_dump(task))
    launch = launched(tmp_path, "evaluate")
    assert launch.results["refused"].endswith("give fused_dir, where to.")
    assert "|choosing|" in launch.out.replace(" ", "")
    [results, *_] = tmp_path.glob("found/*/results_*.json")
    kept = FusionReport.load(tmp_path / "kept")
    assert json.loads(results.read_text())["config"]["fusion"]["parameters_after"] == kept.parameters_after
    assert kept.layers_after == 4 and not (tmp_path / "kept" / ".lf_hf").exists()


def test_a_process_says_that_it_waits_for_others_and_can_be_ended() -> None:
    """As where a shell remembers a launch, and nobody starts the others."""
    program = """
from lf_hf.runtime import launch
launch.SAID_AFTER = 0.1
launch.num_processes()
"""
    left = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    waits = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, env=os.environ | left)
    with waits:
        assert waits.stderr is not None
        try:
            assert any("WORLD_SIZE=2 in the environment" in line for line in waits.stderr)
            waits.send_signal(signal.SIGINT)
            assert waits.wait(60) == -signal.SIGINT
        finally:
            waits.kill()


def test_a_rank_without_a_launch_is_no_other_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a shell remembers it: the command says what it has to say."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["fuse", "no-such-base", "out", "--num-fusions", "1"]) == 1
    assert "no-such-base" in capsys.readouterr().err
