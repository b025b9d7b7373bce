"""The processes that a launcher (accelerate, torchrun, MPI) started, of which this one may be one."""

from __future__ import annotations

import os
import platform
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import get_int_from_env


def local_rank() -> int:
    """Number of this process among those on this machine, from 0."""
    names = ["LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"]
    return get_int_from_env(names, 0)


def local_processes() -> int:
    """How many there are on this machine."""
    names = ["LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"]
    return get_int_from_env(names, 1)


def own_device(device: Any) -> Any:
    """Of a kind of device, such as "cuda", the one that is this process's in a launch; anything else as it is."""
    kind = torch.accelerator.current_accelerator()
    if local_processes() == 1 or kind is None or device != kind.type:
        return device
    return f"{device}:{local_rank() % torch.accelerator.device_count()}"


def rank() -> int | None:
    """Number of this process among all in torch's process group, None without one."""
    in_group = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if in_group else None


def from_rank_0(value: Any) -> Any:
    """What rank 0 gives, in every process of the group; all must call it."""
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def launch_id() -> str:
    """The same in all processes of a launch on this machine, and in no other launch that is alive."""
    if (number := rank()) is not None:
        return f"{from_rank_0(uuid.uuid4().hex)}-{number - local_rank()}"
    parts = [platform.node(), str(os.getppid()), os.environ.get("MASTER_PORT", "")]
    with suppress(OSError):  # Linux: containers may share a host name and the parent's number
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return uuid.uuid5(uuid.NAMESPACE_OID, "\n".join(parts)).hex
