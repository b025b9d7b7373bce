"""Processes that a launcher starts share one fusion or healing, and end with what one process alone would have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import QUICK, files, make_llama, make_texts, run_program, save_base
from run_launched import HEALING

import lf_hf
from lf_hf import FusedLlamaForCausalLM, FusionReport

ZERO = {"zero_optimization": {"stage": 3}, "gradient_clipping": "auto"}
ZERO |= dict.fromkeys(["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"], "auto")


class Launch(NamedTuple):
    folder: Path
    code: int
    out: str
    err: str

    @property
    def results(self) -> dict[str, Any]:
        return dict(json.loads(line[7:]) for line in self.out.splitlines() if line.startswith("RESULT "))


def launched(folder: Path, *given: str) -> Launch:
    """Run `run_launched.py` in two processes."""
    save_base(folder / "base")
    save_base(folder / "tied", make_llama(tie_word_embeddings=True))
    (folder / "texts.txt").write_text("\n\n".join(make_texts(100)))
    lf_hf.fuse_checkpoint(folder / "base", folder / "fused", num_fusions=2, method="truncate", perplexity_tokens=512)
    lf_hf.fuse_checkpoint(folder / "tied", folder / "saves" / "whole", **QUICK)
    done = run_program("run_launched.py", folder, *given, processes=2)
    return Launch(folder, done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return launched(tmp_path_factory.mktemp("launch"))


def test_the_command_writes_and_speaks_once(launch: Launch) -> None:
    assert launch.results["codes"] == [[0, 2], [0, 1]], launch.err  # the second is quiet
    assert launch.out.count("bytes on disk") == 1 and launch.err.count("ridge must be") == 1
    model = FusedLlamaForCausalLM.from_pretrained(launch.folder / "out")
    assert model.config.num_hidden_layers == 3 and model.fusion_report.layers_before == 5


def test_when_one_process_dies_the_others_say_so_and_end(launch: Launch) -> None:
    assert launch.code
    assert "LostProcessError: Another process of this launch has ended" in launch.err


def test_a_sharded_student_has_the_gradients_of_a_whole_one(launch: Launch) -> None:
    """By torch's own FSDP2, as accelerate splits nothing on a CPU."""
    sharded, whole = launch.results["figures"]
    assert sharded == pytest.approx(whole, rel=1e-4)


def test_models_spread_over_processes_are_saved_whole(launch: Launch) -> None:
    """By FSDP2 and tensor parallelism. Rank 0 writes, all end, and all learn that it could not."""
    errors, folder = launch.results["saves"], launch.folder / "saves"
    assert errors.keys() - {"tp", "tp given"} == {"fsdp2", "fsdp2 given"} and max(errors.values()) < 1e-5
    assert {path.name for path in folder.iterdir()} == {"whole", "plain 0", "file", *errors}
    for name in errors:
        assert files(folder / name).keys() - files(folder / "whole").keys() <= {*files(folder / "fsdp2")}
    if not {"tp", "tp given"} <= errors.keys():
        pytest.skip("this transformers takes no tp_size; FSDP2 alone was tried")


def test_a_fusion_that_heals_gives_all_processes_one_model(launch: Launch) -> None:
    one, other = launch.results["healed while loading"]
    assert one is not None and one == other


@pytest.mark.parametrize("kind", ["MULTI_CPU", "DEEPSPEED"])
def test_two_processes_heal_as_one_does(kind: str, launch: Launch, tmp_path: Path) -> None:
    """With the same sequences in each step; to rounding, which training amplifies. What was split loads whole."""
    if kind == "DEEPSPEED":
        pytest.importorskip("deepspeed")
        launch = launched(tmp_path, json.dumps({"deepspeed": ZERO}))
    assert launch.results["healed"] == kind, launch.err
    assert ("FSDP is ignored" in launch.err) == (kind == "MULTI_CPU")
    fused, base, one = launch.folder / "fused", launch.folder / "base", tmp_path / "one"
    lf_hf.heal(fused, one, base=base, text=make_texts(1200, seed=5), training_args={"bf16": False}, **HEALING)
    reports: list[Any] = [FusionReport.load(folder) for folder in (launch.folder / "healed", one)]
    for point, of_one in zip(*(report.healed.curve for report in reports), strict=True):
        assert point.step == of_one.step and point.divergences == pytest.approx(of_one.divergences, rel=2e-3)
    for text, of_text in zip(*(report.healed.judged for report in reports), strict=True):
        assert text.divergence == pytest.approx(of_text.divergence, rel=1e-5)
    for text, of_text in zip(*(report.perplexities for report in reports), strict=True):
        assert text.fused == pytest.approx(of_text.fused, rel=2e-3)
    loaded, alone = (FusedLlamaForCausalLM.from_pretrained(folder) for folder in (launch.folder / "healed", one))
    torch.testing.assert_close(loaded.state_dict(), alone.state_dict(), rtol=0, atol=2e-3)
