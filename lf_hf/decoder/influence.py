"""How much a layer changes the residual stream, and how far predictions moved."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import cosine_similarity

from lf_hf.numerics import in_float64


def influence(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """How much a layer changes the residual stream: 1 - mean cosine of its input and output over tokens.

    Parameters
    ----------
    before, after : sequences of tensors of shape (1, tokens T, hidden)
        The layer's input and output states. The first position is left out: its state is of another size than
        all others and hardly changes. NaN where there is no other.

    Source: the block influence of ShortGPT (arXiv:2403.03853), equation 1.
    """
    total, count = 0.0, 0
    for x, y in zip(before, after, strict=True):
        x, y = in_float64(x[0, 1:].to(y.device)), in_float64(y[0, 1:])
        cosines = cosine_similarity(x, y, dim=-1, eps=1e-150)  # (tokens - 1,)
        total += float(cosines.sum())
        count += len(cosines)
    return 1 - total / count if count else float("nan")


def divergence(expected: Tensor, logits: Tensor) -> float:
    """Kullback-Leibler divergence, in nats, of predictions from the expected ones, summed over tokens.

    Parameters
    ----------
    expected : float32 tensor of shape (tokens T, vocab)
        Log-probabilities.
    logits : tensor of the same shape
        Before the softmax.
    """
    probabilities, logits = expected.exp(), logits.float()
    return float(probabilities.mul_(expected - logits).sum() + logits.logsumexp(-1).sum())
