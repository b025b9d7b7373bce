"""The text of a healing: kinds of text, each as sequences to train on and sequences that are held out.

This module knows no model: what the base writes comes from a function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lf_hf.runtime.amounts import WRITTEN_LENGTH, WRITTEN_TOGETHER
from lf_hf.settings import HealSettings
from lf_hf.text.calibration import QUESTIONS, Corpus
from lf_hf.text.chats import CHATS
from lf_hf.text.packing import check_ids, pack_parts, split_held_out

HELD_OUT = 4
"""Sequences of a kind of text that are held out at most, to see how far the student is from the teacher."""
_MOST_EPOCHS = 3  # more times through the same text are worth a warning
WRITTEN, WRITTEN_CHATS = "text written by the base", "chats written by the base"

Write = Callable[[int, int, int], list[Tensor]]
"""Text that the base writes: `write(sequences, tokens of each, seed)`."""


@dataclass(frozen=True)
class TextKind:
    """A kind of text. All its sequences are int64 tensors of one length."""

    name: str
    training: list[Tensor]
    held_out: list[Tensor]


def given_text(
    tokenizer: PreTrainedTokenizerBase, corpus: Corpus, settings: HealSettings, vocab_size: int
) -> list[TextKind]:
    """Sequences of `settings.length` tokens of each kind of text, as many as are trained on, or as there are.

    Text is taken evenly from its beginning to its end, and what the base writes has no part in it. Raises ValueError if
    the text fills fewer than two sequences, or has ids that the model does not have.
    """
    length = settings.length
    num_given = settings.sequences - int(settings.sequences * corpus.generated_share)
    most = (num_given + HELD_OUT * len(corpus.parts)) * length
    kinds, tokens = [], 0
    for name, packed in pack_parts(tokenizer, corpus, length, most).items():
        check_ids(packed, vocab_size)
        tokens += sum(map(len, packed))
        sequences = [sequence for sequence in packed if len(sequence) == length]
        count = min(HELD_OUT, len(sequences) // 8 or len(sequences) // 2)  # spread evenly
        held_out, training = split_held_out(sequences, count, at_random=False)
        kinds.append(TextKind(name, training, held_out))
    if not any(kind.held_out for kind in kinds):
        raise ValueError(
            f"The text to heal on ({corpus.source}) has only {tokens} tokens, which do not fill two sequences of "
            f"length={length}; give more text, or lower length."
        )
    return kinds


def num_written(given: list[TextKind], corpus: Corpus, settings: HealSettings) -> int:
    """How many sequences the base writes to train on: its share of the training, or of the text where that is short."""
    share = corpus.generated_share
    num_given = sum(len(kind.training) for kind in given)
    return min(int(settings.sequences * share), round(num_given * share / (1 - share)))


def expected_epochs(
    tokenizer: PreTrainedTokenizerBase, corpus: Corpus, settings: HealSettings, vocab_size: int
) -> float:
    """About how many times a training goes through its text, of which the base's part is not written yet.

    Raises the errors of `given_text`.
    """
    given = given_text(tokenizer, corpus, settings, vocab_size)
    num_sequences = sum(len(kind.training) for kind in given) + num_written(given, corpus, settings)
    return max(1.0, settings.sequences / num_sequences)


def repeats_note(epochs: float) -> str | None:
    """What to say of a training that goes `epochs` times through its text, if that is often."""
    if epochs <= _MOST_EPOCHS:
        return None
    return (
        f"Healing goes {epochs:.1f} times through its text: more text, or fewer tokens, gives a better model for the "
        "same time."
    )


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
    kinds = given_text(tokenizer, corpus, settings, vocab_size)
    count = num_written(kinds, corpus, settings)
    if count:
        kinds += _written_text(write, settings, count, chats=chats)
    others = [kind for kind in kinds if kind.held_out and kind.name != QUESTIONS]
    if len(others) > 1:
        # Each question is there twice, so the other half of those that are held out would be trained on.
        for kind in kinds:
            if kind.name == QUESTIONS:
                kind.training.extend(kind.held_out)
                kind.held_out.clear()
    return [kind for kind in kinds if kind.training or kind.held_out]


def training_order(count: int, settings: HealSettings) -> list[int]:
    """Numbers of `count` sequences as a training goes through them: all in a new order, again and again."""
    random = torch.Generator().manual_seed(settings.seed)
    order: list[int] = []
    while len(order) < settings.sequences:
        order += torch.randperm(count, generator=random).tolist()
    return order[: settings.sequences]


def _written_text(write: Write, settings: HealSettings, count: int, *, chats: bool) -> list[TextKind]:
    """`count` sequences that the base writes to train on, chats as a kind of their own, and others to hold out.

    They are made of short pieces: at length a small model's text no longer resembles any, and takes long.
    """
    num_chats = len(range(count)[CHATS]) if chats else 0
    num_texts, held_out_chats = count - num_chats, min(HELD_OUT, num_chats)
    wanted = num_texts + HELD_OUT
    if chats:
        for_texts = math.ceil(wanted * CHATS.step / (CHATS.step - 1))
        wanted = max(for_texts, CHATS.step * (num_chats + held_out_chats))
    short = min(WRITTEN_LENGTH, settings.length)
    joined = math.ceil(settings.length / short)  # pieces of a sequence
    texts: list[Tensor] = []
    for start in range(0, wanted * joined, WRITTEN_TOGETHER):
        texts += write(min(WRITTEN_TOGETHER, wanted * joined - start), short, settings.seed + start)
    parts = [(WRITTEN, texts, num_texts, HELD_OUT)]
    if chats:
        parts.append((WRITTEN_CHATS, texts[CHATS], num_chats, held_out_chats))
        del texts[CHATS]
    kinds = []
    for name, pieces, to_train, held_out in parts:
        starts = range(0, (held_out + to_train) * joined, joined)
        sequences = [torch.cat(pieces[start : start + joined])[: settings.length] for start in starts]
        kinds.append(TextKind(name, sequences[held_out:], sequences[:held_out]))
    return kinds
