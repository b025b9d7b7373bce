"""The tables made of a sweep's points, and how stable each method is."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from lf_hf.checkpoint.card import as_code
from lf_hf.evaluate.points import DENSE, Point, figure_names
from lf_hf.report.page import missing_plot_packages
from lf_hf.report.report import published_name
from lf_hf.report.rows import NOT_MEASURED

PUBLISHED: dict[str, dict[int, float]] = {
    "neural_alignment": {1: 0.6478, 4: 0.6334, 11: 0.6124, 13: 0.6392, 15: 0.2631},
    "mka": {1: 0.662, 4: 0.547, 11: 0.6487, 13: 0.6342, 15: 0.300},
}
"""Accuracy on MMLU, 5-shot, of Llama-3-8B by layers fused, as published with the method."""
TABLES = ("results.csv", "results.md", "curve.png", "curve.svg")
"""What `write_tables` writes."""
STABILITY_HEAD = ["method", "quantity", "standard deviation", "range", "largest change for the worse"]
STABILITY_NOTE = (
    "Over the levels above without the dense model: standard deviation (n - 1), largest minus smallest, and the "
    "largest change for the worse from one level to the next."
)


def stability_rows(points: Sequence[Point]) -> list[list[str]]:
    """Rows under STABILITY_HEAD, of each method with two levels or more.

    Scores are taken as they are; of perplexities the natural logarithm, which for ours is nats a token. Divergences,
    agreements and speed are left out.
    """
    rows = []
    for method in dict.fromkeys(point.method for point in points if point.method != DENSE):
        of_method = sorted((point for point in points if point.method == method), key=lambda point: point.num_fusions)
        levels = [point.num_fusions for point in of_method]
        for name, first in of_method[0].figures.items() if len(levels) > 1 else ():
            figures = [point.figures.get(name) for point in of_method]
            values = [figure.value if figure else math.nan for figure in figures]
            if not all(map(math.isfinite, values)) or first.metric in ("divergence", "agreement", "speed-up"):
                continue
            sign = 1 if first.higher_is_better and not first.is_perplexity else -1
            if first.is_perplexity:
                name = f"log {name}" if name not in of_method[0].scores else f"log {first.metric}, {name}"
                values = list(map(math.log, values))
            steps = [(sign * (a - b), m, n) for (a, b), (m, n) in zip(pairwise(values), pairwise(levels), strict=True)]
            worst, before, after = max(steps)
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


def markdown(points: Sequence[Point], base: str, *, published: bool) -> str:
    """The results as a document: one row a point, then how stable each method is."""
    head, *rows = results_rows(points)
    text = f"# Fusions of {as_code(published_name(base))}\n\n{_markdown_table(head, rows)}"
    if steps := stability_rows(points):
        text += f"\n## Stability\n\n{STABILITY_NOTE}\n\n{_markdown_table(STABILITY_HEAD, steps)}"
    if published:
        numbers = [[method, str(n), f"{value:.4f}"] for method, row in PUBLISHED.items() for n, value in row.items()]
        text += "\n## Published\n\nMMLU, 5-shot, of Llama-3-8B, as published with the method; not measured here.\n\n"
        text += _markdown_table(["method", "layers fused", "accuracy"], numbers)
    return text


def write_tables(folder: Path, points: Sequence[Point], base: str, *, published: bool) -> None:
    """Write `results.csv`, `results.md` and, with matplotlib, `curve.png` and `curve.svg` into a folder.

    Of the dense model alone there is no curve.
    """
    _replace(folder / "results.csv", _csv(points).encode())
    _replace(folder / "results.md", markdown(points, base, published=published).encode())
    if any(point.method != DENSE for point in points) and not missing_plot_packages():
        from lf_hf.evaluate.curve import sweep_curve

        figure = sweep_curve(points, PUBLISHED if published else {})
        for suffix in ("png", "svg"):
            content = io.BytesIO()
            figure.savefig(content, format=suffix)
            _replace(folder / f"curve.{suffix}", content.getvalue())


def _csv(points: Sequence[Point]) -> str:
    names = figure_names(points)
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    head = ["method", "num_fusions", "layers", "parameters", "layers_removed_fraction", "parameters_removed_fraction"]
    tasks = dict.fromkeys(task for point in points for task in point.scores)
    writer.writerow([*head, *names, *(f"{task}_stderr" for task in tasks)])
    for point in points:
        values = [figure.value if (figure := point.figures.get(name)) else None for name in names]
        errors = [score.stderr if (score := point.scores.get(task)) else None for task in tasks]
        writer.writerow([*(getattr(point, name) for name in head), *values, *errors])
    return content.getvalue()


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    scratch = path.with_name(f".{path.name}.new")
    try:
        scratch.write_bytes(content)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
