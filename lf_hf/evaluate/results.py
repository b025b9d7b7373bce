"""A sweep's folder: the points that are there, and the tables and the picture made of them."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lf_hf.checkpoint.saving import only_writer
from lf_hf.evaluate.points import DENSE, RESULTS, Point, read_points
from lf_hf.evaluate.tables import as_csv, markdown
from lf_hf.report.page import missing_plot_packages
from lf_hf.runtime.checked_json import json_ready

_MADE = ("results.csv", "results.md", "curve.png", "curve.svg")


class Results:
    """The points of a sweep that are in its folder, by their `keys`, which are in the order of the tables.

    Other processes may write there too. Raises OSError if the folder cannot be written, and ValueError if it holds
    results of something else, or tables without results.
    """

    def __init__(self, folder: Path, base: str, keys: Sequence[str]) -> None:
        self._folder, self._file, self._base, self._keys = folder, folder / RESULTS, base, keys
        with self._alone():
            read_points(self._file)
            others = [name for name in _MADE if (folder / name).exists()]
            if others and not self._file.exists():
                raise ValueError(
                    f"{str(folder)!r} holds {', '.join(others)}, but no {RESULTS}, so they may be yours; choose "
                    "another folder, or move them."
                )

    def points(self) -> list[Point]:
        """Those that are there now."""
        there = read_points(self._file)
        return [there[key] for key in self._keys if key in there]

    def missing(self) -> list[str]:
        """The keys of all others."""
        there = read_points(self._file)
        return [key for key in self._keys if key not in there]

    def add(self, point: Point) -> None:
        """Keep a point, at once, and write the tables of all points that are there."""
        line = json.dumps(json_ready(dataclasses.asdict(point)), allow_nan=False).encode()
        with self._alone():
            lines = [*self._file.read_bytes().splitlines(), line] if self._file.exists() else [line]
            self._write(RESULTS, b"".join(line + b"\n" for line in lines))
            self._write_tables()

    def complete(self) -> None:
        """Write the tables and, with matplotlib, the picture; of the dense model alone there is none."""
        with self._alone():
            self._write_tables()
            points = self.points()
            if missing_plot_packages() or all(point.method == DENSE for point in points):
                return
            from lf_hf.evaluate.curve import sweep_curve

            figure = sweep_curve(points)
            for suffix in ("png", "svg"):
                content = io.BytesIO()
                figure.savefig(content, format=suffix)
                self._write(f"curve.{suffix}", content.getvalue())

    def _write_tables(self) -> None:
        self._write("results.csv", as_csv(self.points()).encode())
        self._write("results.md", markdown(self.points(), self._base).encode())

    def _write(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all; it is on the disk when this returns."""
        scratch = self._folder / f".{name}.new"
        try:
            with scratch.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(self._folder / name)
        finally:
            scratch.unlink(missing_ok=True)

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
