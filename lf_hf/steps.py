"""A model while its pairs of layers are fused: how the next pair is chosen, and what it becomes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lf_hf.decoder.interface import Decoder
from lf_hf.families import DecoderLayer, Kind, Weights, head_dim
from lf_hf.measure import Clock, Measurements
from lf_hf.refit.group import fit_group
from lf_hf.refit.groups import SHORT, Group, GroupCosts, Groups, estimated, removed, text_for_groups
from lf_hf.refit.layer_parts import build_layer, layer_weights
from lf_hf.refit.states import Boundaries, StateStore, Traces, trace
from lf_hf.report.records import FittedLayer, FusionStep
from lf_hf.settings import LONGEST_GROUP, FusionConfig
from lf_hf.stages.fusion import average_layers, fusion_ratio
from lf_hf.text.packing import beginning

STEPS = "alignment and fusion"
"""What stages 4 and 5 are called in a report's seconds."""
STEP_TOKENS = 8192
"""Tokens of the calibration text that each step runs; the last pass runs all of it."""


@dataclass
class Fusion:
    """The model while its pairs are fused; `start` makes one."""

    decoder: Decoder
    dense: Decoder  # the model as it was, for the last pass; the same decoder where there is no such pass
    config: FusionConfig
    measured: Measurements
    similarity: NDArray[np.float64] | None  # of the dense model's layers, (L, L), where weights are averaged
    groups: list[list[int]]  # for each layer, the layers of the dense model that it stands for
    store: StateStore
    boundaries: Boundaries | None  # states of calibration text at the layers' boundaries, where the config needs them
    clock: Clock
    influences: list[float] = field(default_factory=list)  # of each layer of the dense model; none without text
    steps: list[FusionStep] = field(default_factory=list)
    group_costs: GroupCosts | None = None  # with selection="groups"
    costs: dict[Group, float] = field(default_factory=dict)  # of groups, that it measured
    # Where groups are chosen all at once, the set of them that cost least in trials, and those that may be better.
    plans: list[Groups] = field(default_factory=list)
    fitted: list[FittedLayer] = field(default_factory=list)  # by the last pass
    # The sets that were fitted to a part of the text, if there are several, with the divergence of held-out text.
    compared: dict[Groups, float] = field(default_factory=dict)

    @property
    def left_to_last_pass(self) -> bool:
        """Whether the last pass makes all fused layers, as their groups were chosen all at once."""
        return bool(self.plans) and self.config.made_by_last_pass

    def shortened_to(self, plan: Groups) -> Fusion:
        """The same on a copy of the model that lacks all layers of each group but the first, without any change."""
        groups = [[index] for index in range(self.decoder.num_layers)]
        fusion = replace(self, decoder=self.decoder.copy(), groups=groups, steps=[], plans=[plan])
        for _ in range(removed(plan)):
            i, cost = fusion.choose()
            fusion.join(i, cost)
        return fusion

    def choose(self) -> tuple[int, float | None]:
        """The first layer of the pair to fuse next, and what that is expected to cost where it was measured."""
        if self.plans:
            ends = dict(self.plans[0])
            i = next(i for i, group in enumerate(self.groups) if ends.get(group[0], 0) > group[-1])
            longest = max(last - first + 1 for first, last in self.plans[0])
            costs = estimated(self.costs, longest)
            first, last = self.groups[i][0], self.groups[i + 1][-1]
            return i, costs[first, last] - costs.get((first, self.groups[i][-1]), 0.0)
        if self.config.selection == "least_influence":
            assert self.boundaries is not None
            influences, kinds = self.boundaries.influences, self.decoder.family.config_kinds(self.decoder.config)
            inner = range(1, self.decoder.num_layers - 2)  # the model's first and last layer stay out of any pair
            pairs = [i for i in inner if self.config.merge != "average" or kinds[i] == kinds[i + 1]]
            return min(pairs, key=lambda i: influences[i + 1]), None
        return self.decoder.num_layers - 2, None

    @torch.no_grad()
    def fuse_pair(self, i: int) -> FusedLayer:
        """Layers i and i + 1 as one. A rough fit will do where the last pass makes it again."""
        states = [] if self.boundaries is None else self.boundaries.before(i)
        pair = [self.decoder.layer(index) for index in (i, i + 1)]
        numbers = [self.groups[index][0] for index in (i, i + 1)]
        traces = trace(self.decoder, pair, states if self.config.fits else [], self.store)
        return self.fused(numbers, pair, traces, states, quick=self.config.made_by_last_pass)

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
        config, decoder, kind = self.config, self.decoder, self.decoder.family.layer_kind(layers[0])
        changed, step_fields = self._averaged(numbers, layers) if config.merge == "average" else ({}, {})
        if not config.fits:
            return FusedLayer(changed, kind, step_fields)
        if config.merge != "select":
            layers = [build_layer(decoder, {**layer_weights(decoder, layers[0]), **changed}, kind)]
        fit = fit_group(
            decoder, layers, traces, states, self.store, refit=config.refit, ridge=config.ridge, quick=quick
        )
        for name in ("heads_kept", "channels_kept", "error_before", "error_after"):
            step_fields[name] = getattr(fit, name)
        return FusedLayer(fit.weights, fit.kind, step_fields)

    def _averaged(self, numbers: Sequence[int], layers: Sequence[DecoderLayer]) -> tuple[Weights, dict[str, Any]]:
        """The weights that change where layers are averaged, one after the other, and what the last average found."""
        decoder = self.decoder
        assert self.similarity is not None
        weights, changed, step_fields = layer_weights(decoder, layers[0]), dict[str, Tensor](), dict[str, Any]()
        for number, layer in zip(numbers[1:], layers[1:], strict=True):
            ratio = fusion_ratio(self.similarity, numbers[0], number, self.config.ratio_beta)
            changed, matches = average_layers(
                weights,
                layer_weights(decoder, layer),
                ratio=ratio,
                alignment=self.config.alignment,
                head_dim=head_dim(decoder.config),
                symmetry=decoder.family.symmetry,
                processes=decoder.processes,
            )
            for tensor in changed.values():  # in case machines round differently
                decoder.processes.broadcast(tensor)
            weights |= changed
            step_fields = {"ratio_i": ratio, "ratio_j": 1 - ratio, "matches": matches}
        return changed, step_fields

    def join(self, i: int, cost: float | None, fused: FusedLayer | None = None) -> None:
        """Let layer i stand for layers i and i + 1, as it is or fused, and note the step."""
        step_fields: dict[str, Any] = {"ratio_i": 1.0, "ratio_j": 0.0}
        if self.boundaries is not None and self.config.selection == "least_influence":
            step_fields["influence"] = self.boundaries.influences[i + 1]
        if cost is not None and math.isfinite(cost):
            step_fields["divergence"] = cost
        if fused is not None:
            step_fields |= fused.step_fields
            self.decoder.replace(i, fused.changed, fused.kind)
        self.steps.append(FusionStep(self.groups[i], self.groups[i + 1], **step_fields))
        self.decoder.remove(i + 1)
        self.groups[i] = self.groups[i] + self.groups.pop(i + 1)
        if self.boundaries is not None and not self.left_to_last_pass:
            self.boundaries.update(i)


