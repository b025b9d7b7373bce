"""The tables made of a sweep's points, and how stable each method is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from operator import itemgetter

from lf_hf.checkpoint.card import as_code
from lf_hf.evaluate.points import DENSE, Point, Score, figure_names
from lf_hf.report.report import published_name

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
