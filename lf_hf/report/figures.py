"""The pictures of a fusion's report, each None where the report lacks the figures. Needs matplotlib.

Layers are numbered from 0 as in the original model, except where a picture says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator

from lf_hf.report.report import FusionReport
from lf_hf.text.mmlu import SUBJECTS

COLORS = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b83280", "#4a5568")
_BEFORE, _AFTER = "#a0aec0", "#2b6cb0"
_WIDTH = 5.2  # inches: with text of this size it can be read on a phone
_LONGEST_NAME = 32  # characters, in a legend
_ROW = 10  # layers in a row of the map
_CATEGORIES = {"stem": "STEM", "humanities": "humanities", "social_sciences": "social sciences", "other": "other"}
_MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def layer_map(report: FusionReport) -> Figure:
    """Which original layers became which: each original one above the fused model's that it is part of, in rows."""
    groups = report.groups
    merged = [new for new, group in enumerate(groups) if len(group) > 1]
    colors = {new: COLORS[n % len(COLORS)] for n, new in enumerate(merged)}
    places = [(new, number) for new, group in enumerate(groups) for number in group]
    rows = [places[start : start + _ROW] for start in range(0, len(places), _ROW)]
    figure, [axis] = panels(0.85 * len(rows) + 0.1)

    def box(x: float, y: float, width: int, new: int, number: int, share: float = 1.0) -> None:
        color, dim = colors.get(new, "#e2e8f0"), 0.3 if share == 0 else 1.0
        axis.add_patch(Rectangle((x + 0.06, y), width - 0.12, 0.32, facecolor=color, edgecolor="none", alpha=dim))
        ink = "white" if new in colors and share > 0 else "black"
        axis.text(x + width / 2, y + 0.15, str(number), ha="center", va="center", size=9, color=ink)

    for row, of_row in enumerate(rows):
        for x, (new, number) in enumerate(of_row):
            share = groups[new][number]
            box(x, -row, 1, new, number, share)
            if new in colors:
                axis.text(x + 0.5, 0.36 - row, f"{share:.0%}", ha="center", size=8, color=colors[new])
        for new, together in groupby(enumerate(of_row), key=lambda place: place[1][0]):
            columns = [x for x, _ in together]
            box(columns[0], -0.37 - row, len(columns), new, new)
        for y, name in ((0.15, "original"), (-0.22, "fused")):
            axis.text(-0.1, y - row, name, ha="right", va="center", size=8)
    axis.set(xlim=(-1.3, _ROW), ylim=(0.6 - len(rows), 0.55))
    axis.set_axis_off()
    return figure


def similarity_heatmap(report: FusionReport) -> Figure | None:
    """The layer similarity matrix, with the fused pairs framed."""
    if report.similarity is None:
        return None
    figure, [axis] = panels(4.0)
    # On a linear scale a few very similar pairs would leave all others equally dark.
    image = axis.imshow(np.array(report.similarity), cmap="viridis", origin="lower", norm=PowerNorm(0.5))
    _frame(axis, (place for step in report.steps for place in (step.pair, step.pair[::-1])))
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
    columns = min(5, math.ceil(math.sqrt(len(embeddings))))
    rows = math.ceil(len(embeddings) / columns)
    figure, axes = panels(_WIDTH / columns * rows + 0.4, rows, columns, subplot_kw={"xticks": [], "yticks": []})
    colors = dict(zip(_CATEGORIES, COLORS, strict=False))
    dots: Any = [colors[SUBJECTS.get(label, "other")] for label in report.sample_labels or []] or _AFTER
    for number, (axis, points) in enumerate(zip(axes, embeddings, strict=False)):
        axis.scatter(points[:, 0], points[:, 1], s=9, linewidths=0, color=dots, alpha=0.85)
        axis.margins(0.1)
        axis.set_title(f"layer {number}", size=8, pad=3)
    for axis in axes[len(embeddings) :]:
        axis.remove()
    if report.sample_labels:
        marks = [Line2D([], [], marker="o", linestyle="", color=colors[n], label=_CATEGORIES[n]) for n in _CATEGORIES]
        figure.legend(handles=marks, loc="outside upper center", ncols=len(marks), frameon=False, fontsize=9)
    return figure


