"""The picture of a sweep: scores and predictions against layers removed and speed. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter
from numpy.typing import NDArray

from lf_hf.evaluate.points import DENSE, HEALED, Point, figure_names
from lf_hf.report.pictures import COLORS, panels

_REMOVED = "layers removed (%)"
_FASTER = "times as fast as the base, decoding"


def sweep_curve(points: Sequence[Point]) -> Figure:
    """Each figure against the share of layers removed, and perplexity also against the speed of decoding.

    There is one line a method, dashed where it was healed, and the dense model's point is one of every line. Infinite
    values are marked at the top; a figure without any finite value gets no panel.
    """
    names = [name for name in figure_names(points) if any(math.isfinite(point.value(name)) for point in points)]
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
    without = {point.method: point.method.removesuffix(HEALED) for point in points if point.method != DENSE}
    colors = dict(zip(dict.fromkeys(without.values()), cycle(COLORS), strict=False))
    return {
        method: {"color": colors[plain], "linestyle": "-" if method == plain else "--"}
        for method, plain in without.items()
    }


def _draw(
    axis: Axes, name: str, points: Sequence[Point], places: Sequence[float], styles: Mapping[str, dict[str, Any]]
) -> None:
    """One figure: a line a method through its points and the dense model's."""
    xs, ys = np.array(places), np.array([point.value(name) for point in points])
    methods = np.array([point.method for point in points])
    for method, style in styles.items():
        line = np.isin(methods, (DENSE, method))
        axis.plot(xs[line], ys[line], **style, marker="o", markersize=4, label=method)
        infinite = xs[line & np.isposinf(ys)]
        if len(infinite):
            marks = {"color": style["color"], "marker": "^", "linestyle": "none", "label": "infinite"}
            axis.plot(infinite, np.full_like(infinite, 0.97), transform=axis.get_xaxis_transform(), **marks)
    dense = (methods == DENSE) & np.isfinite(ys)
    if dense.any():
        axis.plot(xs[dense], ys[dense], color="black", marker="D", linestyle="none", label="dense")
        axis.axhline(ys[dense][0], color="black", linewidth=0.7, linestyle=":")
    axis.grid(alpha=0.25)
    _label(axis, name, points, ys[np.isfinite(ys)])


def _label(axis: Axes, name: str, points: Sequence[Point], finite: NDArray[np.float64]) -> None:
    """Name the vertical axis, which is logarithmic for perplexities."""
    point = next(point for point in points if name in point.figures)
    score = point.figures[name]
    label = f"{score.metric}, {name}" if name in point.scores else name
    if score.is_perplexity:
        label += " (log scale)"
        axis.set_yscale("log")
        if finite.max() < 10 * finite.min():  # few powers of ten, if any, are there to be labelled
            axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            axis.yaxis.set_minor_formatter(FormatStrFormatter("%g"))
    axis.set_ylabel(label, parse_math=False)
