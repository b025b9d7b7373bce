"""What a healing did: figures before and after it, on texts that nothing was trained on, and the report with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch.nn.functional import log_softmax
from transformers.utils import logging

from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.decoder.predictions import Predictions, token_figures
from lf_hf.families import CausalLM, family_of
from lf_hf.healing.inputs import HealingInputs
from lf_hf.healing.loss import next_tokens, parts
from lf_hf.healing.teacher import Items, Teacher, stacked
from lf_hf.healing.text import TextUse
from lf_hf.measure import written_on
from lf_hf.report.notes import COLLAPSED, SILENT, collapse_note, silence_note
from lf_hf.report.records import HealedText, HealingInfo, PerplexityInfo
from lf_hf.report.report import FusionReport
from lf_hf.runtime.launch import ALONE, Processes
from lf_hf.runtime.numerics import weights_digest
from lf_hf.text.judging import judging_texts, relation

logger = logging.get_logger(__name__)
_TOKENS = 4096  # that pass the layers together
_LOGITS = 1 << 24  # of each model that exist at a time
_RELATIONS = ("seen", "kin", "unseen")


@torch.no_grad()
def judge(
    model: CausalLM, texts: Mapping[str, Items], teacher: Teacher, processes: Processes = ALONE
) -> dict[str, Predictions]:
    """Compare a model in memory with the teacher on each text, of whose sequences each process reads a share."""
    config, judged = model.config, dict[str, Predictions]()
    for name, items in texts.items():
        mine, sums = processes.shard(items), torch.zeros(5, dtype=torch.float64)
        together = max(1, _TOKENS // len(items[0]["input_ids"]))
        for start in range(0, len(mine), together):
            batch = {key: tensor.to(model.device) for key, tensor in stacked(mine[start : start + together]).items()}
            ids, targets = batch["input_ids"], teacher.targets(batch)
            states = model.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
            next_ids = next_tokens(ids).to(states.device)
            for rows in parts(len(states), config.vocab_size, _LOGITS):
                log_probs = log_softmax(family_of(config).logits(config, model.lm_head(states[rows]).float()), -1)
                expected = targets.part(rows, 1.0)(slice(None), log_probs).to(log_probs.device)
                figures = token_figures(log_probs, next_ids[rows].clamp(min=0), expected)
                sums += figures[:, next_ids[rows] >= 0].double().sum(-1).cpu()
        judged[name] = Predictions.from_sums(*processes.all_reduce_sums(sums))
    return judged


def healed_report(
    inputs: HealingInputs,
    healed: HealingInfo,
    after: Mapping[str, Predictions],
    use: TextUse,
    diverged: tuple[int, float] | None,
) -> FusionReport:
    """The fused model's report, of what it has become; `diverged` is as of a `DistillationTrainer`."""
    report = inputs.report
    # What is said below is of this healing; what was said of an earlier one is not true any more.
    stale = (COLLAPSED, SILENT, "Healing ", "The loss of healing")
    kept_notes = [note for note in report.notes if not note.startswith(stale)]
    perplexities = _perplexities(inputs, healed, after, use)
    continuations = report.continuations
    if inputs.own_tokenizer is not None and continuations:
        now = written_on(ModelDecoder(inputs.model), inputs.own_tokenizer)
        continuations = [dataclasses.replace(text, fused=now.get(text.prompt, text.fused)) for text in continuations]
    new_notes = [
        f"The loss of healing was not finite at step {diverged[0]}, at a learning rate of {diverged[1]:.3g}, so the "
        f"state of step {healed.kept} is kept; a lower learning_rate goes further."
        if diverged
        else None,
        "Healing did not bring the model nearer to its base on held-out text, so its weights are what they were "
        "before; take more tokens or a lower learning_rate."
        if not healed.kept
        else None,
        use.note,
        collapse_note(perplexities, fitted=report.config.get("refit") != "none"),
        silence_note(continuations),
    ]
    for note in filter(None, new_notes):
        logger.warning(note)
    return dataclasses.replace(
        report,
        continuations=continuations,
        perplexities=perplexities,
        notes=[*kept_notes, *filter(None, new_notes)],
        seconds=report.seconds | {"healing": healed.seconds},
        weights_digest=weights_digest(inputs.model.named_parameters()),
        fingerprints=None,
        healed=healed,
    )


def healed_texts(
    texts: Mapping[str, Items], before: Mapping[str, Predictions], after: Mapping[str, Predictions]
) -> list[HealedText]:
    """The figures of each judging text."""
    judged = []
    for name, items in texts.items():
        tokens, was, now = len(items) * len(items[0]["input_ids"]), before[name], after[name]
        pairs = zip(dataclasses.astuple(was), dataclasses.astuple(now), strict=True)
        perplexity, _, divergence, agreement = pairs
        judged.append(HealedText(name, tokens, *perplexity, *divergence, *agreement))
    return judged


def _perplexities(
    inputs: HealingInputs, healed: HealingInfo, after: Mapping[str, Predictions], use: TextUse
) -> list[PerplexityInfo]:
    """Those of the fusion, of what the model is now, where the same text judges both."""
    texts, tokens = {judging.name: judging for judging in judging_texts()}, {t.name: t.tokens for t in healed.judged}
    sources = [kind.source for kind in use.kinds]
    perplexities = []
    for info in inputs.report.perplexities:
        if (now := after.get(info.name)) is None or info.name not in texts:
            continue
        nearness = relation(texts[info.name], inputs.corpus.parts, sources) if healed.kept else "unseen"
        perplexities.append(
            dataclasses.replace(
                info,
                tokens=tokens[info.name],
                dense=now.dense_perplexity,
                fused=now.perplexity,
                relation=min(nearness, info.relation, key=_RELATIONS.index),
                divergence=now.divergence,
                agreement=now.agreement,
            )
        )
    return perplexities or inputs.report.perplexities
