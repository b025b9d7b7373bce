"""The processes of a launch (accelerate, torchrun, MPI), and how they share the work of one fusion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import get_cpu_distributed_information
from torch import Tensor, distributed

from lf_hf.runtime.errors import reason

T = TypeVar("T")
PATIENCE = timedelta(days=7)
"""How long processes wait for one that works alone; a launcher ends them at once when that one has ended."""


class OtherProcessError(RuntimeError):
    """Another process of the launch raised an error, which it says itself, so this one cannot go on either."""


class LostProcessError(ConnectionError):
    """Another process of the launch has ended."""


@dataclass(frozen=True)
class Processes:
    """Processes that compute one thing together: each calls the same methods in the same order.

    `rank` is the number of this one, from 0. With a `world_size` of 1 nothing is sent.
    """

    rank: int = 0
    world_size: int = 1

    @classmethod
    def of_launch(cls) -> Processes:
        """All processes of the launch that this one belongs to, connected; this one alone where there is no launch."""
        if rank() is None and distributed.is_available() and get_cpu_distributed_information().world_size > 1:
            PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
        return cls() if rank() is None else cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and speaks for all."""
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> list[T]:
        """Those of some items that are for this process: every `count`-th one."""
        return list(items[self.rank :: self.world_size])

    def all_reduce(self, tensor: Tensor) -> None:
        """Make a tensor, in place and in all processes, the sum over those of all."""
        self._in_place(distributed.all_reduce, tensor)

    def broadcast(self, tensor: Tensor) -> None:
        """Make a tensor, in place, what it is in the first process."""
        self._in_place(distributed.broadcast, tensor, 0)

    def _in_place(self, collective: Callable[..., Any], tensor: Tensor, *arguments: Any) -> None:
        if self.world_size > 1:
            only_devices = distributed.get_backend() == "nccl" and tensor.device.type != "cuda"
            sent = tensor.to("cuda") if only_devices else tensor
            _communicate(collective, sent, *arguments)
            if only_devices:
                tensor.copy_(sent)

    def all_reduce_sums(self, numbers: Tensor) -> list[float]:
        """Sums of all processes' numbers, of a tensor of shape (n,); the host waits for the device once."""
        numbers = numbers.clone()
        self.all_reduce(numbers)
        return numbers.tolist()

    def all_gather_object(self, value: T) -> list[T]:
        """A small value of each process, by rank, in all of them."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            _communicate(distributed.all_gather_object, values, value)
        return values

    def broadcast_object(self, compute: Callable[[], T]) -> T:
        """A small value that the first process computes, in all; an error there is an OtherProcessError elsewhere."""
        if self.world_size == 1:
            return compute()
        box: list[Any] = [None, None]  # the value, and the reason why there is none
        error: Exception | None = None
        if self.is_main:
            try:
                box[0] = compute()
            except Exception as raised:
                error, box[1] = raised, str(raised)
        _communicate(distributed.broadcast_object_list, box, 0)
        if box[1] is not None:
            raise error or OtherProcessError(box[1])
        return box[0]


ALONE = Processes()


def rank() -> int | None:
    """Number of this process among all in torch's process group, None without one."""
    in_group = distributed.is_available() and distributed.is_initialized()
    return distributed.get_rank() if in_group else None


def leave_process_group() -> None:
    """End torch's process group, if there is one: its threads must not outlive the program."""
    if rank() is not None:
        distributed.destroy_process_group()


def local_rank() -> int:
    """Number of this process among those that a launcher (torchrun, accelerate, MPI) started on this machine."""
    return get_cpu_distributed_information().local_rank


def local_processes() -> int:
    """How many there are on this machine."""
    return get_cpu_distributed_information().local_world_size


def own_device(device: Any) -> Any:
    """Of a kind of device, such as "cuda", the one that is this process's in a launch; anything else as it is."""
    kind = torch.accelerator.current_accelerator()
    if local_processes() == 1 or kind is None or device != kind.type:
        return device
    return f"{device}:{local_rank() % torch.accelerator.device_count()}"


def _communicate(collective: Callable[..., Any], *arguments: Any) -> None:
    """Call one of torch's functions that need all processes; say in one sentence that another process is gone."""
    try:
        collective(*arguments)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # torch has no class of its own for this
        raise LostProcessError(
            "Another process of this launch has ended, so this one cannot go on; see what that one said, and start "
            f"the launch again ({reason(error)})."
        ) from error
