"""The pipeline: fuses pairs of layers of a model, in place, and reports what it did.

From top to bottom: the loop over pairs, how a pair is chosen and what it becomes, then what happens before and after
the loop. Where fused layers are fitted, the loop decides which layers form a group, and a last pass makes each fused
layer again, from the bottom up.
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
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from lf_hf.config import FusionConfig
from lf_hf.decoder.interface import Decoder
from lf_hf.families import DecoderLayer, Kind, Weights, check_layers
from lf_hf.measure import Clock, Measurements, continued, measure, perplexities
from lf_hf.numerics import all_finite, weights_digest
from lf_hf.progress import progress
from lf_hf.refit.bottom_up import fit_from_bottom
from lf_hf.refit.boundaries import Boundaries
from lf_hf.refit.check_family import check_computes
from lf_hf.refit.group import GroupFit, fit_group
from lf_hf.refit.layer_parts import build_layer, layer_weights
from lf_hf.refit.pair_costs import PairCosts, Roles, num_judging_copies
from lf_hf.refit.states import StateStore
from lf_hf.refit.traces import trace
from lf_hf.report.report import FittedLayer, FusionReport, FusionStep, PerplexityInfo, RowMatch
from lf_hf.stages.fusion import average_layers, fusion_ratio
from lf_hf.text.calibration import Calibration, Corpus

logger = logging.get_logger(__name__)

_STEPS = "alignment and fusion"  # stages 4 and 5, in a report's seconds
STEP_TOKENS = 8192  # of the calibration text that each step runs; the last pass runs all of it


def fuse_pairs(fusion: Fusion, num_fusions: int) -> None:
    """Fuse pairs of layers, one after the other, until `num_fusions` are fused."""
    with fusion.clock(_STEPS):
        for _ in progress(range(len(fusion.steps), num_fusions), desc="Fusing", unit="pair"):
            i, cost = fusion.choose()
            pair = fusion.fuse_pair(i, fusion.before(i), quick=fusion.config.remakes)
            fusion.steps.append(fusion.report_step(i, pair, cost))
            fusion.decoder.replace(i, pair.changed, pair.kind)
            fusion.decoder.remove(i + 1)
            fusion.update(i)


@dataclass
class Fusion:
    """The model while its pairs are fused; `start` makes one.

    `groups` has, for each layer, the layers of the dense model that it stands for. The states of calibration text at
    the layers' boundaries, and the costs of pairs, are there where the config needs them. `influences` is how much each
    layer of the dense model changes the stream of calibration text, empty without text.
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
    costs: PairCosts | None = None
    changed: int | None = None  # the layer that was fused since the costs were measured

    def choose(self) -> tuple[int, float | None]:
        """The first layer of the pair to fuse next, and what that is expected to cost where it was measured."""
        if self.costs is not None:
            if self.changed is not None:
                self.costs.update(self.changed)
                self.changed = None
            j = self._cheapest(self.costs.by_layer)
            return j - 1, self.costs.by_layer[j]
        if self.config.selection == "least_influence":
            assert self.boundaries is not None
            return self._cheapest(self.boundaries.influences) - 1, None
        return self.decoder.num_layers - 2, None

    def _cheapest(self, costs: Sequence[float]) -> int:
        """Index j of the layer that it costs least to join with layer j - 1.

        The first and the last layer of the model stay out of any pair: there must be at least four layers.
        """
        kinds = self.decoder.family.config_kinds(self.decoder.config)
        pairs = [j for j in range(2, len(costs) - 1) if self.config.merge != "average" or kinds[j - 1] == kinds[j]]
        return min(pairs, key=lambda j: costs[j])

    def before(self, i: int) -> Sequence[Tensor]:
        return [] if self.boundaries is None else self.boundaries.before(i)

    @torch.no_grad()
    def fuse_pair(self, i: int, states: Sequence[Tensor], *, quick: bool = False) -> _FusedPair:
        """Layers i and i + 1 as one: aligned, merged, and fitted to what they do to `states` where the config says so.

        `quick` is a rough fit: good enough to compare pairs, and where the last pass makes the layer again.
        """
        config, ratio = self.config, 1.0
        if self.similarity is not None:
            ratio = fusion_ratio(self.similarity, self.groups[i][0], self.groups[i + 1][0], config.ratio_beta)
        with ExitStack() as stack:
            pair = [stack.enter_context(self.decoder.layer(index)) for index in (i, i + 1)]
            traces = trace(self.decoder, pair, states if config.fits else [], self.store)
            first, second = (layer_weights(self.decoder, layer) for layer in pair)
            kind = self.decoder.family.layer_kind(pair[0])
            changed, matches = dict[str, Tensor](), dict[str, RowMatch]()  # of layer i, where it stays as it is
            if config.merge == "average":
                changed, matches = average_layers(
                    first,
                    second,
                    ratio=ratio,
                    alignment=config.alignment,
                    head_dim=pair[0].self_attn.head_dim,
                    symmetry=self.decoder.family.symmetry,
                    processes=self.decoder.processes,
                )
                for tensor in changed.values():  # in case machines round differently
                    self.decoder.processes.given_by_first(tensor)
            weights = first | changed
            if not config.fits:
                return _FusedPair(changed, weights, kind, ratio, matches, None)
            if config.merge != "select":
                pair = [build_layer(self.decoder, weights, kind)]
            del first, second, weights
            fit = fit_group(
                self.decoder, pair, traces, states, self.store, refit=config.refit, ridge=config.ridge, quick=quick
            )
            return _FusedPair(fit.weights, fit.weights, fit.kind, ratio, matches, fit)

    def try_pair(self, i: int, states: Sequence[Tensor]) -> DecoderLayer:
        """The layer that a pair would become which may never be fused."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Layers .* have no similarity")
            pair = self.fuse_pair(i, states, quick=True)
        return build_layer(self.decoder, pair.weights, pair.kind)

    def report_step(self, i: int, pair: _FusedPair, cost: float | None) -> FusionStep:
        """What is reported of the fusion of layers i and i + 1."""
        chosen_on_text = self.boundaries is not None and self.config.selection != "last"
        return FusionStep(
            layers_i=self.groups[i],
            layers_j=self.groups[i + 1],
            ratio_i=pair.ratio,
            ratio_j=1 - pair.ratio,
            matches=pair.matches,
            influence=self.boundaries.influences[i + 1] if self.boundaries is not None and chosen_on_text else None,
            divergence=cost if cost is not None and math.isfinite(cost) else None,
            heads_kept=pair.fit.heads_kept if pair.fit else None,
            channels_kept=pair.fit.channels_kept if pair.fit else None,
            error_before=pair.fit.error_before if pair.fit else None,
            error_after=pair.fit.error_after if pair.fit else None,
        )

    def update(self, i: int) -> None:
        """Layers i and i + 1 have become layer i."""
        self.groups[i] = self.groups[i] + self.groups.pop(i + 1)
        self.changed = i
        if self.boundaries is not None:
            self.boundaries.update(i)


@dataclass(frozen=True)
class _FusedPair:
    """What two layers become: the weights that differ from layer i's, all weights, the kind, and how it came about."""

    changed: Weights
    weights: Weights
    kind: Kind
    ratio: float
    matches: dict[str, RowMatch]
    fit: GroupFit | None


