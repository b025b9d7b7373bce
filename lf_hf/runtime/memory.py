"""How much memory is free, and sizes of it for people."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from lf_hf.runtime.launch import local_processes

CONTROL_GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
"""Of Linux: what containers and jobs allow all their processes together, as psutil knows only of the machine."""

_LIMIT_FILES = {"": "memory.max", "memory": "memory.limit_in_bytes"}  # of version 2, and of version 1
_MMAP_THRESHOLD = -3  # as malloc.h of glibc has it: the size from which on a block is mapped by itself
_LARGE = 1 << 20  # bytes; else glibc would raise it to 32 MB


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; of the machine's memory, this process's share among those of a launch."""
    module = torch.get_device_module(device)
    if hasattr(module, "mem_get_info"):
        unused = module.memory_reserved(device) - module.memory_allocated(device)
        return int(module.mem_get_info(device)[0] + unused)
    free = psutil.virtual_memory().available // local_processes()
    used = psutil.Process().memory_info().rss
    return max(0, min([free, *(limit // local_processes() - used for limit in _limits())]))


def _limits() -> Iterator[int]:
    """Bytes that this process's control groups, one inside the other, allow; of either version of these groups."""
    lines = OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.is_file() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers not in _LIMIT_FILES:
            continue
        group = Path(path)
        for parent in (group, *group.parents):  # inside a container the outer ones are not there
            folder = CONTROL_GROUPS / controllers / parent.relative_to("/")
            with suppress(OSError, ValueError):  # "max" is no limit
                yield int((folder / _LIMIT_FILES[controllers]).read_text())


def give_back_freed(*, from_now_on: bool = False) -> None:
    """Let glibc give to the system what is freed in its heap; and `from_now_on` large blocks as soon as they are freed.

    Else it keeps pieces of layers that came and went.
    """
    with suppress(AttributeError, OSError, TypeError):  # of another C library, or of another system
        glibc = ctypes.CDLL(None)
        glibc.malloc_trim(0)
        if from_now_on:
            glibc.mallopt(_MMAP_THRESHOLD, _LARGE)


def in_gib(size: float) -> str:
    """A number of bytes, for people."""
    return f"{size / 2**30:.1f} GiB" if size > 0.1 * 2**30 else f"{size / 2**20:.1f} MiB"
