"""heal: train a fused model in memory to predict what its base predicts, from what was measured on that base."""

from __future__ import annotations

import math
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import purge_accelerate_environment
from torch.utils.data import ConcatDataset, Subset
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from lf_hf.decoder.decoder import Decoder
from lf_hf.healing.teacher import Teacher
from lf_hf.healing.text import training_order
from lf_hf.healing.trainer import (
    check_trains,
    default_learning_rate,
    make_student,
    make_trainer,
    num_shards,
    training_arguments,
    unreadable_file,
)
from lf_hf.plan.plan import HealingPlan
from lf_hf.report.data import CalibrationInfo, HealingInfo
from lf_hf.runtime.launch import compute_once, num_processes
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
    folder: Path,
    training_args: Mapping[str, Any],
) -> HealingInfo:
    """Train a fused model by a plan and with these fields of TrainingArguments, in all processes of a launch.

    The first process's model gets, in place, the weights of the state that is nearest to the base on held-out text, or
    keeps its own where none is nearer. `fused_layers` are its layers that stand for several. States of the training are
    in `folder`: where there are some, the training goes on.
    """
    start, settings = time.monotonic(), plan.settings
    if settings.learning_rate is None:
        settings = replace(settings, learning_rate=default_learning_rate(decoder, plan.train))
    with _undisturbed():
        state = compute_once(lambda: _state_to_go_on_from(folder))
        arguments = training_arguments(settings, folder, training_args, str(decoder.device), plan)
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
            decoder.assign(trainer.trained_weights(decoder))
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


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Give the process back what a training sets for all of it: random numbers, and accelerate's precision."""
    with ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        kind = accelerator() or torch.device("cpu")
        stack.enter_context(torch.random.fork_rng(range(torch.accelerator.device_count()), device_type=kind.type))
        if not AcceleratorState._shared_state and num_processes() == 1:
            stack.callback(AcceleratorState._reset_state)
        yield


def _state_to_go_on_from(folder: Path) -> str | None:
    """The last state that can be read of a run of the same healing that was cut short, if there is one."""
    for state in sorted(folder.glob("checkpoint-*"), key=lambda state: int(state.name.partition("-")[2]), reverse=True):
        if file := unreadable_file(state):
            logger.warning(f"{str(file)!r} cannot be read, so the training does not go on from that state.")
            shutil.rmtree(state)
            continue
        file = state / TRAINER_STATE_NAME
        known = TrainerState.load_from_json(str(file))
        if known.best_model_checkpoint is not None:  # under the name that the folder had then
            best = folder / Path(known.best_model_checkpoint).name
            if not best.is_dir():
                continue
            known.best_model_checkpoint = str(best)
            known.save_to_json(str(file))
        logger.warning(f"Going on from {str(state)!r}, where an earlier run of the same healing stopped.")
        return str(state)
    return None
