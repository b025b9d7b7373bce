"""FusionReport: what was fused, how well it matched, what it cost, and what it did to the model."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

from lf_hf.report.records import (
    BudgetInfo,
    CalibrationInfo,
    Continuation,
    FittedLayer,
    FusionStep,
    GroupCost,
    HealingInfo,
    PerplexityInfo,
    SpeedInfo,
)
from lf_hf.report.rows import Row, text_rows
from lf_hf.runtime.checked_json import from_json, json_ready, parse_json
from lf_hf.settings import FusionConfig

REPORT_NAME = "fusion_report.json"
MOST_LAYERS = 10_000  # larger counts are errors
CHANGED_NOTE = (
    "The weights were changed after fusing, as by training, by merging an adapter or by another dtype: perplexities "
    "and numbers of parameters are those of the model as it was fused."
)


@dataclass(frozen=True)
class FusionReport:
    """All that a fusion found out. JSON by `to_dict` and `save`, back by `from_dict` and `load`.

    What was not measured or asked for, or does not apply, is None or empty. `similarity` is (L, L) and `embeddings` is
    (L, N, d), for N samples whose MMLU subjects are `sample_labels`. `influences` is how much each layer of the dense
    model changes the residual stream. `seconds` is wall time by stage. `notes` holds what a user should know, one
    sentence each. `continuations` shows what both models write. `fingerprints` says by content what the model was made
    of, see `lf_hf.checkpoint.fused_cache.fingerprints`. `weights_digest` is that of the fused model and `base_digest`
    that of the dense one in `dtype`, see `lf_hf.runtime.numerics.weights_digest`. `healed` says how the model was
    trained after the fusion, and `budget` what said how many layers to fuse. `group_costs` are those of groups that
    were measured, and `predicted` what the best of them are expected to cost together for 1, 2, ... fusions.

    `base` is a name of the hub. Of a folder or a file it is the last name alone: reports get published, and local paths
    are private.
    """

    base: str
    config: dict[str, Any]
    steps: list[FusionStep]
    fitted_layers: list[FittedLayer]
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
    group_costs: list[GroupCost] = field(default_factory=list)
    predicted: list[float] = field(default_factory=list)
    speed: SpeedInfo | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "base", published_name(self.base))

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the settings that had an effect; all of them where this version does not know them."""
        with suppress(ValueError):
            in_effect = FusionConfig.from_kwargs(**self.config).in_effect()
            return {name: value for name, value in self.config.items() if name in in_effect}
        return self.config

    def of_weights(self, digest: str | None) -> FusionReport:
        """The report with a note if the model's weights, with this digest, are not those that were fused."""
        if digest is None or self.weights_digest in (None, digest) or CHANGED_NOTE in self.notes:
            return self
        return dataclasses.replace(self, notes=[CHANGED_NOTE, *self.notes], fingerprints=None)

    @property
    def groups(self) -> list[dict[int, float]]:
        """For each layer of the fused model the original layers that it stands for, each with its share.

        A share is an original layer's weight in the average, or its part of the MLP channels where channels were
        selected. Shares add up to 1.
        """
        groups = {number: {number: 1.0} for number in range(self.layers_before)}
        for step in self.steps:
            i, j = groups[step.pair[0]], groups.pop(step.pair[1])
            kept_i, kept_j = step.channels_kept or (step.ratio_i, step.ratio_j)
            for group, kept in ((i, kept_i), (j, kept_j)):
                for number in group:
                    group[number] *= kept / (kept_i + kept_j)
            i.update(j)
        of_fits = {tuple(fitted.layers): fitted.channels_kept for fitted in self.fitted_layers if fitted.channels_kept}
        for group in groups.values():
            if channels := of_fits.get(tuple(group)):
                group.update((number, n / sum(channels)) for number, n in zip(group, channels, strict=True))
        return [*groups.values()]

    @property
    def layers_removed_fraction(self) -> float:
        """Layers removed over all layers."""
        return (self.layers_before - self.layers_after) / self.layers_before

    @property
    def parameters_removed_fraction(self) -> float:
        """Parameters removed over all parameters, tied ones counted once."""
        return (self.parameters_before - self.parameters_after) / self.parameters_before

    def rows(self, bytes_on_disk: tuple[int, int] | None = None) -> list[Row]:
        """Sizes, and figures of each text, of the base, the fused model and, after healing, the healed model.

        `bytes_on_disk` are those of the base and of the last model.
        """
        rows = [
            Row("layers", "size", [self.layers_before, self.layers_after]),
            Row("parameters", "size", [self.parameters_before, self.parameters_after]),
        ]
        if bytes_on_disk:
            rows.append(Row("bytes on disk", "size", bytes_on_disk))
        if self.speed is not None:
            for name, rate in (("prefill", self.speed.prefill), ("decoding", self.speed.decoding)):
                spread = f"({rate.lowest:.3g} to {rate.highest:.3g})"
                rows.append(Row(f"{name}, tokens a second", "rate", [rate.dense, rate.fused], rate.ratio, spread))
            rows.append(Row("bytes of weights", "size", self.speed.weight_bytes))
            rows.append(Row("bytes of cache a token", "size", self.speed.cache_bytes))
        if self.healed is None:
            for text in self.perplexities:
                rows += text_rows(text.name, text.dense, (text.fused, text.divergence, text.agreement))
        else:
            rows = [row._replace(values=[*row.values, row.values[-1]]) for row in rows]  # healing changes no sizes
            dense = {text.name: text.dense for text in self.perplexities}
            for of in self.healed.judged:
                before = (of.perplexity_before, of.divergence_before, of.agreement_before)
                after = (of.perplexity_after, of.divergence_after, of.agreement_after)
                rows += text_rows(of.name, dense.get(of.name), before, after)
        return rows

    @property
    def sources(self) -> list[str]:
        """What the figures in `rows` were measured on, one line each."""
        return [text.source for text in self.perplexities] + ([self.speed.source] if self.speed else [])

    def summary(self) -> str:
        """A few lines for people."""
        lines = [f"Fused {self.base} with {self.config['method']}:"]
        for row in self.rows():
            name, *values, change = row.cells
            lines.append(f"{name}: {' -> '.join(values)}{f', {change}' if change else ''}")
        seconds = ", ".join(f"{stage} {taken:.1f}" for stage, taken in self.seconds.items())
        notes = [f"note: {note}" for note in self.notes]
        return "\n  ".join([*lines, *self.sources, *self.details(), f"seconds: {seconds}", *notes])

    def details(self) -> list[str]:
        """How the model was made, a line each: on which text, of which layers, and what was fitted and healed."""
        lines = [f"calibration: {of.source} ({of.samples} samples, {of.tokens} tokens)" for of in self.calibration]
        for step in self.steps:
            i, j = step.pair
            line = f"layer {i} <- {i} x {step.ratio_i:.4f} + {j} x {step.ratio_j:.4f}"
            figures = {"influence": step.influence, "added divergence": step.divergence}
            if step.matches:
                figures["mean matched cosine"] = statistics.mean(match.cosine_after for match in step.matches.values())
            lines.append(line + "".join(f", {name} {v:.4f}" for name, v in figures.items() if v is not None))
        for fitted in self.fitted_layers:
            kept = f" keeping {fitted.channels_kept} channels" if fitted.channels_kept else ""
            errors = f"error {fitted.error_before:.3f} -> {fitted.error_after:.3f}"
            lines.append(f"last fit of layers {fitted.layers}{kept}, {errors}")
        for name, done in (("budget", self.budget), ("healed", self.healed)):
            lines += [f"{name}: {done.summary()}"] if done else []
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Everything, plus both compression figures, as strict JSON has it."""
        values: dict[str, Any] = json_ready(dataclasses.asdict(self))
        return values | {
            "layers_removed_fraction": self.layers_removed_fraction,
            "parameters_removed_fraction": self.parameters_removed_fraction,
        }

    @classmethod
    def from_dict(cls, values: Any, name: str = "This") -> FusionReport:
        """The report that `to_dict` wrote. Raises ValueError, with `name`, for anything else."""
        try:
            report = from_json(cls, values, "it")
            report._check()
        except ValueError as error:
            raise ValueError(f"{name} is no fusion report: {error}") from None
        return report

    def _check(self) -> None:
        """Raise ValueError where a report cannot be shown, as after editing it by hand."""
        if not 2 <= self.layers_before <= MOST_LAYERS:
            raise ValueError(f"layers_before={self.layers_before!r:.80} is not 2 to {MOST_LAYERS}.")
        try:
            left = len(self.groups)
            self.summary()
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"its parts do not fit together ({error!r:.200}); save the model again.") from None
        if left != self.layers_after:
            raise ValueError(f"layers_after={self.layers_after} is not what the steps leave; save the model again.")

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `fusion_report.json` into a folder."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        (Path(folder) / REPORT_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FusionReport:
        """Read a report from its file or from the folder of a fused checkpoint."""
        file = Path(path, REPORT_NAME) if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise ValueError(f"{str(path)!r} holds no {REPORT_NAME}; give the folder of a fused checkpoint.")
        name = repr(str(file))
        return cls.from_dict(parse_json(file.read_bytes(), name), name)


def published_name(base: str) -> str:
    """A model's name as it may be published: the last name alone of what is a path on this machine or another one."""
    kinds: tuple[type[PurePath], ...] = (PurePosixPath, PureWindowsPath)
    if os.path.exists(base):
        return os.path.basename(os.path.abspath(base)) or base
    return next((kind(base).name for kind in kinds if kind(base).is_absolute()), "") or base
