"""What is measured on the dense model, once for any number of fusions of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from lf_hf.decoder.decoder import Decoder, Group
from lf_hf.decoder.demand import Need, Setup, Work
from lf_hf.decoder.placement import distinct_parameters
from lf_hf.measure.check import check_model
from lf_hf.measure.generating import text_writer, writing
from lf_hf.measure.judge import Judged, judge_dense, judging, write_continuations
from lf_hf.report.data import CalibrationInfo, MadeLayer
from lf_hf.runtime.amounts import JUDGING_LENGTH, MIXTURE_SHARE, PERPLEXITY_LENGTH, WRITTEN_LENGTH
from lf_hf.runtime.memory import give_back_freed
from lf_hf.runtime.numerics import weights_digest
from lf_hf.runtime.progress import Clock
from lf_hf.runtime.words import plural
from lf_hf.settings import FusionConfig
from lf_hf.stages.activations import sample_distances
from lf_hf.stages.averaging import AverageKey
from lf_hf.stages.manifold import diffusion_embedding
from lf_hf.stages.similarity import layer_similarity
from lf_hf.text.calibration import CalibrationSamples, Corpus
from lf_hf.text.chats import CHATS
from lf_hf.text.packing import interleave, pack_corpus, pack_out_of_domain, split_held_out, tokenize_samples

logger = logging.get_logger(__name__)

_SAMPLES, _SAMPLE_LENGTH = 57, 128  # a question of each MMLU subject, and about how many tokens it has


class Similarity(NamedTuple):
    """What stages 1 to 3 found on calibration samples."""

    matrix: NDArray[np.float64]  # of shape (layers L, layers L)
    embeddings: NDArray[np.float64]  # of shape (L, samples N, d)
    influences: list[float] | None  # how much each layer changes the residual stream
    labels: list[str] | None  # MMLU subject of each sample
    source: CalibrationInfo
    notes: list[str]


class CalibrationText(NamedTuple):
    """Running text that layers are fitted to, as int64 tensors of shape (tokens T,)."""

    given: list[Tensor]
    written: list[Tensor]  # by the model itself; judges nothing
    other: list[Tensor]  # pieces of text of other kinds, which only judge
    source: CalibrationInfo
    notes: list[str]  # what users should know of it

    @property
    def sequences(self) -> list[Tensor]:
        """What is given and what the model writes, in turns."""
        return interleave(self.given, self.written)

    def first(self, tokens: int) -> list[Tensor]:
        """As many of the first of these as have `tokens` tokens together, but one at least."""
        ends = np.cumsum(list(map(len, self.sequences)))
        return self.sequences[: max(1, int((ends <= tokens).sum()))]

    def hold_out(self, count: int, *, at_random: bool = True) -> tuple[list[Tensor], CalibrationText]:
        """At most `count` given sequences to measure on, as `split_held_out` takes them, and the text without them."""
        held_out, rest = split_held_out(self.given, count, at_random=at_random)
        return held_out, self._replace(given=rest)


@dataclass
class Kept:
    """What fusions of one base leave to those that follow: each adds to it."""

    group_costs: dict[str, dict[Group, float]] = field(default_factory=dict)  # of short groups, by method
    averages: dict[AverageKey, MadeLayer] | None = None  # none where none are to be kept


@dataclass(frozen=True)
class Measurements:
    """What is measured on the dense model before it is fused.

    It serves all fusions whose settings differ only in how layers are chosen and fused.
    """

    parameters: int
    judged: list[Judged]  # none where no tokens were asked for
    seconds: dict[str, float]
    similarity: Similarity | None = None
    text: CalibrationText | None = None
    continuations: dict[str, str] = field(default_factory=dict)  # by prompt; none where it would take long
    base_digest: str | None = None  # `weights_digest` of the model
    kept: Kept = field(default_factory=Kept)

    def used_by(self, config: FusionConfig) -> Measurements:
        """The same without what a fusion with `config` does not use."""
        similarity = self.similarity if config.averages else None
        return replace(self, similarity=similarity, text=self.text if config.needs_text else None)

    @property
    def on_text(self) -> list[Similarity | CalibrationText]:
        """What comes of calibration text."""
        return [used for used in (self.similarity, self.text) if used is not None]


def measure(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    config: FusionConfig,
    samples: CalibrationSamples | None,
    corpus: Corpus | None,
) -> Measurements:
    """Measure perplexity, and layer similarity where there are samples; tokenize calibration text where there is any.

    Fusions with `config.averages` use samples, and those with `config.needs_text` a corpus. Raises ValueError if the
    model cannot be fused, there are too few samples or too little text, or weights or activations are not finite.
    """
    check_model(decoder)
    clock = Clock()
    with clock("perplexity"):
        judged = judge_dense(decoder, tokenizer, config.perplexity_tokens)
    continuations: dict[str, str] = {}
    if config.perplexity_tokens and not decoder.on_disk:  # from where each token would take reading all of it
        with clock("continuations"):
            continuations = write_continuations(decoder, tokenizer)
    similarity = None
    if samples is not None:
        similarity = compare_layers(decoder, tokenizer, config, samples, clock)
    text = None
    if corpus is not None:
        with clock("calibration text"):
            text = tokenize_corpus(decoder, tokenizer, corpus, config)
    digest = weights_digest(decoder.named_parameters())
    give_back_freed()
    parameters = sum(parameter.numel() for _, parameter in distinct_parameters(decoder.model))
    return Measurements(parameters, judged, clock.seconds, similarity, text, continuations, digest)


def compare_layers(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    config: FusionConfig,
    samples: CalibrationSamples,
    clock: Clock,
) -> Similarity:
    """Stages 1 to 3 of the published method: how similar the layers are, on calibration samples."""
    ids = tokenize_samples(tokenizer, samples, config.sample_length, decoder.config.vocab_size)
    longest = max(map(len, ids))
    different = len({tuple(sample.tolist()) for sample in ids})
    notes = []
    if longest == 1 or different < config.samples_needed:
        notes.append(
            f"The layer similarities are noise: of {len(ids)} calibration samples {different} differ, and the longest "
            f"has {longest} {plural(longest, 'token')}; give {config.samples_needed} different samples of text or more."
        )
        logger.warning(notes[0])
    with clock("activations"):  # stage 1
        distances, influences = sample_distances(decoder, ids)
    with clock("manifold"):  # stage 2
        scale, alpha, dim = config.kernel_scale, config.kernel_alpha, config.embedding_dim
        embeddings = np.stack(
            [diffusion_embedding(d, kernel_scale=scale, kernel_alpha=alpha, embedding_dim=dim) for d in distances]
        )
    with clock("similarity"):  # stage 3
        matrix = layer_similarity(
            embeddings,
            mi_neighbors=config.mi_neighbors,
            entropy_neighbors=config.entropy_neighbors,
            rank_normalize=config.rank_normalize,
            seed=config.seed,
        )
    return Similarity(
        matrix,
        embeddings,
        influences if longest > 1 else None,  # each sample's first token is left out
        samples.labels,
        CalibrationInfo(samples.source, len(ids), sum(map(len, ids))),
        notes,
    )


def tokenize_corpus(
    decoder: Decoder, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, config: FusionConfig
) -> CalibrationText:
    """Sequences of a corpus, with those that the model writes itself."""
    vocab_size = decoder.config.vocab_size
    length = min(config.calibration_length, decoder.config.max_position_embeddings)
    short = min(WRITTEN_LENGTH, length)
    share, tokens = corpus.generated_share, config.calibration_tokens
    # The text that is given fills one sequence at least.
    count = max(0, min(int(tokens * share), tokens - length)) // short
    given = pack_corpus(tokenizer, corpus, length, tokens - count * short, vocab_size)
    count = min(count, round(sum(map(len, given)) * share / (1 - share) / short))  # short text keeps its share
    written: list[Tensor] = []
    source = corpus.full_source
    if count:
        write, has_chats = text_writer(decoder, tokenizer)
        written = write(count, short, config.seed)
        if has_chats:
            num_chats = len(written[CHATS])
            source += f", {num_chats} {plural(num_chats, 'sequence')} of it as chats"
    other = pack_out_of_domain(tokenizer, corpus, min(length, JUDGING_LENGTH), vocab_size)
    info = CalibrationInfo(source, len(given) + len(written), sum(map(len, [*given, *written])))
    notes = [f"{corpus.note}."] if corpus.note else []
    return CalibrationText(given, written, other, info, notes)


def measuring(setup: Setup, config: FusionConfig) -> Need:
    """What `measure` takes: judging, samples to compare layers on, and text that the model writes."""
    judged = judging(setup, config.perplexity_tokens, 0, models=1)
    samples = _SAMPLES * _SAMPLE_LENGTH * config.averages
    written = writing(setup, config.calibration_tokens * MIXTURE_SHARE) if config.needs_text else Need(0, 0, Work())
    inside = max(judged.inside, setup.running(PERPLEXITY_LENGTH, samples), written.inside)
    work = judged.work + setup.forward(samples, setup.shape.layers) + written.work
    return Need(inside, judged.lists + setup.states(2 * samples), work)
