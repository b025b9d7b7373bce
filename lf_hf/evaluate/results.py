"""A sweep's folder, in which several processes may be at work: what is there, and who makes what is missing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from lf_hf.checkpoint.saving import gone_if_empty, held, only_writer
from lf_hf.evaluate.points import RESULTS, Point, append_point, read_points
from lf_hf.evaluate.tables import TABLES, write_tables

_POLL = 1.0  # seconds from one look at what others have made to the next
Choose = Callable[[Sequence[str], Sequence[str]], str]
"""Which of the points that nobody is at to make next, given also those that others are at."""


class Results:
    """The points that were asked for, by their keys, and the tables made of them.

    Only this module's lock file keeps processes apart, so they may be of one launch or started one by one, on all
    machines that share the folder. Each point that a process is at is a lock file of its own, which is free again as
    soon as that process has ended, however it did.

    Parameters
    ----------
    folder : Path
    base : str
        Name of the dense model.
    keys : sequence of str
        In the order of the tables.
    published : bool
        As for `write_tables`.
    """

    def __init__(self, folder: Path, base: str, keys: Sequence[str], *, published: bool) -> None:
        self._folder, self._base, self._keys, self._published = folder, base, keys, published
        self._done: dict[str, Point] = {}

    @contextmanager
    def open(self) -> Iterator[None]:
        """Make the folder, which goes again if nothing is written, and read what is there.

        Raises
        ------
        OSError
            If it cannot be written.
        ValueError
            If it holds results of something else, or tables without results.
        """
        with ExitStack() as stack:
            with _writing(self._folder):
                stack.enter_context(gone_if_empty(self._folder))
            with self._alone():
                others = [name for name in TABLES if (self._folder / name).exists()]
                if others and not (self._folder / RESULTS).exists():
                    raise ValueError(
                        f"{str(self._folder)!r} holds {', '.join(others)}, but no {RESULTS}, so they may be yours; "
                        "choose another folder, or move them."
                    )
            yield

    @property
    def points(self) -> list[Point]:
        """Those that were there when this process last looked."""
        return [self._done[key] for key in self._keys if key in self._done]

    @property
    def missing(self) -> list[str]:
        """The keys of all others."""
        return [key for key in self._keys if key not in self._done]

    def look(self) -> None:
        """See what is there now; where that cannot be read, nothing changes."""
        with suppress(OSError, ValueError):
            self._done = read_points(self._folder / RESULTS)

    @contextmanager
    def next_point(self, choose: Choose) -> Iterator[str | None]:
        """The key of a point to make, which no other process makes during the block; None once all are there.

        Where other processes are at all that are missing, waits for them, and takes over from one that has ended.
        """
        with ExitStack() as stack:
            while (key := self._claimed(choose, stack)) is None and self.missing:
                time.sleep(_POLL)
            yield key

    def add(self, point: Point) -> None:
        """Keep a point, at once."""
        with self._alone():
            append_point(self._folder / RESULTS, point)
            self._done[point.key] = point
            write_tables(self._folder, self.points, self._base, published=self._published)

    def write_tables(self) -> None:
        """Write the tables, and remove what processes that were killed have left."""
        with self._alone():
            for key in self._done.keys() & set(self._keys):
                if self._claim(key).exists():
                    with held(self._claim(key), 0):
                        pass
            write_tables(self._folder, self.points, self._base, published=self._published)

    def _claimed(self, choose: Choose, stack: ExitStack) -> str | None:
        """The key of a point that is this process's until the stack is left, None where none is free."""
        with self._alone():
            free, taken = list[str](), list[str]()
            for key in self._keys:
                if key in self._done and not self._claim(key).exists():
                    continue
                with held(self._claim(key), 0) as got:  # which also removes what a killed process left
                    if key not in self._done:
                        (free if got else taken).append(key)
            if not free:
                return None
            key = choose(free, taken)
            stack.enter_context(held(self._claim(key), -1))
            return key

    def _claim(self, key: str) -> Path:
        return self._folder / f".lf_hf-{key}.lock"

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes from reading and writing for a moment, and see what is there."""
        with _writing(self._folder), only_writer(self._folder, wait=True):
            self._done = read_points(self._folder / RESULTS)
            yield


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Raise errors of writing again, with the folder's name and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"The results in {str(folder)!r} cannot be written ({error}); solve that and run the sweep again, which "
            "goes on where it stopped."
        ) from error
