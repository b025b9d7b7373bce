"""What the processes of a launch do together; run by test_launches.py, which compares it with what it does alone.

`run_launched.py FOLDER [ARGUMENTS]`: all of it, or a healing alone, with training arguments in JSON.
"""

from __future__ import annotations

import gc
import inspect
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import make_llama, make_texts, tensors
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments
from transformers.distributed.configuration_utils import DistributedConfig

import lf_hf
from lf_hf import FusedLlamaForCausalLM, HealSettings
from lf_hf.cli import main as command
from lf_hf.decoder.decoder import Decoder
from lf_hf.healing import trainer
from lf_hf.healing.loss import Loss, Targets
from lf_hf.runtime.launch import OtherProcessError, Processes
from lf_hf.runtime.numerics import weights_digest

HEALING: dict[str, Any] = {"tokens": 2048, "length": 32, "batch_tokens": 128, "learning_rate": 3e-3}


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


def saves(folder: Path) -> dict[str, float]:
    """Save a model that the processes hold between them, by each way of splitting it: how far what loads is off."""
    ids = torch.arange(40).reshape(2, 20)
    whole, spread = (FusedLlamaForCausalLM.from_pretrained(folder / "whole") for _ in range(2))
    for layer in spread.model.layers:
        fully_shard(layer)
    models, errors = {"fsdp2": fully_shard(spread)}, {}
    if "tp_size" in inspect.signature(DistributedConfig).parameters:  # not in older transformers
        split = {"distributed_config": DistributedConfig(tp_size=2)}
        models["tp"] = FusedLlamaForCausalLM.from_pretrained(folder / "whole", **split)
    (folder / "file").touch()
    for name, model in models.items():
        model.save_pretrained(folder / name, max_shard_size="50KB")
        model.save_pretrained(folder / f"{name} given", state_dict=model.state_dict())
        for out in (name, f"{name} given"):
            loaded = FusedLlamaForCausalLM.from_pretrained(folder / out)
            assert tensors(folder / out).keys() == tensors(folder / "whole").keys()
            with torch.no_grad():
                errors[out] = float((loaded(ids).logits - whole(ids).logits).abs().max())
        with pytest.raises((OSError, OtherProcessError), match="Not a directory"):  # on either rank
            model.save_pretrained(folder / "file" / "out")
    whole.save_pretrained(folder / f"plain {torch.distributed.get_rank()}")  # each has it whole, so one alone saves
    return errors


def heal(folder: Path, given: dict[str, Any]) -> str:
    """The kind of launch that the Trainer saw."""
    texts = make_texts(1200, seed=5)
    arguments = {"text": texts, "training_args": {"bf16": False, **given}, **HEALING}
    lf_hf.heal(folder / "fused", folder / "healed", base=folder / "base", **arguments)
    return str(AcceleratorState().distributed_type.value)


def fuse_and_heal(folder: Path) -> str | None:
    """What this process has of a model that is healed while it is loaded: a digest of its weights."""
    given: dict[str, Any] = {"num_fusions": 2, "method": "truncate", "heal_tokens": 2048, "perplexity_tokens": 0}
    model = lf_hf.from_pretrained_fused(folder / "base", **given, calibration=make_texts(1200, seed=5))
    assert model.fusion_report is not None and model.fusion_report.healed is not None
    return weights_digest(model.named_parameters())


def main(folder: Path, given: str = "") -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what was imported stays, and takes long to look through
    words = "--method refit --num-fusions 2 --calibration-tokens 1984 --calibration-length 64".split()
    words = ["fuse", str(folder / "base"), str(folder / "out"), *words, "--calibration", str(folder / "texts.txt")]
    refused = 0 if given else command([*words, "--ridge", "0"])  # before the processes are connected
    processes = Processes.of_launch()

    def say(name: str, value: Any) -> None:
        if processes.is_main:
            print("RESULT " + json.dumps([name, value]), flush=True)

    if given:
        say("healed", heal(folder, json.loads(given)))
        return
    say("codes", processes.all_gather_object([command(words), refused]))
    say("healed", heal(folder, {"fsdp": True}))
    say("healed while loading", processes.all_gather_object(fuse_and_heal(folder)))
    say("saves", saves(folder / "saves"))
    say("figures", [student_figures(sharded=sharded) for sharded in (True, False)])
    processes.all_gather_object(None)  # all is said, and nothing that the command prints falls into a line of it
    if processes.rank == 1:  # ends while the other one goes on; the launcher, which sees no failure, does not end that
        sys.argv[1:] = ["tasks"]
        runpy.run_module("lf_hf", run_name="__main__")
    lf_hf.fuse_checkpoint(folder / "base", folder / "of one", num_fusions=1, method="truncate", perplexity_tokens=0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
