"""heal: a fused checkpoint and its base in, a plain checkpoint that is nearer to the base out."""

from __future__ import annotations

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
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import purge_accelerate_environment
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Subset
from transformers import PreTrainedTokenizerBase, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from lf_hf.checkpoint.base import Base, checked_dtype, is_spread
from lf_hf.checkpoint.classes import FusedForCausalLM
from lf_hf.checkpoint.identity import differences
from lf_hf.checkpoint.saving import check_room, only_writer
from lf_hf.decoder.layer_lists import set_config_layers
from lf_hf.healing.inputs import WORK, HealingInputs, open_inputs
from lf_hf.healing.judge import healed_report, healed_texts, judge, repeats_note
from lf_hf.healing.loss import Loss
from lf_hf.healing.settings import HealSettings
from lf_hf.healing.teacher import Item, Placement, Teacher, open_teacher, place_teacher
from lf_hf.healing.text import expected_epochs, given_text, training_order
from lf_hf.healing.trainer import damaged_file, default_learning_rate, make_student, make_trainer, training_arguments
from lf_hf.measure.speed import with_speed
from lf_hf.models import CausalLM, is_tied, model_class
from lf_hf.report.data import CalibrationInfo, HealingInfo
from lf_hf.report.report import FusionReport
from lf_hf.runtime.errors import explained
from lf_hf.runtime.launch import Processes, compute_once
from lf_hf.runtime.numerics import weights_digest
from lf_hf.settings import FusionConfig
from lf_hf.text.calibration import Corpus
from lf_hf.text.sources import TextSource

logger = logging.get_logger(__name__)

_LOGS = "runs"  # in the work folder and in the result's: where the Trainer's loggers write
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
    to the base on held-out text is saved, or the fused model if none is nearer. The state of a run
    that was killed is in OUT: the same call again goes on there.

    Parameters
    ----------
    fused : path
        Folder of a fused checkpoint.
    out : path
        Where to write a plain checkpoint. A fused one in that folder is replaced, but none that was trained.
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
    settings = HealSettings.taken_from(kwargs, settings)
    inputs, folder = open_inputs(fused, out, base, text, settings, kwargs)
    work = folder / WORK
    report = with_speed(_distill(inputs, work, cache, training_args or {}), inputs.model, inputs.base.config)
    gc.collect()  # the Trainer, in which objects know each other, and which has files in `work` open

    def save() -> None:
        inputs.model.fusion_report, inputs.model.tokenizer = report, inputs.tokenizer
        inputs.model.save_pretrained(folder, plain=True)
        if (work / _LOGS).is_dir():
            shutil.copytree(work / _LOGS, folder / _LOGS, copy_function=_copy_new, dirs_exist_ok=True)
        shutil.rmtree(work, ignore_errors=True)

    compute_once(save)
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
    work: Path | None = None,
    *,
    cache: str | os.PathLike[str] | None = None,
) -> None:
    """Heal a model in memory, in place, as `heal` does with its defaults; `fusion_report` follows.

    The states of a run that is cut short stay in `work`, where the same call goes on; without it they go.
    """
    report, tokenizer = model.fusion_report, model.tokenizer
    assert report is not None and tokenizer is not None
    asked_for = {"method": config.method, "heal_tokens": config.heal_tokens}
    report = replace(report, config=report.config | asked_for)
    inputs = HealingInputs(model, report, tokenizer, base, corpus, _settings(config))
    with ExitStack() as stack:
        folder = work or Path(compute_once(lambda: stack.enter_context(TemporaryDirectory())))
        model.remember(_distill(inputs, folder, cache, {}))
    gc.collect()  # the Trainer, in which objects know each other, and all that it holds


