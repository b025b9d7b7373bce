"""How far a long stage is: a bar on a terminal or in a notebook, a line now and then in a log file."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, Generic, TypeVar, overload

from tqdm import autonotebook, std
from transformers.utils import logging as hf_logging

from lf_hf.runtime.launch import local_rank

T = TypeVar("T")

EVERY = 30.0
"""Seconds from one line of a log to the next; shorter stages print none."""


@overload
def progress(
    iterable: Iterable[T], *, total: int | None = None, desc: str, unit: str, leave: bool = True
) -> Iterable[T]: ...
@overload
def progress(*, total: int, desc: str, unit: str, leave: bool = True) -> Any: ...
def progress(
    iterable: Iterable[Any] | None = None, *, total: int | None = None, desc: str, unit: str, leave: bool = True
) -> Any:
    """Pass on what `iterable` has, and show how far it is; without one, a context whose `update()` counts one.

    Nothing is shown after transformers' `disable_progress_bar()`, nor in a log when its verbosity is errors only. The
    first of the processes that a launcher started on a machine shows it for all.

    Parameters
    ----------
    iterable : iterable, optional
    total : int, optional
        How many there will be; default the length of `iterable`, where it has one.
    desc, unit : str
        The stage, and what is counted in it.
    leave : bool
        Whether a finished bar stays on the terminal.
    """
    shown = local_rank() == 0
    terminal = sys.stderr is not None and sys.stderr.isatty()
    if terminal or autonotebook.tqdm is not std.tqdm or not hf_logging.is_progress_bar_enabled():
        return hf_logging.tqdm(iterable, total=total, desc=desc, unit=unit, leave=leave, disable=not shown)
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    return _Lines(iterable or (), total, desc, unit, shown)


class _Lines(Generic[T]):
    """Lines on standard error."""

    def __init__(self, iterable: Iterable[T], total: int | None, desc: str, unit: str, shown: bool) -> None:
        self._iterable, self._total, self._desc, self._unit, self._shown = iterable, total, desc, unit, shown
        self._done = 0
        self._start = self._last = time.monotonic()

    def __iter__(self) -> Iterator[T]:
        with self:
            for item in self._iterable:
                yield item
                self.update()

    def update(self) -> None:
        self._done += 1
        now = time.monotonic()
        if now - self._last < EVERY or self._done == self._total:
            return
        of, left = "", ""
        if self._total:
            seconds = (now - self._start) * (self._total - self._done) / self._done
            of, left = f" of {self._total}", f", about {duration(seconds)} left"
        self._say(f"{self._unit} {self._done}{of} is done{left}")
        self._last = now

    def __enter__(self) -> _Lines[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        taken = time.monotonic() - self._start
        if kind is None and taken >= EVERY:
            self._say(f"done in {duration(taken)}")

    def _say(self, text: str) -> None:
        if self._shown and sys.stderr is not None and hf_logging.get_verbosity() <= logging.WARNING:
            print(f"{self._desc}: {text}.", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds, for people."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
