"""Numbers of any device: float64, bfloat16, whether they are finite, and whether they are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLED = 1024  # values of a parameter


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor inf, looked at in parts: the temporaries of isfinite are large."""
    return all(bool(torch.isfinite(rows).all()) for rows in tensor.split(1024))


def in_float64(tensor: Tensor) -> Tensor:
    """A tensor in float64; on the CPU where its device, Apple's mps, has no such numbers."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def typical_size(weights: Iterable[Tensor]) -> float:
    """The size of a model's weights: the root mean square of each matrix, and of all these the median."""
    matrices = (weight.detach() for weight in weights if weight.dim() == 2)
    return torch.stack([matrix.float().square().mean().sqrt().cpu() for matrix in matrices]).median().item()


@contextmanager
def bfloat16_products(apply: bool) -> Iterator[None]:
    """Let products of float32 matrices take their factors as bfloat16 on the CPU and TF32 on CUDA; sums are in float32.

    For factors that come from bfloat16 numbers: several times as fast where the hardware has such products.
    """
    faster = ((torch.backends.mkldnn, "bf16"), (torch.backends.cuda, "tf32"))
    before = []
    try:
        for place, precision in faster if apply else ():
            matmul: Any = getattr(place, "matmul", None)
            if hasattr(matmul, "fp32_precision"):  # torch >= 2.9
                before.append((matmul, matmul.fp32_precision))
                matmul.fp32_precision = precision
        yield
    finally:
        for matmul, precision in before:
            matmul.fp32_precision = precision


def computes_bfloat16() -> bool:
    """Whether this machine multiplies matrices in bfloat16 faster than in float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.accelerator.is_available():
        return False
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


def slow_bfloat16_note(dtype: torch.dtype, device: torch.device) -> str | None:
    """What to say of a model whose dtype the CPU can only imitate, if it is one."""
    if dtype != torch.bfloat16 or device.type != "cpu" or computes_bfloat16():
        return None
    return "This CPU has no instructions for bfloat16, so it is several times as slow as float32; give dtype=float32."


def weights_digest(named_parameters: Iterable[tuple[str, Tensor]]) -> str | None:
    """SHA-256 over the names and shapes of a model's parameters, and about a thousand values spread over each.

    It is cheap, and the same on each device and in each wider dtype. Training, or merging an adapter, changes it; a
    change of single values may not. None where values are not at hand: offloaded, quantised or spread over processes.
    """
    digests = []
    for name, parameter in named_parameters:
        if parameter.is_meta or type(parameter) not in (Tensor, nn.Parameter):
            return None
        values = parameter.detach().flatten()
        step = (values.numel() // _SAMPLED) | 1  # odd, so that they are not all of one column
        sampled = in_float64(torch.cat([values[::step], values[-1:]])).cpu()
        digests.append((name, list(parameter.shape), hashlib.sha256(sampled.numpy().tobytes()).hexdigest()))
    return hashlib.sha256(json.dumps(sorted(digests)).encode()).hexdigest()