def group_costs(report: FusionReport) -> Figure | None:
    """A triangle: what each group of layers costs as one layer, with the groups that were fused framed."""
    if not report.group_costs:
        return None
    figure, [axis] = panels(2.6)
    longest = max(cost.last - cost.first for cost in report.group_costs)
    values = np.full((longest, report.layers_before), np.nan)
    for cost in report.group_costs:
        values[cost.last - cost.first - 1, cost.first] = max(cost.divergence, 1e-6)
    # The norm's range ends where most groups are: a few that break the model would leave all others equally dark.
    high = float(np.nanquantile(values, 0.9))
    norm = PowerNorm(0.5, vmin=min(0.0, high), vmax=high)
    image = axis.imshow(values, cmap="viridis", origin="lower", norm=norm, aspect="auto", interpolation="nearest")
    _frame(axis, ((min(group), len(group) - 2) for group in report.groups if 1 < len(group) <= longest + 1))
    axis.set(xlabel="first layer of the group", ylabel="layers")
    axis.set_yticks(range(longest), [str(layers) for layers in range(2, longest + 2)])
    _whole_ticks(axis.xaxis)
    figure.colorbar(image, ax=axis, label="nats a token", extend="max")
    return figure


def cost_curve(report: FusionReport) -> Figure | None:
    """What the best groups of each number of fusions are expected to cost together, and what was measured."""
    if not report.predicted:
        return None
    figure, [axis] = panels(2.6)
    numbers = range(1, len(report.predicted) + 1)
    axis.plot(numbers, report.predicted, marker="o", markersize=3, color=_AFTER, label="expected")
    if budget := report.budget:
        if tried := {trial.num_fusions: trial.divergence for trial in budget.tried if trial.divergence < math.inf}:
            axis.scatter([*tried], [*tried.values()], s=26, color=COLORS[1], label="measured", zorder=2)
        if budget.name == "max_divergence":
            axis.axhline(budget.allowed, color=COLORS[1], linewidth=0.8, linestyle="dashed", label="budget")
    axis.axvline(len(report.steps), color="black", linewidth=0.8, linestyle="dotted")
    axis.set(xlabel="layers fewer (dotted: what was fused)", ylabel="nats a token", ylim=(0, None))
    _whole_ticks(axis.xaxis)
    _legend_above(axis)
    return figure


def along_depth(report: FusionReport) -> Figure | None:
    """How much each layer of the dense model changes the stream, and the shares in which pairs were averaged."""
    influences, averaged = report.influences, [step for step in report.steps if step.ratio_j > 0]
    count = (influences is not None) + bool(averaged)
    if not count:
        return None
    figure, axes = panels(2.3 * count, count, sharex=True)
    if influences is not None:
        removed = {number for step in report.steps for number in step.layers_j}
        for fused, label in ((False, "stays"), (True, "merged into the one before")):
            numbers = [number for number in range(report.layers_before) if (number in removed) == fused]
            heights = [influences[number] for number in numbers]
            axes[0].scatter(numbers, heights, s=26, color=COLORS[1] if fused else _BEFORE, label=label, zorder=2)
        axes[0].set(ylabel="influence")
        if any(0 < height < math.inf for height in influences):
            axes[0].set(yscale="log", ylabel="influence (log scale)")
            axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes[0].yaxis.set_major_formatter(FormatStrFormatter("%g"))
    if averaged:
        firsts, own, later = zip(*((step.pair[0], step.ratio_i, step.ratio_j) for step in averaged), strict=True)
        axes[-1].bar(firsts, own, color=_AFTER, label="layer itself")
        axes[-1].bar(firsts, later, bottom=own, color="#bee3f8", label="layer after it")
        axes[-1].set(ylabel="share in the average", ylim=(0, 1))
    for axis in axes:
        _legend_above(axis)
    axes[-1].set(xlabel="layer", xlim=(-0.7, report.layers_before - 0.3))
    _whole_ticks(axes[-1].xaxis)
    return figure


