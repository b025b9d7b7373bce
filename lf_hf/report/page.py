"""One self-contained page about a fusion, and its pictures, made of the report. Comes with the extra `plot`.

The page's words are in page.html.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from lf_hf.report.report import FusionReport
from lf_hf.report.rows import as_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOT_PACKAGES = ("jinja2", "matplotlib")


def write_page(report: FusionReport, file: str | os.PathLike[str]) -> None:
    """Write the page: one HTML file that loads nothing from elsewhere and runs no script.

    Raises ValueError if matplotlib or jinja2 is not installed, or if figures do not fit together.
    """
    pictures = {name: base64.b64encode(_svg(figure)).decode() for name, figure in report_figures(report).items()}
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("lf_hf.report", "."), autoescape=True, trim_blocks=True)
    page = environment.get_template("page.html").render(
        report=report, pictures=pictures, figures=as_table(report.rows())
    )
    Path(file).write_text(page, encoding="utf-8")


def write_pictures(report: FusionReport, folder: str | os.PathLike[str]) -> list[Path]:
    """Write each picture of the page as a PNG into a folder, which is made if need be. Raises as `write_page`."""
    figures = {Path(folder, f"{name}.png"): figure for name, figure in report_figures(report).items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    for file, figure in figures.items():
        figure.savefig(file)
    return [*figures]


def report_figures(report: FusionReport) -> dict[str, Figure]:
    """The pictures that a report has the figures for, by name, in the order of the page."""
    if missing := missing_plot_packages():
        raise ValueError(missing)
    from lf_hf.report.figures import PICTURES

    drawn = {}
    for draw in PICTURES:
        try:
            if figure := draw(report):
                drawn[draw.__name__] = figure
        except (LookupError, TypeError, ValueError) as error:  # as after editing by hand
            raise ValueError(
                f"The figures for {draw.__name__} do not fit together ({error!r:.150}); save the model again."
            ) from None
    return drawn


def missing_plot_packages() -> str:
    """One sentence about what is not installed that pictures need, or nothing."""
    missing = [name for name in PLOT_PACKAGES if importlib.util.find_spec(name) is None]
    if not missing:
        return ""
    return f"Pictures and pages need {' and '.join(missing)}; run `pip install '.[plot]'` in lf_hf's checkout."


def _svg(figure: Figure) -> bytes:
    import matplotlib

    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "lf_hf"}):  # the same report gives the same bytes
        figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()
