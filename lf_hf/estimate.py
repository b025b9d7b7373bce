"""What a fusion or a healing will do and about what it takes, without doing it: layers, bytes on disk and peak memory.

Layers, parameters and bytes follow from the config and the headers of files and are exact; weights are not read. Memory
is estimated from its few largest terms.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from lf_hf.checkpoint.base import SPREAD, Base
from lf_hf.checkpoint.saving import check_replaceable, check_room
from lf_hf.checkpoint.weights import stored_dtype
from lf_hf.decoder.on_disk import STATES_IN_MEMORY
from lf_hf.decoder.predictions import LOGITS
from lf_hf.fuse import FusionInputs, low_memory_device
from lf_hf.healing.memory import model_bytes
from lf_hf.healing.settings import HealSettings
from lf_hf.measure import PERPLEXITY_LENGTH
from lf_hf.refit.fit import num_candidates
from lf_hf.refit.states import SHARE
from lf_hf.runtime.fields import plural
from lf_hf.runtime.memory import PROCESS, free_memory, in_gib
from lf_hf.runtime.numerics import slow_bfloat16_note
from lf_hf.settings import LONGEST_GROUP, FusionConfig
from lf_hf.text.calibration import CalibrationSamples
from lf_hf.text.sources import TextSource

_CHARACTERS_PER_TOKEN = 4
_STATES_OF_A_GROUP = 11  # times those of all text that the last pass holds, for three layers that become one
_BYTES_TRAINED = 18  # of a parameter: itself, its gradient and two moments in float32, and a copy to compute in


@dataclass(frozen=True)
class Plan:
    """What will be done, `lines`, and what a user should know of it, `notes`; one sentence or figure each.

    `memory` is about how many bytes each process takes at its peak, of which `free` are free now.
    """

    head: str
    lines: list[str]
    notes: list[str]
    memory: int
    free: int

    def summary(self) -> str:
        """All of it, for people."""
        notes = list(self.notes)
        if self.memory > self.free:
            needed = f"less than the {in_gib(self.memory)} that this may take"
            notes.append(f"{in_gib(self.free)} of memory are free now, {needed}.")
        lines = [*self.lines, *(f"note: {note}" for note in notes)]
        return "\n  ".join([f"Plan: {self.head}. Nothing was done.", *lines])


def plan_fusion(
    base: str | os.PathLike[str] | Base,
    config: FusionConfig,
    *,
    out: str | os.PathLike[str] | None = None,
    low_memory: bool = False,
    calibration: TextSource | None = None,
    **kwargs: Any,
) -> Plan:
    """Say what `fuse_checkpoint` with these arguments would do and take.

    Raises ValueError for what `fuse_checkpoint` would refuse before long work, and OSError if the disk of `out` has no
    room for the result.
    """
    opened = Base.open(base, kwargs)
    replaces = out is not None and check_replaceable(out, opened.name)
    if low_memory:
        low_memory_device(config, opened.loading)
    inputs = FusionInputs.open(opened, config, calibration, None)
    inputs.check()
    samples, text = inputs.samples_and_text
    if out is not None:
        check_disk(opened, config, out)

    layers, fused = opened.config.num_hidden_layers, config.num_fusions or 1
    (_, before, after), dtype = _parameters(opened, config), _dtype(opened)
    bytes_before, bytes_after = before * dtype.itemsize, after * dtype.itemsize
    on_disk = sum(file.stat().st_size for file in opened.files())
    devices = _devices(opened.loading.get("device_map"))
    memory, reduced = (_peak(opened, config, samples, devices[0], low_memory=low) for low in (False, True))
    pairs = f"chosen while fusing, on calibration text, by selection={config.selection!r}"
    if config.selection == "last":
        first, last = layers - 1 - fused, layers - 1
        merged = ", then ".join(f"{layer} into {layer - 1}" for layer in range(last, first, -1))
        pairs = f"{merged}; layer {first} then replaces {first} to {last}"
    how_many = f"{fused} {plural(fused, 'fusion')}"
    if config.within_budget:
        how_many = "as many fusions as the budget allows, figures for one"
    where = "" if devices[0].type == "cpu" else f" on {devices[0]}"
    with_low_memory = "cannot be used here"
    with suppress(ValueError):
        low_memory_device(config, opened.loading)
        with_low_memory = in_gib(reduced)
    sources = [samples and samples.source, text and text.full_source]
    notes = [
        f"{str(out)!r} holds a fused model, which would be replaced." if replaces else None,
        None if on_disk else f"The base is not on this machine yet; {in_gib(bytes_before)} will be downloaded.",
        slow_bfloat16_note(dtype, devices[0]),
    ]
    return Plan(
        f"{opened.full_name} with {config.method}, {how_many}",
        [
            f"layers: {_change(layers, layers - fused)}",
            f"pairs, layers numbered from 0 as in the base: {pairs}",
            f"parameters: {_change(before, after)}",
            *([f"healing: on {config.heal_tokens:,} tokens"] if config.heal_tokens else []),
            f"bytes on disk: {_change(on_disk or bytes_before, bytes_after)}, as {str(dtype)[6:]}",
            *(f"calibration: {source}" for source in sources if source),
            f"peak memory{where}, about: {in_gib(memory)}; with low memory: {with_low_memory}",
        ],
        [note for note in notes if note],
        reduced if low_memory else memory,
        sum(map(free_memory, devices)),
    )


def check_disk(base: Base, config: FusionConfig, out: str | os.PathLike[str]) -> None:
    """Raise OSError if the disk of `out` has no room for the weights of `base` fused as `config` says.

    A fused model that is there keeps its room until the new one is whole.
    """
    check_room(out, _parameters(base, config)[-1] * _dtype(base).itemsize, "the fused model takes")


def plan_heal(
    fused: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | Base | None = None,
    text: TextSource | None = None,
    settings: HealSettings | None = None,
    cache: str | os.PathLike[str] | None = None,
    training_args: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Plan:
    """Say what `heal` with these arguments would do and take. Neither model's weights are read.

    Raises what `heal` would raise before the training; but not for a base with other weights than the one that was
    fused, nor for an earlier run in `out` that cannot go on.
    """
    from lf_hf.healing.heal import prepare  # imports the Trainer
    from lf_hf.healing.inputs import WORK, open_inputs

    settings, given = HealSettings.taken_from(kwargs, settings), dict(training_args or {})
    inputs, folder = open_inputs(fused, out, base, text, settings, kwargs, reads_weights=False)
    model = inputs.model
    settings, arguments, student, teacher = prepare(
        model, inputs.fused_layers, inputs.base.config, settings, folder / WORK, given, cache
    )
    parameters = [(p.numel(), p.requires_grad) for p in student.parameters()]
    device, on_cpu = arguments.device, arguments.device.type == "cpu"
    memory = teacher.memory + (PROCESS + sum(p.nbytes for p in model.parameters()) if on_cpu else 0)
    steps = f"{settings.steps:,} {plural(settings.steps, 'step')}"
    goes_on = f"{str(out)!r} holds a run that was cut short; if it is of the same healing, it goes on."
    return Plan(
        f"{Path(fused).resolve().name}, healed by its base {inputs.base.name}",
        [
            f"trained: {sum(n for n, trained in parameters if trained):,} of {sum(n for n, _ in parameters):,} "
            f"parameters ({settings.train})",
            f"training: {steps} of {settings.batch * settings.length:,} tokens",
            f"text: {inputs.corpus.full_source}",
            f"the base's predictions: {teacher.description}",
            f"peak memory{'' if on_cpu else f' on {device}'}, about: {in_gib(memory)}",
            f"disk, until it is done, at most about: {in_gib(teacher.disk)}",
        ],
        [goes_on] if (folder / WORK).is_dir() else [],
        memory,
        free_memory(device),
    )


def _parameters(base: Base, config: FusionConfig) -> tuple[int, int, int]:
    """Of a layer, of the base and of what it is fused to; by one fusion where a budget says how many."""
    with torch.device("meta"):
        layer = sum(weights.numel() for weights in base.family.decoder_layer(base.config, layer_idx=0).parameters())
    count = model_bytes(base.config, 1)
    return layer, count, count - (config.num_fusions or 1) * layer


def _dtype(base: Base) -> torch.dtype:
    """What the base's weights are in when they are loaded."""
    files = base.files()
    stored = torch.float32 if base.hub.get("gguf_file") or not files else stored_dtype(files[0])
    return base.dtype or cast("torch.dtype | None", base.config.dtype) or stored


