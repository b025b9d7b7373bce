"""How much memory is free, and sizes of it for people."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import psutil
import torch

from lf_hf.runtime.launch import local_processes

PROCESS = 11 << 26
"""Bytes that Python takes with torch and transformers."""

# By the version of Linux's control groups: where they are, what holds limits and what is in use, and what comes before
# the names of the file pages in memory.stat, which the kernel gives back when memory runs short.
_CONTROL_GROUPS = {
    2: ("sys/fs/cgroup", ["memory.max", "memory.high"], "memory.current", ""),
    1: ("sys/fs/cgroup/memory", ["memory.limit_in_bytes"], "memory.usage_in_bytes", "total_"),
}


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
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, named = line.partition(":")
        controllers, _, path = named.partition(":")
        if "memory" not in controllers.split(",") and number != "0":
            continue
        place, limits, usage, total = _CONTROL_GROUPS[2 if number == "0" else 1]
        group = Path(path.lstrip("/"))
        for folder in (root / place / parent for parent in (group, *group.parents)):
            # A container may not see the groups above it, and some have no limit ("max").
            most = [int(word) for name in limits for word in _text(folder / name).split() if word.isdecimal()]
            used = [int(word) for word in _text(folder / usage).split() if word.isdecimal()]
            if most and used:
                stat = pairwise(_text(folder / "memory.stat").split())
                pages = {name: int(word) for name, word in stat if word.isdecimal()}
                files = sum(pages.get(f"{total}{kind}_file", 0) for kind in ("active", "inactive"))
                left.append(max(0, min(most) - used[0] + files))
    return left


def _text(file: Path) -> str:
    """What a small file has; nothing, if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def in_gib(size: float) -> str:
    """A number of bytes, for people."""
    return f"{size / 2**30:.1f} GiB" if size > 0.1 * 2**30 else f"{size / 2**20:.1f} MiB"
