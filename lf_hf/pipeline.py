"""The pipeline: runs the five stages on a Llama, in place, and reports what it did."""

from __future__ import annotations

import math
import platform
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from lf_hf.boundaries import Boundaries
from lf_hf.calibration import (
    Calibration,
    Corpus,
    check_ids,
    documentation_halves,
    mixed,
    pack_corpus,
    pack_tokens,
    tokenize_samples,
)
from lf_hf.candidates import JUDGED, Candidates
from lf_hf.config import FusionConfig
from lf_hf.decoder import Decoder, all_finite
from lf_hf.perplexity import perplexity
from lf_hf.refit import GroupFit, build_layer, fit_group, refit_from_bottom, trace
from lf_hf.report import CalibrationInfo, FusionReport, FusionStep, LayerRefit, PerplexityInfo
from lf_hf.stages.activations import sample_distances
from lf_hf.stages.alignment import RowMatch
from lf_hf.stages.fusion import fuse_layers, fusion_ratio
from lf_hf.stages.manifold import diffusion_embedding
from lf_hf.stages.selection import least_costly
from lf_hf.stages.similarity import layer_similarity
from lf_hf.states import StateStore

logger = logging.get_logger(__name__)

PERPLEXITY_LENGTH = 512  # tokens of a sequence on which perplexity is measured
STEP_TOKENS = 8192  # of the calibration text that each step runs; the refit at the end runs all of it
WRITTEN_LENGTH = 128  # tokens of a text that the model writes: all weights are read once for each

# Fields of FusionConfig that measurements do not depend on, so that fusions may differ in them.
_OF_FUSING = ("num_fusions", "method", "selection", "alignment", "merge", "refit", "ridge", "ratio_beta")


@dataclass(frozen=True)
class Measurements:
    """What is measured on the dense model before it is fused; serves any number of fusions of it.

    Attributes
    ----------
    settings : dict
        The FusionConfig fields that it depends on.
    judging, perplexity : list of int64 tensors of shape (tokens T,), and float or None
        The text that perplexity is measured on, and the dense model's; none where no tokens were asked for.
    similarity, embeddings : float64 arrays of shape (L, L) and (L, samples N, d), or None
    text : list of int64 tensors of shape (tokens T,)
        Calibration text for influence, selection and refit.
    offline_text : bool
        Whether that is the mixture that is there offline, which the model writes part of, and not a user's.
    sample_labels : list of str or None
        MMLU subject of each sample.
    influences : list of float or None
        How much each layer changes the residual stream, on the samples.
    of_samples, of_text : CalibrationInfo or None
        Where the samples behind `similarity`, and `text`, came from.
    seconds : dict of float
    notes : list of str
    """

    settings: dict[str, Any]
    judging: list[Tensor]
    perplexity: float | None
    similarity: NDArray[np.float64] | None
    embeddings: NDArray[np.float64] | None
    text: list[Tensor]
    offline_text: bool
    sample_labels: list[str] | None
    influences: list[float] | None
    of_samples: CalibrationInfo | None
    of_text: CalibrationInfo | None
    seconds: dict[str, float]
    notes: list[str]

    def check_serves(self, config: FusionConfig) -> None:
        """Raise ValueError unless a fusion with `config` would measure the same."""
        for name, value in self.settings.items():
            if getattr(config, name) != value:
                raise ValueError(
                    f"The measurements were made with {name}={value!r}, not {getattr(config, name)!r}; measure again."
                )
        if (config.needs_similarity and self.similarity is None) or (config.needs_text and self.of_text is None):
            raise ValueError(f"The measurements lack what method={config.method!r} needs; measure again.")


