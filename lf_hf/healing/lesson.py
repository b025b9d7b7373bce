"""What a student is taught: the text, and how the base's predictions of it are had."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.utils import logging

from lf_hf.checkpoint.base import Base
from lf_hf.checkpoint.fused_cache import base_fingerprint
from lf_hf.checkpoint.saving import checked_folder, only_writer
from lf_hf.decoder.generating import generate
from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.decoder.interface import Decoder
from lf_hf.decoder.on_disk import CheckpointDecoder
from lf_hf.families import CausalLM
from lf_hf.healing.memory import model_bytes, training_memory
from lf_hf.healing.models import Fused, check_base
from lf_hf.healing.settings import HealSettings
from lf_hf.healing.teacher import (
    FileTeacher,
    Item,
    MemoryTeacher,
    Teacher,
    are_written,
    read_targets,
    targets_folder,
    write_targets,
)
from lf_hf.healing.text import WRITTEN, WRITTEN_CHATS, Kind, healing_text, load_kinds, save_kinds, training_order
from lf_hf.healing.training import check_can_train, set_batches
from lf_hf.measure import PERPLEXITY_LENGTH
from lf_hf.report.report import CalibrationInfo
from lf_hf.runtime.launch import Processes
from lf_hf.runtime.memory import free_memory
from lf_hf.text.calibration import Corpus
from lf_hf.text.chats import ChatForm, chat_form
from lf_hf.text.judging import judging_texts
from lf_hf.text.packing import pack_tokens

logger = logging.get_logger(__name__)

MOST_EPOCHS = 3
_SPARE = 0.9  # of free memory: estimates leave something out
_JUDGING = "judging: "  # before a judging text's name, among kinds of text


@dataclass(frozen=True)
class Way:
    """How the base's predictions are had: `said` to people; `folder` for files of them, and `in_memory` the base.

    `memory` is about how many bytes of a device the base and the student then take at most.
    """

    said: str
    folder: Path | None
    in_memory: bool
    memory: int = 0


def choose_way(
    opened: Base,
    student: torch.nn.Module,
    settings: HealSettings,
    arguments: TrainingArguments,
    given: Mapping[str, Any],
    cache: str | os.PathLike[str] | None,
    *,
    planned: torch.nn.Module | None = None,
) -> Way:
    """Decide by free memory, and split steps into batches that fit.

    Raises ValueError if nothing fits, or for arguments with which the Trainer cannot train.

    `planned` is the fused model where it and the student are still to be loaded, and are on the meta device.
    """
    check_can_train(arguments, student)
    cache = None if cache is None else checked_folder(cache)
    size = 2 if arguments.bf16 or arguments.fp16 else 4
    config = getattr(student, "config", opened.config)
    checkpointing = bool(arguments.gradient_checkpointing)
    memory = training_memory(config, student, settings.length, size, checkpointing=checkpointing)
    device = arguments.device
    free = min(Processes.of_launch().all_gather_object(int(free_memory(device) * _SPARE)))  # so that all choose alike
    there = sum(p.nbytes for p in student.parameters() if p.device.type == device.type)
    if planned is not None and device.type == "cpu":
        there = sum(p.nbytes for p in student.parameters())
        free -= int((there + sum(p.nbytes for p in planned.parameters())) * _SPARE)
    launcher = [os.environ.get(f"ACCELERATE_USE_{kind}", "false") for kind in ("FSDP", "DEEPSPEED")]
    sharded = arguments.fsdp or arguments.deepspeed or "true" in launcher
    fixed = memory.fixed // (arguments.world_size if sharded else 1) - there
    of_base = model_bytes(opened.config, 2 if arguments.bf16 else 4)
    one = memory.sequence
    if cache is None and fixed + one + of_base <= free:
        way = Way("computed by the base, which is in memory beside the student", None, True)
        free -= of_base
    elif fixed + one <= free:
        in_memory = of_base <= free
        how = "in memory" if in_memory else "read layer by layer"
        place = cache if cache is not None else Path(arguments.output_dir or ".")
        said = f"the {settings.top_k} most likely ones of each token, written to disk by the base, {how}"
        way = Way(said, place, in_memory)
    else:
        needs = f"{(fixed + one) / 1e9:.1f} GB for train={settings.train!r}"
        ways = []
        if fixed < free:  # so what is too much are the activations
            ways += [] if checkpointing else ["the training argument gradient_checkpointing=True"]
            ways.append("a shorter length")
        if settings.train != "lora" and size * sum(p.numel() for p in student.parameters()) < free:
            ways.append("train='lora'")
        advice = f"take {', '.join([*ways, 'a device with more, or several of them with FSDP'])}"
        raise ValueError(
            f"{free / 1e9:.1f} GB are free, but training takes {needs}, even with the base's predictions on disk; "
            f"{advice}."
        )
    logger.info(f"The base's predictions: {way.said}.")
    set_batches(arguments, settings.batch, int((free - fixed) // one), given)
    peak = fixed + there + arguments.per_device_train_batch_size * one
    if way.folder is None:
        peak += of_base
    elif way.in_memory:
        peak = max(peak, there + of_base)
    return dataclasses.replace(way, memory=peak)


@dataclass(frozen=True)
class Lesson:
    """All sequences, and what is done with which: `order` are the numbers of those to train on, one after the other.

    `held_out` has numbers by kind of text, and `judging` items by judging text.
    """

    teacher: Teacher
    said: str
    kinds: list[CalibrationInfo]
    items: Sequence[Item]
    order: list[int]
    epochs: float
    written_share: float
    held_out: dict[str, list[int]]
    judging: dict[str, list[Item]]


def make_lesson(
    way: Way,
    opened: Base,
    came_in: Fused,
    corpus: Corpus,
    settings: HealSettings,
    arguments: TrainingArguments,
    work: Path,
    processes: Processes,
) -> Lesson:
    """The text and the base's predictions of it, on the way that was chosen."""
    corpus = _teachable(corpus, way, settings)
    if way.folder is None:
        base = _loaded_base(opened, came_in, arguments)
        written_by_base = partial(generate, ModelDecoder(base))
        kinds = processes.broadcast_object(
            lambda: _kinds(written_by_base, way, opened, came_in, corpus, settings, work / "text.safetensors")
        )
        teacher, items = MemoryTeacher(base), list[Item]()
        for kind in kinds:
            items += [{"input_ids": sequence} for sequence in kind.training]
            items += [teacher.read(sequence) for sequence in kind.held_out]
        parts = [(kind.name, len(kind.training), len(kind.held_out)) for kind in kinds]
        return _arranged(teacher, way.said, items, parts, settings)
    made_of = {
        "format": 5,  # of the files: rises when they change
        "base": weights_of(opened, came_in),
        "text": digest_of(corpus),
        "chat_template": str(tokenizer_of(opened, came_in).chat_template),
        "settings": {
            name: getattr(settings, name)
            for name in ("tokens", "length", "batch_tokens", "written_share", "temperature", "top_k", "seed")
        },
        "judging_tokens": came_in.judging_tokens,
        "dtype": "bfloat16" if arguments.bf16 else str(came_in.base_dtype),
    }
    folder = targets_folder(way.folder, **made_of)
    processes.broadcast_object(lambda: _write(folder, way, opened, came_in, corpus, settings, arguments))
    return _arranged(FileTeacher(folder, opened.config), way.said, *read_targets(folder), settings)


