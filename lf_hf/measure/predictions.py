"""What a model predicts on texts: its figures beside the dense model's. This knows nothing of fusing or training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from lf_hf.decoder.decoder import Decoder, Head
from lf_hf.decoder.demand import Setup
from lf_hf.report.figures import FIGURES
from lf_hf.runtime.amounts import LOGITS, LOGITS_IN_CACHE
from lf_hf.runtime.numerics import in_float64, kl_divergence
from lf_hf.runtime.progress import progress

Batches = Mapping[str, Sequence[Tensor]]
"""For each text by name: token ids of shape (sequences B, tokens T), or states of shape (B, T, hidden)."""
HeadAndStates = tuple[Head, Sequence[Tensor]]
"""A model's head, and its final states of all batches of a text."""


@torch.no_grad()
def final_states(decoder: Decoder, ids: Batches, desc: str) -> dict[str, list[Tensor]]:
    """States after the final norm, of which the head makes predictions; all texts go through the layers together."""
    batches = [batch for text in ids.values() for batch in text]
    last: list[Tensor] = []
    if batches:
        for states in progress(decoder.walk(batches), total=decoder.num_layers, desc=desc, unit="layer"):
            last = states
    norm = decoder.final_norm
    remaining = (norm(states) for states in last)
    return {name: [next(remaining) for _ in text] for name, text in ids.items()}


@torch.no_grad()
def predictions(
    decoder: Decoder,
    ids: Batches,
    states: Batches,
    dense: Batches | None = None,
    dense_head: Tensor | None = None,
) -> dict[str, dict[str, float]]:
    """Figures of a model's predictions of each text, by name; of the dense model by itself those that are measured.

    `states` and `dense` are the final states of both, as `final_states` gives them; the model is the dense one by
    default. `dense_head` is the weight of the dense model's head (vocab, hidden), by default the decoder's: fusing does
    not change it. Texts without tokens are left out.
    """
    compared = [states] if dense is None else [states, dense]
    found = {}
    measured = [figure for figure in FIGURES if dense is not None or figure.dense is None]
    weight = decoder.head_weight
    heads = [partial(_head_logits, decoder, weight if other is None else other) for other in (None, dense_head)]
    for name, batches in ids.items():
        models = []
        for head, of_model in zip(heads, compared, strict=False):
            models.append((head, [state[:, :-1] for state in of_model[name]]))
        next_ids = torch.cat([batch[:, 1:].flatten() for batch in batches] or [torch.empty(0)])
        parts: list[Tensor] = []
        for of_models in _log_probs(models, decoder.config.vocab_size):
            log_probs, of_dense = of_models[0], of_models[-1]
            targets, next_ids = next_ids.tensor_split([len(log_probs)])
            targets = targets.to(log_probs.device)
            parts.append(torch.stack([figure.per_token(log_probs, of_dense, targets) for figure in measured]))
        if means := _means_over_tokens(parts):
            found[name] = {figure.name: figure.of_mean(mean) for figure, mean in zip(measured, means, strict=True)}
    return found


def _head_logits(decoder: Decoder, weight: Tensor, states: Tensor) -> Tensor:
    """Logits (..., vocab) of states (..., hidden) after the final norm."""
    return decoder.family.logits(decoder.config, linear(states.to(weight.device, weight.dtype), weight))


@torch.no_grad()
def divergences(decoder: Decoder, dense: Sequence[Tensor], candidates: Iterable[Sequence[Tensor]]) -> list[float]:
    """Mean divergence per token from the dense model's predictions, for final states of the same sequences.

    States have shape (sequences B, tokens T, hidden). A divergence that cannot be computed, as where float16 overflows,
    is inf.
    """
    parts = []
    head = decoder.head()
    models = [(head, states) for states in (dense, *candidates)]
    for expected, *compared in _log_probs(models, decoder.config.vocab_size):
        parts.append(torch.stack([kl_divergence(expected, log_probs) for log_probs in compared]))
        del expected, compared  # before the next ones are made
    means = _means_over_tokens(parts)
    return [mean if math.isfinite(mean) else math.inf for mean in means]


def _log_probs(models: Sequence[HeadAndStates], vocab_size: int) -> Iterator[list[Tensor]]:
    """Log-probabilities of several models, some tokens at a time, in order: float32 of shape (tokens, vocab) of each.

    The head takes many tokens at once, as each product reads all of it; later steps take as few as fit the cache.
    """
    rows, fewer = (max(1, logits // vocab_size) for logits in (LOGITS, LOGITS_IN_CACHE))
    heads = [head for head, _ in models]
    for batch in zip(*(states for _, states in models), strict=True):
        for parts in _rows_of([states.flatten(0, 1) for states in batch], rows):
            logits = [head(part[None])[0] for head, part in zip(heads, parts, strict=True)]
            on_cpu = logits[0].device.type == "cpu"
            for pieces in _rows_of(logits, fewer if on_cpu else rows):
                yield [piece.float().log_softmax(-1) for piece in pieces]
            del logits, pieces  # before the next ones are made


def _rows_of(tensors: Sequence[Tensor], rows: int) -> Iterator[tuple[Tensor, ...]]:
    """Some rows of all tensors at a time, where the first tensor is."""
    return zip(*(tensor.to(tensors[0].device).split(rows) for tensor in tensors), strict=True)


def _means_over_tokens(parts: Sequence[Tensor]) -> list[float]:
    """Means over tokens of figures in parts of shape (figures, tokens); none without any tokens.

    Sums are in float64, so that they do not depend on how many sequences are in a batch. The host does not wait for
    their device before all are computed.
    """
    tokens = sum(part.shape[-1] for part in parts)
    if not tokens:
        return []
    totals = torch.stack([in_float64(part).sum(-1) for part in parts]).sum(0)
    return [total / tokens for total in totals.tolist()]


def logits_bytes(setup: Setup, tokens: int, models: int) -> int:
    """Bytes of logits of some models, of at most so many tokens.

    On a card each model also has float32 log-probabilities, and the one that is compared needs three more of these.
    """
    of_number = models * (setup.shape.size + 4 * setup.on_card) + 12 * setup.on_card
    return min(LOGITS, tokens * setup.shape.vocab) * of_number
