"""The page about a fusion, one HTML file, and its pictures. Comes with the extra `plot`; its words are in page.html."""

from __future__ import annotations

import base64
import importlib.util
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader

from lf_hf.report.figures import FIGURES
from lf_hf.report.report import FusionReport
from lf_hf.report.rows import as_table
from lf_hf.runtime.errors import explained

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MISFITS = (LookupError, TypeError, ValueError)  # as after editing by hand
_MARK, _START = "made by lf-hf report", 1024  # in the first bytes of every file that is written here


def write_page(report: FusionReport, file: str | os.PathLike[str]) -> None:
    """Write the page: one HTML file that loads nothing from elsewhere and runs no script.

    Raises ValueError if matplotlib is not installed, figures do not fit together, or `file` is no name of an HTML file
    or is a file that was not written here.
    """
    page = Path(file)
    if page.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"The page must be a .html file, got {str(page)!r}.")
    _check_ours(page)
    figures = report_figures(report)
    environment = Environment(loader=PackageLoader("lf_hf.report", "."), autoescape=True, trim_blocks=True)
    template = environment.get_template("page.html")
    pictures = {name: base64.b64encode(draw(figure, "svg")).decode() for name, figure in figures.items()}
    shown = {"figures": as_table(report.rows()), "meanings": [figure.meaning for figure in FIGURES]}
    text = template.render(report=report, pictures=pictures, mark=_MARK, **shown)
    page.parent.mkdir(parents=True, exist_ok=True)
    write_whole(page, text.encode())


def write_pictures(report: FusionReport, folder: str | os.PathLike[str]) -> list[Path]:
    """Write each picture of the page as a PNG into a folder, which is made if need be. Raises as `write_page`."""
    figures = {Path(folder, f"{name}.png"): figure for name, figure in report_figures(report).items()}
    for file in figures:
        _check_ours(file)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for file, figure in figures.items():
        write_whole(file, draw(figure, "png"))
    return list(figures)


def report_figures(report: FusionReport) -> dict[str, Figure]:
    """The pictures that a report has the figures for, by name, in the order of the page."""
    if missing := missing_plot_packages():
        raise ValueError(missing)
    from lf_hf.report.pictures import PICTURES

    figures = {}
    for picture in PICTURES:
        name = picture.__name__
        with explained(f"The figures for {name} do not fit together", "save the model again", _MISFITS):
            figure = picture(report)
        if figure is not None:
            figures[name] = figure
    return figures


def missing_plot_packages() -> str:
    """One sentence about what is not installed that pictures need, or nothing."""
    if importlib.util.find_spec("matplotlib"):
        return ""
    return "Pictures and pages need matplotlib; run `pip install '.[plot]'` in lf_hf's checkout."


def write_whole(file: Path, content: bytes) -> None:
    """Write a file whole or not at all; it is on the disk when this returns."""
    scratch = file.with_name(f".{file.name}.new")
    try:
        with scratch.open("wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        scratch.replace(file)
    finally:
        scratch.unlink(missing_ok=True)


def _check_ours(file: Path) -> None:
    """Raise ValueError if a file is there that was not written here."""
    if file.is_file() and _MARK.encode() not in file.read_bytes()[:_START]:
        raise ValueError(
            f"{str(file)!r} was not written by this version of lf-hf report; move it, or name another file."
        )


def draw(figure: Figure, kind: str) -> bytes:
    """A picture as SVG or PNG; the same report gives the same bytes."""
    import matplotlib

    metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {"Software": _MARK}
    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "lf_hf"}):
        figure.savefig(content, format=kind, metadata=metadata)
    return content.getvalue()
