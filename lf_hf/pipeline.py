"""The pipeline: choose groups of the dense model's layers, make each group one layer, judge the result, and report.

`measure.dense.measure` comes before it, once for any number of fusions, and `fuse` is the rest;
`inputs.FusionInputs.fuse` calls both. What a group becomes depends on the method: `stages.fusion.average` is the
published one, `refit.bottom_up.fit_groups` is `refit`. The model before it is fused is `dense` in the code, and the
base wherever people read of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from lf_hf.choose.budget import search_budget
from lf_hf.choose.choice import Choice, choose
from lf_hf.decoder.decoder import Decoder, Group, Groups
from lf_hf.families import Kind, Weights
from lf_hf.measure.check import check_attends, check_layers
from lf_hf.measure.dense import Measurements
from lf_hf.measure.judge import compare_continuations, judge_fused
from lf_hf.models import num_parameters
from lf_hf.refit.bottom_up import fit_groups
from lf_hf.report.data import Continuation, FusedLayer, GroupCost, PerplexityInfo
from lf_hf.report.notes import damage_notes
from lf_hf.report.report import FusionReport, published_name, versions
from lf_hf.runtime.clock import Clock
from lf_hf.runtime.numerics import weights_digest
from lf_hf.runtime.progress import progress
from lf_hf.settings import FusionConfig
from lf_hf.stages.fusion import average
from lf_hf.text.packing import interleave, split_held_out

logger = logging.get_logger(__name__)

_HELD_OUT = 4  # sequences of calibration text that layers are not fitted to, but judged on


class Fusion(NamedTuple):
    """The groups that were chosen, and a report entry of each layer that was made of one."""

    choice: Choice
    layers: list[FusedLayer]


def fuse(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    config: FusionConfig,
    measured: Measurements,
    *,
    base: str,
) -> FusionReport:
    """Fuse groups of the dense model's layers in place, and judge what came out.

    Parameters
    ----------
    decoder : Decoder
        Changed: it has `config.num_fusions` fewer layers afterwards, or as many fewer as a budget allows.
    tokenizer : the model's tokenizer
    config : FusionConfig
    measured : Measurements
        What `measure` found on the same dense model: the layer similarity if `config.averages`, and calibration text if
        `config.needs_text`.
    base : str
        Name of the model, for the report.

    Raises
    ------
    ValueError
        If the model has too few layers, or activations are not finite; the model is unchanged then. Or if a hybrid has
        lost all its attention.
    """
    check_layers(config, decoder.model_config)
    measured = measured.used_by(config)
    described = num_parameters(decoder.model_config)[1]
    clock = Clock(measured.seconds)
    num_layers = decoder.num_layers
    budget = None
    if config.within_budget:
        fuse_copy = partial(fuse_layers, clock=clock)
        fused, fusion, budget, measured = search_budget(decoder, config, measured, fuse_copy)
        decoder.become(fused, fusion.choice.groups)
    else:
        fusion = fuse_layers(decoder, config, measured, clock=clock)
    with clock("perplexity"):
        perplexities = judge_fused(decoder, measured.judged, config)
    with clock("continuations"):
        continuations = compare_continuations(decoder, tokenizer, measured.continuations)
    similarity = measured.similarity
    return FusionReport(
        base=published_name(base),
        config=config.to_dict(),
        fused_layers=fusion.layers,
        layers_before=num_layers,
        layers_after=decoder.num_layers,
        parameters_before=measured.parameters,
        parameters_after=measured.parameters - described + num_parameters(decoder.model_config)[1],
        calibration=measured.sources,
        perplexities=perplexities,
        similarity=similarity and similarity.matrix.tolist(),
        embeddings=similarity and similarity.embeddings.tolist(),
        sample_labels=similarity and similarity.labels,
        influences=fusion.choice.influences or (similarity and similarity.influences),
        seconds=clock.seconds,
        versions=versions(),
        notes=_notes(config, measured, fusion.layers, perplexities, continuations),
        weights_digest=weights_digest(decoder.named_parameters()),
        base_digest=measured.base_digest,
        dtype=str(decoder.layer(0).mlp.down_proj.weight.dtype).removeprefix("torch."),
        continuations=continuations,
        budget=budget,
        group_costs=[GroupCost(*group, cost) for group, cost in sorted(fusion.choice.costs.items())],
    )


def fuse_layers(decoder: Decoder, config: FusionConfig, measured: Measurements, *, clock: Clock) -> Fusion:
    """Choose groups of layers of the dense model, and make each one layer, in place, from the bottom up."""
    with clock("choosing"):
        choice = choose(decoder, config, measured)
    with clock("making"):
        dense = decoder.copy()
        layers = []
        num_removed = 0
        for (first, last), weights, kind, entry in make_layers(dense, choice.groups, config, measured):
            decoder.join((first - num_removed, last - num_removed), weights, kind)
            num_removed += last - first
            layers.append(replace(entry, cost=choice.costs.get((first, last))))
    check_attends(decoder.config)
    return Fusion(choice, layers)


class MadeLayer(NamedTuple):
    """What a group becomes: values for its first layer, that layer's kind where it changes, and a report entry."""

    group: Group
    weights: Weights
    kind: Kind | None
    entry: FusedLayer


