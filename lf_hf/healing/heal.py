"""heal: a fused checkpoint and its base in, a checkpoint of the same kind that is nearer to the base out."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import purge_accelerate_environment
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Subset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from lf_hf.checkpoint.base import Base
from lf_hf.checkpoint.classes import FusedForCausalLM
from lf_hf.checkpoint.saving import check_room, only_writer
from lf_hf.decoder.interface import set_config_layers
from lf_hf.families import CausalLM, is_tied
from lf_hf.healing.inputs import WORK, HealingInputs, open_inputs
from lf_hf.healing.judge import healed_report, healed_texts, judge
from lf_hf.healing.loss import Loss
from lf_hf.healing.memory import Placement, place_teacher
from lf_hf.healing.settings import HealSettings
from lf_hf.healing.teacher import open_teacher
from lf_hf.healing.text import given_text, training_order
from lf_hf.healing.trainer import default_learning_rate, make_student, make_trainer, training_arguments
from lf_hf.report.records import CalibrationInfo, HealingInfo, HealingPoint
from lf_hf.report.report import FusionReport
from lf_hf.runtime.launch import Processes
from lf_hf.runtime.numerics import weights_digest
from lf_hf.settings import ALGORITHM, FusionConfig
from lf_hf.speed import with_speed
from lf_hf.text.calibration import Corpus
from lf_hf.text.sources import TextSource

logger = logging.get_logger(__name__)

_LOGS = "runs"  # in the work folder and in the result's: where the Trainer's loggers write
_TRAINER_STATE = "trainer_state.json"  # what the Trainer writes last into a checkpoint
_NOTE = "healing.json"  # in the work folder: what the run has in common with one that goes on with it


def heal(
    fused: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | Base | None = None,
    text: TextSource | None = None,
    settings: HealSettings | None = None,
    cache: str | os.PathLike[str] | None = None,
    training_args: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> FusionReport:
    """Train a fused model, for a short time, to predict what its base predicts, and save it into another folder.

    It is transformers' `Trainer` that trains, so `accelerate launch` spreads it over devices. The state that is nearest
    to the base on held-out text is what is saved; if none is nearer than the fused model, that is. The state of a run
    that was killed is in OUT: the same call again goes on there.

    Parameters
    ----------
    fused : path
        Folder of a fused checkpoint, native or plain.
    out : path
        Where to write one of the same kind. A fused checkpoint in that folder is replaced, but none that was trained.
    base : str or Base, optional
        Folder or hub name of the model that was fused. Default: what the report names, if that is on the hub.
    text : list of str or chats, or path, optional
        Text to heal on, as `lf_hf.text.calibration.load_training_text` takes it: best what the model will be used
        for. Default: general text from the hub or, without one or with "bundled", what is installed.
    settings : HealSettings, optional
        HealSettings fields in `kwargs` override it.
    cache : path, optional
        Where to keep the base's predictions, for all healings of models that were fused from it, on the same text.
    training_args : dict, optional
        Fields of transformers' TrainingArguments: bf16, gradient_checkpointing, report_to, fsdp, deepspeed, ...
    **kwargs
        HealSettings fields. All others are for loading the base (revision, token, gguf_file, ...).

    Returns
    -------
    FusionReport
        The fused model's, with `healed` in it.

    Raises
    ------
    ValueError
        Before any long work, for settings, models or text that cannot be used, a base that is not the one that was
        fused, or too little memory.
    OSError
        If another process is at work in that folder, or if files cannot be written.
    """
    settings, given = HealSettings.taken_from(kwargs, settings), dict(training_args or {})
    inputs, folder = open_inputs(fused, out, base, text, settings, kwargs)
    work = folder / WORK
    report = with_speed(_distill(inputs, work, cache, given), inputs.model)
    gc.collect()  # the Trainer, in which objects know each other, and which has files in `work` open

    def save() -> None:
        inputs.model.fusion_report, inputs.model.tokenizer = report, inputs.tokenizer
        inputs.model.save_pretrained(folder, plain=inputs.plain)
        if (work / _LOGS).is_dir():
            shutil.copytree(work / _LOGS, folder / _LOGS, copy_function=_copy_new, dirs_exist_ok=True)
        shutil.rmtree(work, ignore_errors=True)

    Processes.of_launch().broadcast_object(save)
    return report


def _copy_new(source: str, target: str) -> None:
    """Copy a file unless there is one of that name: it is the user's."""
    if not os.path.exists(target):
        shutil.copy2(source, target)


