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
from dataclasses import dataclass
from functools import partial
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

from lf_hf.checkpoint.base import Base, load_tokenizer
from lf_hf.checkpoint.classes import FusedForCausalLM
from lf_hf.checkpoint.saving import check_replaceable, check_room, checked_folder, only_writer
from lf_hf.decoder.interface import remove_config_layer
from lf_hf.decoder.predictions import Predictions
from lf_hf.families import is_tied
from lf_hf.healing.judge import judge
from lf_hf.healing.lesson import (
    MOST_EPOCHS,
    Way,
    choose_way,
    digest_of,
    epochs_note,
    make_lesson,
    tokenizer_of,
    weights_of,
)
from lf_hf.healing.loss import Loss
from lf_hf.healing.models import Fused, open_base, open_fused
from lf_hf.healing.outcome import best_step, healed_report
from lf_hf.healing.settings import HealSettings
from lf_hf.healing.teacher import stacked
from lf_hf.healing.text import Sequences, given_text, hub_texts
from lf_hf.healing.training import (
    DistillationTrainer,
    check_arguments,
    choose_trained,
    disk_needed,
    make_student,
    trained_state,
    training_arguments,
)
from lf_hf.report.report import FusionReport
from lf_hf.runtime.launch import Processes
from lf_hf.runtime.numerics import weights_digest
from lf_hf.settings import ALGORITHM, FusionConfig
from lf_hf.text.calibration import Corpus, load_training_text
from lf_hf.text.sources import OpenTokenizer, Samples

logger = logging.get_logger(__name__)

WORK = ".lf_hf-healing"  # in OUT: the state of a training that is not done
STATES = "states of the training take"  # on disk, at most
_LOGS = "runs"  # in it: where the Trainer's loggers write, unless they are told another place
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


