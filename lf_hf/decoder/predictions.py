"""What a model predicts on texts: perplexity, and divergence from and agreement with the dense model.

These figures are defined here and nowhere else. This module knows nothing of fusing or training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lf_hf.decoder.interface import Decoder
from lf_hf.runtime.numerics import in_float64
from lf_hf.runtime.progress import progress

LOGITS = 1 << 25
"""About how many logits of a model exist at a time: with a large vocabulary those of few tokens."""
_IN_CACHE = 1 << 18  # about how many of them the CPU works on at a time, in float32

Batches = Mapping[str, Sequence[Tensor]]
"""For each text by name: token ids of shape (sequences B, tokens T), or states of shape (B, T, hidden)."""


class HasHead(Protocol):
    """What makes logits of final states, as a `Decoder` does."""

    def head(self) -> AbstractContextManager[Callable[[Tensor], Tensor]]: ...


@dataclass(frozen=True)
class Predictions:
    """A model's predictions of each token of a text from the tokens before it."""

    perplexity: float  # exp of the mean negative log-likelihood
    dense_perplexity: float  # the dense model's
    divergence: float  # the mean of KL(dense || model) in nats a token
    agreement: float  # share of tokens at which both models have the same most likely token

    @classmethod
    def from_sums(cls, count: float, loss: float, dense_loss: float, divergence: float, agreed: float) -> Predictions:
        """Means of the sums over tokens that `token_figures` gives."""
        # A model that fusion broke can exceed what a float holds.
        own, dense = torch.tensor([loss / count, dense_loss / count], dtype=torch.float64).exp().tolist()
        return cls(own, dense, divergence / count, agreed / count)


def kl_divergence(expected: Tensor, log_probs: Tensor, probabilities: Tensor | None = None) -> Tensor:
    """KL(expected || predicted) in nats, of log-probabilities of shape (..., tokens T, vocab): shape (..., T).

    `probabilities` are those of `expected`, where a caller has them.
    """
    return torch.linalg.vecdot(expected.exp() if probabilities is None else probabilities, expected - log_probs)


def token_figures(log_probs: Tensor, next_ids: Tensor, expected: Tensor | None = None) -> Tensor:
    """The figures behind `Predictions`, token by token.

    Parameters
    ----------
    log_probs : float32 tensor of shape (tokens T, vocab)
    next_ids : int64 tensor of shape (T,)
        The tokens that are predicted.
    expected : tensor like `log_probs`, optional
        The dense model's log-probabilities; by default the model is the dense one.

    Returns
    -------
    float32 tensor of shape (5, T)
        One (to be counted), negative log-likelihood of the model and of the dense model, divergence, and 1 where both
        have the same most likely token.
    """
    loss = -log_probs.gather(-1, next_ids[:, None])[:, 0]
    one = torch.ones_like(loss)
    if expected is None:
        return torch.stack([one, loss, loss, torch.zeros_like(loss), one])
    dense_loss = -expected.gather(-1, next_ids[:, None])[:, 0]
    agreed = (log_probs.max(-1).indices == expected.max(-1).indices).to(loss)  # faster than argmax
    return torch.stack([one, loss, dense_loss, kl_divergence(expected, log_probs), agreed])


def batched(decoder: Decoder, texts: Mapping[str, Sequence[Tensor]]) -> dict[str, list[Tensor]]:
    """This process's share of each text, sequences of token ids of shape (tokens T,), as batches."""
    return {name: decoder.batches(decoder.processes.shard(sequences)) for name, sequences in texts.items()}


@torch.no_grad()
def final_states(decoder: Decoder, ids: Batches, desc: str) -> dict[str, list[Tensor]]:
    """States before the final norm; all texts go through the layers together."""
    batches = [batch for text in ids.values() for batch in text]
    last: list[Tensor] = []
    if batches:
        for states in progress(decoder.walk(batches), total=decoder.num_layers, desc=desc, unit="layer"):
            last = states
    remaining = iter(last)
    return {name: [next(remaining) for _ in text] for name, text in ids.items()}


