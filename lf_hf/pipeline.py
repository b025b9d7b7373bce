"""The pipeline: measure a model, fuse layers of it, fit what came out, and report.

`fuse` is the whole of it. `fuse_pairs` is the loop of every method: choose two layers, make them one, remove the
second. Where fused layers are fitted, a last pass makes each of them again from the bottom up.
"""

from __future__ import annotations

import math
import platform
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from lf_hf.budget import held_out, search
from lf_hf.decoder.interface import Decoder
from lf_hf.decoder.predictions import batched, final_states, predictions
from lf_hf.families import DecoderLayer, Kind, Weights, check_layers, head_dim
from lf_hf.measure import Clock, Measurements, continued, measure, perplexities
from lf_hf.refit.check_family import check_computes
from lf_hf.refit.group import GroupFit, fit_group
from lf_hf.refit.groups import Group, GroupCosts, cheapest_levels, estimated, text_for_groups
from lf_hf.refit.last_pass import fit_from_bottom
from lf_hf.refit.layer_parts import build_layer, layer_weights
from lf_hf.refit.states import StateStore
from lf_hf.refit.traces import Boundaries, Traces, trace
from lf_hf.report.notes import collapse_note, silence_note
from lf_hf.report.records import (
    BudgetInfo,
    BudgetTrial,
    Continuation,
    FittedLayer,
    FusionStep,
    GroupCost,
    PerplexityInfo,
    RowMatch,
)
from lf_hf.report.report import FusionReport
from lf_hf.runtime.numerics import all_finite, slow_bfloat16_note, weights_digest
from lf_hf.runtime.progress import progress
from lf_hf.settings import LEVELS, LONGEST_GROUP, FusionConfig
from lf_hf.stages.fusion import average_layers, fusion_ratio
from lf_hf.text.calibration import Calibration, Corpus
from lf_hf.text.packing import beginning

logger = logging.get_logger(__name__)

_STEPS = "alignment and fusion"  # stages 4 and 5, in a report's seconds
STEP_TOKENS = 8192  # of the calibration text that each step runs; the last pass runs all of it
_HELD_OUT = 32  # one of so many sequences of calibration text is held out of the last pass


