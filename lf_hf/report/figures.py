"""The pictures: of a fusion's report, and of a sweep. Needs matplotlib.

Layers are numbered from 0 as in the original model, except where a picture says otherwise.
"""

from __future__ import annotations

import math
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
    figure = new_figure(_WIDTH, 0.85 * len(rows) + 0.1)
    axis = figure.subplots()

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


def similarity_heatmap(report: FusionReport) -> Figure:
    """The layer similarity matrix, with the fused pairs framed."""
    assert report.similarity is not None
    figure = new_figure(_WIDTH, 4.0)
    axis = figure.subplots()
    # On a linear scale a few very similar pairs would leave all others equally dark.
    image = axis.imshow(np.array(report.similarity), cmap="viridis", origin="lower", norm=PowerNorm(0.5))
    for step in report.steps:
        i, j = step.pair
        for x, y in ((i, j), (j, i)):
            axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="#f56565", linewidth=1.4))
    axis.set(xlabel="layer", ylabel="layer")
    _whole_ticks(axis.xaxis, axis.yaxis)
    figure.colorbar(image, ax=axis, label="similarity (NPIB, square-root scale)")
    return figure


def manifolds(report: FusionReport) -> Figure:
    """The samples as each layer sees them: the first two manifold coordinates, coloured by category of subject.

    Where similarity was computed from ranks, ranks are shown: of the coordinates themselves a few outliers would leave
    nothing to see but one dot.
    """
    assert report.embeddings is not None
    embeddings = np.array(report.embeddings)  # (L, N, d)
    if report.config.get("rank_normalize", True):
        embeddings = embeddings.argsort(axis=1).argsort(axis=1)
    columns = min(5, math.ceil(math.sqrt(len(embeddings))))
    rows = math.ceil(len(embeddings) / columns)
    figure = new_figure(_WIDTH, _WIDTH / columns * rows + 0.4)
    names = [SUBJECTS.get(label, "other") for label in report.sample_labels or []]
    colors = dict(zip(_CATEGORIES, COLORS, strict=False))
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for number, axis in enumerate(axes):
        axis.set(xticks=[], yticks=[])
        if number >= len(embeddings):
            axis.set_axis_off()
            continue
        x = embeddings[number, :, 0]
        y = embeddings[number, :, 1] if embeddings.shape[2] > 1 else np.zeros(len(x))
        axis.scatter(x, y, s=9, linewidths=0, color=[colors[name] for name in names] or _AFTER, alpha=0.85)
        axis.margins(0.1)
        axis.set_title(f"layer {number}", size=8, pad=3)
    if names:
        marks = [Line2D([], [], marker="o", linestyle="", color=colors[n], label=_CATEGORIES[n]) for n in _CATEGORIES]
        figure.legend(handles=marks, loc="outside upper center", ncols=len(marks), frameon=False, fontsize=9)
    return figure


def along_depth(report: FusionReport) -> Figure:
    """How much each layer of the dense model changes the stream, and the shares in which pairs were averaged."""
    averaged = [step for step in report.steps if step.ratio_j > 0]
    panels = (report.influences is not None) + bool(averaged)
    figure = new_figure(_WIDTH, 2.3 * panels)
    axes: list[Axes] = list(figure.subplots(panels, 1, sharex=True, squeeze=False).flat)
    if report.influences is not None:
        removed = {number for step in report.steps for number in step.layers_j}
        for fused, label in ((False, "stays"), (True, "merged into the one before")):
            numbers = [number for number in range(report.layers_before) if (number in removed) == fused]
            heights = [report.influences[number] for number in numbers]
            axes[0].scatter(numbers, heights, s=26, color=COLORS[1] if fused else _BEFORE, label=label, zorder=2)
        axes[0].set(ylabel="influence")
        if any(0 < height < math.inf for height in report.influences):
            axes[0].set(yscale="log", ylabel="influence (log scale)")
            axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes[0].yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes[0].grid(alpha=0.25)
        legend_above(axes[0])
    if averaged:
        numbers = [step.pair[0] for step in averaged]
        axes[-1].bar(numbers, [step.ratio_i for step in averaged], color=_AFTER, label="layer itself")
        bottoms = [step.ratio_i for step in averaged]
        later = [step.ratio_j for step in averaged]
        axes[-1].bar(numbers, later, bottom=bottoms, color="#bee3f8", label="layer after it")
        axes[-1].set(ylabel="share in the average", ylim=(0, 1))
        legend_above(axes[-1])
    axes[-1].set(xlabel="layer", xlim=(-0.7, report.layers_before - 0.3))
    _whole_ticks(axes[-1].xaxis)
    return figure


def matched_cosines(report: FusionReport) -> Figure:
    """Mean cosine of matched rows before and after alignment, for each matrix of each fused pair."""
    steps = [step for step in report.steps if step.matches]
    names = [name for name in _MATRICES if all(any(key.endswith(name) for key in step.matches) for step in steps)]
    figure = new_figure(_WIDTH, 3.2)
    axis = figure.subplots()
    for n, step in enumerate(steps):
        matches = {key.rpartition(".")[2]: match for key, match in step.matches.items()}
        places = [k + 0.7 * ((n + 0.5) / len(steps) - 0.5) for k in range(len(names))]
        before = [matches[name].cosine_before for name in names]
        after = [matches[name].cosine_after for name in names]
        axis.vlines(places, before, after, color="#cbd5e0", linewidth=1.2)
        axis.scatter(places, before, s=16, color=_BEFORE, label="before" if n == 0 else None, zorder=2)
        axis.scatter(places, after, s=16, color=_AFTER, label="after" if n == 0 else None, zorder=2)
    axis.set_xticks(range(len(names)), names, size=8)
    axis.set_ylabel("mean cosine of matched rows")
    axis.axhline(0, color="black", linewidth=0.6)
    axis.grid(axis="y", alpha=0.25)
    legend_above(axis)
    return figure


