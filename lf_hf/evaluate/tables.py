"""The tables made of a sweep's points, and how stable each method is."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from lf_hf.checkpoint.card import as_code
from lf_hf.evaluate.points import DENSE, Point, Score, judging_names, task_names
from lf_hf.report.page import missing_plot_packages
from lf_hf.report.report import published_name

PUBLISHED: dict[str, dict[int, float]] = {
    "neural_alignment": {1: 0.6478, 4: 0.6334, 11: 0.6124, 13: 0.6392, 15: 0.2631},
    "mka": {1: 0.662, 4: 0.547, 11: 0.6487, 13: 0.6342, 15: 0.300},
}
"""Accuracy on MMLU, 5-shot, of Llama-3-8B by layers fused, as published with the method."""


@dataclass(frozen=True)
class Stability:
    """How much a quantity moves over the levels of a sweep; the dense model is left out.

    `deviation` is the sample standard deviation (n - 1). `worst_step` is the largest change for the worse from one
    level to the next: `worst_from` to `worst_to` layers fused; 0, with no levels, where it never gets worse.
    """

    method: str
    quantity: str
    deviation: float
    range: float
    worst_step: float
    worst_from: int | None
    worst_to: int | None


def stability(points: Sequence[Point]) -> list[Stability]:
    """Standard deviation, range and largest change for the worse of each method with two levels or more.

    Scores are taken as they are; of perplexities the natural logarithm, which for ours is nats a token.
    """
    found = []
    for method in dict.fromkeys(point.method for point in points if point.method != DENSE):
        of_method = sorted((point for point in points if point.method == method), key=lambda point: point.num_fusions)
        levels = [point.num_fusions for point in of_method]
        if len(of_method) < 2:
            continue
        for task, score in of_method[0].scores.items():
            values = [point.scores[task].value if task in point.scores else math.nan for point in of_method]
            if not all(map(math.isfinite, values)):
                continue
            if not score.is_perplexity:
                found.append(_stability(method, task, levels, values, 1 if score.higher_is_better else -1))
            else:
                found.append(_stability(method, f"log {score.metric}, {task}", levels, list(map(math.log, values)), -1))
        for text in judging_names(of_method):
            values = [point.perplexities.get(text, math.nan) for point in of_method]
            if all(map(math.isfinite, values)):
                logs = list(map(math.log, values))
                found.append(_stability(method, f"log perplexity, {text}", levels, logs, -1))
    return found


def results_rows(points: Sequence[Point]) -> list[list[str]]:
    """A head and one row a point, for people."""
    tasks, texts = task_names(points), judging_names(points)
    compared = [text for text in texts if any(text in point.divergences for point in points)]
    heads = [f"perplexity, {text}" for text in texts]
    heads += [f"{figure}, {text}" for figure in ("divergence", "agreement") for text in compared]
    rows = [["method", "layers fused", "layers", "layers removed", "parameters removed", *tasks, *heads]]
    for point in points:
        rows.append(
            [
                point.method,
                str(point.num_fusions),
                str(point.layers),
                f"{point.layers_removed_fraction:.1%}",
                f"{point.parameters_removed_fraction:.1%}",
                *(_score_cell(point.scores.get(task)) for task in tasks),
                *(_cell(point.perplexities.get(text), ".4g") for text in texts),
                *(_cell(point.divergences.get(text), ".4g") for text in compared),
                *(_cell(point.agreements.get(text), ".1%") for text in compared),
            ]
        )
    return rows


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _score_cell(score: Score | None) -> str:
    if score is None:
        return "-"
    value = f"{score.value:.4g}" if score.is_perplexity else f"{score.value:.4f}"
    return value if score.stderr is None else f"{value} ± {score.stderr:.4f}"


def markdown(points: Sequence[Point], base: str, *, published: bool) -> str:
    """The results as a document: one row a point, then how stable each method is."""
    head, *rows = results_rows(points)
    text = f"# Fusions of {as_code(published_name(base))}\n\n{_markdown_table(head, rows)}"
    steps = stability_rows(stability(points))
    if steps:
        text += f"\n## Stability\n\n{STABILITY_NOTE}\n\n{_markdown_table(STABILITY_HEAD, steps)}"
    if published:
        numbers = [[method, str(n), f"{value:.4f}"] for method, row in PUBLISHED.items() for n, value in row.items()]
        text += "\n## Published\n\nMMLU, 5-shot, of Llama-3-8B, as published with the method; not measured here.\n\n"
        text += _markdown_table(["method", "layers fused", "accuracy"], numbers)
    return text


STABILITY_HEAD = ["method", "quantity", "standard deviation", "range", "largest change for the worse"]
STABILITY_NOTE = (
    "Over the levels above without the dense model: standard deviation (n - 1), largest minus smallest, and the "
    "largest change for the worse from one level to the next."
)


def stability_rows(found: Sequence[Stability]) -> list[list[str]]:
    """Rows for people, under STABILITY_HEAD."""
    return [
        [
            entry.method,
            entry.quantity,
            f"{entry.deviation:.4f}",
            f"{entry.range:.4f}",
            "none" if entry.worst_from is None else f"{entry.worst_step:.4f} ({entry.worst_from} -> {entry.worst_to})",
        ]
        for entry in found
    ]


def _stability(method: str, quantity: str, levels: Sequence[int], values: Sequence[float], sign: int) -> Stability:
    steps = [(sign * (a - b), m, n) for (a, b), (m, n) in zip(pairwise(values), pairwise(levels), strict=True)]
    worst = max(steps)
    none_worse = worst[0] <= 0
    return Stability(
        method=method,
        quantity=quantity,
        deviation=statistics.stdev(values),
        range=max(values) - min(values),
        worst_step=0.0 if none_worse else worst[0],
        worst_from=None if none_worse else worst[1],
        worst_to=None if none_worse else worst[2],
    )


TABLES = ("results.csv", "results.md", "curve.png", "curve.svg")
"""What `write_tables` writes."""


def write_tables(folder: Path, points: Sequence[Point], base: str, *, published: bool) -> None:
    """Write `results.csv`, `results.md` and, with matplotlib, `curve.png` and `curve.svg` into a folder.

    Of the dense model alone there is no curve.
    """
    replace_file(folder / "results.csv", _csv(points))
    replace_file(folder / "results.md", markdown(points, base, published=published))
    if any(point.method != DENSE for point in points) and not missing_plot_packages():
        from lf_hf.evaluate.curve import sweep_curve

        figure = sweep_curve(points, PUBLISHED if published else {})
        for suffix in ("png", "svg"):
            content = io.BytesIO()
            figure.savefig(content, format=suffix)
            replace_file(folder / f"curve.{suffix}", content.getvalue())


def _csv(points: Sequence[Point]) -> str:
    tasks, texts = task_names(points), judging_names(points)
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    head = ["method", "num_fusions", "layers", "parameters", "layers_removed_fraction", "parameters_removed_fraction"]
    columns = [f"{figure}, {text}" for figure in ("perplexity", "divergence", "agreement") for text in texts]
    columns += [f"{task}{end}" for task in tasks for end in ("", "_stderr")]
    writer.writerow([*head, *columns])
    for point in points:
        found = [point.scores.get(task) for task in tasks]
        scores = [value for score in found for value in ((score.value, score.stderr) if score else (None, None))]
        of_texts = (point.perplexities, point.divergences, point.agreements)
        judged = [figures.get(text) for figures in of_texts for text in texts]
        writer.writerow([*(getattr(point, name) for name in head), *judged, *scores])
    return content.getvalue()


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all."""
    scratch = path.with_name(f".{path.name}.new")
    try:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
