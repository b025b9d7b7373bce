"""What a healing did: figures before and after it, on texts that nothing was trained on, and the report with them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import astuple

import torch
from transformers.utils import logging

from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.decoder.predictions import Predictions, final_states, predictions
from lf_hf.families import CausalLM
from lf_hf.healing.inputs import HealingInputs
from lf_hf.healing.teacher import STATES, Teacher
from lf_hf.measure import written_on
from lf_hf.report.notes import COLLAPSED, SILENT, damage_notes
from lf_hf.report.records import HealedText, HealingInfo, PerplexityInfo
from lf_hf.report.report import FusionReport
from lf_hf.runtime.launch import ALONE, Processes
from lf_hf.runtime.numerics import weights_digest
from lf_hf.text.judging import judging_texts, nearest, relation

logger = logging.get_logger(__name__)
_MOST_EPOCHS = 3  # more times through the same text are worth a warning


def judge(model: CausalLM, teacher: Teacher, processes: Processes = ALONE) -> dict[str, Predictions]:
    """Compare a model in memory with the teacher on each judging text, of which each process reads a share."""
    decoder = ModelDecoder(model, processes=processes)
    ids, expected = {}, {}
    for name, items in teacher.judging.items():
        mine = [items[n] for n in processes.shard(range(len(items)))]
        ids[name] = decoder.batches([item["input_ids"] for item in mine])
        states = iter(item[STATES] for item in mine)
        expected[name] = [torch.stack([next(states) for _ in batch]) for batch in ids[name]]
    return predictions(decoder, ids, final_states(decoder, ids, "Judging"), expected, teacher)


def healed_report(inputs: HealingInputs, healed: HealingInfo, after: Mapping[str, Predictions]) -> FusionReport:
    """The fused model's report, of what it has become."""
    report = inputs.report
    # What is said below is of this healing; what was said of an earlier one is not true any more.
    notes = [note for note in report.notes if not note.startswith((COLLAPSED, SILENT, "Healing "))]
    perplexities = _perplexities(inputs, healed, after)
    continuations = report.continuations
    if continuations:
        now = written_on(ModelDecoder(inputs.model), inputs.tokenizer)
        continuations = [dataclasses.replace(text, fused=now.get(text.prompt, text.fused)) for text in continuations]
    last = healed.curve[-1]
    said = []
    if not all(map(math.isfinite, last.divergences.values())):
        said.append(
            f"Healing diverged by step {last.step}, so the state of step {healed.kept} is kept; a lower learning_rate "
            "goes further."
        )
    if not healed.kept:
        said.append(
            "Healing did not bring the model nearer to its base on held-out text, so its weights are what they were "
            "before; take more tokens or a lower learning_rate."
        )
    if healed.epochs > _MOST_EPOCHS:
        said.append(
            f"Healing goes {healed.epochs:.1f} times through its text: more text, or fewer tokens, gives a better "
            "model for the same time."
        )
    said += damage_notes(perplexities, continuations, fitted=report.config.get("refit") != "none")
    for note in said:
        logger.warning(note)
    return dataclasses.replace(
        report,
        continuations=continuations,
        perplexities=perplexities,
        notes=notes + said,
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
        perplexity, _, divergence, agreement = zip(astuple(before[name]), astuple(after[name]), strict=True)
        tokens = len(items) * len(items[0]["input_ids"])
        judged.append(HealedText(name, tokens, *perplexity, *divergence, *agreement))
    return judged


def _perplexities(inputs: HealingInputs, healed: HealingInfo, after: Mapping[str, Predictions]) -> list[PerplexityInfo]:
    """Those of the fusion, of what the model is now, where the same text judges both."""
    texts, tokens = {judging.name: judging for judging in judging_texts()}, {t.name: t.tokens for t in healed.judged}
    sources, perplexities = [kind.source for kind in healed.text], []
    for info in (info for info in inputs.report.perplexities if info.name in after):
        now = after[info.name]
        nearness = relation(texts[info.name], inputs.corpus.parts.values(), sources) if healed.kept else "unseen"
        perplexities.append(
            dataclasses.replace(
                info,
                tokens=tokens[info.name],
                dense=now.dense_perplexity,
                fused=now.perplexity,
                relation=nearest(nearness, info.relation),
                divergence=now.divergence,
                agreement=now.agreement,
            )
        )
    return perplexities or inputs.report.perplexities
