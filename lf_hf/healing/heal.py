"""heal: train a fused model in memory to predict what its base predicts, from what was measured on that base."""

from __future__ import annotations

import math
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import purge_accelerate_environment
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from lf_hf.decoder.decoder import Decoder
from lf_hf.healing.teacher import Teacher
from lf_hf.healing.text import training_order
from lf_hf.healing.trainer import (
    check_trains,
    damaged_file,
    default_learning_rate,
    make_student,
    make_trainer,
    num_shards,
    training_arguments,
)
from lf_hf.plan.plan import HealingPlan
from lf_hf.report.data import CalibrationInfo, HealingInfo
from lf_hf.runtime.launch import Processes
from lf_hf.runtime.numerics import accelerator
from lf_hf.settings import HealSettings

logger = logging.get_logger(__name__)


@purge_accelerate_environment  # type: ignore[untyped-decorator]
def prepare(
    settings: HealSettings, longest: int, training_args: Mapping[str, Any], device: str
) -> tuple[HealSettings, int, bool]:
    """The settings for a model that takes `longest` tokens, and for this launch; how many of its processes share the
    weights of what trains, and whether it computes in bfloat16 on a device.

    Sequences are no longer than the model takes, a step is no longer than the whole training, and all processes have as
    many sequences of it. Raises ValueError for training arguments that cannot be used.
    """
    length = min(settings.length, longest)
    batch_tokens = max(length, min(settings.batch_tokens, settings.tokens))
    settings = replace(settings, length=length, batch_tokens=batch_tokens)
    arguments = training_arguments(settings, Path(), training_args, device)
    batch = math.ceil(settings.batch / arguments.world_size) * arguments.world_size
    if batch != settings.batch:
        logger.warning(f"A step has {batch} sequences and not {settings.batch}, so that processes share it evenly.")
        settings = replace(settings, batch_tokens=batch * length)
    if training_args:  # of which the Trainer refuses some when it is made
        with _undisturbed():
            check_trains(arguments)
    return settings, num_shards(arguments), arguments.bf16


@purge_accelerate_environment  # type: ignore[untyped-decorator]
def heal(
    decoder: Decoder,
    fused_layers: Sequence[int],
    teacher: Teacher,
    plan: HealingPlan,
    work: Path,
    training_args: Mapping[str, Any],
) -> HealingInfo:
    """Train a fused model, in place and in all processes, by a plan and with these fields of TrainingArguments.

    It gets the weights of the state that is nearest to the base on held-out text, or keeps its own where none is
    nearer. `fused_layers` are its layers that stand for several. States of the training are in the folder `work`: where
    there are some, the training goes on.
    """
    start, processes, settings = time.monotonic(), Processes.of_launch(), plan.settings
    if settings.learning_rate is None:
        settings = replace(settings, learning_rate=default_learning_rate(decoder, plan.train))
    with _undisturbed():
        state = processes.compute_once(lambda: _state_to_go_on_from(work))
        arguments = training_arguments(settings, work, training_args, plan.device, plan)
        arguments.eval_on_start = state is None
        student = make_student(decoder, settings, fused_layers, arguments)
        trainer = make_trainer(student, decoder, teacher, settings, arguments)
        names = [name for name, items in teacher.training.items() for _ in range(len(items))]  # type: ignore[arg-type]
        order = training_order(len(names), settings)
        used = Counter(names[number] for number in sorted(set(order)))  # different sequences of each kind of text
        trainer.train_dataset = Subset(ConcatDataset(teacher.training.values()), order)
        trainer.train(resume_from_checkpoint=state)
        kept = trainer.best_step()
        if kept:
            decoder.assign(_of_first(processes, decoder, trainer.trained_weights(decoder)))
        return HealingInfo(
            settings=settings.in_effect(),
            text=[CalibrationInfo(name, count, count * settings.length) for name, count in used.items()],
            epochs=len(order) / used.total(),
            trained=sum(p.numel() for p in student.parameters() if p.requires_grad),
            why=plan.why,
            steps=trainer.state.global_step,
            kept=kept,
            curve=trainer.curve(),
            judged=[],
            seconds=time.monotonic() - start,
            training_args={name: str(value) for name, value in training_args.items()},
        )


def _of_first(
    processes: Processes, decoder: Decoder, weights: Iterable[tuple[str, Tensor | None]]
) -> Iterator[tuple[str, Tensor]]:
    """What the first process has of some weights, float32, in all processes."""
    for name, given in weights:
        weight = torch.empty(decoder.model.get_parameter(name).shape) if given is None else given
        processes.broadcast(weight)
        yield name, weight


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Give the process back what a training sets for all of it: random numbers, and accelerate's precision."""
    with ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        kind = accelerator() or torch.device("cpu")
        stack.enter_context(torch.random.fork_rng(range(torch.accelerator.device_count()), device_type=kind.type))
        if not AcceleratorState._shared_state and Processes.of_launch().world_size == 1:
            stack.callback(AcceleratorState._reset_state)
        yield


def _state_to_go_on_from(work: Path) -> str | None:
    """The last state of a run of the same healing that was cut short, if there is one; states with damage go."""
    for state in work.glob("checkpoint-*"):
        if file := damaged_file(state):
            logger.warning(
                f"{str(state)!r} is no whole state of a training ({file}), so it is removed. The training goes on from "
                "another state, or begins anew if there is none."
            )
            shutil.rmtree(state)
    last = get_last_checkpoint(str(work))
    if last is None:
        return None
    best = TrainerState.load_from_json(str(Path(last, TRAINER_STATE_NAME))).best_model_checkpoint
    if best is not None and not Path(best).is_dir():
        logger.warning(f"The best state of an earlier run, {best!r}, is gone, so the training begins anew.")
        shutil.rmtree(last)
        return None
    logger.warning(f"Going on from {last!r}, where an earlier run of the same healing stopped.")
    return last
