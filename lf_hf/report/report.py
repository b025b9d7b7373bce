"""FusionReport: all that a fusion found out."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path, PureWindowsPath
from typing import Any

from pydantic import TypeAdapter
from pydantic_core import from_json, to_json

from lf_hf.report.data import (
    BudgetInfo,
    CalibrationInfo,
    Continuation,
    FusedLayer,
    HealingInfo,
    PerplexityInfo,
    SpeedInfo,
)
from lf_hf.report.figures import FIGURES, dense_figures
from lf_hf.report.rows import Row, speed_rows
from lf_hf.runtime.errors import explained
from lf_hf.settings import METHODS, FusionConfig

REPORT_NAME, PAGE_NAME = "fusion_report.json", "fusion_report.html"
MOST_LAYERS = 10_000  # larger counts are errors
_HARMFUL_RATIO = 2
CHANGED_NOTE = (
    "The weights were changed after fusing, as by training, by merging an adapter or by another dtype: perplexities "
    "and numbers of parameters are those of the model as it was fused."
)


@dataclass(frozen=True)
class FusionReport:
    """All that a fusion found out; what was not measured or does not apply is None or empty.

    Attributes
    ----------
    base : str
        Name on the hub. Of a folder or file only the last name: reports get published, and local paths are private.
    similarity, embeddings : list or None
        (L, L) and (L, N, d) for L layers and N samples, whose MMLU subjects are `sample_labels`.
    influences : list of float or None
        How much each layer of the base changes the residual stream.
    seconds : dict
        Wall time by stage.
    notes : list of str
        What a user should know of the fusion, one sentence each; `all_notes` has those on the model as it is.
    changed : bool
        Whether the weights were changed after they were fused, and healed if they were.
    fingerprints, weights_digest, base_digest
        What the model was made of, by content, and digests of the weights of both models; the base's in `dtype`.
    license : dict
        What the base's model card says of its licence.
    revision : str or None
        Branch, tag or commit of the base on the hub, where one was named.
    """

    base: str
    config: dict[str, Any]
    fused_layers: list[FusedLayer]
    layers_before: int
    layers_after: int
    parameters_before: int
    parameters_after: int
    calibration: list[CalibrationInfo]
    perplexities: list[PerplexityInfo]
    similarity: list[list[float]] | None
    embeddings: list[list[list[float]]] | None
    seconds: dict[str, float]
    versions: dict[str, str]
    notes: list[str]
    sample_labels: list[str] | None = None
    influences: list[float] | None = None
    fingerprints: dict[str, str] | None = None
    weights_digest: str | None = None
    continuations: list[Continuation] = field(default_factory=list)
    base_digest: str | None = None
    dtype: str | None = None
    healed: HealingInfo | None = None
    budget: BudgetInfo | None = None
    speed: SpeedInfo | None = None
    license: dict[str, str] = field(default_factory=dict)
    revision: str | None = None
    changed: bool = False

    @property
    def all_notes(self) -> list[str]:
        """What a user should know of the model as it is, one sentence each."""
        notes = [CHANGED_NOTE] if self.changed else []
        notes += self.notes
        if self.healed is not None:
            notes += self.healed.notes
        return notes + damage_notes(self.perplexities, self.continuations, self.config["method"])

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that had an effect."""
        in_effect = FusionConfig(**self.config).in_effect()
        return {name: value for name, value in self.config.items() if name in in_effect}

    @property
    def options(self) -> dict[str, Any]:
        """The settings that say how to fuse so again: those that had an effect and are no defaults."""
        usual, always = FusionConfig(1, self.config["method"]).to_dict(), ("num_fusions", "method")
        return {name: value for name, value in self.settings.items() if name in always or value != usual[name]}

    def for_weights(self, digest: str | None) -> FusionReport:
        """The report of a model with these weights, which may not be those that were fused."""
        if digest is None or self.weights_digest in (None, digest):
            return self
        return dataclasses.replace(self, changed=True, fingerprints=None)

    @property
    def groups(self) -> list[dict[int, float]]:
        """For each layer of the fused model the layers of the base that it stands for, with their shares."""
        groups = {number: {number: 1.0} for number in range(self.layers_before)}
        for fused in self.fused_layers:
            for number in fused.layers:
                del groups[number]
            groups[fused.layers[0]] = dict(zip(fused.layers, fused.shares, strict=True))
        return [groups[number] for number in sorted(groups)]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Neighbouring layers of the base that were joined, in the order in which averages join them."""
        return [pair for fused in self.fused_layers for pair in fused.pairs]

    @property
    def layers_removed_fraction(self) -> float:
        """Layers removed over all layers."""
        return (self.layers_before - self.layers_after) / self.layers_before

    @property
    def parameters_removed_fraction(self) -> float:
        """Parameters removed over all parameters, tied ones counted once."""
        return (self.parameters_before - self.parameters_after) / self.parameters_before

    def rows(self, bytes_on_disk: tuple[int, int] | None = None) -> list[Row]:
        """Sizes, speed, and figures of each text, of the base, the fused and, where there is one, the healed model.

        `bytes_on_disk` are those of the base and of the last model.
        """
        rows = [
            Row("layers", "size", [self.layers_before, self.layers_after]),
            Row("parameters", "size", [self.parameters_before, self.parameters_after]),
        ]
        if bytes_on_disk:
            rows.append(Row("bytes on disk", "size", bytes_on_disk))
        if self.speed is not None:
            rows += speed_rows(self.speed)
        first_judged = {}
        if self.healed is not None:
            rows = [row._replace(values=[*row.values, row.values[-1]]) for row in rows]  # as of the fused one
            first_judged = {text.name: text for text in self.healed.all[0].judged}
        for text in self.perplexities:
            models = [dense_figures(text.dense), text.figures]
            if self.healed is not None:
                models.insert(1, first_judged.get(text.name, text).figures)
            for figure in FIGURES:
                if any(figure.name not in model for model in models):
                    continue  # of a report that is older than the figure
                values = [model[figure.name] for model in models]
                rows.append(Row(f"{figure.label}, {text.name}", figure.name, values))
        return rows

    @property
    def sources(self) -> list[str]:
        """What the figures in `rows` were measured on, one line each."""
        return [measured.source for measured in (*self.perplexities, self.speed) if measured is not None]

    def summary(self) -> str:
        """A few lines for people."""
        lines = [f"Fused {self.base} (method {self.config['method']}):"]
        for row in self.rows():
            name, *values, change = row.cells
            line = f"{name}: {' -> '.join(values)}"
            lines.append(f"{line}, {change}" if change else line)
        lines += self.sources
        lines += self.details()
        seconds = [f"{stage} {taken:.1f}" for stage, taken in self.seconds.items()]
        lines.append(f"seconds: {', '.join(seconds)}")
        lines += [f"note: {note}" for note in self.all_notes]
        return "\n  ".join(lines)

    def details(self) -> list[str]:
        """How the model was made, one line each: calibration text, fused layers, budget and healing."""
        lines = [text.summary() for text in self.calibration]
        lines += [fused.summary() for fused in self.fused_layers]
        if self.budget is not None:
            lines.append(f"budget: {self.budget.summary()}")
        if self.healed is not None:
            lines.append(f"healed: {self.healed.summary()}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Everything, plus both compression figures, as strict JSON has it."""
        values: dict[str, Any] = from_json(to_json(self, inf_nan_mode="strings"))
        values["layers_removed_fraction"] = self.layers_removed_fraction
        values["parameters_removed_fraction"] = self.parameters_removed_fraction
        return values

    @classmethod
    def from_dict(cls, values: Any, name: str = "This") -> FusionReport:
        """The report that `to_dict` wrote. Raises ValueError, with `name`, for anything else."""
        with explained(f"{name} is no fusion report", "save the model again", ValueError):
            report = TypeAdapter(cls).validate_python(values)
            if not 2 <= report.layers_before <= MOST_LAYERS:
                raise ValueError(f"layers_before={report.layers_before!r:.80} is not 2 to {MOST_LAYERS}")
            try:
                remaining = len(report.groups)
                report.summary()
                _ = report.settings
            except Exception as error:  # as after editing by hand
                raise ValueError(f"its parts do not fit together: {error!r:.200}") from None
            if remaining != report.layers_after:
                raise ValueError(f"layers_after={report.layers_after} does not fit its fused layers")
        return report

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `fusion_report.json` into a folder."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        Path(folder, REPORT_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FusionReport:
        """Read a report from its file or from the folder of a fused checkpoint."""
        file = Path(path)
        if file.is_dir():
            file /= REPORT_NAME
        if not file.is_file():
            raise ValueError(f"{str(path)!r} holds no {REPORT_NAME}; give the folder of a fused checkpoint.")
        with explained(f"{str(file)!r} is not JSON", "save the model again", ValueError):
            values = from_json(file.read_bytes())
        return cls.from_dict(values, repr(str(file)))


