"""How much memory is free, and sizes of it for people."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import psutil
import torch

from lf_hf.runtime.launch import local_processes

PROCESS = 11 << 26
"""Bytes that Python takes with torch and transformers."""


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; of the machine's memory, this process's share among those of a launch."""
    if device.type == "cuda" and torch.cuda.is_available():
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return min([psutil.virtual_memory().available, *left_to_control_groups()]) // local_processes()


def left_to_control_groups(root: Path = Path("/")) -> list[int]:
    """Bytes that are left of each limit that a container or a scheduler's job sets for this process.

    `root` is where `proc` and `sys` are. Without limits, and on other systems than Linux, there are none.
    """
    left = []
    for line in _words(root / "proc/self/cgroup"):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]  # a number comes first
        if controllers and "memory" not in controllers.split(","):
            continue
        # Controllers have names, and a mount each, in version 1 of control groups.
        mount, total = (root / "sys/fs/cgroup/memory", "total_") if controllers else (root / "sys/fs/cgroup", "")
        group = Path(path.lstrip("/"))
        for folder in (mount / parent for parent in (group, *group.parents)):
            # A container may not see the groups above it, and some have no limit ("max").
            limits = [_words(folder / f"memory.{name}") for name in ("max", "high", "limit_in_bytes")]
            in_use = [_words(folder / f"memory.{name}") for name in ("current", "usage_in_bytes")]
            most, used = ([int(word) for words in of for word in words if word.isdecimal()] for of in (limits, in_use))
            if most and used:
                # The kernel gives back the pages of files when memory runs short.
                stat = dict(pairwise(_words(folder / "memory.stat")))
                pages = [stat.get(f"{total}{kind}_file", "") for kind in ("active", "inactive")]
                left.append(max(0, min(most) - used[0] + sum(int(size) for size in pages if size.isdecimal())))
    return left


def _words(file: Path) -> list[str]:
    """The words of a small file; none, if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return []


def in_gib(size: float) -> str:
    """A number of bytes, for people."""
    return f"{size / 2**30:.1f} GiB" if size > 0.1 * 2**30 else f"{size / 2**20:.1f} MiB"
