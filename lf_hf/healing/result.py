"""What a healing did: the report with its figures, and what a user should know of it."""

from __future__ import annotations

import math
from dataclasses import replace

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from lf_hf.decoder.decoder import Decoder
from lf_hf.healing.teacher import Teacher
from lf_hf.healing.text import repeats_note
from lf_hf.measure.judge import compare_continuations, judge
from lf_hf.report.data import HealingInfo
from lf_hf.report.report import FusionReport, damage_notes
from lf_hf.runtime.numerics import weights_digest

logger = logging.get_logger(__name__)
_CHANGED_BEFORE = (
    "The weights had been changed, as by training, before healing: to fuse and heal does not give them again."
)


def healed_report(
    report: FusionReport,
    healed: HealingInfo,
    decoder: Decoder,
    teacher: Teacher,
    tokenizer: PreTrainedTokenizerBase,
) -> FusionReport:
    """The report of what a fused model has become by training."""
    perplexities = report.perplexities
    if healed.kept:
        perplexities = judge(decoder, teacher.judged, teacher.head)
    of_base = {text.prompt: text.dense for text in report.continuations}
    continuations = compare_continuations(decoder, tokenizer, of_base)
    notes = []
    last = healed.curve[-1]
    if not all(map(math.isfinite, last.divergences.values())):
        notes.append(
            f"Healing diverged by step {last.step}, so the state of step {healed.kept} is kept; a lower learning_rate "
            "goes further."
        )
    if not healed.kept:
        notes.append(
            "Healing did not bring the model nearer to its base on held-out text, so its weights are what they were "
            "before; take more tokens or a lower learning_rate."
        )
    for note in (*notes, *damage_notes(perplexities, continuations, report.config["method"])):
        logger.warning(note)
    if repeats := repeats_note(healed.epochs):  # which was logged before the training
        notes.append(repeats)
    if report.changed:
        notes.append(_CHANGED_BEFORE)
    return replace(
        report,
        continuations=continuations,
        perplexities=perplexities,
        seconds=report.seconds | {"healing": healed.seconds},
        weights_digest=weights_digest(decoder.named_parameters()),
        changed=False,
        healed=replace(healed, judged=report.perplexities, before=report.healed, notes=notes),
    )