def measure(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    config: FusionConfig,
    samples: Calibration | None,
    text: Corpus | None,
) -> Measurements:
    """Measure perplexity, layer similarity (stages 1 to 3) where there are samples, and take calibration text.

    Raises
    ------
    ValueError
        If there are too few samples or too little text, or activations are not finite.
    """
    clock = _Clock()
    notes: list[str] = []
    with clock("perplexity"):
        judging = _judging_sequences(decoder, tokenizer, config, notes)
        dense = perplexity(decoder, judging, "Perplexity before fusing") if judging else None

    similarity, embeddings, of_samples = None, None, None
    influences: list[float] | None = None
    if samples is not None:
        config.check_num_samples(len(samples.texts))
        ids = tokenize_samples(tokenizer, samples, config.sample_length, decoder.config.vocab_size)
        of_samples = CalibrationInfo(samples.source, len(ids), sum(map(len, ids)))
        with clock("activations"):  # stage 1
            influences = [] if max(map(len, ids)) > 1 else None  # which leave each sample's first token out
            distances = sample_distances(decoder, ids, influences)
        with clock("manifold"):  # stage 2
            embeddings = np.stack(
                [
                    diffusion_embedding(
                        layer,
                        kernel_scale=config.kernel_scale,
                        kernel_alpha=config.kernel_alpha,
                        embedding_dim=config.embedding_dim,
                    )
                    for layer in distances
                ]
            )
        with clock("similarity"):  # stage 3
            similarity = layer_similarity(
                embeddings,
                mi_neighbors=config.mi_neighbors,
                entropy_neighbors=config.entropy_neighbors,
                rank_normalize=config.rank_normalize,
                seed=config.seed,
            )

    packed: list[Tensor] = []
    of_text = None
    if text is not None:
        with clock("calibration text"):
            packed = calibration_sequences(decoder, tokenizer, text, config)
        of_text = CalibrationInfo(text.full_source, len(packed), sum(map(len, packed)))
    return Measurements(
        settings={name: value for name, value in config.to_dict().items() if name not in _OF_FUSING},
        judging=judging,
        perplexity=dense,
        similarity=similarity,
        embeddings=embeddings,
        text=packed,
        offline_text=text is not None and text.by_default,
        sample_labels=None if samples is None else samples.labels,
        influences=influences,
        of_samples=of_samples,
        of_text=of_text,
        seconds=clock.seconds,
        notes=notes,
    )


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
    """Fuse `config.num_fusions` pairs of layers, in place.

    Parameters
    ----------
    decoder : Decoder
        Changed: it has `num_fusions` fewer layers afterwards.
    tokenizer : the model's tokenizer
    config : FusionConfig
    samples, text : Calibration or None
        Samples for the layer similarity, and running text for influence, selection and refit. Each may be None
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
    parameters_before = check_model(decoder, config)
    layers_before = decoder.num_layers
    if measurements is None:
        measurements = measure(
            decoder,
            tokenizer,
            config,
            samples if config.needs_similarity else None,
            text if config.needs_text else None,
        )
    measurements.check_serves(config)
    similarity = measurements.similarity if config.needs_similarity else None
    embeddings = measurements.embeddings if config.needs_similarity else None
    packed = measurements.text if config.needs_text else []
    sources = [(config.needs_similarity, measurements.of_samples), (config.needs_text, measurements.of_text)]
    notes = list(measurements.notes)
    if config.needs_text and measurements.offline_text:
        notes.append("Calibrated on text that is there offline; text of your own domain gives a better model.")
    clock = _Clock(measurements.seconds)

    with clock("alignment and fusion"):  # stages 4 and 5
        steps, origins, influences = _fuse_steps(decoder, config, similarity, packed)
    refits: list[LayerRefit] = []
    if config.refit != "none":
        with clock("refit"):
            refits = refit_from_bottom(
                decoder, origins, packed, select=config.merge == "select", refit=config.refit, ridge=config.ridge
            )

    judged = None
    dense = measurements.perplexity
    if dense is not None:
        with clock("perplexity"):
            fused = perplexity(decoder, measurements.judging, "Perplexity after fusing")
        judged = PerplexityInfo(dense, fused, sum(map(len, measurements.judging)), _judging_text())
        if not fused <= 2 * dense:
            notes.append(
                f"Perplexity went from {dense:.4g} to {fused:.4g}: the fused model predicts text far worse than its "
                "base, even where multiple-choice scores look fine."
            )
            logger.warning(notes[-1])

    return FusionReport(
        base=base,
        config=config.to_dict(),
        steps=steps,
        refits=refits,
        layers_before=layers_before,
        layers_after=decoder.num_layers,
        parameters_before=parameters_before,
        parameters_after=sum(parameter.numel() for _, parameter in decoder.named_parameters()),
        calibration=[info for needed, info in sources if needed and info is not None],
        perplexity=judged,
        similarity=None if similarity is None else similarity.tolist(),
        embeddings=None if embeddings is None else embeddings.tolist(),
        seconds=clock.seconds,
        versions=versions(),
        notes=notes,
        sample_labels=measurements.sample_labels if config.needs_similarity else None,
        influences=influences or (measurements.influences if config.needs_similarity else None),
    )


def calibration_sequences(
    decoder: Decoder, tokenizer: PreTrainedTokenizerBase, text: Corpus, config: FusionConfig
) -> list[Tensor]:
    """Calibration text as int64 tensors of shape (tokens T,), with what the model is to write of it."""
    length, share = min(config.calibration_length, decoder.config.max_position_embeddings), text.generated_share
    short = min(WRITTEN_LENGTH, length)
    count = int(config.calibration_tokens * share) // short
    packed = pack_corpus(tokenizer, text, length, config.calibration_tokens - count * short, decoder.config.vocab_size)
    count = min(count, round(sum(map(len, packed)) * share / (1 - share) / short))  # short text keeps its share
    return mixed(packed, decoder.generate(count, short, config.seed)) if count else packed


def check_model(decoder: Decoder, config: FusionConfig) -> int:
    """Raise ValueError if the model can not be fused as `config` says; else return its number of parameters."""
    config.check_num_layers(decoder.num_layers)
    count = 0
    for name, parameter in decoder.named_parameters():
        if parameter.device.type == "meta":
            raise ValueError(
                f"{name} is offloaded, so it can not be fused in place; load the base without offloading (a "
                "device_map that fits its devices, or none), or use fuse_checkpoint, which holds two layers at a time."
            )
        if not all_finite(parameter):
            raise ValueError(f"{name} contains NaN or inf; repair the base checkpoint before fusing it.")
        count += parameter.numel()
    return count


def versions() -> dict[str, str]:
    """Versions of what a fusion's result depends on."""
    names = [
        "lf_hf",
        "torch",
        "transformers",
        "numpy",
        "scipy",
        "scikit-learn",
        *(["lapx"] if find_spec("lap") else []),
    ]
    packages = {name: version(name) for name in names}
    return packages | {"python": platform.python_version()}


