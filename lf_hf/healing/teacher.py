"""The teacher: the base's predictions, computed beside the training or read from files.

All sequences of a healing lie in files, written once by the first process. With the base in memory beside the student
they hold the tokens alone, and its predictions are computed when they are needed; otherwise they hold its most likely
predictions. Of text that is looked at again and again the base's final states are there, if it is in memory; of text
that judges they always are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env, patch_environment
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.data import ConcatDataset, StackDataset
from transformers import TrainingArguments
from transformers.utils import logging

from lf_hf.checkpoint.base import Base
from lf_hf.checkpoint.identity import identity_key
from lf_hf.checkpoint.saving import checked_folder, only_writer
from lf_hf.decoder.decoder import Decoder
from lf_hf.decoder.generating import generate
from lf_hf.healing.inputs import HealingInputs
from lf_hf.healing.loss import FullTargets, Targets, TopTargets, logits_memory, row_slices
from lf_hf.healing.settings import HealSettings
from lf_hf.healing.text import TextKind, healing_text, judging_text
from lf_hf.measure.predictions import final_states
from lf_hf.models import CausalLM, family_of, num_parameters, text_model
from lf_hf.runtime.launch import Processes, compute_once
from lf_hf.runtime.memory import free_memory, in_gib, peak_memory
from lf_hf.runtime.numerics import all_finite
from lf_hf.text.calibration import Corpus
from lf_hf.text.chats import bos_prefix, chat_form, special_tokens

logger = logging.get_logger(__name__)
STATES = "base_states"
"""In an item: the base's final states (tokens T, hidden), after the norm."""
_SPARE = 0.9  # of free memory that may be used, as estimates leave something out
_TOKENS_TOGETHER = 1 << 17  # tokens that pass the base's layers at a time when its predictions are written
_LOGITS = 1 << 24  # logits of the base that exist at a time then
_FORMAT = 9  # version of the files' format
# Settings that the files depend on.
_SETTINGS = ("tokens", "length", "batch_tokens", "written_share", "temperature", "top_k", "seed")
_PARTS = "training", "held_out", "judging"
_INDEX, _HEAD = "text.json", "head.safetensors"

Item = Mapping[str, Tensor]
"""A sequence, `input_ids` (tokens T,), and what is stored of the base's predictions of it."""
Items = dict[str, ConcatDataset[Item]]
"""Sequences by kind of text."""


@dataclass(frozen=True)
class Placement:
    """Where the base is while the student trains.

    `description` completes "the base's predictions were ...". `files` is the folder for them, None where the base is in
    memory beside the student. `in_memory` says whether the base is loaded whole at all, and not read layer by layer.
    `memory` is about how many bytes a process takes at its peak, and `disk` how many the student's states take.
    """

    description: str
    files: Path | None
    in_memory: bool
    memory: int
    disk: int

    def text(self, corpus: Corpus, settings: HealSettings) -> Corpus:
        """The text to heal on. A base that is read layer by layer writes none of it, unless the settings say so: each
        token would take all of its weights.
        """
        if self.in_memory or settings.written_share is not None:
            return corpus
        return replace(corpus, generated_share=0.0)


