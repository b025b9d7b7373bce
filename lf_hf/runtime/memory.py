"""How much memory is free, and sizes of it for people."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil
import torch

from lf_hf.runtime.launch import local_processes

PROCESS = 11 << 26
"""Bytes that Python takes with torch and transformers."""

LIMIT = Path("/sys/fs/cgroup/memory.max")
"""Holds what a Linux container allows all its processes together, as psutil knows only of the machine."""


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; of the machine's memory, this process's share among those of a launch."""
    if device.type == "cuda" and torch.cuda.is_available():
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = psutil.virtual_memory().available // local_processes()
    with suppress(OSError, ValueError):  # no container, or one without a limit, which says "max"
        allowed = int(LIMIT.read_text()) // local_processes()
        free = min(free, allowed - psutil.Process().memory_info().rss)
    return max(0, free)


def in_gib(size: float) -> str:
    """A number of bytes, for people."""
    if size > 2**50:
        return "more than 1024 TiB"
    return f"{size / 2**30:.1f} GiB" if size > 0.1 * 2**30 else f"{size / 2**20:.1f} MiB"
