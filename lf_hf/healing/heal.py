"""heal: a fused checkpoint and its base in, a checkpoint of the same kind that is nearer to the base out."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import math
import os
import random
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from lf_hf.checkpoint.base import Base
from lf_hf.checkpoint.classes import FusedForCausalLM
from lf_hf.checkpoint.saving import check_room, only_writer
from lf_hf.decoder.interface import remove_config_layer
from lf_hf.families import is_tied
from lf_hf.healing.inputs import LOGS, WORK, HealingInputs, open_inputs
from lf_hf.healing.judge import healed_report, healed_texts, judge
from lf_hf.healing.loss import Loss
from lf_hf.healing.settings import HealSettings
from lf_hf.healing.teacher import Placement, place_teacher, stacked, training_data
from lf_hf.healing.text import TextUse, given_text
from lf_hf.healing.trainer import (
    choose_trained,
    default_learning_rate,
    disk_needed,
    make_student,
    make_trainer,
    training_arguments,
)
from lf_hf.report.records import HealingInfo, HealingPoint
from lf_hf.report.report import FusionReport
from lf_hf.runtime.fields import naming
from lf_hf.runtime.launch import Processes
from lf_hf.runtime.numerics import weights_digest
from lf_hf.settings import ALGORITHM, FusionConfig
from lf_hf.speed import with_speed
from lf_hf.text.calibration import Corpus
from lf_hf.text.sources import Samples

logger = logging.get_logger(__name__)

STATES = "states of the training take"
"""On disk, at most."""
# What the names of training arguments begin with that change nothing in the result.
_WITHOUT_EFFECT = (
    "report_to",
    "logging_",
    "run_name",
    "disable_tqdm",
    "gradient_checkpointing",
    "dataloader_num_workers",
)
_TRAINER_STATE = "trainer_state.json"  # what the Trainer writes last into a checkpoint


@naming(HealSettings)
def heal(
    fused: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | Base | None = None,
    text: Samples | None = None,
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
        HealSettings fields: {settings}.
        All others are for loading the base (revision, token, gguf_file, ...).

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
    inputs, folder = open_inputs(fused, out, base, text, settings, given, kwargs)
    report = with_speed(_distill(inputs, folder / WORK, cache, given), inputs.model)

    def save() -> None:
        inputs.model.fusion_report, inputs.model.tokenizer = report, inputs.own_tokenizer
        inputs.model.save_pretrained(folder, plain=inputs.plain)
        logs = folder / WORK / LOGS
        for log in logs.rglob("*"):
            target = folder / LOGS / log.relative_to(logs)
            if log.is_file() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(log, target)
        shutil.rmtree(folder / WORK, ignore_errors=True)

    Processes.of_launch().broadcast_object(save)
    return report


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
    assert report is not None
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
    settings, fused = HealSettings(tokens=config.heal_tokens, seed=config.seed), copy.deepcopy(base.config)
    for _ in range(config.num_fusions or 1):  # one at least, where a budget says how many
        remove_config_layer(fused, fused.num_hidden_layers - 1)
    with torch.device("meta"):
        student = base.family.causal_lm(fused)
    with TemporaryDirectory() as work:
        settings, arguments = fitted_arguments(settings, base.config, Path(work), {})
        choose_trained(student, settings.train, [])
        given_text(tokenizer, corpus, settings, base.config.vocab_size)
        place_teacher(base, settings, student, arguments, {}, cache)
        check_room(work, disk_needed(student, settings.train), STATES)


def fitted_arguments(
    settings: HealSettings, config: PreTrainedConfig, work: Path, given: Mapping[str, Any]
) -> tuple[HealSettings, TrainingArguments]:
    """Settings with sequences no longer than the model takes, and as many in a step as all processes share evenly.

    A step is no longer than the whole training.
    """
    length = min(settings.length, config.max_position_embeddings)
    batch_tokens = max(length, min(settings.batch_tokens, settings.tokens))
    settings = dataclasses.replace(settings, length=length, batch_tokens=batch_tokens)
    arguments = training_arguments(settings, work, given)
    batch = math.ceil(settings.batch / arguments.world_size) * arguments.world_size
    if batch == settings.batch:
        return settings, arguments
    logger.warning(f"A step has {batch} sequences and not {settings.batch}, so that all processes have as many.")
    settings = dataclasses.replace(settings, batch_tokens=batch * settings.length)
    return settings, training_arguments(settings, work, given)


@contextmanager
def _unchanged_process() -> Iterator[None]:
    """Give back, after a training, the random numbers and the precision that it sets for the whole process."""
    python, of_numpy, set_before = random.getstate(), np.random.get_state(), bool(AcceleratorState._shared_state)
    try:
        with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(of_numpy)
        if not set_before and Processes.of_launch().world_size == 1:
            AcceleratorState._reset_state()


def _distill(
    inputs: HealingInputs, work: Path, cache: str | os.PathLike[str] | None, given: dict[str, Any]
) -> FusionReport:
    """Train the fused model, in place and in all processes; returns what its report is then."""
    start, model, processes = time.monotonic(), inputs.model, Processes.of_launch()
    rate = inputs.settings.learning_rate or default_learning_rate(model, inputs.settings.train)
    settings = dataclasses.replace(inputs.settings, learning_rate=rate)
    settings, arguments = fitted_arguments(settings, model.config, work, given)
    inputs = dataclasses.replace(inputs, settings=settings)
    student = make_student(model, settings, inputs.fused_layers)
    placement = place_teacher(inputs.base, settings, student, arguments, given, cache)

    with ExitStack() as stack:

        def begin() -> str | None:
            if not any(work.glob("checkpoint-*")):  # of a run that goes on some is there
                check_room(work, disk_needed(student, settings.train), STATES)
                given_text(inputs.tokenizer, inputs.corpus, settings, model.config.vocab_size)
            stack.enter_context(only_writer(work))
            return _resumed_from(work, _identity(inputs, placement, arguments, given), inputs.corpus.source)

        stack.enter_context(_unchanged_process())
        resumed = processes.broadcast_object(begin)
        loss = Loss(settings.temperature, settings.next_token_share)
        arguments.eval_on_start = resumed is None
        trainer = make_trainer(student, arguments, loss, stacked)
        data = training_data(inputs, placement, arguments, work, processes)
        use = TextUse.of(data.counts, settings)
        if use.note:
            logger.warning(use.note)
        before = judge(model, data.judging, data.teacher, processes)
        trainer.targets, trainer.eval_dataset = data.teacher.targets, data.held_out
        trainer.train_dataset = data.training[use.order]
        trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
        trainer.train(resume_from_checkpoint=resumed)
        if kept := trainer.best_step():
            _load(model, trainer.trained_state(model, settings), processes)
        after = judge(model, data.judging, data.teacher, processes)
        healed = HealingInfo(
            settings=settings.recorded(on_disk=placement.files is not None, written_share=use.written_share),
            text=use.kinds,
            epochs=use.epochs,
            trained=trained,
            steps=trainer.state.global_step,
            kept=kept,
            teacher=placement.description,
            curve=[HealingPoint(step, of_kinds) for step, of_kinds in sorted(trainer.curve().items())],
            judged=healed_texts(data.judging, before, after),
            seconds=time.monotonic() - start,
        )
        return healed_report(inputs, healed, after, use, trainer.diverged)


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


def _identity(
    inputs: HealingInputs, placement: Placement, arguments: TrainingArguments, given: Mapping[str, Any]
) -> dict[str, Any]:
    """What a run must have in common with one that was cut short to go on with it."""
    return inputs.content() | {
        "settings": inputs.settings.to_dict(),
        "fused": weights_digest(inputs.model.named_parameters()),
        "processes": arguments.world_size,
        "training_args": {name: str(value) for name, value in given.items() if not name.startswith(_WITHOUT_EFFECT)},
        "teacher": placement.description,
        "algorithm": ALGORITHM,
    }


def _resumed_from(work: Path, identity: dict[str, Any], source: str) -> str | None:
    """The checkpoint of a run of the same healing that was cut short, if any; all else in the folder is removed.

    `source` says where the text is from. Raises ValueError for a run of another healing, so that nothing is lost.
    """
    note = work / "healing.json"
    before = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    source_before = before.pop("source", "another text")
    for checkpoint in work.glob("checkpoint-*"):
        try:
            json.loads((checkpoint / _TRAINER_STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # cut short while it was written
            shutil.rmtree(checkpoint)
    checkpoint = get_last_checkpoint(str(work))
    if before != identity and checkpoint:
        differ = [name for name, value in identity.items() if before.get(name) != value]
        reason = f"its {', '.join(differ)} differ; give the same command again to go on"
        if "algorithm" in differ:
            reason = "it is of another version of lf_hf; go on with that"
        elif differ == ["teacher"]:
            reason = (
                f"for it the base's predictions were {before['teacher']}, and now they would be {identity['teacher']}; "
                "go on with as much memory and the same cache"
            )
        elif differ == ["text"]:
            reason = (
                f"its text is {source_before}, and now it would be {source}; go on with that text (without text= it is "
                "the hub's where that answers, else as with text='bundled')"
            )
        raise ValueError(
            f"{str(work.parent)!r} holds a run that was cut short, of another healing: {reason}, or remove "
            f"{str(work)!r} to start anew."
        )
    if before != identity:
        for path in work.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif not path.name.endswith(".lock"):
                path.unlink()
        note.with_suffix(".new").write_text(json.dumps(identity | {"source": source}), encoding="utf-8")
        note.with_suffix(".new").replace(note)
    if checkpoint:
        logger.warning(f"Going on from {checkpoint!r}, where an earlier run of the same healing stopped.")
    return checkpoint
