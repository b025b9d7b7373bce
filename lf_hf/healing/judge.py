"""What a healing did: figures before and after it, on texts that nothing was trained on, and the report with them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from transformers.utils import logging

from lf_hf.decoder.decoder import Decoder
from lf_hf.healing.inputs import HealingInputs
from lf_hf.healing.teacher import STATES, Teacher
from lf_hf.measure.judge import write_continuations
from lf_hf.measure.predictions import Predictions, final_states, predictions
from lf_hf.models import CausalLM
from lf_hf.report.data import HealedText, HealingInfo, PerplexityInfo
from lf_hf.report.notes import COLLAPSED, SILENT, damage_notes
from lf_hf.report.report import CHANGED_NOTE, FusionReport
from lf_hf.runtime.launch import ALONE, Processes
from lf_hf.runtime.numerics import weights_digest
from lf_hf.settings import FITTING
from lf_hf.text.judging import judging_texts, nearest, relation

logger = logging.get_logger(__name__)
_MOST_EPOCHS = 3  # more times through the same text are worth a warning
CHANGED_BEFORE = (
    "The weights had been changed, as by training, before healing: to fuse and heal does not give them again."
)


def judge(model: CausalLM, teacher: Teacher, processes: Processes = ALONE) -> dict[str, Predictions]:
    """Compare a model in memory with the teacher on each judging text, of which each process reads a share."""
    decoder = Decoder(model)
    decoder.processes = processes
    ids: dict[str, list[Tensor]] = {}
    expected: dict[str, list[Tensor]] = {}
    for name, items in teacher.judging.items():
        share = [items[n] for n in decoder.processes.shard(range(len(items)))]
        ids[name] = decoder.make_batches([item["input_ids"] for item in share])
        states = iter(item[STATES] for item in share)
        expected[name] = [torch.stack([next(states) for _ in batch]) for batch in ids[name]]
    return predictions(decoder, ids, final_states(decoder, ids, "Judging"), expected, teacher.head())


def repeats_note(epochs: float) -> str | None:
    """What to say of a training that goes `epochs` times through its text, if that is often."""
    if epochs <= _MOST_EPOCHS:
        return None
    return (
        f"Healing goes {epochs:.1f} times through its text: more text, or fewer tokens, gives a better model for the "
        "same time."
    )


def healed_report(inputs: HealingInputs, healed: HealingInfo, after: Mapping[str, Predictions]) -> FusionReport:
    """The report of what a fused model has become."""
    report = inputs.report
    perplexities = _perplexities(inputs, healed, after)
    continuations = report.continuations
    if continuations:
        written = write_continuations(Decoder(inputs.model), inputs.tokenizer)
        continuations = [replace(text, fused=written.get(text.prompt, text.fused)) for text in continuations]
    notes = _outcome_notes(healed)
    notes += damage_notes(perplexities, continuations, fitted=report.config.get("method") in FITTING)
    for note in notes:
        logger.warning(note)
    if repeats := repeats_note(healed.epochs):  # which was logged before the training
        notes.append(repeats)
    if CHANGED_NOTE in report.notes:
        notes.append(CHANGED_BEFORE)
    # What was said of the fused model, and of an earlier healing, is not true any more.
    earlier = [note for note in report.notes if not note.startswith((COLLAPSED, SILENT, CHANGED_NOTE, "Healing "))]
    return replace(
        report,
        continuations=continuations,
        perplexities=perplexities,
        notes=earlier + notes,
        seconds=report.seconds | {"healing": healed.seconds},
        weights_digest=weights_digest(inputs.model.named_parameters()),
        fingerprints=None,
        healed=healed,
    )


def healed_texts(
    teacher: Teacher, before: Mapping[str, Predictions], after: Mapping[str, Predictions]
) -> list[HealedText]:
    """The figures of each judging text."""
    judged = []
    for name, items in teacher.judging.items():
        tokens = len(items) * len(items[0]["input_ids"])
        fused, healed = before[name], after[name]
        perplexities = fused.perplexity, healed.perplexity
        divergences = fused.divergence, healed.divergence
        agreements = fused.agreement, healed.agreement
        judged.append(HealedText(name, tokens, *perplexities, *divergences, *agreements))
    return judged


def _outcome_notes(healed: HealingInfo) -> list[str]:
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
    return notes


def _perplexities(inputs: HealingInputs, healed: HealingInfo, after: Mapping[str, Predictions]) -> list[PerplexityInfo]:
    """Those of the fusion, of what the model is now, where the same text judges both."""
    judging = {text.name: text for text in judging_texts()}
    tokens = {text.name: text.tokens for text in healed.judged}
    trained_on = [kind.source for kind in healed.text]
    perplexities = []
    for info in inputs.report.perplexities:
        found = after.get(info.name)
        if found is None:
            continue
        nearness = info.relation
        if healed.kept:
            nearness = nearest(nearness, relation(judging[info.name], inputs.corpus.parts.values(), trained_on))
        perplexity = replace(
            info,
            tokens=tokens[info.name],
            dense=found.dense_perplexity,
            fused=found.perplexity,
            relation=nearness,
            divergence=found.divergence,
            agreement=found.agreement,
        )
        perplexities.append(perplexity)
    return perplexities or inputs.report.perplexities
