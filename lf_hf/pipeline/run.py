"""The pipeline, from a base to the model that a user gets: start reading here.

`make_result` is all of it: `fuse_base`, and `heal_fused` where that is asked for. The middle is `fuse`: choose groups
of the dense model's layers, make each group one layer, judge and report. What a group becomes depends on the method:
`choose.methods` has them all, from `stages.averaging.average`, the published one, to `refit.bottom_up.fit_groups`. The
model before it is fused is `dense` in the code, and the base wherever people read of it.

Of a launch of several processes the first one does all of it but the training, for which they come together.
"""

from __future__ import annotations

import gc
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from lf_hf.checkpoint.base import Base
from lf_hf.checkpoint.classes import FusedForCausalLM
from lf_hf.checkpoint.saving import (
    FUSED,
    LOGS,
    SCRATCH,
    TEACHER,
    TRAINING,
    WORK,
    run_folder,
    write_result,
    write_whole,
)
from lf_hf.choose.budget import search_budget
from lf_hf.choose.choice import Choice, choose
from lf_hf.choose.methods import MAKING
from lf_hf.decoder.decoder import Decoder
from lf_hf.healing.result import healed_report
from lf_hf.healing.teacher import open_teacher, trained_by, write_teacher
from lf_hf.measure.dense import Measurements, measure
from lf_hf.measure.judge import compare_continuations, judge, judge_dense
from lf_hf.measure.speed import with_speed
from lf_hf.pipeline.fusion import FusionInputs
from lf_hf.pipeline.healing import HealInputs
from lf_hf.pipeline.identity import why_not_reused
from lf_hf.pipeline.planning import following, fusion_plan, healing_plan, open_decoder
from lf_hf.plan.plan import Plan
from lf_hf.report.data import Continuation, FusedLayer, PerplexityInfo
from lf_hf.report.report import FusionReport, damage_notes, published_name, versions
from lf_hf.runtime.amounts import MAX_SHARD_BYTES
from lf_hf.runtime.launch import compute_once, rank
from lf_hf.runtime.memory import give_back_freed
from lf_hf.runtime.numerics import to_device, weights_digest
from lf_hf.runtime.progress import Clock
from lf_hf.settings import METHODS, FusionConfig

logger = logging.get_logger(__name__)


def make_result(inputs: FusionInputs, folder: Path, *, overwrite: bool, wait: bool = False) -> torch.device | None:
    """Fuse a base, and heal the result where that is asked for, into a folder, as a plain checkpoint.

    Where an earlier run of the same was cut short there, it goes on. With `wait` it waits for other runs there, and
    does nothing if one of them has made the same. Returns where the result was trained, if it was.
    """
    fused = folder / WORK / FUSED

    def fuse_into() -> Plan | None:
        if fused.is_dir():
            return None
        plan = fusion_plan(inputs, folder)
        write = partial(_write, fuse_base(inputs, plan, folder), inputs.identity, None)
        if inputs.config.healing is None:
            write_result(folder, write)
        else:
            write_whole(folder, FUSED, write)
        return plan

    with _begun(inputs, folder, overwrite=overwrite, wait=wait) as is_begun:
        plan = compute_once(fuse_into) if is_begun else None
        if not is_begun or inputs.config.healing is None:
            return None
        return _heal_into(folder, inputs.to_heal(fused), inputs.identity, plan)


def heal_result(inputs: HealInputs, folder: Path, *, overwrite: bool) -> None:
    """Heal a fused model into a folder, as a plain checkpoint. Where the same was cut short there, it goes on."""
    with _begun(inputs, folder, overwrite=overwrite) as is_begun:
        if is_begun:
            _heal_into(folder, inputs, inputs.identity)


@contextmanager
def _begun(inputs: FusionInputs | HealInputs, folder: Path, *, overwrite: bool, wait: bool = False) -> Iterator[bool]:
    """Begin a run in the folder of its result, in the first process of a launch; gives whether anything is to do."""

    def begin() -> bool:
        made_of = inputs.identity
        begun = run_folder(folder, made_of, *inputs.sources, overwrite=overwrite, wait=wait)
        return stack.enter_context(begun) and not (wait and why_not_reused(folder, made_of) is None)

    with ExitStack() as stack:
        yield compute_once(begin)


