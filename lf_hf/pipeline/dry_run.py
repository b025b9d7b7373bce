"""What a fusion or a healing will do, and about what it takes, for people; nothing is done."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lf_hf.checkpoint.saving import checked_folder, target_note
from lf_hf.checkpoint.weights import tensor_types
from lf_hf.pipeline.fusion import FusionInputs
from lf_hf.pipeline.healing import HealInputs
from lf_hf.pipeline.planning import fusion_plan, healing_plan
from lf_hf.plan.plan import Plan
from lf_hf.runtime.memory import in_gib
from lf_hf.runtime.words import plural

FilePath = str | os.PathLike[str]


@dataclass(frozen=True)
class DryRun:
    """What will be done, `lines`, by which plan, and what a user should know of it, `notes`."""

    head: str
    lines: list[str]
    plan: Plan
    notes: list[str]

    def summary(self) -> str:
        """All of it, for people."""
        lines = [f"Plan: {self.head}. Nothing was done.", *self.lines, *self.plan.lines()]
        return "\n  ".join([*lines, *(f"note: {note}" for note in self.notes)])


def plan_fusion(inputs: FusionInputs, out: FilePath | None = None, *, overwrite: bool = False) -> DryRun:
    """Say what `fuse_checkpoint` of these inputs would do and take.

    Raises ValueError for what `fuse_checkpoint` would refuse before long work, and OSError if the disk of `out` has no
    room for the result.
    """
    config, opened = inputs.config, inputs.base
    folder = None if out is None else checked_folder(out)
    notes = opened.notes()
    if folder is not None:
        notes += _of_target(inputs, folder, overwrite=overwrite)
    plan = fusion_plan(inputs, folder)
    before, after = plan.parameters
    files = opened.files()
    for file in files:
        if file.suffix == ".safetensors":
            tensor_types(file, plain=opened.quantisation is None)  # so that it says what is wrong with one
    stored = sum(file.stat().st_size for file in files)
    if not stored:
        stored = before * opened.loaded_dtype.itemsize
        notes.append(f"The base is not on this machine yet; {in_gib(stored)} will be downloaded.")
    layers, removed = opened.text_config.num_hidden_layers, config.num_fusions or 1
    fused = f"chosen while fusing, by selection={config.selection!r}"
    if config.selection == "last":
        fused = f"{layers - 1 - removed} to {layers - 1}, numbered from 0"
    lines = [
        f"layers: {_change(layers, layers - removed)}",
        f"layers that become one: {fused}",
        f"parameters: {_change(before, after)}",
        f"bytes on disk: {_change(stored, after * opened.loaded_dtype.itemsize)}, as {str(opened.loaded_dtype)[6:]}",
    ]
    samples, text, _ = inputs.texts
    sources = samples and samples.source, text and text.full_source
    lines += [f"calibration: {source}" for source in sources if source]
    if plan.healing is not None:
        lines.append(f"healing: on {config.heal_tokens:,} tokens")
    how_many = f"{removed} {plural(removed, 'fusion')}"
    if config.within_budget:
        how_many = "as many fusions as the budget allows, figures for one"
    return DryRun(f"{opened.name} with {config.method}, {how_many}", lines, plan, notes)


def plan_heal(inputs: HealInputs, out: FilePath, *, overwrite: bool = False) -> DryRun:
    """Say what `heal` of these inputs would do and take. Neither model's weights are read.

    Raises what `heal` would raise before the training; but not for a base with other weights than the one that was
    fused.
    """
    folder = checked_folder(out)
    notes = _of_target(inputs, folder, overwrite=overwrite)
    plan = healing_plan(inputs, folder)
    assert plan.healing is not None
    used = plan.healing.settings
    steps = f"{used.steps:,} {plural(used.steps, 'step')}"
    lines = [
        f"training: {steps} of {used.batch * used.length:,} tokens",
        f"text: {inputs.corpus.full_source}",
    ]
    return DryRun(f"{inputs.folder.name}, healed by its base {inputs.base.name}", lines, plan, notes)


def _of_target(inputs: FusionInputs | HealInputs, folder: Path, *, overwrite: bool) -> list[str]:
    """What is to be known of what the folder of the result holds."""
    found = target_note(folder, lambda: inputs.identity, *inputs.sources, overwrite=overwrite)
    return [found] if found else []


def _change(before: int, after: int) -> str:
    return f"{before:,} -> {after:,} ({after / before - 1:+.1%})"
