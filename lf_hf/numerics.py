"""Numbers of any device: float64, and whether they are finite."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor inf, looked at in parts: the temporaries of isfinite are large."""
    return all(bool(torch.isfinite(rows).all()) for rows in tensor.split(1024))


def in_float64(tensor: Tensor) -> Tensor:
    """A tensor in float64; on the CPU where its device, Apple's mps, has no such numbers."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
