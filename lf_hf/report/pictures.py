"""The pictures of a fusion's report, each None where the report lacks the figures. Needs matplotlib.

Layers are numbered from 0 as in the base, except where a picture says otherwise.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator

from lf_hf.report.report import FusionReport
from lf_hf.runtime.tasks import SUBJECTS

COLORS = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b83280", "#4a5568")
_BEFORE, _AFTER = "#a0aec0", "#2b6cb0"
_PLAIN, _PALE, _FRAME = "#e2e8f0", "#bee3f8", "#f56565"
_WIDTH = 5.2  # inches: with text of this size it can be read on a phone
_LONGEST_NAME = 32  # characters, in a legend
_ROW, _PANELS = 10, 5  # layers in a row of the map, and of pictures
_CATEGORIES = {"stem": "STEM", "humanities": "humanities", "social_sciences": "social sciences", "other": "other"}
_MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def layer_map(report: FusionReport) -> Figure:
    """Which layers became which: each layer of the base above the fused model's that it is part of, in rows."""
    merged = [new for new, group in enumerate(report.groups) if len(group) > 1]
    colors = {new: COLORS[n % len(COLORS)] for n, new in enumerate(merged)}
    layers = [(new, number, share) for new, group in enumerate(report.groups) for number, share in group.items()]
    rows = math.ceil(len(layers) / _ROW)
    figure, [axis] = panels(0.85 * rows + 0.1)
    for row in range(rows):
        axis.text(-0.1, 0.15 - row, "original", ha="right", va="center", size=8)
        axis.text(-0.1, -0.22 - row, "fused", ha="right", va="center", size=8)
        shown = layers[row * _ROW : (row + 1) * _ROW]
        for column, (new, number, share) in enumerate(shown):
            color = colors.get(new)
            _box(axis, column, -row, 1, number, color, unused=share == 0)
            if color:
                axis.text(column + 0.5, 0.36 - row, f"{share:.0%}", ha="center", size=8, color=color)
        start = 0
        for new, width in Counter(new for new, *_ in shown).items():
            _box(axis, start, -0.37 - row, width, new, colors.get(new))
            start += width
    axis.set(xlim=(-1.3, _ROW), ylim=(0.6 - rows, 0.55))
    axis.set_axis_off()
    return figure


def _box(axis: Axes, x: float, y: float, width: int, number: int, color: str | None, *, unused: bool = False) -> None:
    """A box with a layer's number; without a colour for a layer that was not merged, pale for one that is unused."""
    alpha = 0.3 if unused else 1.0
    ink = "white" if color and not unused else "black"
    box = Rectangle((x + 0.06, y), width - 0.12, 0.32, facecolor=color or _PLAIN, edgecolor="none", alpha=alpha)
    axis.add_patch(box)
    axis.text(x + width / 2, y + 0.15, str(number), ha="center", va="center", size=9, color=ink)


def similarity_heatmap(report: FusionReport) -> Figure | None:
    """The layer similarity matrix, with the fused pairs framed."""
    if report.similarity is None:
        return None
    figure, [axis] = panels(4.0)
    scale = PowerNorm(0.5)  # on a linear one a few very similar pairs leave all others equally dark
    image = axis.imshow(np.array(report.similarity), cmap="viridis", origin="lower", norm=scale)
    for i, j in report.pairs:
        for x, y in ((i, j), (j, i)):
            axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=_FRAME, linewidth=1.6))
    axis.set(xlabel="layer", ylabel="layer")
    _whole_ticks(axis.xaxis, axis.yaxis)
    figure.colorbar(image, ax=axis, label="similarity (NPIB, square-root scale)")
    return figure


def manifolds(report: FusionReport) -> Figure | None:
    """The samples as each layer sees them: the first two manifold coordinates, coloured by category of subject.

    Where similarity was computed from ranks, ranks are shown: of the coordinates themselves a few outliers would leave
    nothing to see but one dot.
    """
    if report.embeddings is None:
        return None
    embeddings = np.array(report.embeddings)  # (L, N, d)
    if report.config.get("rank_normalize", True):
        embeddings = embeddings.argsort(axis=1).argsort(axis=1)
    embeddings = np.pad(embeddings, ((0, 0), (0, 0), (0, 1)))  # d may be 1
    columns = min(_PANELS, math.ceil(math.sqrt(len(embeddings))))
    rows = math.ceil(len(embeddings) / columns)
    figure, axes = panels(_WIDTH / columns * rows + 0.4, rows, columns, subplot_kw={"xticks": [], "yticks": []})
    colors = dict(zip(_CATEGORIES, COLORS, strict=False))
    dots: Any = _AFTER
    if report.sample_labels:
        dots = [colors[SUBJECTS.get(label, "other")] for label in report.sample_labels]
        marks = [Line2D([], [], marker="o", linestyle="", color=color) for color in colors.values()]
        names = list(_CATEGORIES.values())
        figure.legend(marks, names, loc="outside upper center", ncols=len(marks), frameon=False, fontsize=9)
    for number, points in enumerate(embeddings):
        axes[number].scatter(points[:, 0], points[:, 1], s=9, linewidths=0, color=dots, alpha=0.85)
        axes[number].margins(0.1)
        axes[number].set_title(f"layer {number}", size=8, pad=3)
    for axis in axes[len(embeddings) :]:
        axis.remove()
    return figure


