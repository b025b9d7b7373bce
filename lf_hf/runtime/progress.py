"""How far a long stage is: a bar on a terminal or in a notebook, a line now and then in a log file."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import autonotebook, std
from transformers.utils import logging as hf_logging

from lf_hf.runtime.launch import local_rank

EVERY = 30.0
"""Seconds from one line of a log to the next; shorter stages print none."""


def progress(
    iterable: Iterable[Any] | None = None, *, total: int | None = None, desc: str, unit: str, leave: bool = True
) -> Any:
    """A tqdm bar around `iterable`, or without one a context whose `update()` counts one; in a log it is lines.

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
    options: dict[str, Any] = {"total": total, "desc": desc, "unit": unit, "leave": leave, "disable": local_rank() > 0}
    terminal = sys.stderr is None or sys.stderr.isatty()
    if terminal or autonotebook.tqdm is not std.tqdm or not hf_logging.is_progress_bar_enabled():
        return hf_logging.tqdm(iterable, **options)
    options["disable"] |= hf_logging.get_verbosity() > logging.WARNING
    return _Lines(iterable, **options, delay=EVERY, mininterval=EVERY, miniters=1)


class _Lines(std.tqdm):
    """Lines on standard error in place of a bar."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if msg is None and 0 < self.n != self.total:
            of, left = "", ""
            if self.total:
                seconds = self.format_dict["elapsed"] * (self.total - self.n) / self.n
                of, left = f" of {self.total}", f", about {duration(seconds)} left"
            print(f"{self.desc}: {self.unit} {self.n}{of} is done{left}.", file=sys.stderr, flush=True)
        return False  # there is nothing to clear

    def close(self) -> None:
        taken = self.format_dict["elapsed"]
        if not self.disable and taken >= EVERY and 0 < self.n == self.total:
            print(f"{self.desc}: done in {duration(taken)}.", file=sys.stderr, flush=True)
        self.leave = False
        super().close()


def duration(seconds: float) -> str:
    """Seconds, for people."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
