"""The teacher: what a healing needs of the base, measured while the base is there.

These are its final states of each token, after the norm, from which its head makes all of its predictions. They lie in
one file: sequences are read when they are used, and a healing that was cut short needs no base to go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, StackDataset
from transformers import PreTrainedTokenizerBase

from lf_hf.decoder.decoder import Decoder
from lf_hf.decoder.demand import Need, Setup
from lf_hf.healing.text import healing_text
from lf_hf.measure.generating import text_writer, writing
from lf_hf.measure.judge import Judged
from lf_hf.measure.predictions import final_states
from lf_hf.runtime.amounts import PERPLEXITY_LENGTH, WRITTEN_SHARE
from lf_hf.runtime.errors import reason
from lf_hf.settings import HealSettings
from lf_hf.text.calibration import Corpus

STATES = "base_states"
"""In an item: the base's final states (tokens T, hidden)."""
_TOKENS_TOGETHER = 1 << 17  # tokens that pass the base's layers at a time
_TEXT, _STATES = "teacher.pt", "states.bin"

Items = dict[str, Dataset[dict[str, Tensor]]]
"""Sequences by kind of text: `input_ids` (tokens T,), and `STATES`."""


@dataclass(frozen=True)
class Teacher:
    """The text of a healing, with the base's final states, and texts that judge the result.

    `head` (vocab, hidden) is the base's, None where the fused model has the same one.
    """

    training: Items
    held_out: Items
    judged: list[Judged]
    head: Tensor | None


@torch.no_grad()
def write_teacher(
    folder: Path,
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    settings: HealSettings,
    judged: Sequence[Judged],
) -> None:
    """Have the base write its share of the text, and write its final states of all of it into a folder.

    The text comes last: without it, what is there is what a killed process left.
    """
    write, has_chats = text_writer(decoder, tokenizer)
    parts = []
    for kind in healing_text(tokenizer, corpus, settings, decoder.config.vocab_size, write, chats=has_chats):
        of_kind = {"training": kind.training, "held_out": kind.held_out}
        parts += [(part, kind.name, torch.stack(sequences)) for part, sequences in of_kind.items() if sequences]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _TEXT).unlink(missing_ok=True)
    with (folder / _STATES).open("wb") as file:
        for *_, ids in parts:
            _write_states(file, decoder, ids)
    known = {
        "parts": parts,
        "hidden": decoder.config.hidden_size,
        "head": decoder.head_weight.detach(),
        "judged": [vars(text) for text in judged],
        "train": settings.train,
    }
    new = folder / f"{_TEXT}.new"
    try:
        torch.save(known, new)
    except RuntimeError as error:  # the disk is full
        raise OSError(f"{str(new)!r} was not written ({reason(error)}).") from error
    new.replace(folder / _TEXT)


def trained_by(folder: Path) -> str | None:
    """What a healing trains whose teacher is in a folder with all of its states; None where there is none."""
    text, states = folder / _TEXT, folder / _STATES
    with suppress(OSError, EOFError, RuntimeError, UnpicklingError):  # as of a file that is cut
        known = _load(text)
        tokens = sum(ids.numel() for *_, ids in known["parts"])
        if states.stat().st_size == tokens * known["hidden"] * torch.bfloat16.itemsize:
            return str(known["train"])
    return None


def open_teacher(folder: Path) -> Teacher:
    """What `write_teacher` wrote; sequences are read when they are used."""
    known = _load(folder / _TEXT)
    items: dict[str, Items] = {"training": {}, "held_out": {}}
    start = 0
    for part, kind, ids in known["parts"]:
        states = _States(folder / _STATES, start, ids.shape, known["hidden"])
        columns: dict[str, Any] = {"input_ids": ids, STATES: states}
        items[part][kind] = StackDataset(**columns)
        start += ids.numel()
    return Teacher(**items, judged=[Judged(**text) for text in known["judged"]], head=known["head"])


@dataclass(frozen=True)
class _States(Dataset[Tensor]):
    """Final states of sequences of a `shape` (sequences B, tokens T), which are `start` tokens on in a file.

    Each is read when it is used: of a file that is mapped, all that was used would count as this process's memory.
    """

    file: Path
    start: int
    shape: torch.Size
    hidden: int

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, number: int) -> Tensor:
        length = self.shape[1]
        a_token = self.hidden * torch.bfloat16.itemsize
        offset = (self.start + number * length) * a_token
        read = np.fromfile(self.file, np.uint8, length * a_token, offset=offset)
        return torch.from_numpy(read).view(torch.bfloat16).view(length, self.hidden)


def _load(file: Path) -> dict[str, Any]:
    """What `write_teacher` knows of the base, in memory."""
    known: dict[str, Any] = torch.load(file, "cpu", weights_only=True)
    return known


def _write_states(file: BinaryIO, decoder: Decoder, ids: Tensor) -> None:
    """Write the final states of sequences of `ids` (sequences B, tokens T) to the end of a file, in bfloat16."""
    for some in ids.split(max(1, _TOKENS_TOGETHER // ids.shape[1])):
        batches = decoder.make_batches(list(some))
        for batch in final_states(decoder, {"": batches}, "Final states")[""]:
            file.write(batch.to(torch.bfloat16).cpu().contiguous().view(torch.uint8).numpy().data)


def teaching(setup: Setup, settings: HealSettings) -> Need:
    """What `write_teacher` takes: text that the base writes, and all of it through the layers."""
    written = writing(setup, settings.tokens * WRITTEN_SHARE)
    inside = max(written.inside, setup.running(PERPLEXITY_LENGTH, settings.tokens))
    return Need(inside, 0, written.work + setup.forward(settings.tokens, setup.shape.layers))