def state_copies(config: FusionConfig, num_layers: int) -> int:
    """How many times the states of the text that steps run are there: at all boundaries, in a pair, of candidates."""
    tried = num_layers // JUDGED if config.selection == "least_divergence" else 0
    return num_layers + 7 + tried


def _fuse_steps(
    decoder: Decoder, config: FusionConfig, similarity: NDArray[np.float64] | None, text: Sequence[Tensor]
) -> tuple[list[FusionStep], list[list[int]], list[float]]:
    """Fuse one pair after another.

    Also returns the original layers that each layer then stands for, and the dense layers' influences on `text`, if
    there is any.
    """
    origins = [[index] for index in range(decoder.num_layers)]
    steps = []
    embedded = decoder.embed(_beginning(text, STEP_TOKENS)) if text else []

    def fuse_pair(i: int, states: Sequence[Tensor], *, by_size: bool = False) -> _FusedPair:
        ratio = 1.0
        if similarity is not None:
            ratio = fusion_ratio(similarity, origins[i][0], origins[i + 1][0], config.ratio_beta)
        return _fused_pair(decoder, config, i, ratio, states, store, by_size=by_size)

    def try_pair(i: int, states: Sequence[Tensor]) -> Mapping[str, Tensor]:
        with warnings.catch_warnings():  # about pairs that may never be fused
            warnings.filterwarnings("ignore", "Layers .* have no similarity")
            return fuse_pair(i, states, by_size=True).weights

    with StateStore(sum(state.nbytes for state in embedded) * state_copies(config, decoder.num_layers)) as store:
        boundaries = Boundaries(decoder, embedded, store) if embedded else None
        influences = list(boundaries.influences) if boundaries is not None else []
        candidates = None
        if boundaries is not None and config.selection == "least_divergence":
            candidates = Candidates(decoder, boundaries, try_pair, store)
        for _ in logging.tqdm(range(config.num_fusions), desc="Fusing", unit="pair"):
            j = decoder.num_layers - 1
            if candidates is not None:
                j = least_costly(candidates.costs)
            elif boundaries is not None and config.selection == "least_influence":
                j = least_costly(boundaries.influences)
            i = j - 1
            cost = candidates.costs[j] if candidates is not None else None
            pair = fuse_pair(i, [] if boundaries is None else boundaries.before(i))
            steps.append(
                FusionStep(
                    layers_i=origins[i],
                    layers_j=origins[j],
                    ratio_i=pair.ratio,
                    ratio_j=1 - pair.ratio,
                    matches=pair.matches,
                    influence=boundaries.influences[j]
                    if boundaries is not None and config.selection != "last"
                    else None,
                    divergence=cost if cost is not None and math.isfinite(cost) else None,
                    heads_kept=pair.fit.heads_kept if pair.fit else None,
                    channels_kept=pair.fit.channels_kept if pair.fit else None,
                    error_before=pair.fit.error_before if pair.fit else None,
                    error_after=pair.fit.error_after if pair.fit else None,
                )
            )
            decoder.replace(i, pair.changed)
            decoder.remove(j)
            origins[i] = origins[i] + origins.pop(j)
            if boundaries is not None:
                boundaries.update(i)
            if candidates is not None and len(steps) < config.num_fusions:
                candidates.update(i)
    return steps, origins, influences