def damage_notes(judged: Sequence[PerplexityInfo], continuations: Sequence[Continuation], method: str) -> list[str]:
    """Notes about perplexities that more than doubled, and about prompts after which only the base writes something.

    The advice depends on the method that layers were fused by.
    """
    notes = []
    collapsed = [text for text in judged if not text.fused <= _HARMFUL_RATIO * text.dense]  # NaN is harm, too
    if collapsed:
        moved = " and ".join(f"from {text.dense:.4g} to {text.fused:.4g} ({text.name})" for text in collapsed)
        notes.append(
            f"Perplexity went {moved}: the fused model predicts text far worse than its base, even where "
            f"multiple-choice scores look fine. {METHODS[method].advice}"
        )
    prompts = [repr(text.prompt) for text in continuations if text.dense.strip() and not text.fused.strip()]
    if prompts:
        notes.append(
            f"The fused model writes nothing where its base goes on, after {', '.join(prompts)}. Fewer fusions help, "
            "or text of that kind to calibrate and heal on."
        )
    return notes


def published_name(base: str) -> str:
    """A model's name as it may be published: of a path, on this machine or another one, the last name alone."""
    if os.path.exists(base):
        return os.path.basename(os.path.abspath(base)) or base
    path = PureWindowsPath(base)  # which takes slashes of either kind
    return path.name if path.root and path.name else base


def versions() -> dict[str, str]:
    """Versions of what a fusion's result depends on."""
    names = ["lf_hf", "torch", "transformers", "numpy", "scipy", "scikit-learn"]
    if find_spec("lap"):
        names.append("lapx")
    return {name: version(name) for name in names} | {"python": platform.python_version()}
