"""The points of a sweep, their figures, and the file that keeps them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lf_hf.report.rows import shown
from lf_hf.runtime.checked_json import dataclass_from_json, json_ready, parse_json

DENSE = "dense"
HEALED = ", healed"  # after a method
RESULTS = "results.jsonl"
_ORDER = ("speed-up", "perplexity", "divergence", "agreement")  # of figures that are no task's
_BEGINNING = b'{"key": "'  # of each of its lines


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

    `key` identifies base, settings, calibration, tasks and limit. `perplexities` has one entry a judging text, by its
    name, and so have `divergences` and `agreements`, which compare predictions with the base's as in a fusion's report;
    these are empty in results of an older version. `speedups` has how many times as fast as the base "prefill" and
    "decoding" are, where that was measured. `seconds` is wall time, evaluating and fusing: that of all steps
    from the dense model on, whichever point they were made for first, without loading and measuring the dense model.
    """

    key: str
    method: str
    num_fusions: int
    layers: int
    parameters: int
    layers_removed_fraction: float
    parameters_removed_fraction: float
    perplexities: dict[str, float]
    scores: dict[str, Score]
    config: dict[str, Any] | None
    notes: list[str]
    seconds: dict[str, float]
    versions: dict[str, str]
    divergences: dict[str, float] = field(default_factory=dict)
    agreements: dict[str, float] = field(default_factory=dict)
    speedups: dict[str, float] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, Score]:
        """All scores by task, and figures of texts by name, such as "perplexity, docs"."""
        of_texts = {"perplexity": self.perplexities, "divergence": self.divergences, "agreement": self.agreements}
        return self.scores | {
            f"{metric}, {name}": Score(metric, value, None, metric in ("agreement", "speed-up"))
            for metric, values in (of_texts | {"speed-up": self.speedups}).items()
            for name, value in values.items()
        }


def figure_names(points: Sequence[Point]) -> list[str]:
    """Names of the figures that any of some points has: tasks, then speed, and what predictions of texts are like."""
    names = dict.fromkeys(name for point in points for name in point.figures)
    metrics = {name: figure.metric for point in points for name, figure in point.figures.items()}
    return sorted(names, key=lambda name: _ORDER.index(metrics[name]) if metrics[name] in _ORDER else -1)


def read_points(path: Path) -> dict[str, Point]:
    """The points of a results file by their keys, without a last line that an interruption cut short.

    Raises
    ------
    ValueError
        If it holds anything else.
    """
    if not path.is_file():
        return {}
    *lines, rest = path.read_bytes().split(b"\n")
    if not (rest.startswith(_BEGINNING) or _BEGINNING.startswith(rest)):
        lines.append(rest)
    points = {}
    for number, line in enumerate(lines, 1):
        try:
            point = dataclass_from_json(Point, parse_json(line, "it"), "it")
        except ValueError as error:
            raise ValueError(
                f"Line {number} of {str(path)!r} is no result of a sweep, so choose another folder: {error}"
            ) from None
        points[point.key] = point
    return points


def append_point(path: Path, point: Point) -> None:
    """Add a point to a results file, whole or not at all; it is on the disk when this returns.

    A last line that an interruption cut short goes.
    """
    left = memoryview((json.dumps(json_ready(dataclasses.asdict(point)), allow_nan=False) + "\n").encode())
    size = path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0
    with path.open("ab", buffering=0) as file:
        os.truncate(path, size)
        try:
            while left:  # a disk that gets full takes a part
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:
            os.truncate(path, size)
            raise


def check_batch_size(batch_size: object) -> None:
    """Raise ValueError unless this is a batch size of lm-eval's."""
    if not re.fullmatch(r"auto(:\d+(\.\d+)?)?|[1-9]\d*", str(batch_size)):
        raise ValueError(f"batch_size must be an integer of at least 1, auto, or auto:N, got {batch_size!r:.80}.")