def plan_lesson(way: Way, opened: Base, came_in: Fused, corpus: Corpus, settings: HealSettings) -> Lesson:
    """A lesson to count with, without the base: nothing is predicted, and all that it would write is zeros."""

    def zeros(count: int, length: int, seed: int, *, chat: ChatForm | None) -> list[torch.Tensor]:
        return [torch.zeros(length, dtype=torch.int64)] * count

    kinds = _kinds(zeros, way, opened, came_in, _teachable(corpus, way, settings), settings, None)
    items: list[Item] = [{"input_ids": ids} for kind in kinds for ids in (*kind.training, *kind.held_out)]
    parts = [(kind.name, len(kind.training), len(kind.held_out)) for kind in kinds]
    return _arranged(FileTeacher(Path(), opened.config), way.said, items, parts, settings)


def _teachable(corpus: Corpus, way: Way, settings: HealSettings) -> Corpus:
    """The text, to which a base that reads all of its weights for each token adds none, unless the settings say so."""
    if way.in_memory or settings.written_share is not None:
        return corpus
    return dataclasses.replace(corpus, generated_share=0.0)


def tokenizer_of(opened: Base, came_in: Fused) -> PreTrainedTokenizerBase:
    """The fused model's own, or its base's."""
    return came_in.tokenizer or opened.tokenizer()


def weights_of(opened: Base, came_in: Fused) -> str:
    """The base's weights by content: by the digest that the report has, or else by their files."""
    return came_in.report.base_digest or base_fingerprint(opened)