def matched_cosines(report: FusionReport) -> Figure | None:
    """Mean cosine of matched rows before and after alignment, for each matrix of each fused pair."""
    steps = [{key.rpartition(".")[2]: match for key, match in step.matches.items()} for step in report.steps]
    steps = [matches for matches in steps if matches]
    if not steps:
        return None
    names = [name for name in _MATRICES if all(name in matches for matches in steps)]
    figure, [axis] = panels(3.2)
    places = [k + 0.7 * ((n + 0.5) / len(steps) - 0.5) for n in range(len(steps)) for k in range(len(names))]
    matches = [of_step[name] for of_step in steps for name in names]
    before, after = [match.cosine_before for match in matches], [match.cosine_after for match in matches]
    axis.vlines(places, before, after, color="#cbd5e0", linewidth=1.2)
    axis.scatter(places, before, s=16, color=_BEFORE, label="before", zorder=2)
    axis.scatter(places, after, s=16, color=_AFTER, label="after", zorder=2)
    axis.set_xticks(range(len(names)), names, size=8)
    axis.set_ylabel("mean cosine of matched rows")
    axis.axhline(0, color="black", linewidth=0.6)
    _legend_above(axis)
    return figure


def fit_errors(report: FusionReport) -> Figure | None:
    """Error of what each fused layer's MLP adds to the stream, before and after its last fit."""
    if not report.fitted_layers:
        return None
    figure, [axis] = panels(max(1.6, 0.3 * len(report.fitted_layers) + 0.9))
    places = range(len(report.fitted_layers))
    before, after = zip(*((fitted.error_before, fitted.error_after) for fitted in report.fitted_layers), strict=True)
    axis.hlines(places, before, after, color="#cbd5e0", linewidth=1.2)
    axis.scatter(before, places, s=20, color=_BEFORE, label="before", zorder=2)
    axis.scatter(after, places, s=20, color=_AFTER, label="after", zorder=2)
    axis.set_yticks(places, [" + ".join(map(str, fitted.layers)) for fitted in report.fitted_layers])
    axis.set(xlabel="squared error, relative", ylabel="fused layer", xlim=(0, None))
    axis.margins(y=0.15)
    _legend_above(axis)
    return figure


def healing_curve(report: FusionReport) -> Figure | None:
    """Divergence from the base on held-out text, along the steps of the healing."""
    if report.healed is None:
        return None
    figure, [axis] = panels(2.6)
    curve = report.healed.curve
    for n, name in enumerate(dict.fromkeys(name for point in curve for name in point.divergences)):
        values = [point.divergences.get(name, math.nan) for point in curve]
        label = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}\N{HORIZONTAL ELLIPSIS}"
        label = label.replace("$", r"\$")  # a text's name is no formula
        color = COLORS[n % len(COLORS)]
        axis.plot([point.step for point in curve], values, marker="o", markersize=3, color=color, label=label)
    axis.axvline(report.healed.kept, color="black", linewidth=0.8, linestyle="dotted")
    axis.set(xlabel="step (dotted: the one that was kept)", ylabel="nats a token", ylim=(0, None))
    _whole_ticks(axis.xaxis)
    _legend_above(axis)
    return figure


PICTURES = (
    *(layer_map, similarity_heatmap, manifolds, group_costs, cost_curve, along_depth, matched_cosines, fit_errors),
    healing_curve,
)
"""In the order of the page."""


def panels(
    height: float, rows: int = 1, columns: int = 1, *, width: float = _WIDTH, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of a size in inches, with empty panels."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def _frame(axis: Axes, squares: Iterable[Sequence[float]]) -> None:
    """Frame squares of an image, each given by its middle."""
    for x, y in squares:
        axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="#f56565", linewidth=1.6))


def _legend_above(axis: Axes) -> None:
    """A grid, and a legend that hides nothing: in rows above the panel."""
    axis.grid(alpha=0.25)
    columns = min(3, len(axis.get_legend_handles_labels()[1]))
    place: Any = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0}
    axis.legend(ncols=max(1, columns), fontsize=8, frameon=False, **place)


def _whole_ticks(*axes: Any) -> None:
    for axis in axes:
        axis.set_major_locator(MaxNLocator(integer=True, nbins=16))
