"""How far a long stage is: a bar on a terminal or in a notebook, a line now and then in a log; and what it took."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import autonotebook, std
from transformers.utils import logging as hf_logging

from lf_hf.runtime.launch import local_rank

EVERY = 30.0
"""Seconds from one line of a log to the next; shorter stages print none."""

_LINE = "{desc}: {unit} {n_fmt} of {total_fmt} is done in {elapsed}, {remaining} left"


def progress(
    iterable: Iterable[Any] | None = None, *, total: int | None = None, desc: str, unit: str, leave: bool = True
) -> Any:
    """A tqdm bar around `iterable`, or a context whose `update()` counts one step; in a log it prints lines.

    Shows nothing after transformers' `disable_progress_bar()`, nor in a log when its verbosity is errors only. The
    first process of a machine shows it for all of a launch.
    """
    options: dict[str, Any] = {"total": total, "desc": desc, "unit": unit, "disable": local_rank() > 0}
    in_notebook = autonotebook.tqdm is not std.tqdm
    on_terminal = sys.stderr is None or sys.stderr.isatty()
    if in_notebook or on_terminal or not hf_logging.is_progress_bar_enabled():
        return hf_logging.tqdm(iterable, **options, leave=leave)
    options["disable"] |= hf_logging.get_verbosity() > logging.WARNING
    options |= {"bar_format": _LINE, "delay": EVERY, "mininterval": EVERY, "miniters": 1}
    return _Lines(iterable, **options, leave=False)


class _Lines(std.tqdm):
    """A tqdm that prints lines in place of a bar, and a last one where tqdm would clear the bar."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if self.n:
            print(self, file=sys.stderr, flush=True)
        return False


class Clock:
    """Seconds by name, added up over `with clock(name):` blocks."""

    def __init__(self, seconds: Mapping[str, float] | None = None) -> None:
        self.seconds: dict[str, float] = dict(seconds or {})

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
