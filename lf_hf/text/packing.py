"""Token sequences from text: samples that are compared, and windows of running text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lf_hf.text.calibration import TOKEN_CHARACTERS, CalibrationSamples, Corpus, other_text
from lf_hf.text.chats import first_token

JUDGING_LENGTH = 128
"""Tokens of a piece of text that judges fused layers."""
_OTHER_TOKENS = 1024  # of each other kind of text


def tokenize_samples(
    tokenizer: PreTrainedTokenizerBase, calibration: CalibrationSamples, sample_length: int, vocab_size: int
) -> list[Tensor]:
    """Token ids of each calibration text, cut to `sample_length`: int64 tensors of shape (tokens T_i,).

    Raises ValueError if a text gives no tokens, or ids that a model with `vocab_size` embeddings does not have.
    """
    samples = []
    for text in calibration.texts:
        # Cut here: a tokenizer that truncates would do so ever after, and be saved so.
        ids = tokenizer(text, verbose=False)["input_ids"][:sample_length]
        if not ids:
            raise ValueError(f"The tokenizer makes no tokens of the calibration text {text!r:.80}.")
        check_ids(max(ids), vocab_size)
        samples.append(torch.tensor(ids))
    return samples


def pack_tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, length: int, max_tokens: int, *, whole: bool = False
) -> list[Tensor]:
    """Sequences of `length` tokens, spread evenly over a text, that have at most `max_tokens` tokens together.

    They are int64 tensors; only the last one may be shorter than `length`, and none has fewer than two tokens. Each
    starts with the tokenizer's own beginning-of-sequence token if it adds one by itself. Of a text of more than 64 *
    `max_tokens` characters only those are looked at, unless `whole`.
    """
    text = text if whole else text[: max_tokens * TOKEN_CHARACTERS]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    prefix = first_token(tokenizer)
    step = length - len(prefix)
    pieces = [torch.tensor(prefix + ids[start : start + step]) for start in range(0, len(ids), step)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    if sum(map(len, pieces)) > max_tokens:
        count = max(1, max_tokens // length)
        pieces = [pieces[n * len(pieces) // count][:max_tokens] for n in range(count)]
    return [piece for piece in pieces if len(piece) > 1]


def pack_corpus(
    tokenizer: PreTrainedTokenizerBase, corpus: Corpus, length: int, max_tokens: int, vocab_size: int
) -> list[Tensor]:
    """Sequences of a corpus, at most `max_tokens` tokens in all, an equal share from each part as far as it goes.

    They are int64 tensors of at most `length` tokens, and each part is spread evenly over the list. Raises ValueError
    if there are fewer tokens than one sequence has, or ids that the model does not have.
    """
    sequences = interleaved(*pack_parts(tokenizer, corpus, length, max_tokens).values())
    total = sum(map(len, sequences))
    if total < length:
        raise ValueError(
            f"The calibration text ({corpus.source}) has only {total} tokens, which do not fill one sequence of "
            f"{length}; give more text, or lower calibration_length."
        )
    check_ids(max(int(sequence.max()) for sequence in sequences), vocab_size)
    return sequences


def check_enough(tokenizer: PreTrainedTokenizerBase, corpus: Corpus, length: int, vocab_size: int) -> None:
    """Raise the errors of `pack_corpus`, from no more of a corpus than that takes."""
    enough = {name: part[: length * TOKEN_CHARACTERS] for name, part in corpus.parts.items()}
    pack_corpus(tokenizer, replace(corpus, parts=enough), length, len(enough) * length, vocab_size)


def pack_parts(tokenizer: PreTrainedTokenizerBase, corpus: Corpus, length: int, tokens: int) -> dict[str, list[Tensor]]:
    """As `pack_corpus`, the sequences of each part by its name; there may be none."""
    packed: dict[str, list[Tensor]] = {}
    left, whole = tokens, not corpus.by_default  # a user's text counts from its beginning to its end
    for name, part in sorted(corpus.parts.items(), key=lambda item: len(item[1])):
        # What short parts do not use goes to longer ones.
        packed[name] = pack_tokens(tokenizer, part, length, left // (len(corpus.parts) - len(packed)), whole=whole)
        left -= sum(map(len, packed[name]))
    return {name: packed[name] for name in corpus.parts}


def pack_other_text(tokenizer: PreTrainedTokenizerBase, corpus: Corpus, length: int, vocab_size: int) -> list[Tensor]:
    """Pieces of the kinds of text that a corpus has little of, of at most `length` tokens: of shape (tokens T,)."""
    length = min(length, JUDGING_LENGTH)
    pieces = [piece for text in other_text(corpus) for piece in pack_tokens(tokenizer, text, length, _OTHER_TOKENS)]
    check_ids(max((int(piece.max()) for piece in pieces), default=0), vocab_size)
    return pieces


def interleaved(*lists: Sequence[Tensor]) -> list[Tensor]:
    """The items of some lists in one, in which each list is spread evenly."""
    placed = [((n + 0.5) / len(items), item) for items in lists for n, item in enumerate(items)]
    return [item for _, item in sorted(placed, key=itemgetter(0))]


def check_ids(largest: int, vocab_size: int) -> None:
    """Raise ValueError if a token id is beyond the model's embeddings."""
    if largest >= vocab_size:
        raise ValueError(
            f"The tokenizer gives token id {largest}, but the model has {vocab_size} embeddings; use the tokenizer "
            "that belongs to the model."
        )


def held_out(text: Sequence[Tensor], count: int, *, at_random: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    """At most `count` sequences to measure on, with no more than half of the tokens, and the others.

    They lie in equal stretches of the text: in the middle of each, or at random places, so that each kind of text has
    its share, as kinds take turns, and what lies at equal distances may all be of one kind. There are none of a single
    sequence, and may be none of a few that differ in length.
    """
    if count == 0:
        return [], list(text)
    ends = np.cumsum([len(sequence) for sequence in text])
    in_stretch = np.random.default_rng(0).random(count) if at_random else 0.5
    places = (np.arange(count) + in_stretch) * ends[-1] / count
    chosen = set(np.searchsorted(ends, places, side="right").tolist())
    if sum(len(text[n]) for n in chosen) > ends[-1] / 2:
        return held_out(text, count // 2, at_random=at_random)
    return [text[n] for n in sorted(chosen)], [sequence for n, sequence in enumerate(text) if n not in chosen]


def beginning(text: Sequence[Tensor], tokens: int) -> Sequence[Tensor]:
    """As many of the first sequences as have `tokens` tokens together, but one at least."""
    ends = np.cumsum([len(sequence) for sequence in text])
    return text[: max(1, int((ends <= tokens).sum()))]
