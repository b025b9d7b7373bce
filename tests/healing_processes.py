"""One of several processes that heal a model together, and that shard a student; run by healing/test_heal.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from conftest import make_llama
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import lf_hf
from lf_hf import HealSettings
from lf_hf.healing import trainer
from lf_hf.healing.loss import FullTargets, Loss


def figures(*, sharded: bool) -> list[float]:
    """The loss of a student, and the norm of each of its gradients."""
    model = make_llama()
    student: Any = trainer.make_student(model, HealSettings(train="all"), [])
    if sharded:
        for layer in student.model.layers:
            fully_shard(layer)
        fully_shard(student)
    ids = torch.arange(2, 66).view(2, 32)
    states = torch.randn(2, 32, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    loss = student(ids, targets=FullTargets(states, model.lm_head.weight.detach()), loss=Loss(2.0, 0.2))["loss"]
    loss.backward()
    gradients = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in student.parameters()]
    return [loss.item(), *(gradient.norm().item() for gradient in gradients)]


def main(file: Path) -> None:
    kinds: list[str] = []
    real = trainer.DistillationTrainer.train

    def spy(self: Any, *arguments: Any, **named: Any) -> Any:
        kinds.append(self.accelerator.distributed_type.value)
        return real(self, *arguments, **named)

    trainer.DistillationTrainer.train = spy  # type: ignore[method-assign]
    lf_hf.heal(**json.loads(file.read_text(encoding="utf-8")))
    said = {"distributed_type": kinds[0], "sharded": figures(sharded=True), "whole": figures(sharded=False)}
    if torch.distributed.get_rank() == 0:
        file.with_name("said.json").write_text(json.dumps(said), encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
