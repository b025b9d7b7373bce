"""How much a layer changes the residual stream, and how far predictions moved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lf_hf.decoder.interface import Decoder
from lf_hf.runtime.launch import ALONE, Processes
from lf_hf.runtime.numerics import in_float64

_ROWS = 64  # tokens whose predictions are compared at a time


def influence(before: Sequence[Tensor], after: Sequence[Tensor], processes: Processes = ALONE) -> float:
    """How much a layer changes the residual stream: 1 - mean cosine of its input and output over tokens.

    Parameters
    ----------
    before, after : sequences of tensors of shape (sequences B, tokens T, hidden)
        The layer's input and output states. The first position is left out: its state is of another size than
        all others and hardly changes. NaN where there is no other.
    processes : Processes
        Those that each have a share of the states.

    Source: the block influence of ShortGPT (arXiv:2403.03853), equation 1.
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    for x, y in zip(before, after, strict=True):
        x, y = in_float64(x[:, 1:].to(y.device)), in_float64(y[:, 1:])
        cosines = cosine_similarity(x, y, dim=-1, eps=1e-150)  # (B, tokens - 1)
        total = total.to(cosines.device) + cosines.sum()
        count += cosines.numel()
    [total_of_all, count_of_all] = processes.all_reduce_sums(torch.stack([total, torch.full_like(total, count)]))
    return 1 - total_of_all / count_of_all if count_of_all else float("nan")


def divergence(expected: Tensor, logits: Tensor) -> Tensor:
    """Kullback-Leibler divergence, in nats, of predictions from the expected ones, summed over tokens.

    Parameters
    ----------
    expected : float32 tensor of shape (..., tokens T, vocab)
        Log-probabilities.
    logits : tensor of the same shape
        Before the softmax.

    Returns
    -------
    tensor without dimensions
    """
    probabilities, logits = expected.exp(), logits.float()
    return probabilities.mul_(expected - logits).sum() + logits.logsumexp(-1).sum()


@torch.no_grad()
def divergences(decoder: Decoder, dense: Sequence[Tensor], candidates: Iterable[Sequence[Tensor]]) -> list[float]:
    """Mean divergence per token from the dense model's predictions, of final states of the same sequences.

    Each process has a share of the sequences. What cannot be computed with, as where float16 overflows, is inf.

    Parameters
    ----------
    dense, and each of `candidates` : sequences of tensors of shape (sequences B, tokens T, hidden)
    """
    candidates = list(candidates)
    totals = torch.zeros(len(candidates) + 1, dtype=torch.float64)
    with decoder.head() as head:
        for n, states in enumerate(dense):
            others = [_rows(candidate[n].to(states.device)) for candidate in candidates]
            for rows, *fused_rows in zip(_rows(states), *others, strict=True):
                expected = head(rows).float().log_softmax(-1)
                found = [divergence(expected, head(fused)) for fused in fused_rows]
                found.append(torch.full_like(found[0], rows.shape[1]))
                sums = in_float64(torch.stack(found))
                totals = totals.to(sums.device) + sums
    *of_candidates, tokens = decoder.processes.all_reduce_sums(totals)
    return [total / tokens if math.isfinite(total) else math.inf for total in of_candidates]


def _rows(states: Tensor) -> tuple[Tensor, ...]:
    """States (sequences B, tokens T, hidden) as some tokens at a time, each of shape (1, tokens, hidden)."""
    return states.flatten(0, 1)[None].split(_ROWS, dim=1)