def along_depth(report: FusionReport) -> Figure | None:
    """How much each layer of the base changes the stream, and the shares in which pairs were averaged."""
    joins = [join for fused in report.fused_layers for join in zip(fused.pairs, fused.ratios, strict=False)]
    firsts = [first for (first, _), _ in joins]
    ratios = [ratio for _, ratio in joins]
    count = bool(ratios) + (report.influences is not None)
    if not count:
        return None
    figure, axes = panels(2.3 * count, count, sharex=True)
    if report.influences is not None:
        _draw_influences(axes[0], report, report.influences)
    if ratios:
        axes[-1].bar(firsts, ratios, color=_AFTER, label="layer itself")
        axes[-1].bar(firsts, [1 - ratio for ratio in ratios], bottom=ratios, color=_PALE, label="layer after it")
        axes[-1].set(ylabel="share in the average", ylim=(0, 1))
    for axis in axes:
        _legend_above(axis)
    axes[-1].set(xlabel="layer", xlim=(-0.7, report.layers_before - 0.3))
    _whole_ticks(axes[-1].xaxis)
    return figure


def _draw_influences(axis: Axes, report: FusionReport, influences: Sequence[float]) -> None:
    merged = [number for fused in report.fused_layers for number in fused.layers[1:]]
    stays = [number for number in range(report.layers_before) if number not in merged]
    for numbers, color, label in (stays, _BEFORE, "stays"), (merged, COLORS[1], "merged into the one before"):
        heights = [influences[number] for number in numbers]
        axis.scatter(numbers, heights, s=26, color=color, label=label, zorder=2)
    axis.set(ylabel="influence")
    if any(0 < height < math.inf for height in influences):
        axis.set(yscale="log", ylabel="influence (log scale)")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))


def matched_cosines(report: FusionReport) -> Figure | None:
    """Mean cosine of matched rows before and after alignment, for each matrix of each fused pair."""
    joins = []
    for fused in report.fused_layers:
        for matches in fused.matches:
            joins.append({name.rpartition(".")[2]: match for name, match in matches.items()})
    if not joins:
        return None
    matrices = [name for name in _MATRICES if all(name in matches for matches in joins)]
    figure, [axis] = panels(3.2)
    offsets = 0.7 * ((np.arange(len(joins)) + 0.5) / len(joins) - 0.5)
    places = np.add.outer(offsets, np.arange(len(matrices))).ravel()
    shown = [matches[name] for matches in joins for name in matrices]
    before = [match.cosine_before for match in shown]
    after = [match.cosine_after for match in shown]
    axis.vlines(places, before, after, color="#cbd5e0", linewidth=1.2)
    axis.scatter(places, before, s=16, color=_BEFORE, label="before", zorder=2)
    axis.scatter(places, after, s=16, color=_AFTER, label="after", zorder=2)
    axis.set_xticks(range(len(matrices)), matrices, size=8)
    axis.set(ylabel="mean cosine of matched rows")
    axis.axhline(0, color="black", linewidth=0.6)
    _legend_above(axis)
    return figure


def healing_curve(report: FusionReport) -> Figure | None:
    """Divergence from the base on held-out text, along the steps of the healing."""
    if report.healed is None:
        return None
    figure, [axis] = panels(2.6)
    curve = report.healed.curve
    steps = [point.step for point in curve]
    axis.set_prop_cycle(color=COLORS)
    for name in dict.fromkeys(chain(*(point.divergences for point in curve))):
        values = [point.divergences.get(name, math.nan) for point in curve]
        label = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}\N{HORIZONTAL ELLIPSIS}"
        axis.plot(steps, values, marker="o", markersize=3, label=label.replace("$", r"\$"))  # which is no formula
    axis.axvline(report.healed.kept, color="black", linewidth=0.8, linestyle="dotted")
    axis.set(xlabel="step (dotted: the one that was kept)", ylabel="nats a token", ylim=(0, None))
    _whole_ticks(axis.xaxis)
    _legend_above(axis)
    return figure


PICTURES = (layer_map, similarity_heatmap, manifolds, along_depth, matched_cosines, healing_curve)
"""In the order of the page."""


def panels(
    height: float, rows: int = 1, columns: int = 1, *, width: float = _WIDTH, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of a size in inches, with empty panels."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flat)


def _legend_above(axis: Axes) -> None:
    """A grid, and a legend that hides nothing: in rows above the panel."""
    axis.grid(alpha=0.25)
    axis.legend(ncols=3, fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)


def _whole_ticks(*axes: Any) -> None:
    for axis in axes:
        axis.set_major_locator(MaxNLocator(integer=True, nbins=16))
