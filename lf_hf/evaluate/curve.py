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
from lf_hf.report.figures import COLORS, panels


def sweep_curve(points: Sequence[Point]) -> Figure:
    """Each score, and perplexity, divergence and agreement on each text, against the share of layers removed.

    Perplexity also against how many times as fast as the base's decoding is, where that was measured. There is one line
    a method, and a dashed one where it was healed; the dense model's point is one of every line. What is infinite is
    marked at the top of its panel; what has no finite value at all gets no panel.
    """
    methods = list(dict.fromkeys(point.method for point in points if point.method != DENSE))
    colors = dict(
        zip(dict.fromkeys(name.removesuffix(HEALED) for name in methods), itertools.cycle(COLORS), strict=False)
    )
    removed = [100 * point.layers_removed_fraction for point in points]
    faster = [point.speedups.get("decoding", math.nan) for point in points]
    along_removed = [
        (name, "layers removed (%)", removed)
        for name in figure_names(points)
        if any(math.isfinite(point.value(name)) for point in points)
    ]
    along_speed = [
        (name, "times as fast as the base, decoding", faster)
        for name, *_ in along_removed
        if name.startswith("perplexity, ") and any(map(math.isfinite, faster))
    ]
    planned = [*along_speed, *along_removed]
    figure, axes = panels(3.0 * max(1, len(planned)) + 0.5, max(1, len(planned)), width=7)
    for axis, (name, along, places) in zip(axes, planned, strict=False):
        _panel(axis, name, points, places, colors, methods)
        axis.set_xlabel(along)
    entries = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if entries:  # above all panels, where it hides no line
        handles, columns = list(entries.values()), min(4, len(entries))
        figure.legend(handles, list(entries), loc="outside upper center", ncols=columns, fontsize=8, frameon=False)
    return figure


def _panel(
    axis: Axes,
    name: str,
    points: Sequence[Point],
    places: Sequence[float],
    colors: Mapping[str, str],
    methods: Sequence[str],
) -> None:
    """One figure: a line a method through its points and the dense model's."""
    heights = [(point.method, place, point.value(name)) for point, place in zip(points, places, strict=True)]
    for method in methods:
        line = [(place, height) for of, place, height in heights if of in (DENSE, method)]
        color, style = colors[method.removesuffix(HEALED)], "--" if method.endswith(HEALED) else "-"
        axis.plot(*zip(*line, strict=True), color=color, linestyle=style, marker="o", markersize=4, label=method)
        if beyond := [place for place, height in line if height == math.inf]:
            marks: dict[str, Any] = {"color": color, "marker": "^", "linestyle": "none", "label": "infinite"}
            axis.plot(beyond, [0.97] * len(beyond), transform=axis.get_xaxis_transform(), **marks)
    for method, place, height in heights:
        if method == DENSE and math.isfinite(height):
            axis.plot(place, height, color="black", marker="D", linestyle="none", label="dense")
            axis.axhline(height, color="black", linewidth=0.7, linestyle=":")
    axis.grid(alpha=0.25)
    score = next(point.figures[name] for point in points if name in point.figures)
    label = name if name.startswith(score.metric) else f"{score.metric}, {name}"
    axis.set_ylabel(f"{label} (log scale)" if score.is_perplexity else label, parse_math=False)
    if score.is_perplexity:
        axis.set_yscale("log")
        finite = [height for *_, height in heights if math.isfinite(height)]
        if max(finite) < 10 * min(finite):  # few powers of ten, if any, are there to be labelled
            axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            axis.yaxis.set_minor_formatter(FormatStrFormatter("%g"))
