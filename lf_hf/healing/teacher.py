"""The teacher: where the base is while the student trains, and its predictions, beside the training or from files.

All sequences of a healing lie in files, written once by the first process. With the base in memory beside the student
they hold the tokens alone, and its predictions are computed when they are needed; otherwise they hold its most likely
predictions. Of text that is looked at again and again the base's final states are there, if it is in memory; of text
that judges they always are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils import patch_environment
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedConfig, TrainingArguments
from transformers.utils import logging

from lf_hf.checkpoint.base import Base
from lf_hf.checkpoint.saving import checked_folder, only_writer
from lf_hf.decoder.generating import generate
from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.decoder.interface import Decoder
from lf_hf.decoder.on_disk import CheckpointDecoder
from lf_hf.families import CausalLM, family_of
from lf_hf.healing.inputs import HealingInputs
from lf_hf.healing.loss import FullTargets, Targets, TopTargets, parts
from lf_hf.healing.memory import model_bytes, training_memory
from lf_hf.healing.settings import HealSettings
from lf_hf.healing.text import Kind, Write, healing_text, judging_kinds
from lf_hf.healing.trainer import is_sharded, set_batches
from lf_hf.runtime.launch import Processes
from lf_hf.runtime.memory import free_memory
from lf_hf.runtime.numerics import all_finite
from lf_hf.runtime.progress import progress
from lf_hf.text.chats import chat_form

logger = logging.get_logger(__name__)
_SPARE = 0.9  # of free memory: estimates leave something out
_TOGETHER = 1 << 17  # tokens that pass the base's layers together when they are written to disk
_LOGITS = 1 << 24  # of the base that exist at a time then
_INDEX = "text.json"
_HEAD = "head.safetensors"
_STATES = "base_states"  # (tokens T, hidden) of a sequence: the base's final ones, after the norm

Item = Mapping[str, Tensor]
"""A sequence, `input_ids` (tokens T,), with what is known of the base's predictions of it."""


@dataclass(frozen=True)
class Placement:
    """Where the base is while the student trains.

    `description` is for people. `files` is the folder for its predictions, None where the base is in memory beside the
    student. `in_memory` says whether the base is loaded whole at all, and not read layer by layer. `memory` is about
    how many bytes of a device the base and the student take at their peak.
    """

    description: str
    files: Path | None
    in_memory: bool
    memory: int = 0


