"""What a model predicts on texts: perplexity, and divergence from and agreement with the dense model.

The figures are defined here alone. This module knows nothing of fusing or training.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from lf_hf.decoder.decoder import Decoder, Head
from lf_hf.runtime.numerics import in_float64
from lf_hf.runtime.progress import progress

LOGITS = 1 << 25
"""About how many logits of a model exist at a time: with a large vocabulary those of few tokens."""
_IN_CACHE = 1 << 18  # about how many of them the CPU works on at a time, in float32

Batches = Mapping[str, Sequence[Tensor]]
"""For each text by name: token ids of shape (sequences B, tokens T), or states of shape (B, T, hidden)."""
HeadAndStates = tuple[Head, Sequence[Tensor]]
"""A model's head, and its final states of all batches of a text."""


@dataclass(frozen=True)
class Predictions:
    """A model's predictions of each token of a text from the tokens before it."""

    perplexity: float  # exp of the mean negative log-likelihood
    dense_perplexity: float  # the dense model's
    divergence: float  # the mean of KL(dense || model) in nats a token
    agreement: float  # share of tokens at which both models have the same most likely token

    @classmethod
    def from_sums(cls, count: float, loss: float, dense_loss: float, divergence: float, agreed: float) -> Predictions:
        """Means of the sums over tokens of `_token_figures`."""
        # A model that fusion broke can exceed what a float holds.
        own, dense = torch.tensor([loss / count, dense_loss / count], dtype=torch.float64).exp().tolist()
        return cls(own, dense, divergence / count, agreed / count)


def kl_divergence(expected: Tensor, log_probs: Tensor, probabilities: Tensor | None = None) -> Tensor:
    """KL(expected || predicted) in nats, of log-probabilities of shape (..., tokens T, vocab): shape (..., T).

    `probabilities` are those of `expected`, where a caller has them.
    """
    if probabilities is None:
        probabilities = expected.exp()
    return torch.linalg.vecdot(probabilities, expected - log_probs)


def shard_batches(decoder: Decoder, texts: Mapping[str, Sequence[Tensor]]) -> dict[str, list[Tensor]]:
    """This process's share of each text, sequences of token ids of shape (tokens T,), as batches."""
    return {name: decoder.make_batches(decoder.processes.shard(sequences)) for name, sequences in texts.items()}


@torch.no_grad()
def final_states(decoder: Decoder, ids: Batches, desc: str) -> dict[str, list[Tensor]]:
    """States after the final norm, of which the head makes predictions; all texts go through the layers together."""
    batches = [batch for text in ids.values() for batch in text]
    last: list[Tensor] = []
    if batches:
        for states in progress(decoder.walk(batches), total=decoder.num_layers, desc=desc, unit="layer"):
            last = states
    with decoder.norm_and_head() as (norm, _):
        remaining = (norm(states) for states in last)
        return {name: [next(remaining) for _ in text] for name, text in ids.items()}


@torch.no_grad()
def predictions(
    decoder: Decoder,
    ids: Batches,
    states: Batches,
    dense: Batches | None = None,
    dense_head: Tensor | None = None,
) -> dict[str, Predictions]:
    """Compare a model's predictions of each text with the dense model's.

    `states` and `dense` are the final states of both, as `final_states` gives them; the model is the dense one by
    default. `dense_head` is the weight of the dense model's head (vocab, hidden), by default the decoder's: fusing does
    not change it. Each process gives its share of the texts, and all get the means over everything. Texts without
    tokens are left out.
    """
    sums = torch.zeros(len(ids), 5, dtype=torch.float64)
    with decoder.norm_and_head() as (_, weight):
        head = partial(_head_logits, decoder, weight)
        other_head = partial(_head_logits, decoder, weight if dense_head is None else dense_head)
        for number, (name, batches) in enumerate(ids.items()):
            if not batches:
                continue
            models = [(head, _without_last(states[name]))]
            if dense is not None:
                models.append((other_head, _without_last(dense[name])))
            next_ids = torch.cat([batch[:, 1:].flatten() for batch in batches])
            parts: list[Tensor] = []
            for log_probs, *expected in _log_probs(models, decoder.config.vocab_size):
                targets, next_ids = next_ids.tensor_split([len(log_probs)])
                parts.append(_token_figures(log_probs, targets.to(log_probs.device), *expected))
            sums[number] = _sum_over_tokens(parts, 5)
    if ids:
        decoder.processes.all_reduce(sums)
    rows = dict(zip(ids, sums.tolist(), strict=True))
    return {name: Predictions.from_sums(*row) for name, row in rows.items() if row[0]}


