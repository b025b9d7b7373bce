"""What a launcher (accelerate, torchrun, MPI) says about the processes that it started on this machine."""

from __future__ import annotations

from accelerate.utils import get_int_from_env


def local_rank() -> int:
    """Number of this process among them, from 0."""
    names = ["LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"]
    return get_int_from_env(names, 0)


def local_processes() -> int:
    """How many there are."""
    names = ["LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"]
    return get_int_from_env(names, 1)