def place_teacher(
    base: Base,
    settings: HealSettings,
    student: nn.Module,
    arguments: TrainingArguments,
    given: Mapping[str, Any],
    cache: str | os.PathLike[str] | None,
    *,
    planned: nn.Module | None = None,
) -> Placement:
    """Place the base by free memory, and split steps into batches that fit.

    `given` are the training arguments of the user. `planned` is the fused model where it and the student are still to
    be loaded, and are on the meta device. Raises ValueError, with what would help, if nothing fits.
    """
    cache = None if cache is None else checked_folder(cache)
    device = arguments.device
    size = 2 if arguments.bf16 or arguments.fp16 else 4
    config, checkpointing = getattr(student, "config", base.config), bool(arguments.gradient_checkpointing)
    memory = training_memory(config, student, settings.length, size, checkpointing=checkpointing)
    free = min(Processes.of_launch().all_gather_object(int(free_memory(device) * _SPARE)))  # so that all choose alike
    loaded = sum(p.nbytes for p in student.parameters() if p.device.type == device.type)
    if planned is not None and device.type == "cpu":
        loaded = sum(p.nbytes for p in student.parameters())
        free -= int((loaded + sum(p.nbytes for p in planned.parameters())) * _SPARE)
    fixed = memory.fixed // (arguments.world_size if is_sharded(arguments) else 1) - loaded
    of_base, one = model_bytes(base.config, 2 if arguments.bf16 else 4), memory.sequence
    if fixed + one > free:
        ways = []
        if fixed < free:  # so activations are what is too much
            ways += [] if checkpointing else ["the training argument gradient_checkpointing=True"]
            ways.append("a shorter length")
        if settings.train != "lora" and size * sum(p.numel() for p in student.parameters()) < free:
            ways.append("train='lora'")
        raise ValueError(
            f"{free / 1e9:.1f} GB are free, but training takes {(fixed + one) / 1e9:.1f} GB for "
            f"train={settings.train!r}, even with the base's predictions on disk; "
            f"take {', '.join([*ways, 'a device with more, or several of them with FSDP'])}."
        )
    beside, in_memory = cache is None and fixed + one + of_base <= free, of_base <= free
    if beside:
        placement = Placement("computed by the base, which is in memory beside the student", None, True)
        free -= of_base
    else:
        how = "in memory" if in_memory else "read layer by layer"
        said = f"the {settings.top_k} most likely ones of each token, written to disk by the base, {how}"
        placement = Placement(said, cache or Path(arguments.output_dir or "."), in_memory)
    logger.info(f"The base's predictions: {placement.description}.")
    set_batches(arguments, settings.batch, int((free - fixed) // one), given)
    training = fixed + loaded + arguments.per_device_train_batch_size * one
    peak = training + of_base if beside else max(training, loaded + of_base if in_memory else 0)
    return dataclasses.replace(placement, memory=peak)


class Teacher:
    """The base's predictions of batches of items.

    `model` is the base in memory; `folder` is that of the items, in which its head lies where it is not.
    """

    def __init__(self, config: PreTrainedConfig, folder: Path, model: CausalLM | None = None) -> None:
        self.model, self._folder = model, folder
        self.to_logits = partial(family_of(config).logits, config)

    def targets(self, batch: Item) -> Targets:
        """Of a batch of items, stacked."""
        if "top_ids" in batch:
            return TopTargets(batch["top_ids"], batch["top_log_probs"], batch["norms"])
        states, weight = batch.get(_STATES), self._weight()
        if states is None:
            assert self.model is not None
            with torch.no_grad():
                ids = batch["input_ids"].to(self.model.device)
                states = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
        device = states.device if self.model is None else self.model.device
        return FullTargets(states.to(device), weight.to(device), self.to_logits)

    def _weight(self) -> Tensor:
        if self.model is not None:
            return self.model.lm_head.weight
        return load_file(self._folder / _HEAD)["weight"]  # read when the result is judged, and not kept meanwhile


class Items(Dataset[Any], Sequence[Any]):
    """Items by their places in files; they are read when they are used. Slices and lists of numbers give some."""

    def __init__(self, places: Sequence[tuple[Path, int]]) -> None:
        self._places, self._opened = places, dict[Path, Any]()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice | list):
            numbers = range(len(self))[number] if isinstance(number, slice) else number
            return Items([self._places[n] for n in numbers])
        file, row = self._places[number]
        if file not in self._opened:
            self._opened[file] = safe_open(file, "pt")
        opened = self._opened[file]
        item = {name: opened.get_slice(name)[row : row + 1][0] for name in opened.keys()}  # noqa: SIM118
        return item | {"input_ids": item["input_ids"].long()}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": {}}  # for the processes of a data loader


@dataclass(frozen=True)
class TrainingData:
    """The sequences of a healing, in files, and what is done with which.

    `counts` are the numbers of sequences to train on by kind of text, `held_out` and `judging` the sequences by kind.
    """

    teacher: Teacher
    counts: dict[str, int]
    training: Items
    held_out: dict[str, Items]
    judging: dict[str, Items]


def stacked(items: Sequence[Item]) -> dict[str, Tensor]:
    """A batch of items."""
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def training_data(
    inputs: HealingInputs, placement: Placement, arguments: TrainingArguments, work: Path, processes: Processes
) -> TrainingData:
    """Have the first process write the text and the base's predictions of it, unless they are there; open them."""
    base = None if placement.files else _loaded_base(inputs, arguments)
    if placement.files is None:
        folder = work / "text"
    else:
        names = ("tokens", "length", "batch_tokens", "written_share", "temperature", "top_k", "seed")
        made_of = inputs.content() | {
            "format": 6,  # of the files: rises when they change
            "settings": {name: getattr(inputs.settings, name) for name in names},
            "dtype": "bfloat16" if arguments.bf16 else str(inputs.base_dtype),
        }
        key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]
        folder = placement.files / f"targets-{key}"
    processes.broadcast_object(lambda: _write(folder, inputs, placement, arguments, base))
    teacher = Teacher(inputs.base.config, folder, base)
    kinds, files = _read_index(folder)
    places = [(file, row) for file, count in files for row in range(count)]
    of_parts: dict[str, dict[str, Items]] = {"held_out": {}, "judging": {}}
    counts, training = dict[str, int](), list[tuple[Path, int]]()
    for name, part, count in kinds:
        if part == "training":
            counts[name] = count
            training += places[:count]
        else:
            of_parts[part][name] = Items(places[:count])
        places = places[count:]
    return TrainingData(teacher, counts, Items(training), **of_parts)