def _peak(
    base: Base, config: FusionConfig, samples: CalibrationSamples | None, device: torch.device, *, low_memory: bool
) -> int:
    """Bytes at the peak of a fusion: the process, the weights, and the most that one phase needs beside them.

    Activations of a sequence are small beside these. States of running text count where they would be kept there.
    """
    model, size, (layer, before, after) = base.config, _dtype(base).itemsize, _parameters(base, config)
    hidden, mlp, fused = model.hidden_size, model.intermediate_size, config.num_fusions or 1
    if low_memory:  # two layers, or those of a group, and on a device the next one, which is read meanwhile
        held = LONGEST_GROUP + 1 if config.selection == "groups" else 2
        weights = (held + (device.type != "cpu")) * layer + model.vocab_size * hidden
    else:  # and the originals of layers that change, at most, or those of two sets of groups that are made
        sets = 0 if config.refit == "none" else 2 if config.selection == "groups" else 1
        weights = before + sets * fused * layer
    # Predictions of some tokens, six times in float32, and final states of two texts, the dense model's too.
    judging = 24 * min(LOGITS, PERPLEXITY_LENGTH * model.vocab_size) + 4 * config.perplexity_tokens * hidden * size
    phases = [judging if config.perplexity_tokens else 0, _BYTES_TRAINED * after if config.heal_tokens else 0]
    if samples is not None:  # states of all samples before and after a layer
        tokens = sum(min(len(text) // _CHARACTERS_PER_TOKEN, config.sample_length) for text in samples.texts)
        phases.append(2 * tokens * hidden * size)
    if config.alignment != "none" and device.type == "cpu":
        phases.append(12 * mlp**2 + 8 * hidden * mlp)  # cost matrices and what they are of; never on a GPU
    if config.fits:  # Gram squares of all candidates, in float32 and once more, and their weights
        candidates = num_candidates(2 * mlp, mlp)
        fit = 8 * candidates**2 + 2 * layer * size + (3 * size + 8) * candidates * hidden
        tuning = _BYTES_TRAINED * layer if config.refit == "projections" else 0
        states = _STATES_OF_A_GROUP * config.calibration_tokens * hidden * size
        room = STATES_IN_MEMORY if low_memory and device.type == "cpu" else int(free_memory(device) * SHARE)
        phases.append(max(fit, tuning) + (states if states < room else 0))
    return (0 if device.type == "cuda" else PROCESS) + weights * size + max(phases)


def _devices(device_map: Any) -> list[torch.device]:
    """Where layers run, as from_pretrained's `device_map` says."""
    if device_map in SPREAD and torch.cuda.is_available():
        return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    return [torch.device("cpu" if device_map in (None, *SPREAD) else device_map)]


def _change(before: int, after: int) -> str:
    return f"{before:,} -> {after:,} ({after / before - 1:+.1%})"