def _loaded_base(opened: Base, came_in: Fused, arguments: TrainingArguments) -> CausalLM:
    loading = {**opened.loading, "dtype": came_in.base_dtype, "device_map": None}
    with _whole_in_each_process():
        model = dataclasses.replace(opened, loading=loading).load()
    check_base(opened, came_in, ModelDecoder(model))
    # Where training is not in bfloat16, the machine is faster without it, or the user wants none.
    dtype = torch.bfloat16 if arguments.bf16 else torch.promote_types(model.dtype, torch.float32)
    for parameter in model.parameters():  # not the buffers: angles of positions need float32
        parameter.data = parameter.data.to(dtype)
    return model.to(arguments.device)  # type: ignore[arg-type]


@contextmanager
def _whole_in_each_process() -> Iterator[None]:
    """Where FSDP is to split the student, older transformers would give other processes than the first one zeros."""
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        del os.environ[name]
        os.environ.update({} if before is None else {name: before})


def _write(
    folder: Path,
    way: Way,
    opened: Base,
    came_in: Fused,
    corpus: Corpus,
    settings: HealSettings,
    arguments: TrainingArguments,
) -> None:
    """Write the base's predictions, unless they are there."""
    if are_written(folder):  # also where nothing can be written
        return
    with only_writer(folder, wait=True), TemporaryDirectory() as scratch:
        if are_written(folder):
            return
        if way.in_memory:
            decoder: Decoder = ModelDecoder(_loaded_base(opened, came_in, arguments))
        else:
            decoder = CheckpointDecoder(
                opened.weights_folder(),
                opened.new_config(),
                Path(scratch),
                dtype=came_in.base_dtype,
                device=arguments.device,
            )
            check_base(opened, came_in, decoder)
        kinds = _kinds(partial(generate, decoder), way, opened, came_in, corpus, settings, None)
        write_targets(
            decoder,
            kinds,
            folder,
            top_k=settings.top_k,
            temperature=settings.temperature,
            judges=lambda kind: kind.name.startswith(_JUDGING),
        )


def _kinds(
    generate: Callable[..., list[torch.Tensor]],
    way: Way,
    opened: Base,
    came_in: Fused,
    corpus: Corpus,
    settings: HealSettings,
    file: Path | None,
) -> list[Kind]:
    """All kinds of text, judging texts among them; in `file` for a run that is cut short."""
    if file is not None and file.is_file():
        return load_kinds(file)
    tokenizer, vocab_size = tokenizer_of(opened, came_in), opened.config.vocab_size
    form = chat_form(tokenizer, vocab_size)
    write = partial(generate, chat=form) if way.in_memory or settings.written_share else None
    kinds = healing_text(tokenizer, corpus, settings, vocab_size, write, chats=form is not None)
    # In sequences of the fusion's length, whatever is trained on, so that its figures and these can be compared.
    length = min(PERPLEXITY_LENGTH, opened.config.max_position_embeddings)
    for judging in judging_texts():
        packed = pack_tokens(tokenizer, judging.text, length, max(length, came_in.judging_tokens))
        kinds.append(Kind(_JUDGING + judging.name, [], [part for part in packed if len(part) == length]))
    if file is not None:
        save_kinds(kinds, file)
    return kinds


def _arranged(
    teacher: Teacher, said: str, items: Sequence[Item], parts: Sequence[tuple[str, int, int]], settings: HealSettings
) -> Lesson:
    ranges: dict[str, range] = {}  # of what is trained on, by kind of text
    held_out: dict[str, list[int]] = {}
    judging: dict[str, list[Item]] = {}
    place = 0
    for name, count, aside in parts:
        ranges[name] = range(place, place + count)
        kept = range(place + count, place + count + aside)
        place += count + aside
        if name.startswith(_JUDGING):
            judging |= {name.removeprefix(_JUDGING): [items[number] for number in kept]} if aside else {}
        elif aside:
            held_out[name] = list(kept)
    training = [number for numbers in ranges.values() for number in numbers]
    total = settings.steps * settings.batch
    order = [training[number] for number in training_order(len(training), total, settings.seed)]
    used = set(order)
    counts = {name: len(used.intersection(numbers)) for name, numbers in ranges.items()}
    epochs, written_share = total / len(used), (counts.get(WRITTEN, 0) + counts.get(WRITTEN_CHATS, 0)) / len(used)
    kinds = [CalibrationInfo(name, count, count * settings.length) for name, count in counts.items() if count]
    return Lesson(teacher, said, kinds, items, order, epochs, round(written_share, 3), held_out, judging)


def epochs_note(epochs: float) -> str:
    return (
        f"Healing goes {epochs:.1f} times through its text: more text, or fewer tokens, gives a better model for the "
        "same time."
    )


def digest_of(corpus: Corpus) -> str:
    return hashlib.sha256(json.dumps([corpus.parts, corpus.generated_share]).encode()).hexdigest()