@contextmanager
def start(decoder: Decoder, config: FusionConfig, measured: Measurements) -> Iterator[Fusion]:
    """A fusion of a dense model, which `fuse_pairs` goes on with in a `with` block."""
    clock = Clock(measured.seconds)
    with ExitStack() as stack:
        with clock(_STEPS):
            text = _beginning(measured.text, STEP_TOKENS) if config.needs_text else []
            roles = Roles.of(len(text)) if config.selection == "least_divergence" else Roles(range(len(text)), [], [])
            parts = [
                decoder.batches([text[number] for number in decoder.processes.share(of_role)])
                for of_role in (roles.fitting, roles.both, roles.judging)
            ]
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
                boundaries=Boundaries(decoder, embedded, store) if text else None,
                clock=clock,
            )
            del embedded
            if fusion.boundaries is not None:
                fusion.influences = list(fusion.boundaries.influences)
            if config.selection == "least_divergence":
                assert fusion.boundaries is not None
                batches = iter(range(sum(map(len, parts))))
                of_batches = Roles(*(list(islice(batches, len(part))) for part in parts))
                fusion.costs = PairCosts(decoder, fusion.boundaries, of_batches, fusion.try_pair, store)
        yield fusion
        fusion.boundaries = fusion.costs = None  # the last pass needs the room