@torch.no_grad()
def predictions(
    decoder: Decoder, ids: Batches, states: Batches, dense: Batches | None = None, base: HasHead | None = None
) -> dict[str, Predictions]:
    """Compare a model's predictions of each text with the dense model's.

    Each process gives its share of the texts, and all get the means over everything. Texts without tokens are left out.

    Parameters
    ----------
    decoder : Decoder
    ids : token ids of each text
    states : the model's final states, as `final_states` gives them
    dense : the dense model's, by default the same
    base : Decoder or what else has its `head`, optional
        The dense model where its final norm or head differs from the decoder's; fusing changes neither.
    """
    sums = torch.zeros(len(ids), 5, dtype=torch.float64)
    with ExitStack() as stack:
        head = stack.enter_context(decoder.head())
        dense_head = head if base is None else stack.enter_context(base.head())
        for number, (name, batches) in enumerate(ids.items()):
            parts = []
            for n, batch in enumerate(batches):
                models = [(head, states[name][n][:, :-1])]
                if dense is not None:
                    models.append((dense_head, dense[name][n][:, :-1].to(states[name][n].device)))
                next_ids = batch[:, 1:].flatten().to(states[name][n].device)
                for log_probs, *expected in _log_probs(models, decoder.config.vocab_size):
                    following, next_ids = next_ids.split([len(log_probs), len(next_ids) - len(log_probs)])
                    device = log_probs.device
                    figures = token_figures(log_probs, following.to(device), *(each.to(device) for each in expected))
                    parts.append(in_float64(figures).sum(-1))
            sums[number] = _total(parts, 5)
    if ids:
        decoder.processes.all_reduce(sums)
    return {name: Predictions.from_sums(*row) for name, row in zip(ids, sums.tolist(), strict=True) if row[0]}


@torch.no_grad()
def divergences(decoder: Decoder, dense: Sequence[Tensor], candidates: Iterable[Sequence[Tensor]]) -> list[float]:
    """Mean divergence per token from the dense model's predictions, for final states of the same sequences.

    Each process has a share of the sequences. A divergence that cannot be computed, as where float16 overflows, is inf.

    Parameters
    ----------
    dense, and each of `candidates` : sequences of tensors of shape (sequences B, tokens T, hidden)
    """
    candidates = list(candidates)
    parts = []
    with decoder.head() as head:
        for n, states in enumerate(dense):
            models = [(head, states), *((head, candidate[n].to(states.device)) for candidate in candidates)]
            for expected, *log_probs in _log_probs(models, decoder.config.vocab_size):
                figures = [kl_divergence(expected, of_candidate) for of_candidate in log_probs]
                # In float64, so that sums do not depend on how many sequences are in a batch.
                parts.append(in_float64(torch.stack([*figures, torch.ones_like(expected[:, 0])])).sum(-1))
    *totals, tokens = decoder.processes.all_reduce_sums(_total(parts, len(candidates) + 1))
    return [total / tokens if math.isfinite(total) else math.inf for total in totals]


def _log_probs(
    models: Sequence[tuple[Callable[[Tensor], Tensor], Tensor]], vocab_size: int
) -> Iterator[tuple[Tensor, ...]]:
    """Log-probabilities of several models, each by its head and final states (sequences B, tokens T, hidden).

    Some tokens at a time, in order: float32 of shape (tokens, vocab) for each model. Products are of many tokens, as
    each reads all of the head; what follows is of as few as stay in the CPU's cache.
    """
    rows = max(1, LOGITS // vocab_size)
    for parts in zip(*(states.flatten(0, 1).split(rows) for _, states in models), strict=True):
        logits = [head(part[None])[0] for (head, _), part in zip(models, parts, strict=True)]
        rows_at_once = max(1, _IN_CACHE // vocab_size) if logits[0].device.type == "cpu" else rows
        for pieces in zip(*(of_model.split(rows_at_once) for of_model in logits), strict=True):
            yield tuple(piece.float().log_softmax(-1) for piece in pieces)


def _total(parts: Sequence[Tensor], size: int) -> Tensor:
    """The sum of float64 tensors of shape (size,); the host does not wait for their device."""
    return torch.stack(list(parts)).sum(0).cpu() if parts else torch.zeros(size, dtype=torch.float64)
