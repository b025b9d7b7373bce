"""The picture of a sweep: scores and predictions against layers removed and speed. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter

from lf_hf.evaluate.points import DENSE, HEALED, Point, figure_names
from lf_hf.report.figures import COLORS, panels


def sweep_curve(points: Sequence[Point]) -> Figure:
    """Each figure against the share of layers removed, and perplexity also against the speed of decoding.

    There is one line a method, and a dashed one where it was healed; the dense model's point is one of every line. What
    is infinite is marked at the top of its panel; what has no finite value at all gets no panel.
    """
    methods = dict.fromkeys(point.method for point in points if point.method != DENSE)
    colors = dict(zip(dict.fromkeys(name.removesuffix(HEALED) for name in methods), cycle(COLORS), strict=False))
    styles = {
        name: {"color": colors[name.removesuffix(HEALED)], "linestyle": "--" if name.endswith(HEALED) else "-"}
        for name in methods
    }
    removed = [100 * point.layers_removed_fraction for point in points]
    faster = [point.speedups.get("decoding", math.nan) for point in points]
    names = [name for name in figure_names(points) if any(math.isfinite(point.value(name)) for point in points)]
    planned = [(name, "layers removed (%)", removed) for name in names]
    if any(map(math.isfinite, faster)):
        of_texts = [name for name in names if name.startswith("perplexity, ")]
        planned = [(name, "times as fast as the base, decoding", faster) for name in of_texts] + planned
    figure, axes = panels(3.0 * len(planned) + 0.5, len(planned), width=7)
    for axis, (name, along, places) in zip(axes, planned, strict=True):
        _panel(axis, name, points, places, styles)
        axis.set_xlabel(along)
    entries = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    handles, columns = list(entries.values()), min(4, len(entries))
    figure.legend(handles, list(entries), loc="outside upper center", ncols=columns, fontsize=8, frameon=False)
    return figure


def _panel(
    axis: Axes, name: str, points: Sequence[Point], places: Sequence[float], styles: Mapping[str, dict[str, Any]]
) -> None:
    """One figure: a line a method through its points and the dense model's."""
    heights = [(point.method, place, point.value(name)) for point, place in zip(points, places, strict=True)]
    for method, style in styles.items():
        line = [(place, height) for of, place, height in heights if of in (DENSE, method)]
        axis.plot(*zip(*line, strict=True), **style, marker="o", markersize=4, label=method)
        if beyond := [place for place, height in line if height == math.inf]:
            marks = style | {"marker": "^", "linestyle": "none", "label": "infinite"}
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