def heal_loaded(
    model: FusedForCausalLM,
    base: Base,
    corpus: Corpus,
    config: FusionConfig,
    *,
    cache: str | os.PathLike[str] | None = None,
) -> None:
    """Heal a model in memory, in place, as `heal` does with its defaults; `fusion_report` follows."""
    report, tokens = model.fusion_report, config.heal_tokens
    assert report is not None and model.tokenizer is not None
    report = dataclasses.replace(report, config=report.config | {"heal_tokens": tokens})
    settings = HealSettings(tokens=tokens, seed=config.seed)
    inputs = HealingInputs(model, report, model.tokenizer, base, corpus, settings)
    with ExitStack() as stack:
        work = Processes.of_launch().broadcast_object(lambda: stack.enter_context(TemporaryDirectory()))
        model.fusion_report = _distill(inputs, Path(work), cache, {})
    gc.collect()  # the Trainer, in which objects know each other, and all that it holds


def check_can_heal(
    base: Base,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    config: FusionConfig,
    *,
    cache: str | os.PathLike[str] | None = None,
) -> None:
    """Raise ValueError, before a model is fused, if there is too little text or memory to heal it afterwards."""
    fused = base.new_config()
    fewer = config.num_fusions or 1  # one at least, where a budget says how many
    set_config_layers(fused, range(fused.num_hidden_layers - fewer))
    with torch.device("meta"):
        model = base.family.causal_lm(fused)
    settings = HealSettings(tokens=config.heal_tokens, seed=config.seed)
    settings, *_ = prepare(model, [], base.config, settings, Path(gettempdir(), "lf_hf-healing", WORK), {}, cache)
    given_text(tokenizer, corpus, settings, base.config.vocab_size)


def prepare(
    model: CausalLM,
    fused_layers: Sequence[int],
    base: PreTrainedConfig,
    settings: HealSettings,
    work: Path,
    given: Mapping[str, Any],
    cache: str | os.PathLike[str] | None,
) -> tuple[HealSettings, TrainingArguments, nn.Module, Placement]:
    """Make a student of a model, which may be on the meta device, and see whether it can be trained in `work`.

    In the settings that are returned sequences are no longer than the model takes, a step no longer than the whole
    training, and all processes have as many sequences of a step. `given` are training arguments.

    Raises ValueError for those that cannot be used, or too little memory, and OSError for too little room on the disk.
    """
    length = min(settings.length, base.max_position_embeddings)
    batch_tokens = max(length, min(settings.batch_tokens, settings.tokens))
    settings = dataclasses.replace(settings, length=length, batch_tokens=batch_tokens)
    world_size = training_arguments(settings, work, given).world_size
    batch = math.ceil(settings.batch / world_size) * world_size
    if batch != settings.batch:
        logger.warning(f"A step has {batch} sequences and not {settings.batch}, so that all processes have as many.")
        settings = dataclasses.replace(settings, batch_tokens=batch * length)
    arguments = training_arguments(settings, work, given)
    if arguments.report_to and (work.parent / _LOGS).is_file():
        raise ValueError(f"{str(work.parent)!r} holds a file {_LOGS!r}, where logs go; choose another folder.")
    student = make_student(model, settings, fused_layers)
    placement = place_teacher(base, student, settings, arguments, cache)

    def check_disk() -> None:
        if not any(work.glob("checkpoint-*")):  # of a run that goes on some is there
            check_room(work, placement.disk, "states of the training take")

    Processes.of_launch().broadcast_object(check_disk)
    return settings, arguments, student, placement


