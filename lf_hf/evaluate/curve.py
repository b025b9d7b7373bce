"""The picture of a sweep: scores and predictions against layers removed and speed. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter

from lf_hf.evaluate.points import DENSE, HEALED, Point, figure_names
from lf_hf.report.figures import COLORS, panels

_REMOVED = "layers removed (%)"
_FASTER = "times as fast as the base, decoding"


def sweep_curve(points: Sequence[Point]) -> Figure:
    """Each figure against the share of layers removed, and perplexity also against the speed of decoding.

    There is one line a method, dashed where it was healed, and the dense model's point is one of every line. Infinite
    values are marked at the top; a figure without any finite value gets no panel.
    """
    names = []
    for name in figure_names(points):
        if any(math.isfinite(point.value(name)) for point in points):
            names.append(name)
    removed = [100 * point.layers_removed_fraction for point in points]
    faster = [point.speedups.get("decoding", math.nan) for point in points]
    planned = [(name, _REMOVED, removed) for name in names]
    if any(map(math.isfinite, faster)):
        planned = [(name, _FASTER, faster) for name in names if name.startswith("perplexity, ")] + planned
    styles = _styles(points)
    figure, axes = panels(3.0 * len(planned) + 0.5, len(planned), width=7)
    entries: dict[str, Any] = {}
    for axis, (name, label, places) in zip(axes, planned, strict=True):
        _draw(axis, name, points, places, styles)
        axis.set_xlabel(label)
        handles, labels = axis.get_legend_handles_labels()
        entries |= zip(labels, handles, strict=True)
    place: Any = {"loc": "outside upper center", "ncols": min(4, len(entries))}
    figure.legend(entries.values(), entries, fontsize=8, frameon=False, **place)
    return figure


def _styles(points: Sequence[Point]) -> dict[str, dict[str, Any]]:
    """Colour and line of each method; a method that was healed has the colour that it has without."""
    styles: dict[str, dict[str, Any]] = {}
    colors: dict[str, str] = {}
    for point in points:
        if point.method == DENSE:
            continue
        method = point.method.removesuffix(HEALED)
        color = colors.setdefault(method, COLORS[len(colors) % len(COLORS)])
        line = "-" if point.method == method else "--"
        styles[point.method] = {"color": color, "linestyle": line}
    return styles


def _draw(
    axis: Axes, name: str, points: Sequence[Point], places: Sequence[float], styles: Mapping[str, dict[str, Any]]
) -> None:
    """One figure: a line a method through its points and the dense model's."""
    heights = [point.value(name) for point in points]
    for method, style in styles.items():
        line = [n for n, point in enumerate(points) if point.method in (DENSE, method)]
        xs = [places[n] for n in line]
        ys = [heights[n] for n in line]
        axis.plot(xs, ys, **style, marker="o", markersize=4, label=method)
        infinite = [places[n] for n in line if heights[n] == math.inf]
        if infinite:
            marks = {"color": style["color"], "marker": "^", "linestyle": "none", "label": "infinite"}
            axis.plot(infinite, [0.97] * len(infinite), transform=axis.get_xaxis_transform(), **marks)
    for point, place, height in zip(points, places, heights, strict=True):
        if point.method == DENSE and math.isfinite(height):
            axis.plot(place, height, color="black", marker="D", linestyle="none", label="dense")
            axis.axhline(height, color="black", linewidth=0.7, linestyle=":")
    axis.grid(alpha=0.25)
    _label(axis, name, points, list(filter(math.isfinite, heights)))


def _label(axis: Axes, name: str, points: Sequence[Point], finite: Sequence[float]) -> None:
    """Name the vertical axis, which is logarithmic for perplexities."""
    score = next(point.figures[name] for point in points if name in point.figures)
    label = name if name.startswith(score.metric) else f"{score.metric}, {name}"
    if score.is_perplexity:
        label += " (log scale)"
        axis.set_yscale("log")
        if max(finite) < 10 * min(finite):  # few powers of ten, if any, are there to be labelled
            axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            axis.yaxis.set_minor_formatter(FormatStrFormatter("%g"))
    axis.set_ylabel(label, parse_math=False)