def kinds_of_text(inputs: HealingInputs, placement: Placement, write: Write) -> list[Kind]:
    """All kinds of text, those that judge among them.

    A base that reads all of its weights for each token writes none, unless the settings say so.
    """
    tokenizer, config, settings, corpus = inputs.tokenizer, inputs.base.config, inputs.settings, inputs.corpus
    writes = placement.in_memory or settings.written_share
    if not writes and settings.written_share is None:
        corpus = dataclasses.replace(corpus, generated_share=0.0)
    chats = chat_form(tokenizer, config.vocab_size) is not None
    kinds = healing_text(tokenizer, corpus, settings, config.vocab_size, write if writes else None, chats=chats)
    return kinds + judging_kinds(tokenizer, config.max_position_embeddings, inputs.judging_tokens)


def _loaded_base(inputs: HealingInputs, arguments: TrainingArguments) -> CausalLM:
    loading = {**inputs.base.loading, "dtype": inputs.base_dtype, "device_map": None}
    # Where FSDP is to split the student, older transformers would give other processes than the first one zeros.
    with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"):
        model = dataclasses.replace(inputs.base, loading=loading).load().requires_grad_(False)
    inputs.check_base(ModelDecoder(model))
    # Where training is not in bfloat16, the machine is faster without it, or the user wants none.
    dtype = torch.bfloat16 if arguments.bf16 else torch.promote_types(model.dtype, torch.float32)
    for parameter in model.parameters():  # not the buffers: angles of positions need float32
        parameter.data = parameter.data.to(dtype)
    return model.to(arguments.device)  # type: ignore[arg-type]


