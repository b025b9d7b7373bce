"""What a fusion or a healing will do and about what it takes, without doing it: layers, bytes on disk and peak memory.

Layers, parameters and bytes follow from the config and the headers of files, and are exact where all layers have as
many parameters; weights are not read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from lf_hf.checkpoint.base import SPREAD, Base
from lf_hf.checkpoint.saving import check_replaceable
from lf_hf.fuse import low_memory_device
from lf_hf.healing.settings import HealSettings
from lf_hf.inputs import FusionInputs
from lf_hf.measure.predictions import LOGITS as JUDGING_LOGITS
from lf_hf.models import num_parameters
from lf_hf.refit.fit import num_candidates
from lf_hf.runtime.memory import free_memory, in_gib, peak_memory
from lf_hf.runtime.numerics import slow_bfloat16_note
from lf_hf.runtime.words import plural
from lf_hf.settings import LONGEST_GROUP, FusionConfig
from lf_hf.text.judging import PERPLEXITY_LENGTH
from lf_hf.text.sources import TextSource

_TUNING_BYTES = 18  # of a parameter: itself, its gradient and two moments in float32, and a copy to compute in
FilePath = str | os.PathLike[str]


@dataclass(frozen=True)
class Plan:
    """What will be done, `lines`, and what a user should know of it, `notes`; one sentence or figure each.

    `memory` is about how many bytes each process takes of `devices` at its peak.
    """

    head: str
    lines: list[str]
    notes: list[str]
    memory: int
    devices: list[torch.device]

    def summary(self) -> str:
        """All of it, for people."""
        device, free = self.devices[0], sum(map(free_memory, self.devices))
        where = "" if device.type == "cpu" else f" on {device}"
        lines = [f"Plan: {self.head}. Nothing was done.", *self.lines]
        lines.append(f"peak memory{where}, about: {in_gib(self.memory)}")
        lines += [f"note: {note}" for note in self.notes]
        if self.memory > free:
            lines.append(f"note: {in_gib(free)} of memory are free now, which is less than that.")
        return "\n  ".join(lines)


def plan_fusion(
    base: FilePath | Base,
    config: FusionConfig,
    *,
    out: FilePath | None = None,
    low_memory: bool = False,
    calibration: TextSource | None = None,
    **kwargs: Any,
) -> Plan:
    """Say what `fuse_checkpoint` with these arguments would do and take.

    Raises ValueError for what `fuse_checkpoint` would refuse before long work, and OSError if the disk of `out` has no
    room for the result.
    """
    opened = Base.open(base, kwargs)
    notes = []
    if out is not None and check_replaceable(out, opened.name):
        notes.append(_replaced(out))
    if low_memory:
        low_memory_device(config, opened.loading)
    inputs = FusionInputs.open(opened, config, calibration, None)
    config = inputs.config
    healing = inputs.check(out, low_memory=low_memory)
    devices, dtype = _devices(opened.loading.get("device_map")), inputs.dtype
    before, after = inputs.parameters
    stored = sum(file.stat().st_size for file in opened.files())
    if not stored:
        stored = before * dtype.itemsize
        notes.append(f"The base is not on this machine yet; {in_gib(stored)} will be downloaded.")
    if note := slow_bfloat16_note(dtype, devices[0]):
        notes.append(note)
    layers, removed = opened.text_config.num_hidden_layers, config.num_fusions or 1
    fused = f"chosen while fusing, by selection={config.selection!r}"
    if config.selection == "last":
        fused = f"{layers - 1 - removed} to {layers - 1}, numbered from 0"
    lines = [
        f"layers: {_change(layers, layers - removed)}",
        f"layers that become one: {fused}",
        f"parameters: {_change(before, after)}",
        f"bytes on disk: {_change(stored, after * dtype.itemsize)}, as {str(dtype)[6:]}",
    ]
    samples, text = inputs.samples_and_text
    if samples is not None:
        lines.append(f"calibration: {samples.source}")
    if text is not None:
        lines.append(f"calibration: {text.full_source}")
    memory = _fusion_memory(config, opened.config, dtype.itemsize, devices[0], low_memory=low_memory)
    if healing is not None:
        lines.append(f"healing: on {config.heal_tokens:,} tokens")
        lines.append(_states(healing.disk))
        memory = max(memory, healing.memory)
    how_many = f"{removed} {plural(removed, 'fusion')}"
    if config.within_budget:
        how_many = "as many fusions as the budget allows, figures for one"
    return Plan(f"{opened.full_name} with {config.method}, {how_many}", lines, notes, memory, devices)


def _fusion_memory(
    config: FusionConfig, base: PreTrainedConfig, size: int, device: torch.device, *, low_memory: bool
) -> int:
    """Bytes at the peak of a fusion in numbers of `size` bytes, from its few largest terms."""
    layer, weights = num_parameters(base)
    text = base.get_text_config()
    hidden, mlp = text.hidden_size, text.intermediate_size
    longest = (config.num_fusions or 1) + 1  # layers that may become one
    if config.selection == "groups":
        longest = min(longest, LONGEST_GROUP)
    if low_memory:
        layers = longest + 2 if config.fits else 3  # and one that is read meanwhile
        weights = layers * layer + text.vocab_size * hidden
    elif config.fits:  # the new layers, beside those that they are fitted to
        weights += (config.num_fusions or 1) * layer
    judging = alignment = fit = 0
    if config.perplexity_tokens:
        judging = 6 * 4 * min(JUDGING_LOGITS, PERPLEXITY_LENGTH * text.vocab_size)  # logits of two models
    if config.alignment != "none" and device.type == "cpu":
        alignment = 12 * mlp**2 + 8 * hidden * mlp  # cost matrices, and the rows that they compare
    if config.fits:
        # Gram matrices of all candidates for a group's channels, in float32, twice, and their weights.
        candidates = num_candidates(2 * mlp, mlp)
        regression = 8 * candidates**2 + 2 * layer * size + (3 * size + 8) * candidates * hidden
        # Lists of all text's states: before and inside each layer of a group, and around it in both models.
        states = (2 * longest + 5) * config.calibration_tokens * hidden * size
        if low_memory:  # they rest on disk
            states = 0
        fit = max(regression, _TUNING_BYTES * layer) + states
    return peak_memory(device, weights * size, judging, alignment, fit)


def plan_heal(
    fused: FilePath,
    out: FilePath,
    *,
    base: FilePath | Base | None = None,
    text: TextSource | None = None,
    settings: HealSettings | None = None,
    cache: FilePath | None = None,
    training_args: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Plan:
    """Say what `heal` with these arguments would do and take. Neither model's weights are read.

    Raises what `heal` would raise before the training; but not for a base with other weights than the one that was
    fused, nor for an earlier run in `out` that cannot go on.
    """
    from lf_hf.healing.heal import prepare  # imports the Trainer
    from lf_hf.healing.inputs import WORK, open_inputs
    from lf_hf.healing.judge import repeats_note
    from lf_hf.healing.text import expected_epochs, given_text

    settings = HealSettings.taken_from(kwargs, settings)
    inputs, folder = open_inputs(fused, out, base, text, settings, kwargs, reads_weights=False)
    work, model = folder / WORK, inputs.model
    training = prepare(model, inputs.fused_layers, inputs.base, settings, work, training_args or {}, cache)
    settings, placement = training.settings, training.placement
    corpus = placement.text(inputs.corpus, settings)
    parameters = list(training.student.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    steps = f"{settings.steps:,} {plural(settings.steps, 'step')}"
    lines = [
        f"trained: {trained:,} of {sum(p.numel() for p in parameters):,} parameters ({settings.train})",
        f"training: {steps} of {settings.batch * settings.length:,} tokens",
        f"text: {corpus.full_source}",
        f"the base's predictions: {placement.description}",
        _states(placement.disk),
    ]
    notes = []
    if inputs.replaces:
        notes.append(_replaced(out))
    if work.is_dir():
        notes.append(f"{str(out)!r} holds a run that was cut short; if it is of the same healing, it goes on.")
    given = given_text(inputs.tokenizer, corpus, settings, inputs.base.text_config.vocab_size)
    if repeats := repeats_note(expected_epochs(given, corpus, settings)):
        notes.append(repeats)
    head = f"{Path(fused).resolve().name}, healed by its base {inputs.base.name}"
    return Plan(head, lines, notes, placement.memory, [training.arguments.device])


def _states(disk: int) -> str:
    return f"disk, until healing is done, at most about: {in_gib(disk)}"


def _devices(device_map: Any) -> list[torch.device]:
    """Where layers run, as from_pretrained's `device_map` says."""
    if isinstance(device_map, dict):
        return [torch.device(device) for device in dict.fromkeys(device_map.values()) if device != "disk"]
    if device_map in SPREAD and torch.cuda.is_available():
        return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    return [torch.device("cpu" if device_map in (None, *SPREAD) else device_map)]


def _replaced(out: object) -> str:
    return f"{str(out)!r} holds a fused model, which would be replaced."


def _change(before: int, after: int) -> str:
    return f"{before:,} -> {after:,} ({after / before - 1:+.1%})"
