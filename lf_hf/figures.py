"""The pictures: of a fusion's report, and of a sweep. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lf_hf.results import DENSE, Point

_COLORS = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b83280", "#4a5568")


def sweep_curve(points: Sequence[Point], published: Mapping[str, Mapping[int, float]]) -> Figure:
    """Score of each task, and perplexity, against the share of layers removed: one line a method.

    Parameters
    ----------
    points : sequence of Point
        At least one; the dense model's is a point of every line.
    published : mapping from methods to mappings from layers fused to accuracy
        Drawn as markers where the score is of MMLU; empty for none.
    """
    dense = [point for point in points if point.method == DENSE]
    methods = list(dict.fromkeys(point.method for point in points if point.method != DENSE))
    colors = dict(
        zip([*methods, *(method for method in published if method not in methods)], _COLORS * 3, strict=False)
    )
    tasks = list(points[0].scores)
    figure = Figure(figsize=(7, 3.2 * (len(tasks) + 1)), layout="constrained", dpi=150)
    axes: list[Axes] = list(figure.subplots(len(tasks) + 1, 1, sharex=True))
    for axis, task in zip(axes, [*tasks, None], strict=True):
        for method in methods:
            line = [(100 * p.layers_removed_fraction, _height(p, task)) for p in points if p.method in (DENSE, method)]
            axis.plot(*zip(*line, strict=True), color=colors[method], marker="o", markersize=4, label=method)
        for point in dense:
            height = _height(point, task)
            axis.plot(0, height, color="black", marker="D", linestyle="none", label="dense")
            axis.axhline(height, color="black", linewidth=0.7, linestyle=":")
        if task is None:
            axis.set_yscale("log")
            axis.set_ylabel("perplexity (log scale)")
        else:
            axis.set_ylabel(f"{points[0].scores[task].metric}, {task}")
            if "mmlu" in task and dense:
                for method, numbers in published.items():
                    shares = [100 * number / dense[0].layers for number in numbers]
                    marks: dict[str, Any] = {
                        "color": colors[method],
                        "marker": "s",
                        "fillstyle": "none",
                        "linestyle": "none",
                    }
                    axis.plot(shares, list(numbers.values()), label=f"{method}, published", **marks)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    axes[-1].set_xlabel("layers removed (%)")
    return figure


def _height(point: Point, task: str | None) -> float:
    """What a point's height in the panel of a task, or of perplexity, is; NaN is not drawn."""
    if task is not None:
        return point.scores[task].value
    return float("nan") if point.perplexity is None else point.perplexity
