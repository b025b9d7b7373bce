"""The picture of a sweep: scores and predictions against layers removed. Needs matplotlib."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter

from lf_hf.evaluate.points import DENSE, HEALED, Point, judging_names, task_names
from lf_hf.report.figures import COLORS, new_figure

_PUBLISHED = ("acc, mmlu", "acc, mmlu_5shot")  # labels of the panels of what was published


def sweep_curve(points: Sequence[Point], published: Mapping[str, Mapping[int, float]]) -> Figure:
    """Score of each task, and perplexity, divergence and agreement on each text, against the share of layers removed.

    There is one line a method, and a dashed one where it was healed.

    What is infinite is marked at the top of its panel; what has no finite value at all gets no panel.

    Parameters
    ----------
    points : sequence of Point
        At least one; the dense model's is a point of every line.
    published : mapping from methods to mappings from layers fused to accuracy
        Drawn as markers where the score is of mmlu or mmlu_5shot; empty for none.
    """
    methods = list(dict.fromkeys(point.method for point in points if point.method != DENSE))
    names = dict.fromkeys(method.removesuffix(HEALED) for method in (*methods, *published))
    colors = dict(zip(names, itertools.cycle(COLORS), strict=False))
    panels: dict[str, tuple[bool, dict[str, float]]] = {}
    for task in task_names(points):
        score = next(p.scores[task] for p in points if task in p.scores)
        heights = {p.key: p.scores[task].value if task in p.scores else math.nan for p in points}
        panels[f"{score.metric}, {task}"] = score.is_perplexity, heights
    for text in judging_names(points):
        panels[f"perplexity, {text}"] = (True, {p.key: p.perplexities.get(text, math.nan) for p in points})
        panels[f"divergence, {text} (nats)"] = (False, {p.key: p.divergences.get(text, math.nan) for p in points})
        panels[f"agreement, {text}"] = (False, {p.key: p.agreements.get(text, math.nan) for p in points})
    panels = {label: panel for label, panel in panels.items() if any(map(math.isfinite, panel[1].values()))}
    figure = new_figure(7, 3.0 * max(1, len(panels)) + 0.5)
    axes: list[Axes] = list(figure.subplots(max(1, len(panels)), 1, sharex=True, squeeze=False).flat)
    for axis, (label, (is_log, heights)) in zip(axes, panels.items(), strict=False):
        _panel(axis, points, methods, colors, heights)
        axis.set_ylabel(f"{label} (log scale)" if is_log else label, parse_math=False)
        if is_log:
            _logarithmic(axis, [height for height in heights.values() if math.isfinite(height)])
        for method, numbers in published.items() if label in _PUBLISHED and points[0].method == DENSE else ():
            shares = [100 * number / points[0].layers for number in numbers]
            marks: dict[str, Any] = {"color": colors[method], "marker": "s", "fillstyle": "none"}
            axis.plot(shares, list(numbers.values()), linestyle="none", label=f"{method}, published", **marks)
        axis.grid(alpha=0.25)
    entries = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if entries:  # above all panels, where it hides no line
        handles, columns = list(entries.values()), min(4, len(entries))
        figure.legend(handles, list(entries), loc="outside upper center", ncols=columns, fontsize=8, frameon=False)
    axes[-1].set_xlabel("layers removed (%)")
    return figure


def _panel(
    axis: Axes, points: Sequence[Point], methods: Sequence[str], colors: Mapping[str, str], heights: Mapping[str, float]
) -> None:
    """One line a method through the heights of its points, by their keys, and the dense model's."""
    for method in methods:
        line = [(100 * p.layers_removed_fraction, heights[p.key]) for p in points if p.method in (DENSE, method)]
        color, style = colors[method.removesuffix(HEALED)], "--" if method.endswith(HEALED) else "-"
        axis.plot(*zip(*line, strict=True), color=color, linestyle=style, marker="o", markersize=4, label=method)
        beyond = [share for share, height in line if height == math.inf]
        if beyond:
            marks: dict[str, Any] = {"color": color, "marker": "^", "linestyle": "none", "label": "infinite"}
            axis.plot(beyond, [0.97] * len(beyond), transform=axis.get_xaxis_transform(), **marks)
    for point in points:
        if point.method == DENSE and math.isfinite(heights[point.key]):
            axis.plot(0, heights[point.key], color="black", marker="D", linestyle="none", label="dense")
            axis.axhline(heights[point.key], color="black", linewidth=0.7, linestyle=":")


def _logarithmic(axis: Axes, heights: Sequence[float]) -> None:
    axis.set_yscale("log")
    if max(heights) < 10 * min(heights):  # few powers of ten, if any, are there to be labelled
        axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.yaxis.set_minor_formatter(FormatStrFormatter("%g"))
