"""The text of a healing: kinds of text, each as sequences to train on and sequences that are kept aside."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from lf_hf.healing.settings import HealSettings
from lf_hf.measure import WRITTEN_LENGTH
from lf_hf.text.calibration import DOCUMENTATION, QUESTIONS, Corpus, documentation_halves
from lf_hf.text.chats import CHATS, is_chat
from lf_hf.text.packing import check_ids, pack_parts, pack_tokens

HELD_OUT = 4
"""Sequences of a kind of text that are kept aside at most, to see how far the healed model is from the base."""

WRITTEN, WRITTEN_CHATS = "text written by the base", "chats written by the base"
_WRITTEN_TOGETHER = 256  # pieces; a multiple of the step of CHATS
_CHARACTERS_PER_TOKEN = 8  # more than any usual text has, so that texts from the hub are enough

Write = Callable[[int, int, int], list[Tensor]]
"""Of so many sequences, tokens of each, and a seed: text that the base writes, as `decoder.generating.generate`."""


@dataclass(frozen=True)
class Kind:
    """A kind of text. All sequences are int64 tensors of shape (length,)."""

    name: str
    training: list[Tensor]
    held_out: list[Tensor]


def given_text(
    tokenizer: PreTrainedTokenizerBase, corpus: Corpus, settings: HealSettings, vocab_size: int
) -> list[Kind]:
    """Sequences of `settings.length` tokens of each kind of text, as many as are trained on, or as there are.

    Text is taken evenly from its beginning to its end, and what the base writes has no part in it.

    Raises
    ------
    ValueError
        If the text fills fewer than two sequences, or has ids that the model does not have.
    """
    length = settings.length
    of_text = settings.sequences - settings.written_sequences(corpus.generated_share)
    parts = pack_parts(tokenizer, corpus, length, (of_text + HELD_OUT * len(corpus.parts)) * length)
    kinds = [
        _split(name, [sequence for sequence in part if len(sequence) == length])
        for name, part in zip(corpus.names, parts, strict=True)
    ]
    if not any(kind.training for kind in kinds):
        tokens = sum(len(sequence) for part in parts for sequence in part)
        raise ValueError(
            f"The text to heal on ({corpus.source}) has only {tokens} tokens, which do not fill two sequences of "
            f"length={length}; give more text."
        )
    check_ids(max(int(sequence.max()) for part in parts for sequence in part), vocab_size)
    return kinds


def healing_text(
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    settings: HealSettings,
    vocab_size: int,
    write: Write | None,
    *,
    chats: bool = False,
) -> list[Kind]:
    """The text of a healing: `given_text`, and the share that the settings, or else the corpus, leave to the base.

    `chats` says whether `CHATS` of what `write` gives are chats. There are two kinds of held-out text at least: where
    one was given, and the base writes none, some of the text that comes with this package is kept aside too.

    Raises
    ------
    ValueError
        If the text fills fewer than two sequences, or has ids that the model does not have.
    """
    length = settings.length
    kinds = given_text(tokenizer, corpus, settings, vocab_size)
    there = sum(len(kind.training) for kind in kinds)
    share = settings.share_written(corpus.generated_share)
    # Short text keeps its share.
    count = min(settings.written_sequences(corpus.generated_share), round(there * share / (1 - share)))
    lacks_kind = len([kind for kind in kinds if kind.held_out]) < 2
    if write is None:
        trained = {kind.name for kind in kinds if kind.training}
        if lacks_kind and DOCUMENTATION not in trained:
            sequences = pack_tokens(tokenizer, documentation_halves()[0], length, HELD_OUT * length)
            aside = [sequence for sequence in sequences if len(sequence) == length]
            kinds.append(Kind(f"{DOCUMENTATION}, for comparison", [], aside))
    elif count or lacks_kind:
        of_chats = len(range(count)[CHATS]) if chats else 0
        aside_chats, of_text = min(HELD_OUT, of_chats), count - of_chats + HELD_OUT
        enough = max(CHATS.step * (of_chats + aside_chats), math.ceil(of_text * CHATS.step / (CHATS.step - 1)))
        pieces = _written(write, length, settings.seed, enough if chats else of_text)
        written_chats = pieces[CHATS]
        if chats:
            del pieces[CHATS]
        kinds.append(_joined(WRITTEN, pieces, length, count - of_chats, HELD_OUT))
        kinds.append(_joined(WRITTEN_CHATS, written_chats, length, of_chats, aside_chats))
    if sum(bool(kind.held_out) for kind in kinds if kind.name != QUESTIONS) > 1:
        # Each question is there twice, so of those that are kept aside the other half would be trained on.
        kinds = [
            Kind(kind.name, [*kind.training, *kind.held_out], []) if kind.name == QUESTIONS else kind for kind in kinds
        ]
    return [kind for kind in kinds if kind.training or kind.held_out]


def _written(write: Write, length: int, seed: int, count: int) -> list[Tensor]:
    """Short pieces for `count` sequences: at length a small model's text no longer resembles any, and takes long."""
    short, pieces = min(WRITTEN_LENGTH, length), list[Tensor]()
    total = count * -(-length // short)
    for start in range(0, total, _WRITTEN_TOGETHER):
        pieces += write(min(_WRITTEN_TOGETHER, total - start), short, seed + start)
    return pieces


def _joined(name: str, pieces: list[Tensor], length: int, count: int, aside: int) -> Kind:
    """Sequences of short pieces, `count` to train on and `aside` that are kept aside."""
    of_each = -(-length // len(pieces[0]))
    sequences = [torch.cat(pieces[n * of_each : (n + 1) * of_each])[:length] for n in range(aside + count)]
    return Kind(name, sequences[aside:], sequences[:aside])


def _split(name: str, sequences: list[Tensor]) -> Kind:
    """Sequences with some of them, spread evenly, kept aside: an eighth, or half of the last two."""
    count = min(HELD_OUT, len(sequences) // 8 or len(sequences) // 2)
    places = {(2 * n + 1) * len(sequences) // (2 * count) for n in range(count)}
    return Kind(
        name,
        [sequence for place, sequence in enumerate(sequences) if place not in places],
        [sequences[place] for place in sorted(places)],
    )


def save_kinds(kinds: Sequence[Kind], file: Path) -> None:
    """Write kinds of text, for `load_kinds`; the file appears when it is whole."""
    tensors = {
        f"{number} {part}": torch.stack(sequences)
        for number, kind in enumerate(kinds)
        for part, sequences in (("training", kind.training), ("held_out", kind.held_out))
        if sequences
    }
    new = file.with_suffix(".new")
    save_file(tensors, new, metadata={"names": json.dumps([kind.name for kind in kinds])})
    new.replace(file)


def load_kinds(file: Path) -> list[Kind]:
    """What `save_kinds` wrote."""
    with safe_open(file, "pt") as opened:
        names = json.loads(opened.metadata()["names"])
        found = {name: list(opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118
    return [
        Kind(name, found.get(f"{number} training", []), found.get(f"{number} held_out", []))
        for number, name in enumerate(names)
    ]


def training_order(count: int, total: int, seed: int) -> list[int]:
    """Numbers of `total` sequences out of `count`: all of them in a new order, again and again."""
    random = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < total:
        order += torch.randperm(count, generator=random).tolist()
    return order[:total]


class Sequences(Dataset[dict[str, Tensor]]):
    """Some of the items, each `{"input_ids": (tokens T,), ...}`, by their numbers, which may repeat."""

    def __init__(self, items: Sequence[Mapping[str, Tensor]], numbers: Sequence[int]) -> None:
        self.items, self.numbers = items, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return dict(self.items[self.numbers[place]])


def hub_texts(name: str, config: str | None, split: str, column: str, tokens: int) -> list[Any]:
    """The first texts, or chats, of a data set on the hub, streamed, that have some `tokens` tokens together.

    Raises
    ------
    ValueError
        If `datasets` is not installed, or the data set, its split or its column is not there.
    """
    if find_spec("datasets") is None:
        raise ValueError(
            f"dataset={name!r} needs the datasets package; run `pip install '.[heal]'` in lf_hf's checkout."
        )
    from datasets import load_dataset

    try:
        rows = load_dataset(name, config, split=split, streaming=True)
        texts = list(_until(tokens * _CHARACTERS_PER_TOKEN, (row[column] for row in rows)))
    except KeyError:
        raise ValueError(f"The data set {name!r} has no column {column!r}; name the one with text.") from None
    except Exception as error:  # of any kind: the hub's, the reader's, a missing split
        reason = " ".join(f"{error}".split())
        raise ValueError(f"The data set {name!r} cannot be read ({reason:.300}).") from None
    if texts and not _is_text(texts[-1]):
        raise ValueError(f"The column {column!r} of the data set {name!r} holds {texts[-1]!r:.80}, which is no text.")
    return texts


def _until(characters: int, texts: Iterator[Any]) -> Iterator[Any]:
    for text in texts:
        if text is None:  # a row without one
            continue
        yield text
        characters -= len(str(text))
        if characters <= 0 or not _is_text(text):
            return


def _is_text(text: Any) -> bool:
    return isinstance(text, str) or is_chat(text)