def place_teacher(
    base: Base,
    student: Any,
    settings: HealSettings,
    arguments: TrainingArguments,
    cache: str | os.PathLike[str] | None,
    *,
    held: int = 0,
) -> Placement:
    """Place the base by free memory less `held` bytes, and split the steps of `arguments` into batches that fit.

    The student may be on the meta device. Raises ValueError, with what would help, if nothing fits, or if the base has
    to be read layer by layer and cannot be.
    """
    device = arguments.device
    size = 2 if arguments.bf16 or arguments.fp16 else 4
    folder = None if cache is None else checked_folder(cache)
    # So that all processes choose alike.
    free = min(Processes.of_launch().all_gather_object(int(free_memory(device) * _SPARE) - held))
    loaded = sum(p.nbytes for p in student.parameters() if p.device.type == device.type)
    checkpoints = bool(arguments.gradient_checkpointing)
    fixed, sequence = _training_memory(student, settings.length, size, checkpoints=checkpoints)
    logits = settings.batch_tokens // arguments.world_size * base.text_config.vocab_size
    num_shards = _num_shards(arguments)
    fixed = fixed // num_shards + logits_memory(device, logits, size)
    needed = fixed - loaded + sequence
    if needed > free:
        raise ValueError(
            f"{in_gib(free)} are free, but training takes {in_gib(needed)} for train={settings.train!r}, even with the "
            "base's predictions on disk; take train='lora', a shorter length, the training argument "
            "gradient_checkpointing=True, a device with more, or several of them with FSDP."
        )
    base_size = num_parameters(base.config)[1] * (2 if arguments.bf16 else 4)
    student_size = sum(p.nbytes for p in student.parameters())
    beside_base = student_size - loaded if num_shards == 1 else 0  # else it comes when the base has gone
    in_memory = beside_base + base_size <= free
    if folder is None and not in_memory and (unread := base.only_whole):
        raise ValueError(
            f"{in_gib(free)} are free, the base takes {in_gib(base_size)}, and with {', '.join(unread)} it cannot be "
            "read layer by layer; save it with save_pretrained, as safetensors files, and give that."
        )
    if folder is None and needed + base_size <= free:
        files, beside = None, base_size
        description = "computed in memory, beside the student"
    else:
        files, beside = folder or Path(arguments.output_dir or "."), 0
        reading = "in memory" if in_memory else "read layer by layer"
        description = f"written to disk, the {settings.top_k} most likely ones of each token, by the base {reading}"
    sequences = _split_steps(arguments, settings, (free - beside - fixed + loaded) // sequence)
    fused_model = student_size if device.type == "cpu" else 0  # of which the student is a copy
    training = fixed + sequences * sequence + beside
    writing = student_size + base_size if in_memory else 0
    memory = peak_memory(device, fused_model, training, writing)
    return Placement(description, files, in_memory, memory, _disk(student, settings))


def _training_memory(student: nn.Module, length: int, size: int, *, checkpoints: bool) -> tuple[int, int]:
    """Bytes of a training for weights, gradients and AdamW, and for each sequence of `length` tokens at a time.

    It computes in numbers of `size` bytes. With `checkpoints` activations are computed again for the gradient.
    """
    config: Any = student.config.get_text_config()  # type: ignore[union-attr, operator]
    fixed = 0
    for parameter in student.parameters():
        fixed += parameter.nbytes
        if parameter.requires_grad:
            fixed += 12 * parameter.numel()
        if parameter.element_size() > size:  # a copy in what autocast computes in
            fixed += size * parameter.numel()
    # Of each layer: its input, two norms, queries, keys, values, what attention and the MLP give, and the MLP's inside.
    layers = config.num_hidden_layers
    values = 10 * config.hidden_size + 4 * config.intermediate_size
    if checkpoints:
        values += layers * config.hidden_size
    else:
        values *= layers
    return fixed, length * values * size


def _num_shards(arguments: TrainingArguments) -> int:
    """How many processes share the student's weights."""
    if arguments.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return arguments.world_size
    if not arguments.fsdp and not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return 1
    if arguments.device.type == "cpu":
        logger.warning("FSDP is ignored, as accelerate splits no model on a CPU: each process trains a whole copy.")
        return 1
    return arguments.world_size


def _split_steps(arguments: TrainingArguments, settings: HealSettings, most: int) -> int:
    """Split this process's part of a step into equal batches, of `most` sequences at most; returns of how many."""
    part = settings.batch // arguments.world_size
    most = max(1, min(most, arguments.per_device_train_batch_size))
    size = max(n for n in range(1, part + 1) if part % n == 0 and n <= most)
    arguments.per_device_train_batch_size = size
    arguments.gradient_accumulation_steps = part // size
    return size


def _disk(student: Any, settings: HealSettings) -> int:
    """Bytes of the best state, the last one and one that is being written, each with AdamW's two float32 numbers."""
    trained = [p for p in student.parameters() if p.requires_grad]
    stored = trained if settings.train == "lora" else student.parameters()
    return 3 * (sum(p.nbytes for p in stored) + sum(8 * p.numel() for p in trained))


@dataclass
class Teacher:
    """The sequences of a healing by kind of text, and the base's predictions of them.

    `model` is the base where it is in memory beside the student; otherwise its head lies in `folder`.
    """

    folder: Path
    config: Any
    model: CausalLM | None
    training: Items = field(default_factory=dict)
    held_out: Items = field(default_factory=dict)
    judging: Items = field(default_factory=dict)

    def targets(self, batch: Item) -> Targets:
        """The predictions of a batch of items, stacked, of text to train on or held out."""
        if "top_ids" in batch:
            return TopTargets(batch["top_ids"], batch["top_log_probs"], batch["norms"])
        assert self.model is not None
        device = self.model.device
        states = batch.get(STATES)
        if states is None:
            ids = batch["input_ids"].to(device)
            with torch.no_grad():
                states = text_model(self.model)(input_ids=ids, use_cache=False).last_hidden_state
        return FullTargets(states.to(device), self.model.lm_head.weight, self._to_logits)

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """What makes logits of the final states that lie in the files, as `Decoder.head`."""
        weight = self.model.lm_head.weight if self.model else load_file(self.folder / _HEAD)["weight"]
        yield lambda states: self._to_logits(linear(states.to(weight.device, weight.dtype), weight))

    def _to_logits(self, outputs: Tensor) -> Tensor:
        return family_of(self.config).logits(self.config, outputs)


def open_teacher(inputs: HealingInputs, placement: Placement, arguments: TrainingArguments, work: Path) -> Teacher:
    """Have the first process write the text and the base's predictions of it, unless they are there; open them."""
    base = None if placement.files else _load_base(inputs, arguments)
    settings = {name: getattr(inputs.settings, name) for name in _SETTINGS}
    dtype = "bfloat16" if arguments.bf16 else inputs.base_dtype
    key = identity_key(inputs.identity(settings, format=_FORMAT, dtype=dtype, beside=base is not None))
    folder = (placement.files or work) / f"targets-{key:.32}"
    compute_once(lambda: _write(folder, inputs, placement, arguments, base))
    if not all(Processes.of_launch().all_gather_object((folder / _INDEX).is_file())):
        raise ValueError(
            f"Not all machines of the launch see {str(folder)!r}; heal in a folder on a disk that they share."
        )
    teacher = Teacher(folder, inputs.base.text_config, base)
    for kind, part, files in json.loads((folder / _INDEX).read_text(encoding="utf-8")):
        # Files are mapped into memory, so that sequences are read when they are used.
        tensors: list[Any] = [load_file(folder / name) for name in files]
        getattr(teacher, part)[kind] = ConcatDataset([StackDataset(**stored) for stored in tensors])
    return teacher


def _load_base(inputs: HealingInputs, arguments: TrainingArguments) -> CausalLM:
    loading = {**inputs.base.loading, "dtype": inputs.base_dtype, "device_map": None}
    # Where FSDP is to split the student, older transformers would give other processes than the first one zeros.
    with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"):
        model = replace(inputs.base, loading=loading).load().requires_grad_(False)
    inputs.check_base(Decoder(model))
    # Where training is not in bfloat16, the machine is faster without it, or the user wants none.
    dtype = torch.bfloat16 if arguments.bf16 else torch.promote_types(model.dtype, torch.float32)
    for parameter in model.parameters():  # not the buffers: angles of positions need float32
        parameter.data = parameter.data.to(dtype)
    return model.to(arguments.device)  # type: ignore[arg-type]


@torch.no_grad()
def _write(
    folder: Path, inputs: HealingInputs, placement: Placement, arguments: TrainingArguments, base: CausalLM | None
) -> None:
    """Write all sequences, with what is stored of the base's predictions, unless they are there.

    The index comes last: without it, what is there is what a killed process left, and is written again. `base` is
    there if it stays in memory.
    """
    index = folder / _INDEX
    if index.is_file():  # also where nothing can be written
        return
    with only_writer(folder, wait=True), TemporaryDirectory() as scratch:
        if index.is_file():
            return
        decoder = _open_base(inputs, placement, arguments, base, Path(scratch))
        try:
            if base is None:
                with decoder.norm_and_head() as (_, weight):
                    save_file({"weight": weight.detach().cpu().contiguous()}, folder / _HEAD)
            entries: list[tuple[str, str, list[str]]] = []
            for kind in _text(inputs, decoder):
                for part in _PARTS:
                    files: list[str] = []
                    for ids in _split(getattr(kind, part)):
                        files.append(f"items-{len(entries):02}-{len(files):05}.safetensors")
                        stored = _stored_predictions(decoder, ids, part, inputs.settings, beside=base is not None)
                        save_file({"input_ids": ids, **stored}, folder / files[-1])
                    if files:
                        entries.append((kind.name, part, files))
        except SafetensorError as error:  # the disk is full
            raise OSError(f"{str(folder)!r} was not written ({error}).") from error
        new = folder / f"{_INDEX}.new"
        new.write_text(json.dumps(entries), encoding="utf-8")
        new.replace(index)


def _open_base(
    inputs: HealingInputs, placement: Placement, arguments: TrainingArguments, base: CausalLM | None, scratch: Path
) -> Decoder:
    """The base in memory, or as it is on disk, of which few layers are in memory at a time."""
    if placement.in_memory:
        return Decoder(base or _load_base(inputs, arguments))
    base_on_disk = inputs.base.on_disk(arguments.device, scratch)
    decoder = Decoder(replace(base_on_disk, loading={**base_on_disk.loading, "dtype": inputs.base_dtype}).load())
    inputs.check_base(decoder)
    return decoder


def _split(sequences: list[Tensor]) -> Iterable[Tensor]:
    """Sequences (tokens T,) as batches (B, T) that pass the base's layers together."""
    if not sequences:
        return ()
    return torch.stack(sequences).split(max(1, _TOKENS_TOGETHER // len(sequences[0])))


def _text(inputs: HealingInputs, decoder: Decoder) -> list[TextKind]:
    """All kinds of text, those that judge among them."""
    tokenizer, settings = inputs.tokenizer, inputs.settings
    vocab_size = decoder.config.vocab_size
    form = chat_form(tokenizer, vocab_size)
    write = partial(generate, decoder, chat=form, prefix=bos_prefix(tokenizer), special=special_tokens(tokenizer))
    kinds = healing_text(tokenizer, inputs.corpus, settings, vocab_size, write, chats=form is not None)
    return kinds + judging_text(tokenizer, decoder.config.max_position_embeddings, inputs.judging_tokens)


def _stored_predictions(
    decoder: Decoder, ids: Tensor, part: str, settings: HealSettings, *, beside: bool
) -> dict[str, Tensor]:
    """What is stored of the base's predictions of sequences (B, tokens T); `beside` the student it makes them anew."""
    if beside and part == "training":
        return {}
    batches = decoder.make_batches(list(ids))
    states = final_states(decoder, {"": batches}, "The base's predictions")[""]
    if beside or part == "judging":
        with decoder.norm_and_head() as (norm, _):
            return {STATES: torch.cat([norm(batch).cpu() for batch in states])}
    return _top_predictions(decoder, torch.cat([batch.cpu() for batch in states]), settings)


def _top_predictions(decoder: Decoder, states: Tensor, settings: HealSettings) -> dict[str, Tensor]:
    """What `TopTargets` has, from final states (sequences B, tokens T, hidden)."""
    vocab_size = decoder.config.vocab_size
    shape, flat = states.shape[:2], states.flatten(0, 1)
    found: dict[str, list[Tensor]] = {"top_ids": [], "top_log_probs": [], "norms": []}
    with decoder.head() as head:
        for rows in row_slices(len(flat), vocab_size, _LOGITS):
            logits = head(flat[rows].to(decoder.device)[None])[0].float()  # (rows, vocab)
            if not all_finite(logits):
                raise ValueError(
                    "The base's predictions contain NaN or inf; use a dtype of wider range, such as bfloat16."
                )
            log_probs = logits.log_softmax(-1)
            top = log_probs.topk(min(settings.top_k, vocab_size))
            found["top_ids"].append(top.indices.int().cpu())
            found["top_log_probs"].append(top.values.half().cpu())
            found["norms"].append((log_probs / settings.temperature).logsumexp(-1).cpu())
    return {name: torch.cat(parts).unflatten(0, shape) for name, parts in found.items()}
