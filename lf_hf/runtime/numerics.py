"""The accelerator, and numbers on any device: float64, bfloat16, finite values, and digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLED = 1024  # values of a parameter in a digest


def accelerator() -> torch.device | None:
    """The kind of accelerator that is here, if there is one; torch by itself also names one that it was built for."""
    return torch.accelerator.current_accelerator(check_available=True)


def is_finite(tensor: Tensor) -> Tensor:
    """Whether a tensor holds neither NaN nor inf: a bool tensor of shape (), as the host waits where it reads one."""
    return torch.stack(tensor.aminmax()).isfinite().all()  # of all numbers temporaries would be large


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. CUDA takes it out of memory before the call is over, so the host waits no longer."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def to_host(*tensors: Tensor) -> list[Tensor]:
    """Copies of small tensors in the machine's memory, in float64: the host waits once, for the first one's device."""
    flat = [in_float64(to_device(tensor, tensors[0].device)).flatten() for tensor in tensors]
    parts = torch.cat(flat).cpu().split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def kl_divergence(expected: Tensor, log_probs: Tensor) -> Tensor:
    """KL(expected || predicted) in nats, of log-probabilities of shape (..., tokens T, vocab): shape (..., T)."""
    return torch.linalg.vecdot(expected.exp(), expected - log_probs)


def in_float64(tensor: Tensor) -> Tensor:
    """A tensor in float64; on the CPU where its device (Apple's mps) has no such numbers."""
    if tensor.device.type == "mps":
        tensor = tensor.cpu()
    return tensor.double()


def typical_size(weights: Iterable[Tensor]) -> float:
    """Median over a model's matrices of the root mean square of their weights."""
    squares = [weight.detach().float().square().mean() for weight in weights if weight.dim() == 2]
    sizes = torch.stack([square.to(squares[0].device) for square in squares]).sqrt()
    return sizes.median().item()


@contextmanager
def bfloat16_products(apply: bool) -> Iterator[None]:
    """Let products of float32 matrices take their factors as bfloat16 on the CPU and TF32 on CUDA; sums are in float32.

    Meant for factors that come from bfloat16 numbers. Several times as fast where the hardware has such products.
    """
    cpu: Any = torch.backends.mkldnn
    cuda: Any = torch.backends.cuda
    if not apply or not hasattr(cuda.matmul, "fp32_precision"):  # torch < 2.9
        yield
        return
    before = cpu.matmul.fp32_precision, cuda.matmul.fp32_precision
    try:
        cpu.matmul.fp32_precision, cuda.matmul.fp32_precision = "bf16", "tf32"
        yield
    finally:
        cpu.matmul.fp32_precision, cuda.matmul.fp32_precision = before


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies matrices in bfloat16 faster than in float32."""
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    module = torch.get_device_module(device)
    options = {"including_emulation": False} if device.type in ("cuda", "xpu") else {}
    return hasattr(module, "is_bf16_supported") and module.is_bf16_supported(**options)


def weights_digest(named_parameters: Iterable[tuple[str, Tensor]]) -> str | None:
    """SHA-256 over the names and shapes of a model's parameters, and about a thousand values spread over each.

    Cheap, and the same on each device and in each wider dtype. Training, or merging an adapter, changes it; a change
    of single values may not. None where values are not at hand: offloaded, quantised or spread over processes.
    """
    digests = []
    for name, parameter in named_parameters:
        if parameter.is_meta or type(parameter) not in (Tensor, nn.Parameter):
            return None
        values = parameter.detach().flatten()
        step = (values.numel() // _SAMPLED) | 1  # odd, so that they are not all of one column
        sample = in_float64(torch.cat([values[::step], values[-1:]]))
        digest = hashlib.sha256(sample.cpu().numpy().tobytes())
        digests.append((name, list(parameter.shape), digest.hexdigest()))
    return hashlib.sha256(json.dumps(sorted(digests)).encode()).hexdigest()