@dataclass(frozen=True)
class FusedLayer:
    """What layers become: weights that differ from the first one's, the kind, and what a FusionStep says of it."""

    changed: Weights
    kind: Kind
    step_fields: dict[str, Any]


@contextmanager
def start(
    decoder: Decoder, config: FusionConfig, measured: Measurements, clock: Clock | None = None
) -> Iterator[Fusion]:
    """A fusion of a dense model, which `fuse_pairs` goes on with in a `with` block."""
    clock = clock or Clock(measured.seconds)
    with ExitStack() as stack:
        with clock(STEPS):
            fitting, judging = beginning(measured.text, STEP_TOKENS) if config.needs_text else [], list[Tensor]()
            if config.selection == "groups":
                fitting, judging = text_for_groups(measured.given, measured.written, measured.other_text)
            parts = [decoder.batches(decoder.processes.shard(of_role)) for of_role in (fitting, judging)]
            embedded = decoder.embed([batch for part in parts for batch in part])
            # States are at all boundaries and in a pair. Where groups are chosen, half of the text judges, and is there
            # once after each two and each three layers; groups are fitted to the other half.
            of_groups = decoder.num_layers + 2 * LONGEST_GROUP if config.selection == "groups" else 0
            expected = sum(state.nbytes for state in embedded) * (decoder.num_layers + 7 + of_groups)
            store = stack.enter_context(StateStore.with_room(decoder, expected))
            boundaries = Boundaries(decoder, embedded, store) if config.needs_text else None
            del embedded
            similarity = measured.similarity if config.needs_similarity else None
            groups = [[index] for index in range(decoder.num_layers)]
            dense = decoder if config.refit == "none" else decoder.copy()
            fusion = Fusion(decoder, dense, config, measured, similarity, groups, store, boundaries, clock)
            if boundaries is not None:
                fusion.influences = list(boundaries.influences)
            if config.selection == "groups":
                assert boundaries is not None
                fusion.costs |= measured.group_costs.get(group_settings(config), {})
                fitted, judged = range(len(parts[0])), range(len(parts[0]), sum(map(len, parts)))
                fuse, costs = fusion.try_group, fusion.costs
                fusion.group_costs = GroupCosts(decoder, boundaries, fitted, judged, fuse, store, costs)
            del boundaries
        yield fusion
        if fusion.group_costs is not None:  # what one number of fusions measures of longer ones, others may not
            short = {group: cost for group, cost in fusion.costs.items() if removed([group]) <= SHORT}
            measured.group_costs[group_settings(config)] = short
        fusion.boundaries = fusion.group_costs = None  # the last pass needs the room


def group_settings(config: FusionConfig) -> tuple[Any, ...]:
    """What the costs of groups depend on, besides what was measured."""
    return config.alignment, config.merge, config.refit, config.ridge, config.ratio_beta
