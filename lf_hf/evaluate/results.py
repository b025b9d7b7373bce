"""A sweep's folder: the points that are there, and the tables and the picture made of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic_core import to_json
from transformers.utils import logging

from lf_hf.checkpoint.saving import writing
from lf_hf.evaluate.points import RESULTS, Point, read_points, result_lines
from lf_hf.evaluate.tables import markdown
from lf_hf.report.page import draw, missing_plot_packages, write_whole
from lf_hf.runtime.words import plural

logger = logging.get_logger(__name__)
_ADVICE = "fix the cause and run the sweep again, which goes on where it stopped"
_MADE = ("results.md", "curve.png", "curve.svg")


class Results:
    """The points of a sweep that are in its folder, by their `keys`.

    Raises ValueError if the folder holds results of something else, or tables without results.
    """

    def __init__(self, folder: Path, base: str, keys: Sequence[str]) -> None:
        self._folder = folder
        self._file = folder / RESULTS
        self._base = base
        self._keys = keys
        others = read_points(self._file).keys() - set(keys)
        if others:
            logger.warning(
                f"{RESULTS} in {str(folder)!r} also holds {len(others)} {plural(len(others), 'point')} of another "
                "base or other arguments; they stay, and tables and pictures show only what this sweep asks for."
            )
        tables = [name for name in _MADE if (folder / name).exists()]
        if tables and not self._file.exists():
            raise ValueError(
                f"{str(folder)!r} holds {', '.join(tables)}, but no {RESULTS}, so they may be yours; choose "
                "another folder, or move them."
            )

    def points(self) -> list[Point]:
        """The points that are there now, level by level."""
        there = read_points(self._file)
        points = [there[key] for key in self._keys if key in there]
        return sorted(points, key=lambda point: point.num_fusions)

    def add(self, point: Point) -> None:
        """Keep a point at once, and write the tables of all points. Raises OSError if they cannot be written."""
        line = to_json(point, inf_nan_mode="strings")
        with writing(self._folder, _ADVICE):
            lines = [*result_lines(self._file), line]
            write_whole(self._file, b"".join(line + b"\n" for line in lines))
            self._write_tables()

    def complete(self) -> None:
        """Write the tables and, with matplotlib, the picture. Raises OSError if they cannot be written."""
        with writing(self._folder, _ADVICE):
            self._write_tables()
            if missing_plot_packages():
                return
            from lf_hf.evaluate.curve import sweep_curve

            figure = sweep_curve(self.points())
            for kind in ("png", "svg"):
                write_whole(self._folder / f"curve.{kind}", draw(figure, kind))

    def _write_tables(self) -> None:
        write_whole(self._folder / "results.md", markdown(self.points(), self._base).encode())