def group_costs(report: FusionReport) -> Figure:
    """A triangle: what each group of layers costs as one layer, with the groups that were fused framed."""
    figure = new_figure(_WIDTH, 2.6)
    axis = figure.subplots()
    longest = max(cost.last - cost.first for cost in report.group_costs)
    values = np.full((longest, report.layers_before), np.nan)
    for cost in report.group_costs:
        values[cost.last - cost.first - 1, cost.first] = max(cost.divergence, 1e-6)
    # The norm's range ends where most groups are: a few that break the model would leave all others equally dark.
    high = float(np.nanquantile(values, 0.9))
    norm = PowerNorm(0.5, vmin=min(0.0, high), vmax=high)
    image = axis.imshow(values, cmap="viridis", origin="lower", norm=norm, aspect="auto", interpolation="nearest")
    for group in report.groups:
        if 1 < len(group) <= longest + 1:
            corner = min(group) - 0.5, len(group) - 2.5
            axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="#f56565", linewidth=1.8))
    axis.set(xlabel="first layer of the group", ylabel="layers")
    axis.set_yticks(range(longest), [str(layers) for layers in range(2, longest + 2)])
    _whole_ticks(axis.xaxis)
    figure.colorbar(image, ax=axis, label="nats a token", extend="max")
    return figure


def cost_curve(report: FusionReport) -> Figure:
    """What the best groups of each number of fusions are expected to cost together, and what was measured."""
    figure = new_figure(_WIDTH, 2.6)
    axis = figure.subplots()
    numbers = range(1, len(report.predicted) + 1)
    axis.plot(numbers, report.predicted, marker="o", markersize=3, color=_AFTER, label="expected")
    tried = sorted(report.budget.tried, key=lambda trial: trial.num_fusions) if report.budget else []
    tried = [trial for trial in tried if trial.divergence < math.inf]
    if tried:
        found = [trial.divergence for trial in tried]
        axis.scatter([trial.num_fusions for trial in tried], found, s=26, color=COLORS[1], label="measured", zorder=2)
    if report.budget is not None and report.budget.name == "max_divergence":
        axis.axhline(report.budget.allowed, color=COLORS[1], linewidth=0.8, linestyle="dashed", label="budget")
    axis.axvline(len(report.steps), color="black", linewidth=0.8, linestyle="dotted")
    axis.set(xlabel="layers fewer (dotted: what was fused)", ylabel="nats a token", ylim=(0, None))
    axis.grid(alpha=0.25)
    _whole_ticks(axis.xaxis)
    legend_above(axis)
    return figure


def fit_errors(report: FusionReport) -> Figure:
    """Error of what each fused layer's MLP adds to the stream, before and after its last fit."""
    figure = new_figure(_WIDTH, max(1.6, 0.3 * len(report.fitted_layers) + 0.9))
    axis = figure.subplots()
    places = range(len(report.fitted_layers))
    before = [fitted.error_before for fitted in report.fitted_layers]
    after = [fitted.error_after for fitted in report.fitted_layers]
    axis.hlines(places, before, after, color="#cbd5e0", linewidth=1.2)
    axis.scatter(before, places, s=20, color=_BEFORE, label="before", zorder=2)
    axis.scatter(after, places, s=20, color=_AFTER, label="after", zorder=2)
    axis.set_yticks(places, [" + ".join(map(str, fitted.layers)) for fitted in report.fitted_layers])
    axis.set(xlabel="squared error, relative", ylabel="fused layer", xlim=(0, None))
    axis.margins(y=0.15)
    axis.grid(axis="x", alpha=0.25)
    legend_above(axis)
    return figure


def healing_curve(report: FusionReport) -> Figure:
    """Divergence from the base on held-out text, along the steps of the healing."""
    figure = new_figure(_WIDTH, 2.6)
    axis = figure.subplots()
    healed = report.healed
    assert healed is not None
    steps = [point.step for point in healed.curve]
    for n, name in enumerate(dict.fromkeys(name for point in healed.curve for name in point.divergences)):
        values = [point.divergences.get(name, math.nan) for point in healed.curve]
        label = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}\N{HORIZONTAL ELLIPSIS}"
        axis.plot(steps, values, marker="o", markersize=3, color=COLORS[n % len(COLORS)], label=label)
    axis.axvline(healed.kept, color="black", linewidth=0.8, linestyle="dotted")
    axis.set(xlabel="step (dotted: the one that was kept)", ylabel="nats a token", ylim=(0, None))
    axis.grid(alpha=0.25)
    _whole_ticks(axis.xaxis)
    for text in axis.get_legend_handles_labels()[0]:
        text.set_label(str(text.get_label()).replace("$", r"\$"))  # a text's name is no formula
    legend_above(axis)
    return figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; sizes are in inches."""
    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def legend_above(axis: Axes) -> None:
    """A legend that hides nothing: in rows above the panel."""
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(
        handles,
        labels,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        borderaxespad=0,
        ncols=min(3, len(labels)),
        fontsize=8,
        frameon=False,
    )


def _whole_ticks(*axes: Any) -> None:
    for axis in axes:
        axis.set_major_locator(MaxNLocator(integer=True, nbins=16))
