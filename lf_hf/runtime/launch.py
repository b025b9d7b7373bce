"""The processes of a launch (accelerate, torchrun, MPI), and how they share work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import get_cpu_distributed_information
from torch import Tensor, distributed

from lf_hf.runtime.errors import reason
from lf_hf.runtime.numerics import accelerator

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long processes wait for one that works alone; a launcher ends them at once when that one has ended."""


class OtherProcessError(RuntimeError):
    """Another process of the launch raised an error, which it reports itself."""


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
        """All processes of this one's launch, connected; this one alone where there is no launch."""
        if rank() is None and get_cpu_distributed_information().world_size > 1:
            PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
        if rank() is None:
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and speaks for all."""
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> list[T]:
        """The items of this process: every `world_size`-th one."""
        return list(items[self.rank :: self.world_size])

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace a tensor, in place and in all processes, by its sum over the processes."""
        self._in_place(distributed.all_reduce, tensor)

    def broadcast(self, tensor: Tensor) -> None:
        """Replace a tensor, in place, by that of the first process."""
        self._in_place(distributed.broadcast, tensor, 0)

    def _in_place(self, collective: Callable[..., Any], tensor: Tensor, *arguments: Any) -> None:
        if self.world_size > 1:
            takes = distributed.get_backend_config()  # by device: "cuda:nccl", or "cpu:gloo,cuda:gloo"
            sent = tensor if f"{tensor.device.type}:" in takes else tensor.to(takes.partition(":")[0])
            _communicate(collective, sent, *arguments)
            tensor.copy_(sent)

    def all_gather_object(self, value: T) -> list[T]:
        """A small value of each process, by rank."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            _communicate(distributed.all_gather_object, values, value)
        return values

    @contextmanager
    def apart(self) -> Iterator[None]:
        """A `with` block in which each process computes something else: a ValueError of one is raised in all."""
        own_error: ValueError | None = None
        try:
            yield
        except ValueError as raised:
            own_error = raised
        for error in (own_error, *self.all_gather_object(own_error)):
            if error is not None:
                raise error

    def compute_once(self, compute: Callable[[], T]) -> T:
        """A small value that the first process computes. Its error is an OtherProcessError in the others."""
        if self.world_size == 1:
            return compute()
        sent: list[Any] = [None]
        error: Exception | None = None
        if self.is_main:
            try:
                sent = [compute()]
            except Exception as raised:
                error, sent = raised, [OtherProcessError(str(raised))]
        _communicate(distributed.broadcast_object_list, sent, 0)
        if isinstance(sent[0], OtherProcessError):
            raise error or sent[0]
        return sent[0]


ALONE = Processes()


def compute_once(compute: Callable[[], T]) -> T:
    """A small value that the first process of this launch computes, in all of them; each has to call this."""
    return Processes.of_launch().compute_once(compute)


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
    """How many processes a launcher started on this machine."""
    return get_cpu_distributed_information().local_world_size


def speaks() -> bool:
    """Whether this process prints for all of its launch: it is the first one."""
    return not rank() and not local_rank()


def own_device(device: Any) -> Any:
    """This process's device of a kind, such as "cuda", in a launch; any other device as it is."""
    kind = accelerator()
    if local_processes() == 1 or kind is None or str(device) != kind.type:
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