def check_can_heal(
    base: Base,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    config: FusionConfig,
    *,
    folder: str | os.PathLike[str] | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> Placement:
    """Raise ValueError, before a model is fused, if there is too little text or memory to heal it afterwards.

    Raises OSError if the disk of `folder`, where the result goes, has too little room. Returns what the healing will
    take.
    """
    fused = base.new_config()
    num_fusions = config.num_fusions or 1  # one at least, where a budget says how many
    text = fused.get_text_config()
    set_config_layers(text, range(text.num_hidden_layers - num_fusions))
    with torch.device("meta"):
        model = model_class(fused)(fused)
    work, settings = Path(folder or Path(gettempdir(), "lf_hf-healing"), WORK), _settings(config)
    size = sum(p.nbytes for p in model.to(base.dtype or checked_dtype(fused.dtype)).parameters())
    device, place = training_arguments(settings, work, {}).device, base.loading.get("device_map") or "cpu"
    index = None if is_spread(place) or isinstance(place, dict) else torch.device(place).index
    if device.index is not None and index not in (None, device.index):
        raise ValueError(f"Healing trains on {device}, not on {place}; give cuda, and CUDA_VISIBLE_DEVICES={index}.")
    # The student will be a copy of the fused model, which stays where it was fused.
    held = size if device.type == "cpu" or not (is_spread(place) or str(place) == "cpu") else 0
    advice = "give method='refit' and heal_tokens=0, and heal the result with lf_hf.heal"
    with explained("Where a fusion heals, it does so by the defaults", advice, ValueError):
        training = prepare(model, [], base, settings, work, {}, cache, held=held)
    corpus = training.placement.text(corpus, training.settings)
    given_text(tokenizer, corpus, training.settings, base.text_config.vocab_size)
    return replace(training.placement, disk=training.placement.disk + size)


def _settings(config: FusionConfig) -> HealSettings:
    return HealSettings(tokens=config.heal_tokens, seed=config.seed)


@dataclass(frozen=True)
class Training:
    """What is trained, where and how.

    The sequences of `settings` are no longer than the model takes, a step is no longer than the whole training, and all
    processes have as many sequences of it.
    """

    settings: HealSettings
    arguments: TrainingArguments
    student: nn.Module
    placement: Placement


def prepare(
    model: CausalLM,
    fused_layers: Sequence[int],
    base: Base,
    settings: HealSettings,
    work: Path,
    training_args: Mapping[str, Any],
    cache: str | os.PathLike[str] | None,
    *,
    held: int = 0,
) -> Training:
    """Make a student of a model, which may be on the meta device, and see whether it can be trained in `work`.

    Of free memory `held` bytes will be taken by then. Raises ValueError for training arguments that cannot be used, or
    too little memory, and OSError for too little room on the disk.
    """
    length = min(settings.length, base.text_config.max_position_embeddings)
    batch_tokens = max(length, min(settings.batch_tokens, settings.tokens))
    settings = replace(settings, length=length, batch_tokens=batch_tokens)
    world_size = training_arguments(settings, work, training_args).world_size
    batch = math.ceil(settings.batch / world_size) * world_size
    if batch != settings.batch:
        logger.warning(f"A step has {batch} sequences and not {settings.batch}, so that processes share it evenly.")
        settings = replace(settings, batch_tokens=batch * length)
    arguments = training_arguments(settings, work, training_args)
    if arguments.report_to and (work.parent / _LOGS).is_file():
        raise ValueError(f"{str(work.parent)!r} holds a file {_LOGS!r}, where logs go; choose another folder.")
    student = make_student(model, settings, fused_layers)
    placement = place_teacher(base, student, settings, arguments, cache, held=held)

    def check_disk() -> None:
        if not any(work.glob("checkpoint-*")):  # a run that goes on has its states there
            check_room(work, placement.disk, "states of the training take")

    compute_once(check_disk)
    return Training(settings, arguments, student, placement)


@purge_accelerate_environment  # type: ignore[untyped-decorator]
def _distill(
    inputs: HealingInputs, work: Path, cache: str | os.PathLike[str] | None, training_args: Mapping[str, Any]
) -> FusionReport:
    """Train the fused model, in place and in all processes; returns what its report is then."""
    start = time.monotonic()
    model, settings, processes = inputs.model, inputs.settings, Processes.of_launch()
    if settings.learning_rate is None:
        settings = replace(settings, learning_rate=default_learning_rate(model, settings.train))
    with ExitStack() as stack:
        _keep_random_numbers(stack)
        training = prepare(model, inputs.fused_layers, inputs.base, settings, work, training_args, cache)
        settings, arguments, placement = training.settings, training.arguments, training.placement
        given_arguments = {name: str(value) for name, value in training_args.items()}
        inputs = replace(inputs, settings=settings, corpus=placement.text(inputs.corpus, settings))
        identity = inputs.identity(
            settings.in_effect(),
            fused=weights_digest(model.named_parameters()),
            processes=processes.world_size,
            training_args=given_arguments,
        )
        note = {"teacher": placement.description, "identity": identity}

        def begin() -> str | None:
            given = given_text(inputs.tokenizer, inputs.corpus, settings, inputs.base.text_config.vocab_size)
            if repeats := repeats_note(expected_epochs(given, inputs.corpus, settings)):
                logger.warning(repeats)
            stack.enter_context(only_writer(work))
            return _state_to_go_on_from(work, note)

        if not AcceleratorState._shared_state and processes.world_size == 1:
            stack.callback(AcceleratorState._reset_state)  # with the precision that is set for the whole process
        state = processes.broadcast_object(begin)
        arguments.eval_on_start = state is None
        trainer = make_trainer(training.student, arguments)
        teacher = open_teacher(inputs, placement, arguments, work)
        before = judge(model, teacher, processes)
        sequences, used = _training_sequences(teacher, settings)
        trainer.targets, trainer.loss = teacher.targets, Loss(settings.temperature, settings.next_token_share)
        trainer.eval_dataset, trainer.train_dataset = teacher.held_out, sequences
        processes.broadcast_object(lambda: (work / _NOTE).write_text(json.dumps(note), encoding="utf-8"))
        trainer.train(resume_from_checkpoint=state)
        kept = trainer.best_step()
        if kept:
            _load(model, trainer.trained_state(model, settings), processes)
        after = judge(model, teacher, processes)
        healed = HealingInfo(
            settings=settings.in_effect(),
            text=[CalibrationInfo(name, count, count * settings.length) for name, count in used.items()],
            epochs=len(sequences) / used.total(),
            trained=sum(p.numel() for p in training.student.parameters() if p.requires_grad),
            steps=trainer.state.global_step,
            kept=kept,
            teacher=placement.description,
            curve=trainer.curve(),
            judged=healed_texts(teacher, before, after),
            seconds=time.monotonic() - start,
            training_args=given_arguments,
            before=inputs.report.healed,
        )
        return healed_report(inputs, healed, after)


def _keep_random_numbers(stack: ExitStack) -> None:
    """Give the process its random numbers back, which a training sets, when the stack is left."""
    stack.callback(random.setstate, random.getstate())
    stack.callback(np.random.set_state, np.random.get_state())
    stack.enter_context(torch.random.fork_rng(list(range(torch.cuda.device_count()))))


def _training_sequences(teacher: Teacher, settings: HealSettings) -> tuple[Subset[Item], Counter[str]]:
    """Sequences in the order of the training, and how many different ones of each kind of text are among them."""
    names: list[str] = []
    for name, items in teacher.training.items():
        names += [name] * len(items)
    order = training_order(len(names), settings)
    used = Counter(names[number] for number in sorted(set(order)))
    return Subset(ConcatDataset(teacher.training.values()), order), used


@torch.no_grad()
def _load(model: FusedForCausalLM, state: Mapping[str, Tensor], processes: Processes) -> None:
    """Give a model, in all processes, the weights that the first one has; other models may share its old tensors."""
    new: dict[str, Tensor] = {}
    tied = is_tied(model)
    for name, parameter in model.named_parameters():
        new[name] = torch.empty_like(parameter)
        if processes.is_main:
            new[name].copy_(state[name])
        processes.broadcast(new[name])
    model.load_state_dict(new, assign=True, strict=False)
    if tied:
        model.tie_weights()


def _state_to_go_on_from(work: Path, note: Mapping[str, Any]) -> str | None:
    """The last state of a run of the same healing that was cut short, if there is one; states with damage go.

    Raises ValueError for a run of another healing, so that nothing is lost.
    """
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
    advice = f"remove {str(work)!r} to begin anew"
    with explained(f"{str(work / _NOTE)!r}, which says what is healed there, cannot be read", advice):
        earlier = json.loads((work / _NOTE).read_text(encoding="utf-8"))
        changes = differences(earlier["identity"], note["identity"])
    if changes:
        raise ValueError(
            f"{str(work.parent)!r} holds a run that was cut short, of another healing ({'; '.join(changes):.500}). "
            "To go on with it, give its command again, with the same lf_hf, Python and hub access "
            f"(or the text 'bundled' if it had none), or {advice}."
        )
    best = TrainerState.load_from_json(str(Path(last, TRAINER_STATE_NAME))).best_model_checkpoint
    if best is not None and not Path(best).is_dir():
        logger.warning(f"The best state of an earlier run, {best!r}, is gone, so the training begins anew.")
        shutil.rmtree(last)
        return None
    logger.warning(f"Going on from {last!r}, where an earlier run of the same healing stopped.")
    if earlier["teacher"] != note["teacher"]:
        logger.warning(f"The base's predictions were {earlier['teacher']}; from now on they are {note['teacher']}.")
    return last