def fuse(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    config: FusionConfig,
    samples: Calibration | None,
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
    samples, text : Calibration or None
        Samples for the layer similarity, and running text for influence, selection and fits. Each may be None
        only where `config.needs_similarity` or `config.needs_text` is false, or there are measurements.
    base : str
        Name of the model, for the report.
    measurements : Measurements, optional
        What `measure` found on the same dense model; by default it is measured here.

    Raises
    ------
    ValueError
        If the model has too few layers, there are too few calibration samples, weights or activations are
        not finite, or the measurements are of other settings. The model is unchanged then.
    """
    parameters = check_model(decoder, config)
    measured = measurements or measure(
        decoder,
        tokenizer,
        config,
        samples if config.needs_similarity else None,
        text if config.needs_text else None,
    )
    measured.check_serves(config)
    if config.within_budget:
        fusion, fitted, budget = _fuse_within_budget(decoder, config, measured)
        report = _report(fusion, fitted, config, decoder, tokenizer, base=base, parameters=parameters)
        return replace(report, budget=budget)
    with start(decoder, config, measured) as fusion:
        fuse_pairs(fusion, config.num_fusions)
    return finish(fusion, decoder, tokenizer, base=base, parameters=parameters)


def fuse_pairs(fusion: Fusion, num_fusions: int) -> None:
    """Fuse pairs of layers, one after the other, until `num_fusions` are fused."""
    with fusion.clock(_STEPS):
        if fusion.table is not None and not fusion.planned:
            fusion.planned = list(fusion.table.best(num_fusions))
        for _ in progress(range(len(fusion.steps), num_fusions), desc="Fusing", unit="pair"):
            i, cost = fusion.choose()
            fused = fusion.fuse_pair(i)
            fusion.steps.append(fusion.report_step(i, fused, cost))
            fusion.decoder.replace(i, fused.changed, fused.kind)
            fusion.decoder.remove(i + 1)
            fusion.update(i)


@dataclass
class Fusion:
    """The model while its pairs are fused; `start` makes one.

    Attributes
    ----------
    decoder, config, measured
    similarity : float64 array of shape (layers L, layers L), or None
        Of the dense model's layers, where weights are averaged.
    groups : list of lists of int
        For each layer, the layers of the dense model that it stands for.
    store : StateStore
    boundaries : Boundaries or None
        States of calibration text at the layers' boundaries, where the config needs them.
    clock : Clock
    influences : list of float
        How much each layer of the dense model changes the stream of calibration text; empty without text.
    steps : list of FusionStep
    table : GroupCosts or None
        With selection="groups".
    planned : list of pairs of int
        The groups that become one layer each, where they are chosen all at once.
    """

    decoder: Decoder
    config: FusionConfig
    measured: Measurements
    similarity: NDArray[np.float64] | None
    groups: list[list[int]]
    store: StateStore
    boundaries: Boundaries | None
    clock: Clock
    influences: list[float] = field(default_factory=list)
    steps: list[FusionStep] = field(default_factory=list)
    table: GroupCosts | None = None
    planned: list[Group] = field(default_factory=list)

    def choose(self) -> tuple[int, float | None]:
        """The first layer of the pair to fuse next, and what that is expected to cost where it was measured."""
        if self.planned:
            ends = dict(self.planned)
            i = next(i for i, group in enumerate(self.groups) if ends.get(group[0], 0) > group[-1])
            assert self.table is not None
            costs = estimated(self.table.by_group, longest=max(last - first + 1 for first, last in self.planned))
            first, *_, last = *self.groups[i], *self.groups[i + 1]
            return i, costs[first, last] - costs.get((first, self.groups[i][-1]), 0.0)
        if self.config.selection == "least_influence":
            assert self.boundaries is not None
            return self._least(self.boundaries.influences) - 1, None
        return self.decoder.num_layers - 2, None

    def _least(self, influences: Sequence[float]) -> int:
        """Index j of the layer of least influence that may be joined with layer j - 1.

        The first and the last layer of the model stay out of any pair: there must be at least four layers.
        """
        kinds = self.decoder.family.config_kinds(self.decoder.config)
        pairs = [j for j in range(2, len(influences) - 1) if self.config.merge != "average" or kinds[j - 1] == kinds[j]]
        return min(pairs, key=lambda j: influences[j])

    @torch.no_grad()
    def fuse_pair(self, i: int) -> FusedLayer:
        """Layers i and i + 1 as one. Where the last pass makes it again a rough fit will do, or none."""
        if self.planned and self.config.remakes:
            return FusedLayer({}, {})
        states = [] if self.boundaries is None else self.boundaries.before(i)
        with ExitStack() as stack:
            pair = [stack.enter_context(self.decoder.layer(index)) for index in (i, i + 1)]
            traces = trace(self.decoder, pair, states if self.config.fits else [], self.store)
            numbers = [self.groups[index][0] for index in (i, i + 1)]
            return self.fused(numbers, pair, traces, states, quick=self.config.remakes)

    @torch.no_grad()
    def try_group(
        self, first: int, layers: list[DecoderLayer], traces: Traces, states: Sequence[Tensor]
    ) -> DecoderLayer:
        """The layer that a group of layers of the dense model, from `first` on, would become by a rough fit."""
        beginning_weights = layer_weights(self.decoder, layers[0]) if self.config.merge != "select" else {}
        with warnings.catch_warnings():  # of layers that may never be fused
            warnings.filterwarnings("ignore", "Layers .* have no similarity")
            fused = self.fused(range(first, first + len(layers)), layers, traces, states, quick=True)
        return build_layer(self.decoder, {**beginning_weights, **fused.changed}, fused.kind)

    def fused(
        self,
        numbers: Sequence[int],
        layers: list[DecoderLayer],
        traces: Traces,
        states: Sequence[Tensor],
        *,
        quick: bool,
    ) -> FusedLayer:
        """Some layers as one: averaged where the config says so, and fitted to what they do to `states`.

        `numbers` are those of the layers in the dense model. The list of layers may be emptied.
        """
        config, kind = self.config, self.decoder.family.layer_kind(layers[0])
        changed, matches, ratio = dict[str, Tensor](), dict[str, RowMatch](), 1.0
        if config.merge != "select":
            weights = layer_weights(self.decoder, layers[0])
            for number, layer in zip(numbers[1:], layers[1:], strict=True) if config.merge == "average" else ():
                assert self.similarity is not None
                ratio = fusion_ratio(self.similarity, numbers[0], number, config.ratio_beta)
                changed, matches = self._averaged(weights, layer_weights(self.decoder, layer), ratio)
                weights |= changed
            if not config.fits:
                return FusedLayer(changed, kind, ratio, matches)
            layers = [build_layer(self.decoder, weights, kind)]
        fit = fit_group(
            self.decoder, layers, traces, states, self.store, refit=config.refit, ridge=config.ridge, quick=quick
        )
        return FusedLayer(fit.weights, fit.kind, ratio, matches, fit)

    def _averaged(self, first: Weights, second: Weights, ratio: float) -> tuple[dict[str, Tensor], dict[str, RowMatch]]:
        """What two layers' weights become, and how they were matched."""
        changed, matches = average_layers(
            first,
            second,
            ratio=ratio,
            alignment=self.config.alignment,
            head_dim=head_dim(self.decoder.config),
            symmetry=self.decoder.family.symmetry,
            processes=self.decoder.processes,
        )
        for tensor in changed.values():  # in case machines round differently
            self.decoder.processes.broadcast(tensor)
        return changed, matches

    def report_step(self, i: int, fused: FusedLayer, cost: float | None) -> FusionStep:
        """What is reported of the fusion of layers i and i + 1."""
        step = FusionStep(
            layers_i=self.groups[i],
            layers_j=self.groups[i + 1],
            ratio_i=fused.ratio,
            ratio_j=1 - fused.ratio,
            matches=fused.matches,
            divergence=cost if cost is not None and math.isfinite(cost) else None,
        )
        if self.boundaries is not None and self.config.selection == "least_influence":
            step = replace(step, influence=self.boundaries.influences[i + 1])
        if fit := fused.fit:
            step = replace(
                step,
                heads_kept=fit.heads_kept,
                channels_kept=fit.channels_kept,
                error_before=fit.error_before,
                error_after=fit.error_after,
            )
        return step

    def update(self, i: int) -> None:
        """Layers i and i + 1 have become layer i."""
        self.groups[i] = self.groups[i] + self.groups.pop(i + 1)
        if self.boundaries is not None and not (self.planned and self.config.remakes):
            self.boundaries.update(i)


@dataclass(frozen=True)
class FusedLayer:
    """What layers become: the weights that differ from the first one's, the kind, and how it came about."""

    changed: Weights
    kind: Kind
    ratio: float = 1.0
    matches: dict[str, RowMatch] = field(default_factory=dict)
    fit: GroupFit | None = None


@contextmanager
def start(
    decoder: Decoder, config: FusionConfig, measured: Measurements, clock: Clock | None = None
) -> Iterator[Fusion]:
    """A fusion of a dense model, which `fuse_pairs` goes on with in a `with` block."""
    clock = clock or Clock(measured.seconds)
    with ExitStack() as stack:
        with clock(_STEPS):
            fitting, judging = _texts_of_roles(config, measured)
            parts = [decoder.batches(decoder.processes.shard(of_role)) for of_role in (fitting, judging)]
            embedded = decoder.embed([batch for part in parts for batch in part])
            expected = sum(state.nbytes for state in embedded) * state_copies(config, decoder.num_layers)
            store = stack.enter_context(StateStore.with_room(decoder, expected))
            fusion = Fusion(
                decoder=decoder,
                config=config,
                measured=measured,
                similarity=measured.similarity if config.needs_similarity else None,
                groups=[[index] for index in range(decoder.num_layers)],
                store=store,
                boundaries=Boundaries(decoder, embedded, store) if config.needs_text else None,
                clock=clock,
            )
            del embedded
            if fusion.boundaries is not None:
                fusion.influences = list(fusion.boundaries.influences)
            if config.selection == "groups":
                assert fusion.boundaries is not None
                known = measured.group_costs.setdefault(_group_settings(config), {})
                fitted, judged = range(len(parts[0])), range(len(parts[0]), sum(map(len, parts)))
                fusion.table = GroupCosts(decoder, fusion.boundaries, fitted, judged, fusion.try_group, store, known)
        yield fusion
        fusion.boundaries = fusion.table = None  # the last pass needs the room


def _texts_of_roles(config: FusionConfig, measured: Measurements) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Sequences that steps are fitted to, and where groups are chosen those that judge them."""
    if config.selection == "groups":
        return text_for_groups(measured.text, measured.other_kinds)
    return beginning(measured.text, STEP_TOKENS) if config.needs_text else [], []


def _group_settings(config: FusionConfig) -> tuple[Any, ...]:
    """What the costs of groups depend on, besides what was measured."""
    return config.alignment, config.merge, config.refit, config.ridge, config.ratio_beta


def state_copies(config: FusionConfig, num_layers: int) -> int:
    """How many times the states of the text that steps run are there: at all boundaries, in a pair, of candidates."""
    # Half of the text judges: after each pair of layers it is there once. Groups are fitted to the other half.
    of_groups = num_layers // 2 + 2 * LONGEST_GROUP if config.selection == "groups" else 0
    return num_layers + 7 + of_groups


def _fuse_within_budget(
    decoder: Decoder, config: FusionConfig, measured: Measurements
) -> tuple[Fusion, list[FittedLayer], BudgetInfo]:
    """Fuse as many layers as a budget allows: copies of the model are fused whole, and measured on held-out text."""
    held, rest = held_out(measured.text, config.seed)
    assert measured.of_text is not None
    of_text = replace(measured.of_text, samples=len(rest), tokens=sum(map(len, rest)))
    measured = replace(measured, text=rest, of_text=of_text, group_costs={})  # costs of groups on the rest alone
    ids = batched(decoder, {"": held})
    dense = final_states(decoder, ids, "Held-out text")
    name, allowed = next((name, value) for name in LEVELS if (value := getattr(config, name)) is not None)
    clock = Clock(measured.seconds)  # which goes on from trial to trial

    def attempt(count: int) -> tuple[BudgetTrial, tuple[Decoder, Fusion, list[FittedLayer]]]:
        copy = decoder.copy()
        level = replace(config, num_fusions=count, max_divergence=None, max_perplexity_ratio=None)
        with start(copy, level, measured, clock) as fusion:
            fuse_pairs(fusion, count)
        fitted = last_pass(fusion, copy)
        [found] = predictions(copy, ids, final_states(copy, ids, "Measuring on held-out text"), dense).values()
        trial = BudgetTrial(count, found.divergence, found.perplexity / found.dense_perplexity)
        return trial, (copy, fusion, fitted)

    (best, fusion, fitted), tried = search(name, allowed, config.most_fusions(decoder.num_layers), attempt)
    for index, group in enumerate(fusion.groups):
        if len(group) > 1:
            with best.layer(index) as layer:
                decoder.replace(index, layer_weights(decoder, layer), decoder.family.layer_kind(layer))
            for _ in group[1:]:
                decoder.remove(index + 1)
    return fusion, fitted, BudgetInfo(name, allowed, sum(map(len, held)), tried, of_text.source)


def last_pass(fusion: Fusion, decoder: Decoder) -> list[FittedLayer]:
    """Fit the fused layers of a model whose pairs are fused, where the config says so."""
    if fusion.config.refit == "none":
        return []
    with fusion.clock("last pass"):
        text = fusion.measured.text
        held_out = [*text[_HELD_OUT - 1 :: _HELD_OUT], *fusion.measured.other_kinds]
        rest = [sequence for n, sequence in enumerate(text, 1) if n % _HELD_OUT]
        return fit_from_bottom(decoder, fusion.groups, rest, fusion.config, held_out)


def finish(
    fusion: Fusion, decoder: Decoder, tokenizer: PreTrainedTokenizerBase, *, base: str, parameters: int
) -> FusionReport:
    """Make the last pass over a model whose pairs are fused, measure it, and report what was done.

    Parameters
    ----------
    fusion : Fusion
    decoder : Decoder
        The fusion's own, or a copy of it, which lets the fusion go on afterwards. Changed where layers are fitted.
    tokenizer : the model's tokenizer
    base : str
        Name of the model, for the report.
    parameters : int
        How many the dense model has.
    """
    config = replace(fusion.config, num_fusions=len(fusion.steps))
    fusion = replace(fusion, clock=Clock(fusion.clock.seconds))
    return _report(fusion, last_pass(fusion, decoder), config, decoder, tokenizer, base=base, parameters=parameters)


def _report(
    fusion: Fusion,
    fitted: list[FittedLayer],
    config: FusionConfig,
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    *,
    base: str,
    parameters: int,
) -> FusionReport:
    """Measure the fused model, and put all together that was found out; `config` is what the user asked for."""
    measured, steps, clock = fusion.measured, list(fusion.steps), fusion.clock
    with clock("perplexity"):
        judged = perplexities(decoder, measured, fusion.config)
    with clock("continuations"):
        continuations = continued(decoder, tokenizer, measured)
    with decoder.layer(0) as layer:
        layer_parameters = sum(parameter.numel() for parameter in layer.parameters())
        dtype = str(next(layer.parameters()).dtype).removeprefix("torch.")
    layers = len(fusion.groups) + len(steps)
    report = FusionReport(
        base=base,
        config=config.to_dict(),
        steps=steps,
        fitted_layers=fitted,
        layers_before=layers,
        layers_after=len(fusion.groups),
        parameters_before=parameters,
        parameters_after=parameters - len(steps) * layer_parameters,
        calibration=measured.sources(fusion.config),
        perplexities=judged,
        similarity=None,
        embeddings=None,
        seconds=clock.seconds,
        versions=versions(),
        notes=_notes(measured, fusion.config, fitted, judged, continuations),
        influences=fusion.influences or None,
        weights_digest=weights_digest(decoder.named_parameters()),
        base_digest=measured.base_digest,
        dtype=dtype,
        continuations=continuations,
    )
    if fusion.similarity is not None and measured.embeddings is not None:
        report = replace(
            report,
            similarity=fusion.similarity.tolist(),
            embeddings=measured.embeddings.tolist(),
            sample_labels=measured.sample_labels,
            influences=fusion.influences or measured.influences,
        )
    if fusion.planned:
        costs = measured.group_costs[_group_settings(fusion.config)]
        report = replace(
            report,
            group_costs=[GroupCost(*group, cost) for group, cost in sorted(costs.items()) if math.isfinite(cost)],
            predicted=[cost for cost, _ in cheapest_levels(estimated(costs), fusion.config.most_fusions(layers))],
        )
    return report


def _notes(
    measured: Measurements,
    config: FusionConfig,
    fitted: Sequence[FittedLayer],
    judged: Sequence[PerplexityInfo],
    continuations: Sequence[Continuation],
) -> list[str]:
    """What a user should know, one sentence each."""
    notes = list(measured.notes)
    if config.needs_text and measured.text_note:
        notes.append(f"{measured.text_note}.")
    if config.selection == "least_influence":
        notes.append(
            "Layers were chosen by their influence alone, and what any pair of them costs was not measured; "
            "selection='groups' measures it, and finds pairs that must not be fused."
        )
    notes += [
        f"Layer {layer.layer_instead} stands for layers {layer.layers[0]} to {layer.layers[-1]} as it is: on held-out "
        "text it comes nearer to what they do than the fitted layer."
        for layer in fitted
        if layer.layer_instead is not None
    ]
    for note in (collapse_note(judged, fitted=config.refit != "none"), silence_note(continuations)):
        if note:
            notes.append(note)
            logger.warning(note)
    return notes


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
