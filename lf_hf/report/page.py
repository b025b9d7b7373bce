"""One self-contained page about a fusion, and its pictures, made of the report. Comes with the extra `plot`."""

from __future__ import annotations

import base64
import importlib.util
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lf_hf.report.report import FusionReport
from lf_hf.report.rows import as_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEMPLATE = "page.html"


@dataclass(frozen=True)
class Section:
    """A picture with what a reader who is new to the method needs to read it."""

    name: str
    title: str
    explanation: str
    figure: Figure


def write_page(report: FusionReport, file: str | os.PathLike[str]) -> None:
    """Write the page: one HTML file that loads nothing from elsewhere and runs no script.

    Raises
    ------
    ValueError
        If matplotlib or jinja2 is not installed.
    """
    sections = report_sections(report)
    from jinja2 import Environment, PackageLoader

    template = Environment(loader=PackageLoader("lf_hf.report", "."), autoescape=True).get_template(_TEMPLATE)
    pictures = {section.name: base64.b64encode(_svg(section.figure)).decode() for section in sections}
    page = template.render(report=report, sections=sections, pictures=pictures, figures=as_table(report.rows()))
    Path(file).write_text(page, encoding="utf-8")


def write_pictures(report: FusionReport, folder: str | os.PathLike[str]) -> list[Path]:
    """Write each picture of the page as a PNG into a folder, which is made if need be.

    Raises
    ------
    ValueError
        If matplotlib or jinja2 is not installed.
    """
    sections = report_sections(report)
    Path(folder).mkdir(parents=True, exist_ok=True)
    files = []
    for section in sections:
        files.append(Path(folder, f"{section.name}.png"))
        files[-1].write_bytes(_png(section.figure))
    return files


def report_sections(report: FusionReport) -> list[Section]:
    """The pictures that a report has the figures for, in the order of the page."""
    if missing := missing_plot_packages():
        raise ValueError(missing)
    from lf_hf.report import figures

    matched = any(step.matches for step in report.steps)
    averaged = any(step.ratio_j > 0 for step in report.steps)
    planned: list[tuple[bool, Callable[[FusionReport], Figure], str, str]] = [
        (True, figures.cost_and_gain, "What it cost and what it saved", _COST),
        (True, figures.layer_map, "Which layers became which", _MAP),
        (report.similarity is not None, figures.similarity_heatmap, "How alike the layers are", _SIMILARITY),
        (report.embeddings is not None, figures.manifolds, "How each layer sees the samples", _MANIFOLD),
        (bool(report.group_costs), figures.group_costs, "What groups of layers cost", _GROUPS),
        (bool(report.predicted), figures.cost_curve, "How many layers to fuse", _CURVE),
        (report.influences is not None or averaged, figures.along_depth, "Along the depth of the model", _DEPTH),
        (matched, figures.matched_cosines, "How well neurons matched", _COSINES),
        (bool(report.fitted_layers), figures.fit_errors, "How well fused layers were fitted", _FIT),
        (report.healed is not None, figures.healing_curve, "How it healed", _HEALED),
    ]
    return [
        Section(draw.__name__, title, explanation, draw(report)) for there, draw, title, explanation in planned if there
    ]


_COST = (
    "Perplexity says how well a model predicts text that it has not seen: it is the number of equally likely next "
    "tokens that the model is as unsure between, so lower is better. A fusion that keeps the model useful keeps it "
    "close to the base's: \N{MULTIPLICATION SIGN} 1 is as good as the base, and from \N{MULTIPLICATION SIGN} 2 on a "
    "model writes poorly. Below it is what is left of the base's layers and parameters."
)
_MAP = (
    "In each row, above are the layers of the original model, and below those of the fused one that they became, "
    "numbered as in each model. Coloured layers were merged; the percentages say how much of each original layer is "
    "in the result."
)
_SIMILARITY = (
    "Each square compares two layers by how much one layer's picture of the calibration samples says about the "
    "other's; brighter is more alike. The pairs that were fused are framed."
)
_MANIFOLD = (
    "Each dot is a calibration sample, and each panel shows how one layer arranges the samples: those close together "
    "are alike to that layer. Where two layers show the same arrangement, they do similar work. Axes have no unit; "
    "only the order of the samples along them counts, unless rank_normalize was switched off."
)
_GROUPS = (
    "Each square is a group of adjacent layers, and how far the predictions of the base move when that group alone "
    "becomes one layer, on calibration text that it was not fitted to; darker costs less. Those that were fused are "
    "framed: the ones that cost least together, for as many layers fewer."
)
_CURVE = (
    "For each number of layers fewer, what the best groups are expected to cost together: the sum of their own costs. "
    "All of them in one model cost about that, often somewhat more. Where a budget said how many layers to fuse, what "
    "was measured is there too, on text that nothing was fitted to."
)
_DEPTH = (
    "Influence is how much a layer turns the stream of activations that passes through it, from 0 for not at all; the "
    "lower it is, the less it costs to lose the layer. Where weights were averaged, the shares say how much each of "
    "the two layers counted."
)
_COSINES = (
    "Before two layers are averaged, the rows of each weight matrix of the later one are put into the order that "
    "matches the earlier one best. 1 would be rows that point the same way, 0 rows that have nothing to do with each "
    "other: the nearer to 0 a blue dot is, the less averaging can make sense. One line a fused pair, in the order of "
    "the steps."
)
_FIT = (
    "The output projections of a fused layer are fitted to what the dense model computes at that depth. The error "
    "is what is left of it, on calibration text: 0 would be a perfect fit."
)
_HEALED = (
    "After the fusion the model was trained to predict what its base predicts. The divergence says how far it is from "
    "the base, on text that it was not trained on: 0 would be the base itself. Of all states the "
    "nearest one was kept."
)


def _svg(figure: Figure) -> bytes:
    import matplotlib

    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "lf_hf"}):  # the same report gives the same bytes
        figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()


def _png(figure: Figure) -> bytes:
    """A PNG of at most 256 colours, which is a third of the size and looks the same."""
    from PIL import Image

    content, small = io.BytesIO(), io.BytesIO()
    figure.savefig(content, format="png")
    Image.open(content).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    return small.getvalue()


PLOT_PACKAGES = ("jinja2", "matplotlib")


def missing_plot_packages() -> str:
    """One sentence about what is not installed that pictures need, or nothing."""
    missing = [name for name in PLOT_PACKAGES if importlib.util.find_spec(name) is None]
    if not missing:
        return ""
    return f"Pictures and pages need {' and '.join(missing)}; run `pip install '.[plot]'` in lf_hf's checkout."
