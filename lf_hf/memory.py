"""How much memory is free."""

from __future__ import annotations

import psutil
import torch

from lf_hf.processes import local_processes


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; of the machine's memory, this process's share among those of a launch."""
    if device.type == "cuda" and torch.cuda.is_available():
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available // local_processes()
