"""The pipeline, from a base to the model that a user gets: start reading here.

`run` is all of it, and `fuse` its middle: choose groups of the dense model's layers, make each group one layer, judge
and report. What a group becomes depends on the method: `stages.averaging.average` is the published one,
`refit.bottom_up.fit_groups` is `refit`. The model before it is fused is `dense` in the code, and the base wherever
people read of it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from lf_hf.checkpoint.base import Base
from lf_hf.checkpoint.classes import FusedForCausalLM
from lf_hf.checkpoint.saving import WORK
from lf_hf.choose.budget import search_budget
from lf_hf.choose.choice import Choice, choose
from lf_hf.decoder.decoder import Decoder, Groups
from lf_hf.healing.result import healed_report
from lf_hf.healing.teacher import Teacher, open_teacher, write_teacher
from lf_hf.inputs.fusion import FusionInputs, Texts
from lf_hf.inputs.healing import HealInputs
from lf_hf.inputs.planning import following
from lf_hf.inputs.resuming import holds_fused, note_healing, save_healed
from lf_hf.measure.dense import Measurements, measure
from lf_hf.measure.judge import compare_continuations, judge, judge_dense
from lf_hf.measure.speed import with_speed
from lf_hf.plan.plan import HealingPlan, Plan
from lf_hf.refit.bottom_up import fit_groups
from lf_hf.report.data import Continuation, FusedLayer, GroupCost, MadeLayer, PerplexityInfo
from lf_hf.report.notes import damage_notes
from lf_hf.report.report import FusionReport, published_name, versions
from lf_hf.runtime.clock import Clock
from lf_hf.runtime.launch import compute_once
from lf_hf.runtime.memory import give_back_freed
from lf_hf.runtime.numerics import weights_digest
from lf_hf.runtime.progress import progress
from lf_hf.settings import FusionConfig
from lf_hf.stages.averaging import average
from lf_hf.text.calibration import Corpus

logger = logging.get_logger(__name__)

_HELD_OUT = 4  # sequences of calibration text that layers are not fitted to, but judged on


def run(
    inputs: FusionInputs,
    folder: Path | None = None,
    *,
    scratch: Path | None = None,
    fingerprints: dict[str, str] | None = None,
    **saving: Any,
) -> FusedForCausalLM:
    """Fuse a base, and heal the result where that is asked for.

    The result goes into `folder`, if there is one, as does what its healing goes on from after an interruption; it is
    locked. `scratch` is a folder for what the plan puts on a disk, as long as the result is needed, and `fingerprints`
    say what the result is made of, for its report. All else is as for `FusedForCausalLM.save_into`.
    """
    plan = inputs.check(folder)
    with following(plan), TemporaryDirectory() as temporary:
        place = Path(compute_once(lambda: temporary)) if folder is None else folder
        work = place / WORK
        config, corpus, healing = inputs.config, inputs.texts.to_heal, plan.healing
        begun = _begun(inputs, place, plan)
        model = begun or _fuse_base(inputs, plan, work, scratch)
        if healing is not None and corpus is not None:
            if begun is None:
                _write(model, folder, **saving)
            asked_for = {"method": config.method, "heal_tokens": config.heal_tokens}
            model.remember(replace(model.report, config=model.report.config | asked_for))
            heal_fused(model, open_teacher(work), corpus, healing, work)
    model.fusion_report = replace(model.report, fingerprints=fingerprints)
    _write(model, folder, **saving)
    return model


def _fuse_base(inputs: FusionInputs, plan: Plan, work: Path, scratch: Path | None) -> FusedForCausalLM:
    """Open the base, measure it, and fuse its layers. What a healing needs of it goes into the folder `work`."""
    base, config, tokenizer, healing = inputs.base, inputs.config, inputs.tokenizer, plan.healing
    decoder = base.open_decoder(plan, scratch)
    measured = measure_base(decoder, tokenizer, config, inputs.texts, healing, work)
    model = fuse_measured(base, decoder, tokenizer, config.unhealed, measured, inputs.model_class)
    base.credit(model)
    if healing is not None:
        made_of, digest = inputs.healing_identity, model.report.weights_digest
        compute_once(lambda: note_healing(work, made_of=made_of, train=healing.train, fused=digest))
    return model


def measure_base(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    config: FusionConfig,
    texts: Texts,
    healing: HealingPlan | None,
    work: Path,
) -> Measurements:
    """Measure a base on samples and text to fit to; what a healing needs of it on its text goes into `work`."""
    samples, text, to_heal = texts
    measured = measure(decoder, tokenizer, config, samples, text)
    clock = Clock(measured.seconds)
    if healing is not None and to_heal is not None:
        with clock("final states"):
            write_teacher(work, decoder, tokenizer, to_heal, healing.settings, measured.judged)
    return replace(measured, seconds=clock.seconds)


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


def heal_folder(inputs: HealInputs, folder: Path, scratch: Path) -> FusedForCausalLM:
    """Heal a fused model into a folder that is locked: its base is opened, measured and closed before it is read."""
    plan = inputs.check(folder)
    with following(plan):
        healing, work = plan.healing, folder / WORK
        assert healing is not None
        if not plan.begun:
            base = inputs.base.open_decoder(plan, scratch)
            inputs.check_base(weights_digest(base.named_parameters()))
            judged = judge_dense(base, inputs.tokenizer, inputs.judging_tokens)
            write_teacher(work, base, inputs.tokenizer, inputs.corpus, healing.settings, judged, with_head=True)
            del base
            compute_once(lambda: note_healing(work, made_of=inputs.healing_identity, train=healing.train))
        model, teacher = inputs.load_fused(plan), open_teacher(work)
        if (
            teacher.head is not None
            and healing.train != "all"
            and torch.equal(teacher.head, model.lm_head.weight.cpu())
        ):
            teacher = replace(teacher, head=None)
        decoder = Decoder(model)
        report = with_speed(inputs.report, model, inputs.base.config)
        model.remember(replace(report, perplexities=judge(decoder, teacher.judged, teacher.head)))
        heal_fused(model, teacher, inputs.corpus, healing, work, inputs.training_args)
        _write(model, folder)
        return model


def heal_fused(
    model: FusedForCausalLM,
    teacher: Teacher,
    corpus: Corpus,
    plan: HealingPlan,
    work: Path,
    training_args: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Heal a fused model in place; its report follows. States of the training are in the folder `work`."""
    from lf_hf.healing.heal import heal  # imports the Trainer, which takes seconds

    gc.collect()  # what offloading holds of layers that are gone
    give_back_freed()
    decoder, report = Decoder(model), model.report
    assert model.tokenizer is not None
    fused_layers = [number for number, group in enumerate(report.groups) if len(group) > 1]
    healed = heal(decoder, fused_layers, teacher, plan, work, training_args)
    gc.collect()  # the Trainer, in which objects know each other, and all that it holds
    model.remember(healed_report(report, healed, decoder, teacher, corpus, model.tokenizer))