def state_copies(config: FusionConfig, num_layers: int) -> int:
    """How many times the states of the text that steps run are there: at all boundaries, in a pair, of candidates."""
    tried = num_judging_copies(num_layers) if config.selection == "least_divergence" else 0
    return num_layers + 7 + tried


def _beginning(text: Sequence[Tensor], tokens: int) -> Sequence[Tensor]:
    """As many of the first sequences as have `tokens` tokens together, but one at least."""
    ends = np.cumsum([len(sequence) for sequence in text])
    return text[: max(1, int((ends <= tokens).sum()))]


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
        Changed: it has `num_fusions` fewer layers afterwards.
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
    with start(decoder, config, measured) as fusion:
        fuse_pairs(fusion, config.num_fusions)
    return finish(fusion, decoder, tokenizer, base=base, parameters=parameters)


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
    measured, steps, groups = fusion.measured, list(fusion.steps), list(fusion.groups)
    config = replace(fusion.config, num_fusions=len(steps))
    clock = Clock(fusion.clock.seconds)
    fitted: list[FittedLayer] = []
    if config.refit != "none":
        with clock("last pass"):
            fitted = fit_from_bottom(decoder, groups, measured.text, config)
    with clock("perplexity"):
        judged = perplexities(decoder, measured, config)
    with clock("continuations"):
        continuations = continued(decoder, tokenizer, measured)
    with decoder.layer(0) as layer:
        layer_parameters = sum(parameter.numel() for parameter in layer.parameters())

    similar = config.needs_similarity
    return FusionReport(
        base=base,
        config=config.to_dict(),
        steps=steps,
        fitted_layers=fitted,
        layers_before=len(groups) + len(steps),
        layers_after=len(groups),
        parameters_before=parameters,
        parameters_after=parameters - len(steps) * layer_parameters,
        calibration=measured.sources(config),
        perplexities=judged,
        similarity=measured.similarity.tolist() if similar and measured.similarity is not None else None,
        embeddings=measured.embeddings.tolist() if similar and measured.embeddings is not None else None,
        seconds=clock.seconds,
        versions=versions(),
        notes=_notes(measured, config, judged),
        sample_labels=measured.sample_labels if similar else None,
        influences=fusion.influences or (measured.influences if similar else None),
        weights_digest=weights_digest(decoder.named_parameters()),
        base_digest=measured.base_digest,
        continuations=continuations,
    )


def _notes(measured: Measurements, config: FusionConfig, judged: Sequence[PerplexityInfo]) -> list[str]:
    """What a user should know, one sentence each."""
    notes = list(measured.notes)
    if config.needs_text and measured.offline_text:
        notes.append("Calibrated on text that is there offline; text of your own domain gives a better model.")
    if collapsed := [info for info in judged if not info.fused <= 2 * info.dense]:
        moved = " and ".join(f"from {info.dense:.4g} to {info.fused:.4g} ({info.name})" for info in collapsed)
        notes.append(
            f"Perplexity went {moved}: the fused model predicts text far worse than its base, even where "
            "multiple-choice scores look fine. "
            + (
                "method=refit fits the fused layers to the base and keeps far more of it."
                if config.refit == "none"
                else "Fewer fusions, or calibration text of the kind that the model will be used for, keep more of it."
            )
        )
        logger.warning(notes[-1])
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
    return count


def versions() -> dict[str, str]:
    """Versions of what a fusion's result depends on."""
    names = ["lf_hf", "torch", "transformers", "numpy", "scipy", "scikit-learn"]
    if find_spec("lap"):
        names.append("lapx")
    return {name: version(name) for name in names} | {"python": platform.python_version()}
