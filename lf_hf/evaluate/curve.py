"""The picture of a sweep: scores and predictions against layers removed and speed. Needs matplotlib."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter

from lf_hf.evaluate.points import DENSE, HEALED, Point, figure_names
from lf_hf.report.figures import COLORS, new_figure


def sweep_curve(points: Sequence[Point], published: Mapping[str, Mapping[int, float]]) -> Figure:
    """Each score, and perplexity, divergence and agreement on each text, against the share of layers removed.

    Perplexity also against how many times as fast as the base's decoding is, where that was measured. There is one line
    a method, and a dashed one where it was healed. What is infinite is marked at the top of its panel; what has no
    finite value at all gets no panel.

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
    removed = [100 * point.layers_removed_fraction for point in points]
    faster = [point.speedups.get("decoding", math.nan) for point in points]
    panels: list[tuple[str, str, list[float], list[float]]] = []
    for name in figure_names(points):
        heights = [found.value if (found := point.figures.get(name)) else math.nan for point in points]
        if any(map(math.isfinite, heights)):
            panels.append((name, "layers removed (%)", removed, heights))
            if name.startswith("perplexity, ") and any(map(math.isfinite, faster)):
                panels.insert(0, (name, "times as fast as the base, decoding", faster, heights))
    figure = new_figure(7, 3.0 * max(1, len(panels)) + 0.5)
    axes: list[Axes] = list(figure.subplots(max(1, len(panels)), 1, squeeze=False).flat)
    for axis, (name, along, places, heights) in zip(axes, panels, strict=False):
        _panel(axis, [point.method for point in points], places, heights, methods, colors)
        axis.set_xlabel(along)
        score = next(point.figures[name] for point in points if name in point.figures)
        label = name if name.startswith(score.metric) else f"{score.metric}, {name}"
        axis.set_ylabel(f"{label} (log scale)" if score.is_perplexity else label, parse_math=False)
        if score.is_perplexity:
            _logarithmic(axis, [height for height in heights if math.isfinite(height)])
        if name in ("mmlu", "mmlu_5shot") and score.metric == "acc" and points[0].method == DENSE:
            for method, numbers in published.items():
                shares = [100 * number / points[0].layers for number in numbers]
                marks: dict[str, Any] = {"color": colors[method], "marker": "s", "fillstyle": "none"}
                axis.plot(shares, list(numbers.values()), linestyle="none", label=f"{method}, published", **marks)
        axis.grid(alpha=0.25)
    entries = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if entries:  # above all panels, where it hides no line
        handles, columns = list(entries.values()), min(4, len(entries))
        figure.legend(handles, list(entries), loc="outside upper center", ncols=columns, fontsize=8, frameon=False)
    return figure


def _panel(
    axis: Axes,
    of_methods: Sequence[str],
    places: Sequence[float],
    heights: Sequence[float],
    methods: Sequence[str],
    colors: Mapping[str, str],
) -> None:
    """One line a method through its points and the dense model's."""
    points = list(zip(of_methods, places, heights, strict=True))
    for method in methods:
        line = [(place, height) for of, place, height in points if of in (DENSE, method)]
        color, style = colors[method.removesuffix(HEALED)], "--" if method.endswith(HEALED) else "-"
        axis.plot(*zip(*line, strict=True), color=color, linestyle=style, marker="o", markersize=4, label=method)
        if beyond := [share for share, height in line if height == math.inf]:
            marks: dict[str, Any] = {"color": color, "marker": "^", "linestyle": "none", "label": "infinite"}
            axis.plot(beyond, [0.97] * len(beyond), transform=axis.get_xaxis_transform(), **marks)
    for method, place, height in points:
        if method == DENSE and math.isfinite(height):
            axis.plot(place, height, color="black", marker="D", linestyle="none", label="dense")
            axis.axhline(height, color="black", linewidth=0.7, linestyle=":")


def _logarithmic(axis: Axes, heights: Sequence[float]) -> None:
    axis.set_yscale("log")
    if max(heights) < 10 * min(heights):  # few powers of ten, if any, are there to be labelled
        axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.yaxis.set_minor_formatter(FormatStrFormatter("%g"))