def _heal_into(folder: Path, inputs: HealInputs, made_of: Mapping[str, str], plan: Plan | None = None) -> torch.device:
    """Heal a fused model into the folder of a run that is made of this; returns where it was trained."""
    model = heal_fused(inputs, folder, plan)
    logs = folder / WORK / TRAINING / LOGS
    compute_once(lambda: write_result(folder, partial(_write, model, made_of, logs)))
    return model.device


def _write(model: FusedForCausalLM, made_of: Mapping[str, str], logs: Path | None, folder: Path) -> None:
    """Write a model, of which its report says what it is made of, and the logs of its training, into a folder."""
    model.remember(replace(model.report, fingerprints=dict(made_of)))
    with warnings.catch_warnings():  # transformers' speaks of files of 50 GB, and these are as small as planned
        warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
        model.save_pretrained(folder, plain=True, max_shard_size=MAX_SHARD_BYTES)
    if logs is not None and logs.is_dir():
        shutil.copytree(logs, folder / LOGS)


def fuse_base(inputs: FusionInputs, plan: Plan, folder: Path | None = None) -> FusedForCausalLM:
    """Open a base, measure it, and fuse its layers; `folder` is that of the result, where it goes into one."""
    base, tokenizer, config = inputs.base, inputs.tokenizer, inputs.config
    with following(plan):
        decoder = open_decoder(base, plan, folder and folder / WORK / SCRATCH)
        measured = measure(decoder, tokenizer, config, inputs.texts.samples, inputs.texts.text)
        model = fuse_measured(base, decoder, tokenizer, config, measured, inputs.model_class)
    base.credit(model)
    return model


def fuse_measured(
    base: Base,
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    config: FusionConfig,
    measured: Measurements,
    model_class: type[FusedForCausalLM],
) -> FusedForCausalLM:
    """Make a base that is measured, in place, the fused model that a user gets; its report has the speeds of both."""
    report = fuse(decoder, tokenizer, config, measured, base=base.name)
    report = with_speed(report, decoder.model, base.config)
    return model_class.adopt(decoder.model, report, tokenizer)


def heal_fused(inputs: HealInputs, folder: Path, plan: Plan | None = None) -> FusedForCausalLM:
    """Heal a fused model: its base is opened, measured and closed before the model is read.

    `plan` is that of the run which fused it, where this one did. What is measured and states of the training lie in the
    hidden folder of `folder`. All processes of a launch train, and the first one has the result.
    """
    from lf_hf.healing.heal import heal  # imports the Trainer, which takes seconds

    work = folder / WORK
    plan = compute_once(lambda: _measure_base(inputs, folder, plan))
    assert plan.healing is not None
    with following(plan):
        model, teacher, report = inputs.load_fused(plan), open_teacher(work / TEACHER), inputs.report
        assert teacher.head is not None
        own = model.lm_head.weight
        if plan.healing.train != "all" and torch.equal(to_device(teacher.head, own.device), own):
            teacher = replace(teacher, head=None)
        decoder = Decoder(model)
        if not rank():
            report = with_speed(report, model, inputs.base.config)
            report = replace(report, perplexities=judge(decoder, teacher.judged, teacher.head))
        fused_layers = [number for number, group in enumerate(report.groups) if len(group) > 1]
        healed = heal(decoder, fused_layers, teacher, plan.healing, work / TRAINING, inputs.training_args or {})
        gc.collect()  # the Trainer, in which objects know each other, and all that it holds
        if not rank():
            report = healed_report(report, healed, decoder, teacher, inputs.tokenizer)
    model.remember(report)
    return model


def _measure_base(inputs: HealInputs, folder: Path, plan: Plan | None) -> Plan:
    """Measure the base of a healing, unless an earlier run of the same has done so; returns the plan."""
    gc.collect()  # what offloading holds of layers that are gone
    give_back_freed()
    plan, teacher = plan or healing_plan(inputs, folder), folder / WORK / TEACHER
    assert plan.healing is not None
    if trained_by(teacher) is None:
        with following(plan):
            base = open_decoder(inputs.base, plan, folder / WORK / SCRATCH)
            inputs.check_base(weights_digest(base.named_parameters()))
            judged = judge_dense(base, inputs.tokenizer, inputs.judging_tokens)
            write_teacher(teacher, base, inputs.tokenizer, inputs.corpus, plan.healing.settings, judged)
    return plan