@torch.no_grad()
def _write(
    folder: Path, inputs: HealingInputs, placement: Placement, arguments: TrainingArguments, base: CausalLM | None
) -> None:
    """Write all sequences, with what is to be known of the base's predictions, unless they are there.

    The index comes last: without it, what is there is what a killed process left, and is written again.
    """
    if _is_whole(folder):  # also where nothing can be written
        return
    with only_writer(folder, wait=True), TemporaryDirectory() as scratch:
        if _is_whole(folder):
            return
        settings = inputs.settings
        if placement.in_memory:
            decoder: Decoder = ModelDecoder(base or _loaded_base(inputs, arguments))
        else:
            weights, config = inputs.base.weights_folder(), inputs.base.new_config()
            dtype, device = inputs.base_dtype, arguments.device
            decoder = CheckpointDecoder(weights, config, Path(scratch), dtype=dtype, device=device)
            inputs.check_base(decoder)
        form = chat_form(inputs.tokenizer, inputs.base.config.vocab_size)
        kinds = kinds_of_text(inputs, placement, partial(generate, decoder, chat=form))
        top = partial(_top_predictions, decoder, top_k=settings.top_k, temperature=settings.temperature)
        whole = partial(_states, decoder)
        known = {"training": _tokens if base else top, "held_out": whole if base else top, "judging": whole}
        sequences = [(part, ids) for kind in kinds for part in known for ids in getattr(kind, part)]
        files: list[tuple[str, int]] = []
        try:
            if not base:
                with decoder.norm_and_head() as (_, weight):
                    save_file({"weight": weight.detach().cpu().contiguous()}, folder / _HEAD)
                files.append((_HEAD, 0))
            for (part, length), alike in groupby(sequences, lambda pair: (pair[0], len(pair[1]))):
                left, together = [ids for _, ids in alike], max(1, _TOGETHER // length)
                for some in (left[start : start + together] for start in range(0, len(left), together)):
                    files.append((f"items-{len(files):05}.safetensors", len(some)))
                    save_file(known[part](some), folder / files[-1][0])
        except SafetensorError as error:  # the disk is full
            raise OSError(f"{str(folder)!r} was not written ({error}).") from error
        index = [(kind.name, part, len(getattr(kind, part))) for kind in kinds for part in known if getattr(kind, part)]
        new = folder / f"{_INDEX}.new"
        new.write_text(json.dumps({"kinds": index, "files": files}), encoding="utf-8")
        new.replace(folder / _INDEX)


def _read_index(folder: Path) -> tuple[list[tuple[str, str, int]], list[tuple[Path, int]]]:
    """Kinds of text, each part with its number of sequences, in their order; and the files, with theirs."""
    index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    return index["kinds"], [(folder / name, count) for name, count in index["files"]]


def _is_whole(folder: Path) -> bool:
    """Whether all of a folder was written, and can be read."""
    try:
        for file, _ in _read_index(folder)[1]:
            with safe_open(file, "pt"):
                pass
    except (OSError, ValueError, KeyError, SafetensorError):
        return False
    return True


def _tokens(sequences: Sequence[Tensor]) -> dict[str, Tensor]:
    return {"input_ids": torch.stack(list(sequences)).int()}


def _states(decoder: Decoder, sequences: Sequence[Tensor]) -> dict[str, Tensor]:
    """Tokens of some sequences of one length, and the base's final states, after the norm."""
    with decoder.norm_and_head() as (norm, _):
        states = torch.cat([norm(state).cpu() for state in _final_states(decoder, sequences)])
    return _tokens(sequences) | {_STATES: states.contiguous()}


def _final_states(decoder: Decoder, sequences: Sequence[Tensor]) -> Sequence[Tensor]:
    walk = decoder.walk(decoder.batches(sequences))
    for states in progress(walk, total=decoder.num_layers, desc="The base's predictions", unit="layer"):
        last = states
    return last


def _top_predictions(
    decoder: Decoder, sequences: Sequence[Tensor], *, top_k: int, temperature: float
) -> dict[str, Tensor]:
    """Tokens of some sequences of one length, and what `TopTargets` has of them."""
    ids, log_probs, norms = list[Tensor](), list[Tensor](), list[Tensor]()
    states = torch.cat([state.flatten(0, 1).cpu() for state in _final_states(decoder, sequences)])
    with decoder.head() as head:
        for rows in parts(len(states), decoder.config.vocab_size, _LOGITS):
            logits = head(states[rows].to(decoder.device)[None])[0].float()  # (rows, vocab)
            if not all_finite(logits):
                raise ValueError(
                    "The base's predictions contain NaN or inf; use a dtype of wider range, such as bfloat16."
                )
            every = logits.log_softmax(-1)
            top = every.topk(min(top_k, every.shape[-1]))
            ids.append(top.indices.int().cpu())
            log_probs.append(top.values.half().cpu())
            norms.append((every / temperature).logsumexp(-1).cpu())
    shape = (len(sequences), len(sequences[0]), -1)
    tensors = {"top_ids": torch.cat(ids).view(shape), "top_log_probs": torch.cat(log_probs).view(shape)}
    return _tokens(sequences) | tensors | {"norms": torch.cat(norms).view(shape[:2])}
