"""Stages 1 to 3 of the published method in a row: how similar the layers are, on calibration samples."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lf_hf.decoder.decoder import Decoder
from lf_hf.report.data import CalibrationInfo
from lf_hf.runtime.clock import Clock
from lf_hf.runtime.words import plural
from lf_hf.settings import FusionConfig
from lf_hf.stages.activations import sample_distances
from lf_hf.stages.manifold import diffusion_embedding
from lf_hf.stages.similarity import layer_similarity
from lf_hf.text.calibration import CalibrationSamples
from lf_hf.text.packing import tokenize_samples


class Similarity(NamedTuple):
    """What stages 1 to 3 found on calibration samples."""

    matrix: NDArray[np.float64]  # of shape (layers L, layers L)
    embeddings: NDArray[np.float64]  # of shape (L, samples N, d)
    influences: list[float] | None  # how much each layer changes the residual stream
    labels: list[str] | None  # MMLU subject of each sample
    source: CalibrationInfo
    notes: list[str]


def compare_layers(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    config: FusionConfig,
    samples: CalibrationSamples,
    clock: Clock,
) -> Similarity:
    """Stages 1 to 3, on calibration samples."""
    config.check_num_samples(len(samples.texts))
    ids = tokenize_samples(tokenizer, samples, config.sample_length, decoder.config.vocab_size)
    longest = max(map(len, ids))
    different = len({tuple(sample.tolist()) for sample in ids})
    notes = []
    if longest == 1 or different < config.samples_needed:
        notes.append(
            f"The layer similarities are noise: of {len(ids)} calibration samples {different} differ, and the longest "
            f"has {longest} {plural(longest, 'token')}; give {config.samples_needed} different samples of text or more."
        )
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
