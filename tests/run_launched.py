"""What the two processes of a launch do together; run by test_launches.py, which compares it with what one does alone.

`run_launched.py FOLDER heal [ARGUMENTS]`, with training arguments in JSON, or `run_launched.py FOLDER evaluate`.
"""

import functools
import gc
import json
import logging
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from conftest import make_llama
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from lf_hf import HealSettings
from lf_hf.cli import main as command
from lf_hf.decoder.decoder import Decoder
from lf_hf.healing import trainer
from lf_hf.healing.loss import Loss, Targets
from lf_hf.runtime.launch import rank

TOKENS = 4096  # to heal on
FITTING: dict[str, Any] = {"num_fusions": 2, "selection": "last", "calibration_tokens": 1024, "calibration_length": 32}
FITTING |= {"perplexity_tokens": 512}


def student_figures(*, sharded: bool) -> list[float]:
    """The loss of a student, and the norm of each of its gradients."""
    model = make_llama()
    arguments = TrainingArguments(use_cpu=True, bf16=False)
    student: Any = trainer.make_student(Decoder(model), HealSettings(train="all"), [], arguments)
    if sharded:
        for layer in student.model.layers:
            fully_shard(layer)
        fully_shard(student)
    ids = torch.arange(2, 66).view(2, 32)
    states = torch.randn(2, 32, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    targets = Targets(states, model.lm_head.weight.detach(), torch.nn.Identity())
    loss = student(ids, targets=targets, loss=Loss(2.0, 0.2))["loss"]
    loss.backward()
    gradients = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in student.parameters()]
    return [loss.item(), *(gradient.norm().item() for gradient in gradients)]


def say(name: str, value: Any) -> None:
    """Tell the test, from the first process."""
    if not rank():
        print("RESULT " + json.dumps([name, value]), flush=True)


def options(settings: dict[str, Any]) -> list[str]:
    """Settings as a command line has them."""
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def heal(folder: Path, given: dict[str, Any]) -> None:
    base, fused, texts = (str(folder / name) for name in ("base", "fused", "texts.txt"))
    if not given:
        words = ["fuse", base, str(folder / "out"), *options(FITTING), "--heal-tokens", str(TOKENS)]
        words += ["--calibration", texts, "--no-speed"]
        # Before the processes are connected.
        refused = [command([*words, "--ridge", "0"]), command(["sweep", base, str(folder), "--num-fusions", "1"])]
        say("codes", [*refused, command(words), command(words)])  # the last one finds a result in OUT
    words = ["heal", fused, str(folder / "healed"), "--base", base, "--text", texts, "--tokens", str(TOKENS)]
    arguments = [f"{name}={json.dumps(value)}" for name, value in (given or {"fsdp": True}).items()]
    command([*words, *(word for argument in arguments for word in ("--arg", argument))])
    say("healed", str(AcceleratorState().distributed_type.value))
    if not given:
        say("figures", [student_figures(sharded=sharded) for sharded in (True, False)])


def evaluate(folder: Path) -> None:
    """Run `python -m lf_hf.evaluate` twice, of which the first run has no folder to fuse into."""
    from lm_eval.tasks import TaskManager

    own: Any = functools.partialmethod(TaskManager.__init__, include_defaults=False)  # else it looks through all
    TaskManager.__init__ = own
    given = f"pretrained={folder / 'base'},num_fusions=1,method=truncate,perplexity_tokens=0"
    words = ["lm_eval", "--device", "cpu", "--tasks", "choosing", "--include_path", str(folder), "--model", "fused"]
    try:
        sys.argv = [*words, "--model_args", given]
        runpy.run_module("lf_hf.evaluate", run_name="__main__")
    except ValueError as error:
        say("refused", str(error))
    logging.disable(logging.WARNING)
    sys.argv = [*words, "--model_args", f"{given},fused_dir={folder / 'kept'}", "--output_path", str(folder / "found")]
    runpy.run_module("lf_hf.evaluate", run_name="__main__")


def main(folder: Path, task: str, given: str = "{}") -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what was imported stays, and takes long to look through
    if task == "heal":
        heal(folder, json.loads(given))
    else:
        evaluate(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
