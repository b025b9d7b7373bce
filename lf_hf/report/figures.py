"""The pictures: of a fusion's report, and of a sweep. Needs matplotlib.

Layers are numbered from 0 as in the original model, except where a picture says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
_CATEGORIES = {"stem": "STEM", "humanities": "humanities", "social_sciences": "social sciences", "other": "other"}
_MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def layer_map(report: FusionReport) -> Figure:
    """Which original layers became which: the original ones above, the fused model's below."""
    groups, count = report.groups, report.layers_before
    figure = new_figure(max(6.0, 0.3 * count), 2.9)
    axis = figure.subplots()
    left = (count - len(groups)) / 2
    size = 8 if count <= 40 else 6
    merged = 0
    for new, group in enumerate(groups):
        color = "#e2e8f0"
        if len(group) > 1:
            color = COLORS[merged % len(COLORS)]
            merged += 1
        x = left + new
        axis.add_patch(Rectangle((x - 0.42, 0), 0.84, 0.42, facecolor=color, edgecolor="none"))
        axis.text(x, 0.2, str(new), ha="center", va="center", size=size, color="white" if len(group) > 1 else "black")
        for number, share in group.items():
            gone = share == 0
            dim = 0.3 if gone else 1.0
            axis.add_patch(Rectangle((number - 0.42, 1.6), 0.84, 0.42, facecolor=color, edgecolor="none", alpha=dim))
            ink = "white" if len(group) > 1 and not gone else "black"
            axis.text(number, 1.8, str(number), ha="center", va="center", size=size, color=ink)
            if len(group) > 1 and not gone:
                axis.text(number, 2.12, f"{share:.0%}", ha="center", size=size - 2, color=color)
            axis.plot(
                *([number, x], [1.58, 0.44]),
                color=color if len(group) > 1 else "#a0aec0",
                linewidth=0.6 if gone else 0.8 + 3 * share * (len(group) > 1),
                linestyle=":" if gone else "-",
            )
    axis.text(-0.7, 1.8, "original", ha="right", va="center", size=9)
    axis.text(left - 0.7, 0.2, "fused", ha="right", va="center", size=9)
    axis.set(xlim=(-3, count), ylim=(-0.1, 2.4))
    axis.set_axis_off()
    return figure


def similarity_heatmap(report: FusionReport) -> Figure:
    """The layer similarity matrix, with the fused pairs framed."""
    assert report.similarity is not None
    figure = new_figure(6.4, 5.4)
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
    columns = min(8, math.ceil(math.sqrt(len(embeddings))))
    rows = math.ceil(len(embeddings) / columns)
    figure = new_figure(1.55 * columns, 1.55 * rows + 0.5)
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
    figure = new_figure(7, 2.5 * panels)
    axes: list[Axes] = list(figure.subplots(panels, 1, sharex=True, squeeze=False).flat)
    if report.influences is not None:
        removed = {number for step in report.steps for number in step.layers_j}
        for fused, label in ((False, "stays"), (True, "merged into the one before")):
            numbers = [number for number in range(report.layers_before) if (number in removed) == fused]
            heights = [report.influences[number] for number in numbers]
            axes[0].scatter(numbers, heights, s=26, color=COLORS[1] if fused else _BEFORE, label=label, zorder=2)
        axes[0].set(yscale="log", ylabel="influence (log scale)")
        axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes[0].yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes[0].grid(alpha=0.25)
        axes[0].legend(fontsize=8)
    if averaged:
        numbers = [step.pair[0] for step in averaged]
        axes[-1].bar(numbers, [step.ratio_i for step in averaged], color=_AFTER, label="layer itself")
        bottoms = [step.ratio_i for step in averaged]
        later = [step.ratio_j for step in averaged]
        axes[-1].bar(numbers, later, bottom=bottoms, color="#bee3f8", label="layer after it")
        axes[-1].set(ylabel="share in the average", ylim=(0, 1))
        axes[-1].legend(fontsize=8, loc="lower left")
    axes[-1].set(xlabel="layer", xlim=(-0.7, report.layers_before - 0.3))
    _whole_ticks(axes[-1].xaxis)
    return figure


