"""What hidden states say of the layer that they come from: whether they are numbers, and how much it changed them.

All of it stays on the states' device, as the host waits for that wherever it reads something.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lf_hf.runtime.numerics import in_float64, is_finite, to_device


def are_finite(states: Sequence[Tensor]) -> Tensor:
    """Whether states contain neither NaN nor inf: a bool tensor of shape ()."""
    return torch.stack([is_finite(state) for state in states]).all() if states else torch.tensor(True)


def check_finite(finite: Sequence[bool]) -> None:
    """Raise ValueError for the first layer whose output states are not finite, by what `are_finite` says of each."""
    if not all(finite):
        raise ValueError(f"The activations of layer {finite.index(False)} contain NaN or inf on the calibration text.")


def cosine_sums(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """The sum of the cosines of a layer's input and output over tokens, and their number: float64, of shape (2,).

    Of the states (sequences B, tokens T, hidden) the first position is left out: it is of another size than all others
    and hardly changes.
    """
    sums = torch.zeros(2, dtype=torch.float64)
    for x, y in zip(before, after, strict=True):
        x, y = in_float64(x[:, 1:].to(y.device)), in_float64(y[:, 1:])
        cosines = cosine_similarity(x, y, dim=-1, eps=1e-150)  # (B, tokens - 1)
        total = cosines.sum()
        count = torch.full_like(total, cosines.numel())
        sums = to_device(sums, total.device) + torch.stack([total, count])
    return sums


def influences(sums: Sequence[Tensor]) -> list[float]:
    """How much each layer changes the residual stream, by its `cosine_sums`: 1 - mean cosine; NaN of no tokens.

    Source: the block influence of ShortGPT (arXiv:2403.03853), equation 1.
    """
    device = sums[0].device
    of_layers = torch.stack([of_layer.to(device) for of_layer in sums])
    return [1 - total / count if count else float("nan") for total, count in of_layers.tolist()]
