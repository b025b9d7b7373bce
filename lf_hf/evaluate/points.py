"""The points of a sweep and their figures."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from lf_hf.report.figures import FIGURES
from lf_hf.report.rows import shown

DENSE = "dense"
HEALED = ", healed"  # added to the name of a method
_ORDER = ("speed-up", *(figure.name for figure in FIGURES))  # in which figures that are no task's are shown


@dataclass(frozen=True)
class Score:
    """A task's main metric, with its standard error where lm-eval gives one; or a figure of a text.

    `metric` also names the filter that takes the answer out of what a model wrote, where a task has such.
    """

    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool = True

    @property
    def is_perplexity(self) -> bool:
        """Whether it is a perplexity of some kind, which is looked at on a logarithmic scale."""
        return "perplexity" in self.metric

    def __str__(self) -> str:
        if self.metric in _ORDER:
            return shown(self.metric, self.value)
        return f"{self.value:.4f}" + (f" ± {self.stderr:.4f}" if self.stderr is not None else "")


@dataclass(frozen=True)
class Point:
    """One model of a sweep: the base (`method` "dense") or a fusion of it.

    `key` identifies base, settings, calibration, tasks and limit. `texts` has the figures of a fusion's report, by the
    name of the judging text. `speedups` has how many times as fast as the base "prefill" and "decoding" are, where that
    was measured. `seconds` is wall time, evaluating and fusing, without loading and measuring the dense model.
    `calibration` says where the texts are from that were used.
    """

    key: str
    method: str
    num_fusions: int
    layers: int
    parameters: int
    layers_removed_fraction: float
    parameters_removed_fraction: float
    scores: dict[str, Score]
    seconds: dict[str, float]
    versions: dict[str, str]
    texts: dict[str, dict[str, float]] = field(default_factory=dict)
    speedups: dict[str, float] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    calibration: str = ""

    @property
    def figures(self) -> dict[str, Score]:
        """All scores by task, and figures of texts by name, such as "perplexity, docs"."""
        figures = dict(self.scores)
        for name, speedup in self.speedups.items():
            figures[f"speed-up, {name}"] = Score("speed-up", speedup, None)
        for figure, (name, of_text) in product(FIGURES, self.texts.items()):
            if figure.name in of_text:
                score = Score(figure.name, of_text[figure.name], None, figure.higher_is_better)
                figures[f"{figure.label}, {name}"] = score
        return figures

    def value(self, name: str) -> float:
        """A figure's value, NaN where it was not measured."""
        return self.figures[name].value if name in self.figures else math.nan


def figure_names(points: Sequence[Point]) -> list[str]:
    """Names of the figures that any of some points has: tasks, then speed, and what predictions of texts are like."""
    metrics = {name: figure.metric for point in points for name, figure in point.figures.items()}
    return sorted(metrics, key=lambda name: _ORDER.index(metrics[name]) if metrics[name] in _ORDER else -1)


def check_evaluation(limit: object, batch_size: object) -> None:
    """Raise ValueError unless these are what lm-eval takes."""
    fits = isinstance(limit, int | float) and 0 < limit < math.inf and (limit < 1 or limit % 1 == 0)
    if limit is not None and not fits:
        raise ValueError(f"limit must be a number of questions, whole, or their share below 1, got {limit!r:.80}.")
    if not re.fullmatch(r"auto(:\d+(\.\d+)?)?|[1-9]\d*", str(batch_size)):
        raise ValueError(f"batch_size must be an integer of at least 1, auto, or auto:N, got {batch_size!r:.80}.")
