"""The tables made of a sweep's points, and how stable each method is."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from itertools import pairwise

from lf_hf.checkpoint.card import as_code, markdown_rows
from lf_hf.evaluate.points import DENSE, Point, figure_names
from lf_hf.report.report import published_name
from lf_hf.report.rows import NOT_MEASURED

STABILITY_HEAD = ["method", "quantity", "standard deviation", "range", "largest change for the worse"]
STABILITY_NOTE = (
    "Over the levels above without the dense model: standard deviation (n - 1), largest minus smallest, and the "
    "largest change for the worse from one level to the next."
)
_SIZES = ("layers", "parameters", "layers_removed_fraction", "parameters_removed_fraction")


def stability_rows(points: Sequence[Point]) -> list[list[str]]:
    """Rows under STABILITY_HEAD, of each method with two levels or more.

    Scores are taken as they are; of perplexities the natural logarithm, which for ours is nats a token. Divergences,
    agreements and speed are left out.
    """
    rows = []
    for method in dict.fromkeys(point.method for point in points if point.method != DENSE):
        of_method = sorted((point for point in points if point.method == method), key=lambda point: point.num_fusions)
        for name, first in of_method[0].figures.items() if len(of_method) > 1 else ():
            values = [point.value(name) for point in of_method]
            if not all(map(math.isfinite, values)) or first.metric in ("divergence", "agreement", "speed-up"):
                continue
            if first.is_perplexity:
                name = f"log {first.metric}, {name}" if name in of_method[0].scores else f"log {name}"
                values = list(map(math.log, values))
            sign = 1 if first.higher_is_better and not first.is_perplexity else -1
            levels = pairwise(point.num_fusions for point in of_method)
            worst, (before, after) = max(
                (sign * (a - b), of) for (a, b), of in zip(pairwise(values), levels, strict=True)
            )
            shown = f"{worst:.4f} ({before} -> {after})" if worst > 0 else "none"
            spread = [statistics.stdev(values), max(values) - min(values)]
            rows.append([method, name, *(f"{value:.4f}" for value in spread), shown])
    return rows


def results_rows(points: Sequence[Point]) -> list[list[str]]:
    """A head and one row a point, for people."""
    names = figure_names(points)
    rows = [["method", "layers fused", "layers", "layers removed", "parameters removed", *names]]
    for point in points:
        sizes = [str(point.num_fusions), str(point.layers)]
        sizes += [f"{share:.1%}" for share in (point.layers_removed_fraction, point.parameters_removed_fraction)]
        rows.append([point.method, *sizes, *(str(point.figures.get(name, NOT_MEASURED)) for name in names)])
    return rows


def markdown(points: Sequence[Point], base: str) -> str:
    """The results as a document: one row a point, then how stable each method is."""
    text = f"# Fusions of {as_code(published_name(base))}\n\n{_markdown_table(*results_rows(points))}"
    if steady := stability_rows(points):
        text += f"\n## Stability\n\n{STABILITY_NOTE}\n\n{_markdown_table(STABILITY_HEAD, *steady)}"
    return text


def as_csv(points: Sequence[Point]) -> str:
    """The results for programs: one row a point."""
    rows = [
        {name: getattr(point, name) for name in ("method", "num_fusions", *_SIZES)}
        | {name: figure.value for name, figure in point.figures.items()}
        | {f"{task}_stderr": score.stderr for task, score in point.scores.items()}
        for point in points
    ]
    names = dict.fromkeys(["method", "num_fusions", *_SIZES, *figure_names(points), *(n for row in rows for n in row)])
    content = io.StringIO()
    writer = csv.DictWriter(content, [*names], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return content.getvalue()


def _markdown_table(head: Sequence[str], *rows: Sequence[str]) -> str:
    return markdown_rows([head, ["---"] * len(head), *rows])
