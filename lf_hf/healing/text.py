"""The text of a healing: kinds of text, each as sequences to train on and sequences that are held out.

This module knows no model: what the base writes comes from a function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lf_hf.healing.settings import HealSettings
from lf_hf.measure import PERPLEXITY_LENGTH, WRITTEN_LENGTH
from lf_hf.text.calibration import QUESTIONS, Corpus
from lf_hf.text.chats import CHATS
from lf_hf.text.judging import judging_texts
from lf_hf.text.packing import check_ids, pack_parts, pack_tokens

HELD_OUT = 4
"""Sequences of a kind of text that are held out at most, to see how far the student is from the teacher."""
WRITTEN, WRITTEN_CHATS = "text written by the base", "chats written by the base"
WRITTEN_TOGETHER = 256
"""Pieces that the base writes together; a multiple of the step of `CHATS`, so that chats keep their places."""

Write = Callable[[int, int, int], list[Tensor]]
"""Text that the base writes: of so many sequences, of so many tokens each, with a seed."""


@dataclass(frozen=True)
class TextKind:
    """A kind of text. All sequences of one are int64 tensors of one length; those of `judging` judge the result."""

    name: str
    training: list[Tensor] = field(default_factory=list)
    held_out: list[Tensor] = field(default_factory=list)
    judging: list[Tensor] = field(default_factory=list)


def given_text(
    tokenizer: PreTrainedTokenizerBase, corpus: Corpus, settings: HealSettings, vocab_size: int
) -> list[TextKind]:
    """Sequences of `settings.length` tokens of each kind of text, as many as are trained on, or as there are.

    Text is taken evenly from its beginning to its end, and what the base writes has no part in it. Raises ValueError if
    the text fills fewer than two sequences, or has ids that the model does not have.
    """
    length = settings.length
    num_given = settings.sequences - int(settings.sequences * corpus.generated_share)
    packed = pack_parts(tokenizer, corpus, length, (num_given + HELD_OUT * len(corpus.parts)) * length)
    kinds = [_split(name, [sequence for sequence in part if len(sequence) == length]) for name, part in packed.items()]
    if not any(kind.held_out for kind in kinds):
        tokens = sum(len(sequence) for part in packed.values() for sequence in part)
        raise ValueError(
            f"The text to heal on ({corpus.source}) has only {tokens} tokens, which do not fill two sequences of "
            f"length={length}; give more text, or lower length."
        )
    check_ids(max(int(sequence.max()) for part in packed.values() for sequence in part), vocab_size)
    return kinds


def healing_text(
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    settings: HealSettings,
    vocab_size: int,
    write: Write,
    *,
    chats: bool = False,
) -> list[TextKind]:
    """The text of a healing: `given_text`, and the share that the corpus leaves to the base.

    `chats` says whether `CHATS` of what `write` gives are chats.
    """
    length = settings.length
    kinds = given_text(tokenizer, corpus, settings, vocab_size)
    share, given = corpus.generated_share, sum(len(kind.training) for kind in kinds)
    # Short text keeps its share.
    count = min(int(settings.sequences * share), round(given * share / (1 - share)))
    if count:
        num_chats = len(range(count)[CHATS]) if chats else 0
        held_out_chats, num_text = min(HELD_OUT, num_chats), count - num_chats + HELD_OUT
        enough = max(CHATS.step * (num_chats + held_out_chats), math.ceil(num_text * CHATS.step / (CHATS.step - 1)))
        pieces = _written(write, length, settings.seed, enough if chats else num_text)
        written_chats = pieces[CHATS]
        if chats:
            del pieces[CHATS]
        kinds.append(_joined(WRITTEN, pieces, length, count - num_chats, HELD_OUT))
        kinds.append(_joined(WRITTEN_CHATS, written_chats, length, num_chats, held_out_chats))
    if sum(bool(kind.held_out) for kind in kinds if kind.name != QUESTIONS) > 1:
        # Each question is there twice, so the other half of those that are held out would be trained on.
        kinds = [TextKind(k.name, [*k.training, *k.held_out]) if k.name == QUESTIONS else k for k in kinds]
    return [kind for kind in kinds if kind.training or kind.held_out]


def judging_kinds(tokenizer: PreTrainedTokenizerBase, longest: int, tokens: int) -> list[TextKind]:
    """The judging texts in sequences of the fusion's length, so that its figures and those of healing can be compared.

    `longest` is what the model takes, and `tokens` is how many there are of each text.
    """
    length, kinds = min(PERPLEXITY_LENGTH, longest), []
    for text in judging_texts():
        sequences = pack_tokens(tokenizer, text.text, length, max(length, tokens))
        kinds.append(TextKind(text.name, judging=[sequence for sequence in sequences if len(sequence) == length]))
    return kinds


def training_order(count: int, settings: HealSettings) -> list[int]:
    """Numbers of `count` sequences as a training goes through them: all in a new order, again and again."""
    random, order = torch.Generator().manual_seed(settings.seed), list[int]()
    while len(order) < settings.sequences:
        order += torch.randperm(count, generator=random).tolist()
    return order[: settings.sequences]


def _written(write: Write, length: int, seed: int, count: int) -> list[Tensor]:
    """Short pieces for `count` sequences: at length a small model's text no longer resembles any, and takes long."""
    short, pieces = min(WRITTEN_LENGTH, length), list[Tensor]()
    total = count * -(-length // short)
    for start in range(0, total, WRITTEN_TOGETHER):
        pieces += write(min(WRITTEN_TOGETHER, total - start), short, seed + start)
    return pieces


def _joined(name: str, pieces: list[Tensor], length: int, count: int, held_out: int) -> TextKind:
    """Sequences of short pieces, `count` to train on and `held_out` that are not."""
    of_each = -(-length // len(pieces[0]))
    sequences = [torch.cat(pieces[n * of_each : (n + 1) * of_each])[:length] for n in range(held_out + count)]
    return TextKind(name, sequences[held_out:], sequences[:held_out])


def _split(name: str, sequences: list[Tensor]) -> TextKind:
    """Sequences with some of them, spread evenly, held out: an eighth, or half of the last two."""
    count = min(HELD_OUT, len(sequences) // 8 or len(sequences) // 2)
    places = {(2 * n + 1) * len(sequences) // (2 * count) for n in range(count)}
    training = [sequence for place, sequence in enumerate(sequences) if place not in places]
    return TextKind(name, training, [sequences[place] for place in sorted(places)])
