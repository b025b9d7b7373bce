"""Figures of models as people read them: the rows of every table about a fusion.

A report or a sweep has the figures; the terminal, the model card and the page only lay out the rows made of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

NOT_MEASURED = "-"
_MODELS = ("base", "fused", "healed")
# Of each kind of figure: how a value is written, and how a change is.
_FORMS = {
    "size": (",", "percent"),
    "perplexity": (".4g", "times"),
    "divergence": (".4g", "none"),
    "agreement": (".1%", "percent"),
    "rate": (".4g", "times"),
    "speed-up": (".3g", "none"),
}


class Row(NamedTuple):
    """One figure of the base, of the fused model and, where there is one, of the healed model.

    `kind` is "size", "perplexity", "divergence", "agreement" or "rate". A value that was not measured is None. `ratio`
    is that of the last value to the base's where it was measured on its own, and `spread` what it lies in.
    """

    name: str
    kind: str
    values: Sequence[float | None]
    ratio: float | None = None
    spread: str = ""

    @property
    def change(self) -> str:
        """The last value against the base's; nothing where one of them is missing, or the base's is 0 by definition."""
        first, last, way = self.values[0], self.values[-1], _FORMS[self.kind][1]
        if first is None or last is None or way == "none":
            return ""
        ratio = last / first if self.ratio is None else self.ratio
        return f"x {ratio:.3g} {self.spread}".rstrip() if way == "times" else f"{ratio - 1:+.1%}"

    @property
    def cells(self) -> list[str]:
        """Name, values and change, as text."""
        return [self.name, *(shown(self.kind, value) for value in self.values), self.change]


def text_rows(name: str, dense: float | None, *models: tuple[float, float, float]) -> list[Row]:
    """Rows of a text: the base's perplexity beside perplexity, divergence and agreement of each other model."""
    columns = zip((dense, 0.0, 1.0), *models, strict=True)
    kinds = ("perplexity", "divergence", "agreement")
    return [Row(f"{kind}, {name}", kind, values) for kind, values in zip(kinds, columns, strict=True)]


def shown(kind: str, value: float | None) -> str:
    """A value of some kind of figure as text."""
    return NOT_MEASURED if value is None else format(value, _FORMS[kind][0])


def as_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of a table of rows, all of them with values of the same models."""
    return ["", *_MODELS[: len(rows[0].values)], "change"], [row.cells for row in rows]
