"""What came of a healing: the state that is kept, and the report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from transformers.utils import logging

from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.decoder.predictions import Predictions
from lf_hf.healing.lesson import MOST_EPOCHS, Lesson, epochs_note
from lf_hf.healing.models import Fused
from lf_hf.healing.settings import HealSettings
from lf_hf.healing.teacher import FileTeacher
from lf_hf.healing.training import DistillationTrainer
from lf_hf.measure import written_on
from lf_hf.report.report import (
    CHANGED_NOTE,
    COLLAPSED,
    SILENT,
    FusionReport,
    HealedText,
    HealingInfo,
    HealingPoint,
    PerplexityInfo,
    collapse_note,
    silence_note,
)
from lf_hf.runtime.numerics import weights_digest
from lf_hf.text.calibration import Corpus
from lf_hf.text.judging import judging_texts, relation

logger = logging.get_logger(__name__)


def best_step(trainer: DistillationTrainer) -> int:
    """The step whose state is the nearest to the base on held-out text; 0 is what came in."""
    curve = trainer.curve()
    means = {step: sum(found.values()) / len(found) for step, found in curve.items()}
    best = trainer.state.best_global_step or 0
    value = means.get(best, math.inf)
    return best if math.isfinite(value) and value < means.get(0, math.inf) else 0


def healed_report(
    came_in: Fused,
    settings: HealSettings,
    lesson: Lesson,
    trainer: DistillationTrainer,
    trained: int,
    kept: int,
    before: Mapping[str, Predictions],
    after: Mapping[str, Predictions],
    corpus: Corpus,
    seconds: float,
) -> FusionReport:
    """The fused model's report, of what it has become."""
    report = came_in.report
    curve = trainer.curve()
    healed = HealingInfo(
        settings=settings.recorded(on_disk=isinstance(lesson.teacher, FileTeacher), written_share=lesson.written_share),
        text=lesson.kinds,
        epochs=lesson.epochs,
        trained=trained,
        steps=trainer.state.global_step,
        kept=kept,
        teacher=lesson.said,
        curve=[HealingPoint(step, found) for step, found in sorted(curve.items())],
        judged=[
            HealedText(
                name,
                sum(len(item["input_ids"]) for item in lesson.judging[name]),
                before[name].perplexity,
                found.perplexity,
                before[name].divergence,
                found.divergence,
                before[name].agreement,
                found.agreement,
            )
            for name, found in after.items()
        ],
        seconds=seconds,
    )
    # What is said below is of this healing; an earlier one's is not true any more.
    notes = [
        note
        for note in report.notes
        if not note.startswith((CHANGED_NOTE, COLLAPSED, SILENT, "Healing ", "The loss of healing"))
    ]
    old = len(notes)
    if trainer.diverged is not None:
        step, rate = trainer.diverged
        notes.append(
            f"The loss of healing was not finite at step {step}, at a learning rate of {rate:.3g}, so the state of "
            f"step {kept} is kept; a lower learning_rate goes further."
        )
    if not kept:
        notes.append(
            "Healing did not bring the model nearer to its base on text that was kept aside, so its weights are what "
            "they were before; take more tokens or a lower learning_rate."
        )
    if lesson.epochs > MOST_EPOCHS:
        notes.append(epochs_note(lesson.epochs))
    texts = {judging.name: judging for judging in judging_texts()}
    perplexities = []
    for info in report.perplexities:
        if info.name in after and info.name in texts:
            near = (
                relation(texts[info.name], corpus.parts, [kind.source for kind in lesson.kinds]) if kept else "unseen"
            )
            order = ("seen", "kin", "unseen")
            perplexities.append(
                PerplexityInfo(
                    name=info.name,
                    text=info.text,
                    tokens=sum(len(item["input_ids"]) for item in lesson.judging[info.name]),
                    dense=after[info.name].dense_perplexity,
                    fused=after[info.name].perplexity,
                    relation=min(near, info.relation, key=order.index),
                    divergence=after[info.name].divergence,
                    agreement=after[info.name].agreement,
                )
            )
    perplexities = perplexities or report.perplexities
    if note := collapse_note(perplexities, fitted=report.config.get("refit") != "none"):
        notes.append(note)
    continuations = report.continuations
    if came_in.tokenizer is not None and continuations:
        now = written_on(ModelDecoder(came_in.model), came_in.tokenizer)
        continuations = [dataclasses.replace(text, fused=now.get(text.prompt, text.fused)) for text in continuations]
    if note := silence_note(continuations):
        notes.append(note)
    for note in notes[old:]:
        logger.warning(note)
    return dataclasses.replace(
        report,
        continuations=continuations,
        perplexities=perplexities,
        notes=notes,
        seconds=report.seconds | {"healing": seconds},
        weights_digest=weights_digest(came_in.model.named_parameters()),
        fingerprints=None,
        healed=healed,
    )
