"""Sums in float64, wherever the numbers are."""

from __future__ import annotations

from torch import Tensor


def in_float64(tensor: Tensor) -> Tensor:
    """A tensor in float64; on the CPU where its device, Apple's mps, has no such numbers."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