def _head_logits(decoder: Decoder, weight: Tensor, states: Tensor) -> Tensor:
    """Logits (..., vocab) of states (..., hidden) after the final norm."""
    return decoder.family.logits(decoder.config, linear(states.to(weight.device, weight.dtype), weight))


def _without_last(states: Sequence[Tensor]) -> list[Tensor]:
    """The states from which tokens are predicted."""
    return [state[:, :-1] for state in states]


def _token_figures(log_probs: Tensor, next_ids: Tensor, expected: Tensor | None = None) -> Tensor:
    """What `Predictions` are means of, token by token: (5, tokens T), of log-probabilities (T, vocab) and ids (T,).

    One (to be counted), negative log-likelihood of the model and of the dense model, divergence, and 1 where both have
    the same most likely token. Without `expected` the model is the dense one.
    """
    loss = -log_probs.gather(-1, next_ids[:, None])[:, 0]
    one = torch.ones_like(loss)
    if expected is None:
        return torch.stack([one, loss, loss, torch.zeros_like(loss), one])
    dense_loss = -expected.gather(-1, next_ids[:, None])[:, 0]
    agreed = (log_probs.max(-1).indices == expected.max(-1).indices).to(loss)  # faster than argmax
    return torch.stack([one, loss, dense_loss, kl_divergence(expected, log_probs), agreed])


@torch.no_grad()
def divergences(decoder: Decoder, dense: Sequence[Tensor], candidates: Iterable[Sequence[Tensor]]) -> list[float]:
    """Mean divergence per token from the dense model's predictions, for final states of the same sequences.

    States have shape (sequences B, tokens T, hidden); each process has a share of the sequences. A divergence that
    cannot be computed, as where float16 overflows, is inf.
    """
    parts: list[Tensor] = []
    with decoder.head() as head:
        models = [(head, states) for states in (dense, *candidates)]
        for expected, *compared in _log_probs(models, decoder.config.vocab_size):
            figures = [kl_divergence(expected, log_probs) for log_probs in compared]
            parts.append(torch.stack([torch.ones_like(expected[:, 0]), *figures]))
    sums = _sum_over_tokens(parts, len(models))
    decoder.processes.all_reduce(sums)
    tokens, *totals = sums.tolist()
    return [total / tokens if math.isfinite(total) else math.inf for total in totals]


def _log_probs(models: Sequence[HeadAndStates], vocab_size: int) -> Iterator[list[Tensor]]:
    """Log-probabilities of several models, some tokens at a time, in order: float32 of shape (tokens, vocab) of each.

    The head takes many tokens at once, as each product reads all of it; later steps take as few as fit the cache.
    """
    rows = max(1, LOGITS // vocab_size)
    heads = [head for head, _ in models]
    for batch in zip(*(states for _, states in models), strict=True):
        device = batch[0].device
        split_states = [states.to(device).flatten(0, 1).split(rows) for states in batch]
        for parts in zip(*split_states, strict=True):
            logits = [head(part[None])[0] for head, part in zip(heads, parts, strict=True)]
            few, device = rows, logits[0].device
            if device.type == "cpu":
                few = max(1, _IN_CACHE // vocab_size)
            split_logits = [each.to(device).split(few) for each in logits]
            for pieces in zip(*split_logits, strict=True):
                yield [piece.float().log_softmax(-1) for piece in pieces]


def _sum_over_tokens(parts: Sequence[Tensor], size: int) -> Tensor:
    """Sums of figures of shape (size, tokens), as float64 of shape (size,); the host does not wait for their device.

    In float64 sums do not depend on how many sequences are in a batch.
    """
    sums = [in_float64(part).sum(-1) for part in parts]
    if not sums:
        return torch.zeros(size, dtype=torch.float64)
    return torch.stack(sums).sum(0).cpu()
