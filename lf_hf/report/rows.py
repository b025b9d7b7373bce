"""Figures of models as people read them: rows of tables in the terminal, on the model card and on the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lf_hf.report.data import SpeedInfo
from lf_hf.report.figures import FIGURES

_MODELS = ("base", "fused", "healed")
# By kind of row: how a value is written, and how a change is.
_FORMS = {
    "size": (",", "percent"),
    "rate": (".4g", "times"),
    "speed-up": (".3g", "none"),
    **{figure.name: (figure.form, figure.change) for figure in FIGURES},
}


class Row(NamedTuple):
    """A figure of the base, the fused model and, where there is one, the healed model.

    `kind` is a key of _FORMS. `ratio` is that of the last value to the base's where it was measured on its own, and
    `spread` the range that it lies in.
    """

    name: str
    kind: str
    values: Sequence[float]
    ratio: float | None = None
    spread: str = ""

    @property
    def change(self) -> str:
        """The last value against the base's, or nothing where the base's is 0 by definition."""
        _, form = _FORMS[self.kind]
        if form == "none":
            return ""
        ratio = self.values[-1] / self.values[0] if self.ratio is None else self.ratio
        return f"{ratio - 1:+.1%}" if form == "percent" else f"x {ratio:.3g} {self.spread}".rstrip()

    @property
    def cells(self) -> list[str]:
        """Name, values and change, as text."""
        return [self.name, *(shown(self.kind, value) for value in self.values), self.change]


def speed_rows(speed: SpeedInfo) -> list[Row]:
    """Rows of rates and of the bytes that are read for each token."""
    rows = []
    for name, rate in (("prefill", speed.prefill), ("decoding", speed.decoding)):
        spread = f"({rate.lowest:.3g} to {rate.highest:.3g})"
        rows.append(Row(f"{name}, tokens a second", "rate", [rate.dense, rate.fused], rate.ratio, spread))
    rows.append(Row("bytes of weights", "size", speed.weight_bytes))
    rows.append(Row("bytes of cache a token", "size", speed.cache_bytes))
    return rows


def shown(kind: str, value: float) -> str:
    """A value as text."""
    return format(value, _FORMS[kind][0])


def as_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of a table of rows, all of them with values of the same models."""
    models = _MODELS[: len(rows[0].values)]
    return ["", *models, "change"], [row.cells for row in rows]
