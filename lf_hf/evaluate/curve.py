"""The picture of a sweep: scores and perplexity against layers removed. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lf_hf.evaluate.points import DENSE, Point
from lf_hf.report.figures import COLORS, legend_above, new_figure


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
    colors = dict(zip([*methods, *(method for method in published if method not in methods)], COLORS, strict=False))
    tasks, texts = points[0].scores, list(points[0].perplexities)
    heights = [{p.key: p.scores[task].value for p in points} for task in tasks]
    heights += [{p.key: p.perplexities[text] for p in points} for text in texts]
    labels = [f"{score.metric}, {task}" for task, score in tasks.items()] + [f"perplexity, {text}" for text in texts]
    logarithmic = [score.is_perplexity for score in tasks.values()] + [True] * len(texts)
    figure = new_figure(7, 3.2 * len(heights))
    axes: list[Axes] = list(figure.subplots(len(heights), 1, sharex=True, squeeze=False).flat)
    for axis, height, label, is_log in zip(axes, heights, labels, logarithmic, strict=True):
        for method in methods:
            line = [(100 * p.layers_removed_fraction, height[p.key]) for p in points if p.method in (DENSE, method)]
            axis.plot(*zip(*line, strict=True), color=colors[method], marker="o", markersize=4, label=method)
        for point in dense:
            axis.plot(0, height[point.key], color="black", marker="D", linestyle="none", label="dense")
            axis.axhline(height[point.key], color="black", linewidth=0.7, linestyle=":")
        axis.set_ylabel(f"{label} (log scale)" if is_log else label)
        if is_log:
            axis.set_yscale("log")
        if "mmlu" in label and dense:
            for method, numbers in published.items():
                shares = [100 * number / dense[0].layers for number in numbers]
                marks: dict[str, Any] = {"color": colors[method], "marker": "s", "fillstyle": "none"}
                axis.plot(shares, list(numbers.values()), linestyle="none", label=f"{method}, published", **marks)
        axis.grid(alpha=0.25)
        legend_above(axis)
    axes[-1].set_xlabel("layers removed (%)")
    return figure
