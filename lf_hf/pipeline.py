"""The pipeline: measure a model, fuse layers of it, fit what came out, and report.

`fuse` is the whole of it. `fuse_pairs` is the loop of every method: choose two layers, make them one, remove the
second. Where fused layers are fitted, `last_pass` follows: from the bottom up it fits each to what the dense model
computes there. Where it also makes them, from groups of layers that are all chosen at once, nothing is left for the
loop: the last pass fits some sets of groups to part of the text, and makes the best one whole.

The model before it is fused is `dense` in the code, and the base wherever people read of it.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from operator import itemgetter

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from lf_hf.budget import search
from lf_hf.decoder.interface import Decoder
from lf_hf.decoder.predictions import batched, final_states, predictions
from lf_hf.families import check_layers
from lf_hf.measure import Clock, Measurements, continued, measure, perplexities
from lf_hf.refit.check_family import check_computes
from lf_hf.refit.groups import Groups, cheapest_levels, estimated
from lf_hf.refit.last_pass import fit_from_bottom
from lf_hf.refit.layer_parts import layer_weights
from lf_hf.report.notes import damage_notes
from lf_hf.report.records import (
    BudgetInfo,
    BudgetTrial,
    Continuation,
    GroupCost,
    PerplexityInfo,
)
from lf_hf.report.report import FusionReport
from lf_hf.runtime.numerics import all_finite, slow_bfloat16_note, weights_digest
from lf_hf.runtime.progress import progress
from lf_hf.settings import LEVELS, FusionConfig
from lf_hf.steps import STEPS, Fusion, start
from lf_hf.text.calibration import CalibrationSamples, Corpus
from lf_hf.text.packing import held_out, interleaved

logger = logging.get_logger(__name__)

_HELD_OUT = 4  # sequences of calibration text that are held out of the last pass
_TIE = 1.02  # times what the best set costs then: two that are so near are both made whole
_BUDGET_SHARE = 1 / 8  # of the sequences: on these a budget is measured, and nothing is fitted to them


def fuse(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    config: FusionConfig,
    samples: CalibrationSamples | None,
    text: Corpus | None,
    *,
    base: str,
    measurements: Measurements | None = None,
) -> FusionReport:
    """Measure the dense model, fuse `config.num_fusions` pairs of its layers in place, and measure what came out.

    Parameters
    ----------
    decoder : Decoder
        Changed: it has `num_fusions` fewer layers afterwards, or as many fewer as a budget allows.
    tokenizer : the model's tokenizer
    config : FusionConfig
    samples : CalibrationSamples or None
    text : Corpus or None
        Samples for the layer similarity, and running text for influence, selection and fits. Each may be None
        only where `config.needs_similarity` or `config.needs_text` is false, or there are measurements.
    base : str
        Name of the model, for the report.
    measurements : Measurements, optional
        What `measure` found on the same dense model; by default it is measured here.

    Raises
    ------
    ValueError
        If the model has too few layers, there are too few calibration samples, or weights or activations are
        not finite. The model is unchanged then.
    """
    parameters = check_model(decoder, config)
    samples, text = samples if config.needs_similarity else None, text if config.needs_text else None
    measured = measurements or measure(decoder, tokenizer, config, samples, text)
    if config.within_budget:
        fusion, budget = _fuse_within_budget(decoder, config, measured)
        return replace(_report(fusion, config, tokenizer, base=base, parameters=parameters), budget=budget)
    with start(decoder, config, measured) as fusion:
        fuse_pairs(fusion, config.num_fusions)
    return finish(fusion, tokenizer, base=base, parameters=parameters)


def fuse_pairs(fusion: Fusion, num_fusions: int) -> None:
    """Fuse pairs of layers, one after the other, until `num_fusions` are fused.

    Where all layers were chosen at once and the last pass makes them, that is left to it.
    """
    with fusion.clock(STEPS):
        if fusion.group_costs is not None and not fusion.plans:
            fusion.plans = fusion.group_costs.best(num_fusions)
        if fusion.left_to_last_pass:
            return
        for _ in progress(range(len(fusion.steps), num_fusions), desc="Fusing", unit="pair"):
            i, cost = fusion.choose()
            fusion.join(i, cost, fusion.fuse_pair(i))


def _fuse_within_budget(decoder: Decoder, config: FusionConfig, measured: Measurements) -> tuple[Fusion, BudgetInfo]:
    """Fuse as many layers as a budget allows: copies of the model are fused whole, and measured on held-out text."""
    held, rest = held_out(measured.given, max(1, int(len(measured.given) * _BUDGET_SHARE)))
    if not held:
        raise ValueError(
            "A budget needs two sequences of calibration text, one of them to measure on; give more text, or lower "
            "calibration_length."
        )
    assert measured.text_source is not None
    fitted_to = [*rest, *measured.written]
    text_source = replace(measured.text_source, samples=len(fitted_to), tokens=sum(map(len, fitted_to)))
    # Costs of groups are measured on the rest alone.
    measured = replace(measured, given=rest, text_source=text_source, group_costs={})
    ids = batched(decoder, {"": held})
    dense = final_states(decoder, ids, "Held-out text")
    name, allowed = next((name, value) for name in LEVELS if (value := getattr(config, name)) is not None)
    clock = Clock(measured.seconds)  # which goes on from trial to trial

    def attempt(count: int) -> tuple[BudgetTrial, Fusion]:
        copy = decoder.copy()
        level = replace(config, num_fusions=count, max_divergence=None, max_perplexity_ratio=None)
        with start(copy, level, measured, clock) as fusion:
            fuse_pairs(fusion, count)
        fusion = last_pass(fusion)
        [figures] = predictions(copy, ids, final_states(copy, ids, "Measuring on held-out text"), dense).values()
        return BudgetTrial(count, figures.divergence, figures.perplexity / figures.dense_perplexity), fusion

    best, tried = search(name, allowed, config.most_fusions(decoder.num_layers), attempt)
    return _taken_over(decoder, best), BudgetInfo(name, allowed, sum(map(len, held)), tried, text_source.source)


def _taken_over(decoder: Decoder, fusion: Fusion) -> Fusion:
    """The fusion of a copy of a dense model as one of the model itself, which becomes what the copy is."""
    for index, group in enumerate(fusion.groups):
        if len(group) > 1:
            layer = fusion.decoder.layer(index)
            decoder.replace(index, layer_weights(decoder, layer), decoder.family.layer_kind(layer))
            for _ in group[1:]:
                decoder.remove(index + 1)
    return replace(fusion, decoder=decoder)


def last_pass(fusion: Fusion) -> Fusion:
    """Make and fit the fused layers from the bottom up, where the config says so.

    Where their groups were chosen all at once, each set that is left to choose from is first fitted to half of the
    text, and the one whose predictions of held-out text are then nearest to the dense model's is made whole. Two that
    come out alike are both made whole, and compared again.
    """
    if fusion.config.refit == "none":
        return fusion
    with fusion.clock("last pass"):
        measured = fusion.measured
        aside, rest = held_out(measured.given, _HELD_OUT)
        held_out_text = [*aside, *measured.other_text]
        texts = interleaved(rest, measured.written), fusion.config, held_out_text
        if not fusion.left_to_last_pass:
            fitted, _ = fit_from_bottom(fusion.decoder, fusion.dense, fusion.groups, *texts)
            return replace(fusion, fitted=fitted)
        # At random places, as chats are at equal distances.
        half = interleaved(*(held_out(some, len(some) // 2)[0] for some in (rest, measured.written)))
        plans, compared = fusion.plans if held_out_text and half else fusion.plans[:1], dict[Groups, float]()
        for plan in plans if len(plans) > 1 else ():
            made = fusion.shortened_to(plan)
            _, compared[plan] = fit_from_bottom(
                made.decoder, made.dense, made.groups, half, fusion.config, held_out_text, tuned=False
            )
        plans = sorted(compared, key=compared.__getitem__) or plans[:1]
        tie = [plan for plan in plans[1:2] if compared[plan] <= _TIE * compared[plans[0]]]
        best, least = None, math.inf
        for plan in [plans[0], *tie]:
            made = fusion.shortened_to(plan)
            made.fitted, cost = fit_from_bottom(made.decoder, made.dense, made.groups, *texts)
            if best is None or cost < least:
                best, least = made, cost
        assert best is not None
        return replace(_taken_over(fusion.decoder, best), compared=compared)


def finish(fusion: Fusion, tokenizer: PreTrainedTokenizerBase, *, base: str, parameters: int) -> FusionReport:
    """Make the last pass over a model after `fuse_pairs`, measure it, and report what was done.

    Parameters
    ----------
    fusion : Fusion
        Its decoder is changed where layers are fitted: with a copy of it in its place, the fusion can go on afterwards.
    tokenizer : the model's tokenizer
    base : str
        Name of the model, for the report.
    parameters : int
        How many the dense model has.
    """
    fusion = last_pass(replace(fusion, clock=Clock(fusion.clock.seconds)))
    config = replace(fusion.config, num_fusions=len(fusion.steps))
    return _report(fusion, config, tokenizer, base=base, parameters=parameters)


def _report(
    fusion: Fusion, config: FusionConfig, tokenizer: PreTrainedTokenizerBase, *, base: str, parameters: int
) -> FusionReport:
    """Measure the fused model, and put all together that was found out; `config` is what the user asked for."""
    decoder, measured, steps, clock = fusion.decoder, fusion.measured, list(fusion.steps), fusion.clock
    with clock("perplexity"):
        judged = perplexities(decoder, measured, fusion.config)
    with clock("continuations"):
        continuations = continued(decoder, tokenizer, measured)
    of_layer = list(decoder.layer(0).parameters())
    layers, averaged = len(fusion.groups) + len(steps), fusion.similarity is not None
    costs = fusion.costs if fusion.plans else {}
    return FusionReport(
        base=base,
        config=config.to_dict(),
        steps=steps,
        fitted_layers=fusion.fitted,
        layers_before=layers,
        layers_after=len(fusion.groups),
        parameters_before=parameters,
        parameters_after=parameters - len(steps) * sum(parameter.numel() for parameter in of_layer),
        calibration=measured.sources(fusion.config),
        perplexities=judged,
        similarity=None if fusion.similarity is None else fusion.similarity.tolist(),
        embeddings=measured.embeddings.tolist() if averaged and measured.embeddings is not None else None,
        sample_labels=measured.sample_labels if averaged else None,
        seconds=clock.seconds,
        versions=versions(),
        notes=_notes(fusion, judged, continuations),
        influences=fusion.influences or (measured.influences if averaged else None),
        weights_digest=weights_digest(decoder.named_parameters()),
        base_digest=measured.base_digest,
        dtype=str(of_layer[0].dtype).removeprefix("torch."),
        continuations=continuations,
        group_costs=[GroupCost(*group, cost) for group, cost in sorted(costs.items()) if math.isfinite(cost)],
        predicted=cheapest_levels(estimated(costs), fusion.config.most_fusions(layers)) if costs else [],
    )


def _notes(fusion: Fusion, judged: Sequence[PerplexityInfo], continuations: Sequence[Continuation]) -> list[str]:
    """What a user should know, one sentence each."""
    measured, config = fusion.measured, fusion.config
    notes = list(measured.notes)
    if config.needs_text and measured.text_note:
        notes.append(f"{measured.text_note}.")
    if config.selection == "least_influence":
        notes.append(
            "Layers were chosen by their influence alone, and what any pair of them costs was not measured; "
            "selection='groups' measures it, and finds pairs that must not be fused."
        )
    if fusion.compared:
        costs = "; ".join(
            f"{_named(groups)}: {cost:.3f}" for groups, cost in sorted(fusion.compared.items(), key=itemgetter(1))
        )
        notes.append(
            f"Of {len(fusion.compared)} sets of groups that were fitted to half of the text, {_named(fusion.plans[0])} "
            f"are fused. Divergence from the dense model then, in nats a token of held-out text: {costs}. If two are "
            f"within {_TIE - 1:.0%}, fits to all of the text decide."
        )
    notes += [
        f"Layer {layer.layer_instead} stands for layers {layer.layers[0]} to {layer.layers[-1]} as it is: on held-out "
        "text it comes nearer to what they do than the fitted layer."
        for layer in fusion.fitted
        if layer.layer_instead is not None
    ]
    damage = damage_notes(judged, continuations, fitted=config.refit != "none")
    for note in damage:
        logger.warning(note)
    return notes + damage


def _named(groups: Groups) -> str:
    return f"layers {', '.join(f'{first}-{last}' for first, last in groups)}"


def check_model(decoder: Decoder, config: FusionConfig) -> int:
    """Raise ValueError if the model cannot be fused as `config` says; else return its number of parameters."""
    check_layers(config, decoder.config)
    check_computes(decoder.config)
    count = 0
    for name, parameter in decoder.named_parameters():
        if parameter.device.type == "meta":
            raise ValueError(
                f"{name} is offloaded, so it cannot be fused in place; load the base without offloading (a "
                "device_map that fits its devices, or none), or use fuse_checkpoint, which holds two layers at a time."
            )
        if not all_finite(parameter):
            raise ValueError(f"{name} contains NaN or inf; repair the base checkpoint before fusing it.")
        count += parameter.numel()
    if note := slow_bfloat16_note(parameter.dtype, decoder.device):
        logger.warning(note)
    return count


def versions() -> dict[str, str]:
    """Versions of what a fusion's result depends on."""
    names = ["lf_hf", "torch", "transformers", "numpy", "scipy", "scikit-learn"]
    if find_spec("lap"):
        names.append("lapx")
    return {name: version(name) for name in names} | {"python": platform.python_version()}