@dataclass(frozen=True)
class _FusedPair:
    """What two layers become: the weights that differ from layer i's, all weights, and how they came about."""

    changed: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    ratio: float
    matches: dict[str, RowMatch]
    fit: GroupFit | None


@torch.no_grad()
def _fused_pair(
    decoder: Decoder,
    config: FusionConfig,
    i: int,
    ratio: float,
    states: Sequence[Tensor],
    store: StateStore,
    *,
    by_size: bool,
) -> _FusedPair:
    """Layers i and i + 1 as one, fitted to what they do to `states` where the config says so."""
    with ExitStack() as stack:
        pair = [stack.enter_context(decoder.layer(index)) for index in (i, i + 1)]
        traces = trace(decoder, pair, states if config.fits else [], store)
        first, second = (dict(layer.named_parameters()) for layer in pair)
        changed, matches = fuse_layers(
            first,
            second,
            ratio=ratio,
            alignment=config.alignment,
            merge=config.merge,
            head_dim=pair[0].self_attn.head_dim,
        )
        weights = first | changed
        if not config.fits:
            return _FusedPair(changed, weights, ratio, matches, None)
        if config.merge != "select":
            pair = [build_layer(decoder, weights)]
        del first, second, weights
        fit = fit_group(decoder, pair, traces, states, store, refit=config.refit, ridge=config.ridge, by_size=by_size)
        return _FusedPair(fit.weights, fit.weights, ratio, matches, fit)


def _beginning(text: Sequence[Tensor], tokens: int) -> Sequence[Tensor]:
    """As many of the first sequences as have `tokens` tokens together, but one at least."""
    ends = np.cumsum([len(sequence) for sequence in text])
    return text[: max(1, int((ends <= tokens).sum()))]


def _judging_sequences(
    decoder: Decoder, tokenizer: PreTrainedTokenizerBase, config: FusionConfig, notes: list[str]
) -> list[Tensor]:
    """Token sequences on which perplexity is measured: the second half of Python's documentation."""
    if config.perplexity_tokens == 0:
        return []
    text = documentation_halves()[1]
    if not text:
        notes.append("No perplexity: this Python comes without pydoc_data.topics, the text that it is measured on.")
        logger.warning(notes[-1])
    length = min(PERPLEXITY_LENGTH, decoder.config.max_position_embeddings)
    sequences = pack_tokens(tokenizer, text, length, config.perplexity_tokens)
    check_ids(max((int(sequence.max()) for sequence in sequences), default=0), decoder.config.vocab_size)
    return sequences


def _judging_text() -> str:
    return f"documentation of Python {platform.python_version()}, second half"


class _Clock:
    """Seconds by name, added up over `with clock(name):` blocks."""

    def __init__(self, seconds: Mapping[str, float] | None = None) -> None:
        self.seconds: dict[str, float] = dict(seconds or {})

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
