"""Token sequences from text: samples that are compared, and sequences of running text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lf_hf.runtime.amounts import OUT_OF_DOMAIN_TOKENS
from lf_hf.text.calibration import TOKEN_CHARACTERS, CalibrationSamples, Corpus, documentation_halves
from lf_hf.text.chats import bos_prefix
from lf_hf.text.mmlu import fitting_questions
from lf_hf.text.sources import evenly


def tokenize_samples(
    tokenizer: PreTrainedTokenizerBase, calibration: CalibrationSamples, sample_length: int, vocab_size: int
) -> list[Tensor]:
    """Token ids of each calibration text, cut to `sample_length`: int64 tensors of shape (tokens T_i,).

    Raises ValueError if a text gives no tokens, or ids that a model with `vocab_size` embeddings does not have.
    """
    # Cut here: a tokenizer that truncates would do so ever after, and be saved so.
    samples = [torch.tensor(tokenizer(text, verbose=False)["input_ids"][:sample_length]) for text in calibration.texts]
    for text, sample in zip(calibration.texts, samples, strict=True):
        if not len(sample):
            raise ValueError(f"The tokenizer makes no tokens of the calibration text {text!r:.80}.")
    check_ids(samples, vocab_size)
    return samples


def pack_tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, length: int, max_tokens: int, *, whole: bool = False
) -> list[Tensor]:
    """Sequences of `length` tokens, spread evenly over a text, that have at most `max_tokens` tokens together.

    Each has at least two tokens, only the last one may be shorter than `length`, and all start with the
    beginning-of-sequence token if the tokenizer adds it. Unless `whole`, 64 * `max_tokens` characters are used.
    """
    if not whole:
        text = text[: max_tokens * TOKEN_CHARACTERS]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    prefix = bos_prefix(tokenizer)
    step = length - len(prefix)
    pieces = [torch.tensor(prefix + ids[start : start + step]) for start in range(0, len(ids), step)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    if sum(map(len, pieces)) > max_tokens:
        count = max(1, max_tokens // length)
        pieces = [piece[:max_tokens] for piece in evenly(pieces, count)]
    return [piece for piece in pieces if len(piece) > 1]


def pack_corpus(
    tokenizer: PreTrainedTokenizerBase, corpus: Corpus, length: int, max_tokens: int, vocab_size: int
) -> list[Tensor]:
    """Sequences of a corpus, at most `max_tokens` tokens in all, of which each part has an equal share if it can.

    Each part is spread evenly over the list. Raises ValueError if there are fewer tokens than one sequence has, or ids
    that the model does not have.
    """
    sequences = interleave(*pack_parts(tokenizer, corpus, length, max_tokens).values())
    total = sum(map(len, sequences))
    if total < length:
        raise ValueError(
            f"The calibration text ({corpus.source}) has only {total} tokens, which do not fill one sequence of "
            f"{length}; give more text, or lower calibration_length."
        )
    check_ids(sequences, vocab_size)
    return sequences


def check_enough(tokenizer: PreTrainedTokenizerBase, corpus: Corpus, length: int, vocab_size: int) -> None:
    """Raise the errors of `pack_corpus`, from no more of a corpus than that takes."""
    beginnings = {name: part[: length * TOKEN_CHARACTERS] for name, part in corpus.parts.items()}
    pack_corpus(tokenizer, replace(corpus, parts=beginnings), length, len(beginnings) * length, vocab_size)


def pack_parts(tokenizer: PreTrainedTokenizerBase, corpus: Corpus, length: int, tokens: int) -> dict[str, list[Tensor]]:
    """As `pack_corpus`, the sequences of each part by its name; a part may have none."""
    packed: dict[str, list[Tensor]] = {}
    remaining = tokens
    whole = not corpus.is_bundled  # a user's text counts from its beginning to its end
    for name in sorted(corpus.parts, key=lambda name: len(corpus.parts[name])):
        # What short parts do not use goes to longer ones.
        share = remaining // (len(corpus.parts) - len(packed))
        packed[name] = pack_tokens(tokenizer, corpus.parts[name], length, share, whole=whole)
        remaining -= sum(map(len, packed[name]))
    return {name: packed[name] for name in corpus.parts}


def pack_out_of_domain(
    tokenizer: PreTrainedTokenizerBase, corpus: Corpus, length: int, vocab_size: int
) -> list[Tensor]:
    """Sequences that judge fused layers, of text that a corpus has little of: int64 tensors of shape (tokens T,).

    Each has at most `length` tokens. It is documentation, beside a user's text alone, and worked examples: explained
    answers to questions that are neither in a corpus for fits nor in `mmlu_sample`.
    """
    texts = [] if corpus.is_bundled else [documentation_halves()[0]]
    with suppress(ValueError):
        others = [question for questions in fitting_questions().values() for question in questions[2:]]
        texts.append("\n\n".join(f"Question: {q.question}\nAnswer: {q.explanation}" for q in others))
    sequences: list[Tensor] = []
    for text in texts:
        sequences += pack_tokens(tokenizer, text, length, OUT_OF_DOMAIN_TOKENS)
    check_ids(sequences, vocab_size)
    return sequences


def interleave(*lists: Sequence[Tensor]) -> list[Tensor]:
    """The items of all lists in one list, over which the items of each are spread evenly."""
    placed = [((n + 0.5) / len(items), item) for items in lists for n, item in enumerate(items)]
    placed.sort(key=itemgetter(0))
    return [item for _, item in placed]


def check_ids(sequences: Iterable[Tensor], vocab_size: int) -> None:
    """Raise ValueError if a token id is beyond the model's embeddings."""
    largest = max((int(sequence.max()) for sequence in sequences), default=0)
    if largest >= vocab_size:
        raise ValueError(
            f"The tokenizer gives token id {largest}, but the model has {vocab_size} embeddings; use the tokenizer "
            "that belongs to the model."
        )


def split_held_out(text: Sequence[Tensor], count: int, *, at_random: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    """At most `count` sequences to measure on, with no more than half of the tokens, and the others.

    One lies in each of `count` equal stretches of the text: in its middle, or at a random place, as kinds of text take
    turns. A single sequence is never held out.
    """
    if count == 0:
        return [], list(text)
    ends = np.cumsum([len(sequence) for sequence in text])
    offsets = np.random.default_rng(0).random(count) if at_random else np.full(count, 0.5)
    places = (np.arange(count) + offsets) * ends[-1] / count
    chosen = set(np.searchsorted(ends, places, side="right").tolist())
    if sum(len(text[n]) for n in chosen) > ends[-1] / 2:
        return split_held_out(text, count // 2, at_random=at_random)
    rest = [sequence for n, sequence in enumerate(text) if n not in chosen]
    return [text[n] for n in sorted(chosen)], rest