def make_layers(dense: Decoder, groups: Groups, config: FusionConfig, measured: Measurements) -> Iterator[MadeLayer]:
    """Make one layer of each group, from the bottom up: a fit to the group, its average, or its first layer."""
    if config.fits:
        return _fit(dense, groups, config, measured)
    if config.averages:
        return _average(dense, groups, config, measured)
    return _keep_first(groups)


def _fit(dense: Decoder, groups: Groups, config: FusionConfig, measured: Measurements) -> Iterator[MadeLayer]:
    assert measured.text is not None
    held_out_sequences, rest = split_held_out(measured.text.given, _HELD_OUT)
    sequences = interleave(rest, measured.text.written)
    judging = [*held_out_sequences, *measured.text.other]
    for group, fit in fit_groups(dense, groups, sequences, judging, ridge=config.ridge):
        entry = FusedLayer(
            layers=_numbers(group),
            shares=fit.shares,
            heads_kept=fit.heads_kept,
            channels_kept=fit.channels_kept,
            error_before=fit.error_before,
            error_after=fit.error_after,
            attention_error=fit.attention_error,
            held_out_error=fit.held_out_error,
            first_token_error=fit.first_token_error,
            layer_instead=fit.layer_instead,
        )
        yield MadeLayer(group, fit.weights, fit.kind, entry)


def _average(dense: Decoder, groups: Groups, config: FusionConfig, measured: Measurements) -> Iterator[MadeLayer]:
    assert measured.similarity is not None
    for group in progress(groups, desc="Fusing", unit="group"):
        averaged = average(
            dense,
            group,
            measured.similarity.matrix,
            alignment=config.alignment,
            ratio_beta=config.ratio_beta,
            known=measured.averages,
        )
        matches = [match for match in averaged.matches if match]
        entry = FusedLayer(_numbers(group), averaged.shares, averaged.ratios, matches)
        yield MadeLayer(group, averaged.weights, None, entry)


def _keep_first(groups: Groups) -> Iterator[MadeLayer]:
    for first, last in groups:
        entry = FusedLayer(_numbers((first, last)), shares=[1.0, *[0.0] * (last - first)])
        yield MadeLayer((first, last), {}, None, entry)


def _numbers(group: Group) -> list[int]:
    return list(range(group[0], group[1] + 1))


def _notes(
    config: FusionConfig,
    measured: Measurements,
    layers: Sequence[FusedLayer],
    perplexities: Sequence[PerplexityInfo],
    continuations: Sequence[Continuation],
) -> list[str]:
    """What a user should know, one sentence each."""
    notes = list(measured.notes)
    if measured.similarity is not None:
        notes += measured.similarity.notes
    if measured.text is not None and measured.text.note:
        notes.append(f"{measured.text.note}.")
    if config.fits and config.selection == "least_influence":
        notes.append(
            "Layers were chosen by their influence alone, and what any group of them costs was not measured; "
            "selection='groups' measures it, and finds groups that must not be fused."
        )
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
