"""The teacher: what a healing needs of the base, measured while the base is there.

These are its final states of each token, after the norm, from which its head makes all of its predictions. They lie in
one file, which is mapped into memory: sequences are read when they are used, and a healing that was cut short needs no
base to go on.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset, StackDataset
from transformers import PreTrainedTokenizerBase

from lf_hf.decoder.decoder import Decoder
from lf_hf.healing.text import healing_text
from lf_hf.measure.generating import text_writer
from lf_hf.measure.judge import Judged
from lf_hf.measure.predictions import final_states
from lf_hf.runtime.launch import Processes
from lf_hf.settings import HealSettings
from lf_hf.text.calibration import Corpus

STATES = "base_states"
"""In an item: the base's final states (tokens T, hidden)."""
_TOKENS_TOGETHER = 1 << 17  # tokens that pass the base's layers at a time
_PARTS = "training", "held_out"
_INDEX, _TEXT, _STATES, _HEAD = "teacher.json", "text.safetensors", "states.bin", "head.safetensors"

Items = dict[str, Dataset[dict[str, Tensor]]]
"""Sequences by kind of text: `input_ids` (tokens T,), and `STATES`."""


@dataclass(frozen=True)
class Teacher:
    """The text of a healing, with the base's final states, and texts that judge the result.

    `head` (vocab, hidden) is the base's, None where the fused model has the same one.
    """

    training: Items = field(default_factory=dict)
    held_out: Items = field(default_factory=dict)
    judged: list[Judged] = field(default_factory=list)
    head: Tensor | None = None


@torch.no_grad()
def write_teacher(
    folder: Path,
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    settings: HealSettings,
    judged: Sequence[Judged],
    *,
    with_head: bool = False,
) -> None:
    """Have the base write its share of the text, and write its final states of all of it into a folder.

    All processes of a launch share the work; their machines have to share that folder's disk. The index comes last:
    without it, what is there is what a killed process left.
    """
    processes = Processes.of_launch()
    write, has_chats = text_writer(decoder, tokenizer)
    kinds = healing_text(tokenizer, corpus, settings, decoder.config.vocab_size, write, chats=has_chats)
    parts = [torch.stack(getattr(kind, part)) for kind in kinds for part in _PARTS if getattr(kind, part)]

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _INDEX).unlink(missing_ok=True)
        (folder / _STATES).write_bytes(b"")

    processes.compute_once(begin)
    if not all(processes.all_gather_object((folder / _STATES).is_file())):
        raise ValueError(
            f"Not all machines of the launch see {str(folder)!r}; heal in a folder on a disk that they share."
        )
    with (folder / _STATES).open("r+b") as file:
        start = 0
        for ids in parts:
            _write_states(file, start, decoder, ids, processes.shard(range(len(ids))))
            start += ids.numel()
    _save(_judged_tensors(judged), folder / f"judged-{processes.rank}.safetensors")

    def finish() -> None:
        _save({str(number): ids for number, ids in enumerate(parts)}, folder / _TEXT)
        if with_head:
            with decoder.norm_and_head() as (_, weight):
                _save({"weight": weight.detach().cpu().contiguous()}, folder / _HEAD)
        index = {
            "hidden": decoder.config.hidden_size,
            "parts": [(kind.name, part) for kind in kinds for part in _PARTS if getattr(kind, part)],
            "judged": [_figures(text) for text in judged],
        }
        new = folder / f"{_INDEX}.new"
        new.write_text(json.dumps(index), encoding="utf-8")
        new.replace(folder / _INDEX)

    processes.all_gather_object(None)  # until all states are there
    processes.compute_once(finish)


def is_written(folder: Path) -> bool:
    """Whether a teacher is there, and whole."""
    return (folder / _INDEX).is_file()


def open_teacher(folder: Path) -> Teacher:
    """What `write_teacher` wrote; sequences are read when they are used."""
    index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    text = load_file(folder / _TEXT)
    parts = [text[str(number)] for number in range(len(index["parts"]))]
    head = load_file(folder / _HEAD)["weight"] if (folder / _HEAD).is_file() else None
    tensors = load_file(folder / f"judged-{Processes.of_launch().rank}.safetensors")
    judged = [_judged(number, figures, tensors) for number, figures in enumerate(index["judged"])]
    teacher = Teacher(judged=judged, head=head)
    states = _mapped(folder / _STATES, parts, index["hidden"])
    for (kind, part), ids, stored in zip(index["parts"], parts, states, strict=True):
        columns: dict[str, Any] = {"input_ids": ids, STATES: stored}
        getattr(teacher, part)[kind] = StackDataset(**columns)
    return teacher


def _write_states(file: BinaryIO, start: int, decoder: Decoder, ids: Tensor, numbers: Sequence[int]) -> None:
    """Write the final states of some sequences of `ids` (sequences B, tokens T), which are `start` tokens on in a file.

    They are in bfloat16 there.
    """
    length = ids.shape[1]
    for some in torch.tensor(numbers, dtype=torch.int64).split(max(1, _TOKENS_TOGETHER // length)):
        batches = decoder.make_batches(list(ids[some]))
        states = final_states(decoder, {"": batches}, "Final states")[""]
        sequences = (sequence for batch in states for sequence in batch.to(torch.bfloat16).cpu())
        for number, sequence in zip(some.tolist(), sequences, strict=True):
            file.seek((start + number * length) * sequence[0].nbytes)
            file.write(sequence.contiguous().view(torch.uint8).numpy().data)


def _mapped(file: Path, parts: Sequence[Tensor], hidden: int) -> Iterator[Tensor]:
    """The final states of sequences (B, tokens T), as (B, T, hidden) each, in one file that is mapped into memory."""
    tokens = sum(ids.numel() for ids in parts)
    states = torch.from_file(str(file), shared=False, size=tokens * hidden, dtype=torch.bfloat16)
    each = states.split([ids.numel() * hidden for ids in parts])
    return (stored.view(*ids.shape, hidden) for ids, stored in zip(parts, each, strict=True))


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    try:
        save_file(tensors, file)
    except SafetensorError as error:  # the disk is full
        raise OSError(f"{str(file)!r} was not written ({error}).") from error


def _figures(text: Judged) -> dict[str, Any]:
    """What is known of a judging text beside its tensors."""
    return {entry.name: getattr(text, entry.name) for entry in dataclasses.fields(text)} | {"ids": [], "states": []}


def _judged_tensors(judged: Sequence[Judged]) -> dict[str, Tensor]:
    tensors = {}
    for number, text in enumerate(judged):
        for batch, (ids, states) in enumerate(zip(text.ids, text.states, strict=True)):
            tensors[f"{number}.{batch}.ids"] = ids.cpu()
            tensors[f"{number}.{batch}.states"] = states.contiguous()
    return tensors


def _judged(number: int, figures: dict[str, Any], tensors: dict[str, Tensor]) -> Judged:
    count = sum(name.startswith(f"{number}.") and name.endswith("ids") for name in tensors)
    batches = {name: [tensors[f"{number}.{batch}.{name}"] for batch in range(count)] for name in ("ids", "states")}
    known = {entry.name: figures[entry.name] for entry in dataclasses.fields(Judged)}  # others are an earlier version's
    return Judged(**known | batches)
