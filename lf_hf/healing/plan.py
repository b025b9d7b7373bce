"""What a healing will do and about what it will take, without doing it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import TrainingArguments

from lf_hf.checkpoint.base import Base
from lf_hf.checkpoint.saving import check_room
from lf_hf.healing.heal import STATES, WORK, HealingText, fitted_arguments, heal_settings, open_healing
from lf_hf.healing.lesson import MOST_EPOCHS, Lesson, Way, choose_way, epochs_note, plan_lesson
from lf_hf.healing.memory import model_bytes
from lf_hf.healing.settings import HealSettings
from lf_hf.healing.training import EVALUATIONS, disk_needed, make_student
from lf_hf.report.report import CalibrationInfo
from lf_hf.runtime.memory import PROCESS, free_memory, in_gib
from lf_hf.runtime.numerics import product_speed
from lf_hf.runtime.progress import duration
from lf_hf.text.sources import Samples

_WRITTEN = 3  # how many tokens the base reads in the time in which it writes one, about, a batch at a time


@dataclass(frozen=True)
class HealPlan:
    """What a healing will do and take.

    `text` is what is trained on, by kind, and `epochs` how often it goes through all of that. `trained` counts
    parameters of the student's `parameters`. `way` is how the base's predictions are had. `memory` is about how many
    bytes of `device` each process takes at its peak, of which `free` are free now. `disk` is how many bytes the states
    of the training take on disk at most, until it is done. `seconds` is a range, for a machine that stays as busy as it
    is. `notes` are what a user should know, one sentence each.
    """

    fused: str
    base: str
    settings: HealSettings
    text: list[CalibrationInfo]
    epochs: float
    parameters: int
    trained: int
    way: Way
    device: torch.device
    memory: int
    free: int
    disk: int
    seconds: tuple[float, float]
    notes: list[str]

    def summary(self) -> str:
        """A few lines for people."""
        settings = self.settings
        where = "" if self.device.type == "cpu" else f" on {self.device}"
        return "\n".join(
            [
                f"Plan: {self.fused}, healed by its base {self.base}. Nothing was done.",
                f"  trained: {self.trained:,} of {self.parameters:,} parameters ({settings.train})",
                f"  steps: {settings.steps:,} of {settings.batch * settings.length:,} tokens; "
                f"{self.epochs:.1f} times through the text",
                *(f"  text: {kind.tokens:,} tokens of {kind.source}" for kind in self.text),
                f"  the base's predictions: {self.way.said}",
                f"  peak memory{where}, about: {in_gib(self.memory)}; free now: {in_gib(self.free)}",
                f"  disk, until it is done, at most about: {in_gib(self.disk)}",
                f"  time, if the machine stays as busy as now: {' to '.join(map(duration, self.seconds))}",
                *(f"  note: {note}" for note in self.notes),
            ]
        )


def plan_heal(
    fused: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | Base | None = None,
    text: Samples | None = None,
    dataset: str | None = None,
    dataset_config: str | None = None,
    dataset_split: str = "train",
    dataset_column: str = "text",
    settings: HealSettings | None = None,
    cache: str | os.PathLike[str] | None = None,
    training_args: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> HealPlan:
    """Say what `heal` with these arguments would do and take. Neither model's weights are read.

    Raises
    ------
    ValueError
        For settings, models or text that `heal` would refuse, or too little memory; but not for a base with other
        weights than the one that was fused, nor for an earlier run in `out` that cannot go on.
    OSError
        If the disk has no room for the training's states.
    """
    source = HealingText(text, dataset, dataset_config, dataset_split, dataset_column)
    settings, given = heal_settings(settings, kwargs), dict(training_args or {})
    came_in, opened, corpus, folder = open_healing(
        fused, out, base, source, settings, given, kwargs, reads_weights=False
    )
    with TemporaryDirectory() as work:
        settings, arguments = fitted_arguments(settings, came_in.model.config, Path(work), given)
        student = make_student(came_in.model, settings, came_in.fused_layers)
        way = choose_way(opened, student, settings, arguments, given, cache, planned=came_in.model)
    disk = disk_needed(student, settings.train)
    check_room(folder, disk, STATES)
    lesson = plan_lesson(way, opened, came_in, corpus, settings)
    parameters = [(p.numel(), p.requires_grad) for p in student.parameters()]
    count, trained = sum(n for n, _ in parameters), sum(n for n, needs_gradient in parameters if needs_gradient)
    of_base, dtype = model_bytes(opened.config, 1), came_in.model.dtype
    seconds = _seconds(settings, arguments, way, lesson, count, trained, of_base, dtype)
    on_cpu = arguments.device.type == "cpu"
    loaded = PROCESS + sum(p.nbytes for p in came_in.model.parameters()) if on_cpu else 0
    notes = {
        epochs_note(lesson.epochs): lesson.epochs > MOST_EPOCHS,
        "For each token that it writes the base is read once more, which takes much longer than said here.": (
            lesson.written_share > 0 and not way.in_memory
        ),
        f"{str(out)!r} holds a run that was cut short; if it is of the same healing, it goes on.": (
            (folder / WORK).is_dir()
        ),
    }
    return HealPlan(
        fused=Path(fused).resolve().name,
        base=opened.name,
        settings=settings,
        text=lesson.kinds,
        epochs=lesson.epochs,
        parameters=count,
        trained=trained,
        way=way,
        device=arguments.device,
        memory=way.memory + loaded,
        free=free_memory(arguments.device),
        disk=disk,
        seconds=(seconds / 2, seconds * 2),
        notes=[note for note, applies in notes.items() if applies],
    )


def _seconds(
    settings: HealSettings,
    arguments: TrainingArguments,
    way: Way,
    lesson: Lesson,
    parameters: int,
    trained: int,
    of_base: int,
    judged_in: torch.dtype,
) -> float:
    """Operations over the speed of this machine now: two for each parameter and token of a pass.

    Backwards there is one more pass, and another one for gradients of what is trained.
    """
    tokens = settings.sequences * settings.length
    aside = settings.length * sum(len(numbers) for numbers in lesson.held_out.values())
    judged = settings.length * sum(len(items) for items in lesson.judging.values())
    written = tokens * lesson.written_share / lesson.epochs
    step = 4 * parameters + 2 * trained + (2 * parameters if arguments.gradient_checkpointing else 0)
    training = tokens * step + 2 * parameters * aside * (EVALUATIONS + 1)
    # Before and after, in each process, where what came in was loaded.
    judging = 4 * parameters * judged / product_speed(judged_in, torch.device("cpu"))
    by_base = 2 * of_base * (tokens + aside + judged + _WRITTEN * written)
    processes = arguments.world_size
    by_base /= processes if way.folder is None else 1  # the first one alone writes predictions to disk
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32
    # Training reaches about a third of the speed of a product.
    return 3 * (judging + (training / processes + by_base) / product_speed(dtype, arguments.device))