@purge_accelerate_environment  # type: ignore[untyped-decorator]
def _distill(
    inputs: HealingInputs, work: Path, cache: str | os.PathLike[str] | None, given: dict[str, Any]
) -> FusionReport:
    """Train the fused model, in place and in all processes; returns what its report is then."""
    start, model, processes = time.monotonic(), inputs.model, Processes.of_launch()
    rate = inputs.settings.learning_rate or default_learning_rate(model, inputs.settings.train)
    settings = dataclasses.replace(inputs.settings, learning_rate=rate)

    with ExitStack() as stack:
        # The process keeps its random numbers, which a training sets.
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.enter_context(torch.random.fork_rng(list(range(torch.cuda.device_count()))))
        settings, arguments, student, placement = prepare(
            model, inputs.fused_layers, inputs.base.config, settings, work, given, cache
        )
        inputs = dataclasses.replace(inputs, settings=settings)
        identity = _identity(inputs, placement, given)

        def begin() -> str | None:
            given_text(inputs.tokenizer, inputs.corpus, settings, model.config.vocab_size)
            stack.enter_context(only_writer(work))
            return _resumed_from(work, identity)

        def note() -> None:
            if not resumed:
                (work / _NOTE).write_text(json.dumps(identity), encoding="utf-8")

        if not AcceleratorState._shared_state and processes.world_size == 1:
            stack.callback(AcceleratorState._reset_state)  # with the precision that is set for the whole process
        resumed = processes.broadcast_object(begin)
        arguments.eval_on_start = resumed is None
        trainer = make_trainer(student, arguments)
        teacher = open_teacher(inputs, placement, arguments, work)
        before = judge(model, teacher, processes)
        names = [name for name, items in teacher.training.items() for _ in range(len(items))]
        order = training_order(len(names), settings)
        used = Counter(names[number] for number in sorted(set(order)))
        trainer.targets, trainer.loss = teacher.targets, Loss(settings.temperature, settings.next_token_share)
        trainer.eval_dataset = teacher.held_out
        trainer.train_dataset = Subset(ConcatDataset(teacher.training.values()), order)
        trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
        processes.broadcast_object(note)
        trainer.train(resume_from_checkpoint=resumed)
        if kept := trainer.best_step():
            _load(model, trainer.trained_state(model, settings), processes)
        after = judge(model, teacher, processes)
        healed = HealingInfo(
            settings=settings.in_effect(),
            text=[CalibrationInfo(name, count, count * settings.length) for name, count in used.items()],
            epochs=len(order) / used.total(),
            trained=trained,
            steps=trainer.state.global_step,
            kept=kept,
            teacher=placement.description,
            curve=[HealingPoint(step, of_kinds) for step, of_kinds in sorted(trainer.curve().items())],
            judged=healed_texts(teacher, before, after),
            seconds=time.monotonic() - start,
        )
        return healed_report(inputs, healed, after)


@torch.no_grad()
def _load(model: FusedForCausalLM, state: Mapping[str, Tensor], processes: Processes) -> None:
    """Give a model, in all processes, the weights that the first one has; other models may share its old tensors."""
    new, tied = {}, is_tied(model)
    for name, parameter in model.named_parameters():
        new[name] = torch.empty_like(parameter)
        if processes.is_main:
            new[name].copy_(state[name])
        processes.broadcast(new[name])
    model.load_state_dict(new, assign=True, strict=False)
    if tied:
        model.tie_weights()


def _identity(inputs: HealingInputs, placement: Placement, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a run must have in common with one that was cut short to go on with it."""
    content = inputs.content()
    return content | {
        "text": f"{inputs.corpus.source} ({content['text']:.16})",
        "settings": inputs.settings.to_dict(),
        "fused": weights_digest(inputs.model.named_parameters()),
        "processes": Processes.of_launch().world_size,
        "training_args": {name: str(value) for name, value in given.items()},
        "teacher": placement.description,
        "algorithm": ALGORITHM,
    }


def _resumed_from(work: Path, identity: dict[str, Any]) -> str | None:
    """The last state of a run of the same healing that was cut short, if there is one.

    Raises ValueError for a run of another healing, so that nothing is lost.
    """
    for state in work.glob("checkpoint-*"):
        try:
            json.loads((state / _TRAINER_STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # cut short while it was written
            shutil.rmtree(state)
    last = get_last_checkpoint(str(work))
    if last is None:
        return None
    before = json.loads((work / _NOTE).read_text(encoding="utf-8"))
    if before != identity:
        changes = [(name, before.get(name), now) for name, now in identity.items() if before.get(name) != now]
        differ = "; ".join(f"{name} was {then}, and now is {now}" for name, then, now in changes)
        raise ValueError(
            f"{str(work.parent)!r} holds a run that was cut short, of another healing ({differ:.500}). Give the same "
            "command again to go on, with the same lf_hf and Python, as much memory, and the hub as it was "
            f"(text='bundled' where it gave none), or remove {str(work)!r} to start anew."
        )
    logger.warning(f"Going on from {last!r}, where an earlier run of the same healing stopped.")
    return last