def heal(
    fused: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | Base | None = None,
    text: Samples | None = None,
    dataset: str | None = None,
    dataset_config: str | None = None,
    dataset_split: str = "train",
    dataset_column: str = "text",
    settings: HealSettings | None = None,
    cache: str | os.PathLike[str] | None = None,
    training_args: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> FusionReport:
    """Train a fused model, for a short time, to predict what its base predicts, and save it into another folder.

    It is transformers' `Trainer` that trains, so `accelerate launch` spreads it over devices. The state that is nearest
    to the base on text that was kept aside is what is saved; if none is nearer than what came in, that is. What a
    killed run had done is in OUT: the same call again goes on there.

    Parameters
    ----------
    fused : path
        Folder of a fused checkpoint, native or plain.
    out : path
        Where to write one of the same kind. A fused checkpoint in that folder is replaced.
    base : str or Base, optional
        Folder or hub name of the model that was fused. Default: what the report names, if that is on the hub.
    text : list of str or chats, or path, optional
        Text to heal on, as `lf_hf.text.calibration.load_training_text` takes it: best what the model will be used
        for. Default: a mixture that is there offline.
    dataset, dataset_config, dataset_split, dataset_column : str, optional
        A data set on the hub in place of `text`: its beginning is streamed.
    settings : HealSettings, optional
        HealSettings fields in `kwargs` override it.
    cache : path, optional
        Where to keep the base's predictions, for all healings of models that were fused from it, on the same text.
    training_args : dict, optional
        Fields of transformers' TrainingArguments: bf16, gradient_checkpointing, report_to, fsdp, deepspeed, ...
    **kwargs
        HealSettings fields; all others are for loading the base (revision, token, gguf_file, ...).

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
    source = HealingText(text, dataset, dataset_config, dataset_split, dataset_column)
    settings, given = HealSettings.taken_from(kwargs, settings), dict(training_args or {})
    came_in, opened, corpus, folder = open_healing(fused, out, base, source, settings, given, kwargs)
    work = folder / WORK
    report = _distilled(came_in, opened, corpus, settings, work, cache, given)

    def save() -> None:
        came_in.model.fusion_report, came_in.model.tokenizer = report, came_in.tokenizer
        came_in.model.save_pretrained(folder, plain=came_in.plain)
        if (work / _LOGS).is_dir():
            shutil.copytree(work / _LOGS, folder / _LOGS, dirs_exist_ok=True, copy_function=_copy_unless_there)
        shutil.rmtree(work, ignore_errors=True)

    Processes.of_launch().broadcast_object(save)
    return report


def _copy_unless_there(source: str, target: str) -> None:
    if not os.path.exists(target):
        shutil.copy2(source, target)


@dataclass(frozen=True)
class HealingText:
    """Where the text of a healing comes from, as `heal` takes it."""

    text: Samples | None
    dataset: str | None
    config: str | None
    split: str
    column: str

    def load(self, settings: HealSettings, open_tokenizer: OpenTokenizer) -> Corpus:
        if self.dataset is None:
            if (self.config, self.split, self.column) != (None, "train", "text"):
                raise ValueError(
                    "A configuration, split or column is one of a data set; name it with dataset= (--dataset)."
                )
            return load_training_text(self.text, settings.tokens, open_tokenizer)
        if self.text is not None:
            raise ValueError("text and dataset exclude each other; give one of them.")
        texts = hub_texts(self.dataset, self.config, self.split, self.column, settings.tokens)
        corpus = load_training_text(texts, settings.tokens, open_tokenizer)
        names = [f"{self.dataset} ({self.split})", *corpus.names[1:]]
        return dataclasses.replace(corpus, source=", ".join(names))


def open_healing(
    fused: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: str | os.PathLike[str] | Base | None,
    source: HealingText,
    settings: HealSettings,
    given: Mapping[str, Any],
    hub: dict[str, Any],
    *,
    reads_weights: bool = True,
) -> tuple[Fused, Base, Corpus, Path]:
    """What `heal` starts from, checked: the fused model, its base, the text, and the folder of the result."""
    folder = checked_folder(out)
    if folder == checked_folder(fused):
        raise ValueError(f"{os.fspath(out)!r} is the fused model itself; choose another folder for the result.")
    if (folder / _LOGS).is_file() and given.get("report_to", "none") != "none":
        raise ValueError(
            f"{os.fspath(out)!r} holds a file {_LOGS!r}, where the Trainer's logs go; choose another folder."
        )
    check_arguments(given)
    if base is not None and not isinstance(base, Base):
        base = Base.open(base, hub)
    own = base is None or (checked_folder(fused) / "tokenizer_config.json").is_file()
    open_tokenizer = base.tokenizer if base is not None and not own else partial(load_tokenizer, str(fused), {})
    corpus = source.load(settings, open_tokenizer)
    came_in = open_fused(fused, reads_weights=reads_weights)
    opened = open_base(base, came_in, hub)
    check_replaceable(folder, opened.name)
    return came_in, opened, corpus, folder


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
    came_in = Fused(model, report, plain=False, tokenizer=model.tokenizer)
    settings = HealSettings(tokens=tokens, seed=config.seed)
    with ExitStack() as stack:
        work = Processes.of_launch().broadcast_object(lambda: stack.enter_context(TemporaryDirectory()))
        model.fusion_report = _distilled(came_in, base, corpus, settings, Path(work), cache, {})
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
    settings = HealSettings(tokens=config.heal_tokens, seed=config.seed)
    fused = copy.deepcopy(base.config)
    for _ in range(config.num_fusions or 1):  # one at least, where a budget says how many
        remove_config_layer(fused, fused.num_hidden_layers - 1)
    with torch.device("meta"):
        student = base.family.causal_lm(fused)
    with TemporaryDirectory() as work:
        settings, arguments = fitted_arguments(settings, base.config, Path(work), {})
        choose_trained(student, settings.train, [])
        given_text(tokenizer, corpus, settings, base.config.vocab_size)
        choose_way(base, student, settings, arguments, {}, cache)
        check_room(work, disk_needed(student, settings.train), STATES)


def fitted_arguments(
    settings: HealSettings, config: PreTrainedConfig, work: Path, given: dict[str, Any]
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
def _as_it_was() -> Iterator[None]:
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


def _distilled(
    came_in: Fused,
    opened: Base,
    corpus: Corpus,
    settings: HealSettings,
    work: Path,
    cache: str | os.PathLike[str] | None,
    given: dict[str, Any],
) -> FusionReport:
    """Train the model that came in, in place and in all processes; returns what its report is then."""
    start = time.monotonic()
    model = came_in.model
    settings, arguments = fitted_arguments(settings, model.config, work, given)
    processes = Processes.of_launch()
    student = make_student(model, settings, came_in.fused_layers)
    way = choose_way(opened, student, settings, arguments, given, cache)
    on_disk = disk_needed(student, settings.train)

    def check_disk() -> None:
        if not any(work.glob("checkpoint-*")):  # of a run that goes on some is there
            check_room(work, on_disk, STATES)

    processes.broadcast_object(check_disk)
    with ExitStack() as stack:
        stack.enter_context(_as_it_was())
        processes.broadcast_object(lambda: bool(stack.enter_context(only_writer(work))))
        resumed = processes.broadcast_object(
            lambda: _state_of(work, came_in, opened, settings, corpus, way, arguments, given)
        )
        lesson = make_lesson(way, opened, came_in, corpus, settings, arguments, work, processes)
        if lesson.epochs > MOST_EPOCHS:
            logger.warning(epochs_note(lesson.epochs))

        def judged() -> dict[str, Predictions]:
            return {name: judge(model, items, lesson.teacher, processes) for name, items in lesson.judging.items()}

        before = judged()
        trainer = DistillationTrainer(
            teacher=lesson.teacher,
            loss=Loss(settings.temperature, settings.next_token_share),
            model=student,
            args=arguments,
            data_collator=stacked,
            train_dataset=Sequences(lesson.items, lesson.order),
            eval_dataset={name: Sequences(lesson.items, numbers) for name, numbers in lesson.held_out.items()},
        )
        trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
        del student
        arguments.eval_on_start = resumed is None
        trainer.train(resume_from_checkpoint=resumed)
        kept = best_step(trainer)
        if kept:
            _take_over(model, trained_state(trainer, model, settings), processes)
        after, seconds = judged(), time.monotonic() - start
        return healed_report(came_in, settings, lesson, trainer, trained, kept, before, after, corpus, seconds)


@torch.no_grad()
def _take_over(model: FusedForCausalLM, state: Mapping[str, Tensor], processes: Processes) -> None:
    """Give a model, in all processes, the weights that the first one has; other models may share its tensors."""
    taken, tied = {}, is_tied(model)
    for name, parameter in model.named_parameters():
        tensor = torch.empty_like(parameter)
        if processes.is_main:
            tensor.copy_(state[name])
        processes.broadcast(tensor)
        taken[name] = tensor
    model.load_state_dict(taken, assign=True, strict=False)
    if tied:
        model.tie_weights()


def _state_of(
    work: Path,
    came_in: Fused,
    opened: Base,
    settings: HealSettings,
    corpus: Corpus,
    way: Way,
    arguments: TrainingArguments,
    given: Mapping[str, Any],
) -> str | None:
    """The checkpoint of a run of the same healing that was cut short, if any.

    Raises ValueError for one of another healing, so that nothing is lost; what has no checkpoint is removed.
    """
    identity = {
        "settings": settings.to_dict(),
        "fused": weights_digest(came_in.model.named_parameters()),
        "base": weights_of(opened, came_in),
        "text": digest_of(corpus),
        "processes": arguments.world_size,
        "judging_tokens": came_in.judging_tokens,
        "training_args": {name: str(value) for name, value in given.items() if not name.startswith(_WITHOUT_EFFECT)},
        "teacher": way.said,
        "chat_template": str(tokenizer_of(opened, came_in).chat_template),
        "algorithm": ALGORITHM,
    }
    note = work / "healing.json"
    before = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    for checkpoint in work.glob("checkpoint-*"):
        try:
            json.loads((checkpoint / _TRAINER_STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # cut short while it was written
            shutil.rmtree(checkpoint)
    if before != identity and get_last_checkpoint(str(work)):
        differ = [name for name, value in identity.items() if before.get(name) != value]
        if before.keys() != identity.keys() or "algorithm" in differ:
            reason = (
                f"{str(work.parent)!r} holds a run that was cut short, of another version of lf_hf. Go on with that"
            )
        elif differ == ["teacher"]:
            reason = (
                f"For the run that was cut short the base's predictions were {before['teacher']}; now they would be "
                f"{way.said}. Go on with as much memory and the same cache"
            )
        else:
            reason = (
                f"{str(work.parent)!r} holds a run that was cut short, of another healing: {', '.join(differ)} differ. "
                "Give the same command again to go on"
            )
        raise ValueError(f"{reason}, or remove {str(work)!r} to start anew.")
    if before != identity:
        for path in work.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif not path.name.endswith(".lock"):
                path.unlink()
        (work / "healing.new").write_text(json.dumps(identity), encoding="utf-8")
        (work / "healing.new").replace(note)
    found: str | None = get_last_checkpoint(str(work))
    if found:
        logger.warning(f"Going on from {found!r}, where an earlier run of the same healing stopped.")
    return found