def _begun(inputs: FusionInputs, folder: Path, plan: Plan) -> FusedForCausalLM | None:
    """The fused model in a folder, if it is the one that a healing which was cut short there began with."""
    if not plan.begun or not compute_once(lambda: holds_fused(folder, plan.begun)):
        return None
    return inputs.load_fused(folder, plan.one_place)


def _write(model: FusedForCausalLM, folder: Path | None, **saving: Any) -> None:
    """Save a model into a folder, if there is one, and end its healing; the first process of a launch writes."""
    if folder is None:
        return
    save = partial(model.save_into, folder, **saving)
    is_healed = model.report.healed is not None
    compute_once(partial(save_healed, folder, save, model.report.weights_digest) if is_healed else save)


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
        calibration=measured.sources,
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
        group_costs=[GroupCost(*group, cost) for group, cost in sorted(choice.costs.items())],
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
        for weights, kind, entry in make_layers(dense, choice.groups, config, measured):
            first, *_, last = entry.layers
            num_removed = dense.num_layers - decoder.num_layers
            decoder.join((first - num_removed, last - num_removed), weights, kind)
            layers.append(replace(entry, cost=choice.costs.get((first, last))))
    return choice, layers


def make_layers(dense: Decoder, groups: Groups, config: FusionConfig, measured: Measurements) -> Iterator[MadeLayer]:
    """Make one layer of each group, from the bottom up: a fit to the group, its average, or its first layer."""
    if config.fits:
        assert measured.text is not None
        held_out, text = measured.text.hold_out(_HELD_OUT)
        yield from fit_groups(dense, groups, text.sequences, [*held_out, *text.other], ridge=config.ridge)
    elif config.averages:
        assert measured.similarity is not None
        for group in progress(groups, desc="Fusing", unit="group"):
            yield average(
                dense,
                group,
                measured.similarity.matrix,
                alignment=config.alignment,
                ratio_beta=config.ratio_beta,
                known=measured.kept.averages,
            )
    else:
        for first, last in groups:
            layers = list(range(first, last + 1))
            yield MadeLayer({}, {}, FusedLayer(layers, shares=[1.0, *[0.0] * (last - first)]))


def _notes(
    config: FusionConfig,
    measured: Measurements,
    layers: Sequence[FusedLayer],
    perplexities: Sequence[PerplexityInfo],
    continuations: Sequence[Continuation],
) -> list[str]:
    """What a user should know, one sentence each."""
    notes = measured.notes
    if config.perplexity_tokens and not perplexities:
        notes.append("No perplexity: this Python comes without the texts that it is measured on.")
        logger.warning(notes[-1])
    if config.fits and config.selection == "least_influence":
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
    damage = damage_notes(perplexities, continuations, fitted=config.fits)
    for note in damage:
        logger.warning(note)
    return notes + damage
