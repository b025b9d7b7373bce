"""A sweep's folder: the points that are there, and the tables made of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lf_hf.checkpoint.saving import gone_if_empty, only_writer
from lf_hf.evaluate.points import RESULTS, Point, append_point, read_points
from lf_hf.evaluate.tables import TABLES, write_tables


class Results:
    """The points of a sweep that are in its folder, by their keys. Other processes may write there too.

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

    @contextmanager
    def open(self) -> Iterator[None]:
        """Make the folder, which goes again if nothing is written.

        Raises
        ------
        OSError
            If it cannot be written.
        ValueError
            If it holds results of something else, or tables without results.
        """
        with ExitStack() as stack:
            with self._alone():
                stack.enter_context(gone_if_empty(self._folder))
                read_points(self._folder / RESULTS)
                others = [name for name in TABLES if (self._folder / name).exists()]
                if others and not (self._folder / RESULTS).exists():
                    raise ValueError(
                        f"{str(self._folder)!r} holds {', '.join(others)}, but no {RESULTS}, so they may be yours; "
                        "choose another folder, or move them."
                    )
            yield

    def points(self) -> list[Point]:
        """Those that are there now."""
        there = read_points(self._folder / RESULTS)
        return [there[key] for key in self._keys if key in there]

    def missing(self) -> list[str]:
        """The keys of all others."""
        there = read_points(self._folder / RESULTS)
        return [key for key in self._keys if key not in there]

    def add(self, point: Point) -> None:
        """Keep a point, at once, and write the tables of all points that are there."""
        with self._alone():
            append_point(self._folder / RESULTS, point)
            self._write_tables()

    def write_tables(self) -> None:
        """Write the tables."""
        with self._alone():
            self._write_tables()

    def _write_tables(self) -> None:
        write_tables(self._folder, self.points(), self._base, published=self._published)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes from writing for a moment. Errors of writing name the folder and say what to do."""
        try:
            with only_writer(self._folder, wait=True):
                yield
        except OSError as error:
            raise OSError(
                f"The results in {str(self._folder)!r} cannot be written ({error}); solve that and run the sweep "
                "again, which goes on where it stopped."
            ) from error