def fuse(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    config: FusionConfig,
    measured: Measurements,
    *,
    base: str,
) -> FusionReport:
    """Fuse groups of the dense model's layers in place, and judge what came out; its report names it `base`.

    The decoder has `config.num_fusions` fewer layers afterwards, or as many fewer as a budget allows. Raises
    ValueError, with the model unchanged, if it has too few layers or activations are not finite.
    """
    measured = measured.used_by(config)
    clock = Clock(measured.seconds)
    num_layers, num_parameters = decoder.num_layers, decoder.num_parameters
    budget = None
    if config.within_budget:
        fuse_copy = partial(fuse_layers, clock=clock)
        fused, (choice, layers), budget, measured = search_budget(decoder, config, measured, fuse_copy)
        decoder.become(fused, choice.groups)
        del fused  # else its layers are there twice while the result is judged
    else:
        choice, layers = fuse_layers(decoder, config, measured, clock=clock)
    with clock("perplexity"):
        perplexities = judge(decoder, measured.judged)
    with clock("continuations"):
        continuations = compare_continuations(decoder, tokenizer, measured.continuations)
    similarity = measured.similarity
    return FusionReport(
        base=published_name(base),
        config=config.to_dict(),
        fused_layers=layers,
        layers_before=num_layers,
        layers_after=decoder.num_layers,
        parameters_before=measured.parameters,
        parameters_after=measured.parameters - num_parameters + decoder.num_parameters,
        calibration=[used.source for used in measured.on_text],
        perplexities=perplexities,
        similarity=similarity and similarity.matrix.tolist(),
        embeddings=similarity and similarity.embeddings.tolist(),
        sample_labels=similarity and similarity.labels,
        influences=choice.influences or (similarity and similarity.influences),
        seconds=clock.seconds,
        versions=versions(),
        notes=_notes(config, measured, layers, perplexities, continuations),
        weights_digest=weights_digest(decoder.named_parameters()),
        base_digest=measured.base_digest,
        dtype=str(decoder.family.writer_weight(decoder.layer(0)).dtype).removeprefix("torch."),
        continuations=continuations,
        budget=budget,
    )


def fuse_layers(
    decoder: Decoder, config: FusionConfig, measured: Measurements, *, clock: Clock
) -> tuple[Choice, list[FusedLayer]]:
    """Choose groups of layers of the dense model, and make each one layer, in place, from the bottom up.

    Returns the groups, and a report entry of each layer that was made of one.
    """
    with clock("choosing"):
        choice = choose(decoder, config, measured)
    with clock("making"):
        dense = decoder.copy()
        layers = []
        for weights, kind, entry in MAKING[config.method].make(dense, choice.groups, config, measured):
            first, *_, last = entry.layers
            num_removed = dense.num_layers - decoder.num_layers
            decoder.join((first - num_removed, last - num_removed), weights, kind)
            layers.append(replace(entry, cost=choice.costs.get((first, last))))
    return choice, layers


def _notes(
    config: FusionConfig,
    measured: Measurements,
    layers: Sequence[FusedLayer],
    perplexities: Sequence[PerplexityInfo],
    continuations: Sequence[Continuation],
) -> list[str]:
    """What a user should know, one sentence each."""
    notes = [note for used in measured.on_text for note in used.notes]
    if config.perplexity_tokens and not perplexities:
        notes.append("No perplexity: this Python comes without the texts that it is measured on.")
        logger.warning(notes[-1])
    if config.selection == "least_influence" and "groups" in METHODS[config.method].selections:
        notes.append(
            "Layers were chosen by their influence alone, and what any group of them costs was not measured; "
            "selection='groups' measures it, and finds groups that must not be fused."
        )
    if any(layer.error_after is not None and layer.held_out_error is None for layer in layers):
        notes.append(
            "Fitted layers were not trained by themselves, as the calibration text has no sequence to hold out; give "
            "two or more, or lower calibration_length."
        )
        logger.warning(notes[-1])
    for layer in layers:
        if layer.layer_instead is not None:
            notes.append(
                f"Layer {layer.layer_instead} stands for layers {layer.layers[0]} to {layer.layers[-1]} as it is: on "
                "held-out text it comes nearer to what they do than the fitted layer."
            )
    for note in damage_notes(perplexities, continuations, config.method):
        logger.warning(note)
    return notes
