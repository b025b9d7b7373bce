"""A sweep's folder: the points that are there, and the tables and the picture made of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from operator import itemgetter
from pathlib import Path

from pydantic import TypeAdapter
from pydantic_core import to_json
from transformers.utils import logging

from lf_hf.checkpoint.card import as_code
from lf_hf.checkpoint.saving import writing
from lf_hf.evaluate.points import DENSE, Point, Score, figure_names
from lf_hf.report.page import draw, missing_plot_packages, write_whole
from lf_hf.report.report import published_name
from lf_hf.runtime.errors import explained
from lf_hf.runtime.words import plural

logger = logging.get_logger(__name__)
RESULTS = "results.jsonl"
_ADVICE = "fix the cause and run the sweep again, which goes on where it stopped"
_MADE = ("results.md", "curve.png", "curve.svg")
STABILITY_HEAD = ["method", "quantity", "standard deviation", "range", "largest change for the worse"]
STABILITY_NOTE = (
    "Over the levels above, without the base: standard deviation (n - 1), largest minus smallest, and the "
    "largest change for the worse from one level to the next."
)


def stability_rows(points: Sequence[Point]) -> list[list[str]]:
    """Rows under STABILITY_HEAD, of each method with two levels or more.

    Scores are taken as they are, of perplexities the natural logarithm. Speed and other figures of texts are left out.
    """
    rows = []
    for method in dict.fromkeys(point.method for point in points if point.method != DENSE):
        levels = [point for point in points if point.method == method]
        levels.sort(key=lambda point: point.num_fusions)
        if len(levels) < 2:
            continue
        for name, score in levels[0].figures.items():
            finite = all(math.isfinite(point.value(name)) for point in levels)
            if finite and (name in levels[0].scores or score.is_perplexity):
                rows.append([method, *_stability(levels, name, score)])
    return rows


def _stability(levels: Sequence[Point], name: str, score: Score) -> list[str]:
    """Name, standard deviation, range and largest change for the worse of a figure."""
    values = [point.value(name) for point in levels]
    sign = 1 if score.higher_is_better else -1
    if score.is_perplexity:
        name = f"log {score.metric}, {name}" if name in levels[0].scores else f"log {name}"
        values = [math.log(value) for value in values]
        sign = -1
    losses = [sign * (before - after) for before, after in pairwise(values)]
    place, worst = max(enumerate(losses), key=itemgetter(1))
    change = "none"
    if worst > 0:
        change = f"{worst:.4f} ({levels[place].num_fusions} -> {levels[place + 1].num_fusions})"
    return [name, f"{statistics.stdev(values):.4f}", f"{max(values) - min(values):.4f}", change]


def results_rows(points: Sequence[Point]) -> list[list[str]]:
    """A head and one row a point, for people."""
    names = figure_names(points)
    base = next((point for point in points if point.method == DENSE), None)
    rows = [["method", "fusions", "layers", "layers removed", "parameters removed", *names]]
    for point in points:
        sizes = [point.method, str(point.num_fusions), str(point.layers)]
        removed = [f"{point.layers_removed_fraction:.1%}", f"{point.parameters_removed_fraction:.1%}"]
        figures = [_shown(name, point, base) for name in names]
        rows.append(sizes + removed + figures)
    return rows


def _shown(name: str, point: Point, base: Point | None) -> str:
    """A figure, and of a task's score, where more is better, also what share of the base's it is."""
    if name not in point.figures:
        return "-"
    figure = point.figures[name]
    is_share = name in point.scores and figure.higher_is_better and not figure.is_perplexity
    if not is_share or base is None or base is point:
        return str(figure)
    share = figure.value / (base.value(name) or math.nan)
    return f"{figure} ({share:.1%})" if 0 <= share < math.inf else str(figure)


def markdown(points: Sequence[Point], base: str) -> str:
    """The results as a document: one row a point, then how stable each method is."""
    text = f"# Fusions of {as_code(published_name(base))}\n\n{_markdown_table(*results_rows(points))}"
    stability = stability_rows(points)
    if stability:
        text += f"\n## Stability\n\n{STABILITY_NOTE}\n\n{_markdown_table(STABILITY_HEAD, *stability)}"
    return text


def _markdown_table(head: Sequence[str], *rows: Sequence[str]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def read_points(path: Path) -> dict[str, Point]:
    """The points of a results file by their keys, none if there is no file. Raises ValueError for anything else."""
    reader = TypeAdapter(Point)
    points: dict[str, Point] = {}
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else (), 1):
        advice = "remove it, and its point is made again" if points else "choose another folder"
        with explained(f"Line {number} of {str(path)!r} is no result of a sweep", advice, ValueError):
            point = reader.validate_json(line)
        points[point.key] = point
    return points


class Results:
    """The points of a sweep that are in its folder, by their `keys`.

    Raises ValueError if the folder holds results of something else, or tables without results.
    """

    def __init__(self, folder: Path, base: str, keys: Sequence[str]) -> None:
        self._folder, self._file = folder, folder / RESULTS
        self._base, self._keys = base, keys
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
        with writing(self._folder, _ADVICE):
            lines = [to_json(made, inf_nan_mode="strings") for made in [*read_points(self._file).values(), point]]
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