def matched_cosines(report: FusionReport) -> Figure:
    """Mean cosine of matched rows before and after alignment, for each matrix of each fused pair."""
    steps = [step for step in report.steps if step.matches]
    names = [name for name in _MATRICES if all(any(key.endswith(name) for key in step.matches) for step in steps)]
    figure = new_figure(7.5, 3.4)
    axis = figure.subplots()
    for n, step in enumerate(steps):
        matches = {key.rpartition(".")[2]: match for key, match in step.matches.items()}
        places = [k + 0.7 * ((n + 0.5) / len(steps) - 0.5) for k in range(len(names))]
        before = [matches[name].cosine_before for name in names]
        after = [matches[name].cosine_after for name in names]
        axis.vlines(places, before, after, color="#cbd5e0", linewidth=1.2)
        axis.scatter(places, before, s=16, color=_BEFORE, label="before" if n == 0 else None, zorder=2)
        axis.scatter(places, after, s=16, color=_AFTER, label="after" if n == 0 else None, zorder=2)
    axis.set_xticks(range(len(names)), names)
    axis.set_ylabel("mean cosine of matched rows")
    axis.axhline(0, color="black", linewidth=0.6)
    axis.grid(axis="y", alpha=0.25)
    axis.legend(fontsize=8)
    return figure


def fit_errors(report: FusionReport) -> Figure:
    """Error of what each fused layer's MLP adds to the stream, before and after its last fit."""
    figure = new_figure(7, max(1.6, 0.34 * len(report.fitted_layers) + 0.9))
    axis = figure.subplots()
    places = range(len(report.fitted_layers))
    before = [fitted.error_before for fitted in report.fitted_layers]
    after = [fitted.error_after for fitted in report.fitted_layers]
    axis.hlines(places, before, after, color="#cbd5e0", linewidth=1.2)
    axis.scatter(before, places, s=20, color=_BEFORE, label="before", zorder=2)
    axis.scatter(after, places, s=20, color=_AFTER, label="after", zorder=2)
    axis.set_yticks(places, [" + ".join(map(str, fitted.layers)) for fitted in report.fitted_layers])
    axis.set(xlabel="squared error, relative", ylabel="fused layer", xlim=(0, None))
    axis.grid(axis="x", alpha=0.25)
    axis.legend(fontsize=8)
    return figure


def cost_and_gain(report: FusionReport) -> Figure:
    """What the fused model has left of the base's layers and parameters, and the perplexity of both."""
    figure = new_figure(7 + 2 * (len(report.perplexities) > 1), 2.1)
    axes: list[Axes] = list(figure.subplots(1, 1 + len(report.perplexities), squeeze=False).flat)
    left = [1 - report.parameters_removed_fraction, 1 - report.layers_removed_fraction]
    _bars(axes[0], ["parameters", "layers"], [100 * share for share in left], "{:.1f} %")
    axes[0].set(xlim=(0, 130), xticks=range(0, 101, 25), xlabel="left of the base (%)")
    for axis, judged in zip(axes[1:], report.perplexities, strict=True):
        values = [judged.fused, judged.dense]
        finite = [value for value in values if math.isfinite(value)]
        _bars(axis, ["fused", "base"], values, "{:.4g}")
        axis.set_xscale("log")
        axis.set_xlim(1, max(10.0, *finite) ** 1.5)
        axis.set_xlabel(f"perplexity, {judged.name} (log scale)", parse_math=False)
    return figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; sizes are in inches."""
    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def _whole_ticks(*axes: Any) -> None:
    for axis in axes:
        axis.set_major_locator(MaxNLocator(integer=True, nbins=16))


def _bars(axis: Axes, names: Sequence[str], values: Sequence[float], form: str) -> None:
    bars = axis.barh(names, values, color=[_AFTER if name != "base" else _BEFORE for name in names])
    axis.bar_label(bars, [form.format(value) for value in values], padding=4, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
