"""How much a layer changes the residual stream, and how far predictions moved."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lf_hf.numerics import in_float64
from lf_hf.processes import ALONE, Processes


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
    [total_of_all, count_of_all] = processes.summed(torch.stack([total, torch.full_like(total, count)]))
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
