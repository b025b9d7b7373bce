"""The processes of a launch (accelerate, torchrun, MPI): the first one works, and all of them train and evaluate."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Timer, current_thread, main_thread
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import get_cpu_distributed_information
from torch import distributed
from transformers.utils import logging

from lf_hf.runtime.errors import reason
from lf_hf.runtime.numerics import accelerator

T = TypeVar("T")
logger = logging.get_logger(__name__)

PATIENCE = timedelta(days=7)
"""How long processes wait for one that works alone; a launcher ends them at once when that one has ended."""
SAID_AFTER = 20
"""Seconds after which a process says that it waits for others: a shell may remember a launch that is over."""
SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")
"""Device maps that spread a model over all devices."""


class OtherProcessError(RuntimeError):
    """The first process of the launch ended with an error, which it reports itself."""


def num_processes() -> int:
    """How many processes this one's launch has, which are connected now; 1 where there is no launch."""
    asked = get_cpu_distributed_information().world_size
    if rank() is None and asked > 1:
        with _waiting(asked):
            PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
    return 1 if rank() is None else distributed.get_world_size()


@contextmanager
def _waiting(asked: int) -> Iterator[None]:
    """Wait for so many processes: a line says so after a while, and Ctrl-C or SIGTERM ends this one at once."""
    others = f"Waiting for the other processes: WORLD_SIZE={asked} in the environment says that there are {asked}."
    waiting = Timer(SAID_AFTER, logger.warning, [f"{others} Where no launcher set it, unset it."])
    waiting.daemon = True
    ending = (signal.SIGINT, signal.SIGTERM) if current_thread() is main_thread() else ()
    # Python's own handlers would run when torch has come back.
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in ending}
    waiting.start()
    try:
        yield
    finally:
        waiting.cancel()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def compute_once(compute: Callable[[], T]) -> T:
    """A small value that the first process of a launch computes, in all of them: each has to call this, and waits."""
    if num_processes() == 1:
        return compute()
    sent: list[Any] = [None]
    error: Exception | None = None
    if not rank():
        try:
            sent = [compute()]
        except Exception as raised:
            error, sent = raised, [OtherProcessError(str(raised))]
    try:
        distributed.broadcast_object_list(sent)
    except RuntimeError as lost:  # torch has no class of its own for this
        raise error or OtherProcessError(reason(lost)) from lost
    if isinstance(sent[0], OtherProcessError):
        raise error or sent[0]
    return sent[0]


def rank() -> int | None:
    """Number of this process among all in torch's process group, None without one."""
    in_group = distributed.is_available() and distributed.is_initialized()
    return distributed.get_rank() if in_group else None


def leave_process_group() -> None:
    """End torch's process group, if there is one: its threads must not outlive the program."""
    if rank() is not None:
        distributed.destroy_process_group()


def local_rank() -> int:
    """Number of this process among those that a launcher (torchrun, accelerate, MPI) started on this machine.

    0 where there are no others: a shell may remember a launch that is over.
    """
    launched = get_cpu_distributed_information()
    return launched.local_rank if launched.world_size > 1 else 0


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
