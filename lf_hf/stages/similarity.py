"""Stage 3: similarity of layers as a normalised mutual information (NPIB) of their embeddings.

Source: arXiv:2406.16330, section 3.2.
"""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree
from scipy.stats import rankdata

from lf_hf.runtime.progress import progress

Array = NDArray[np.float64]

# Distances and entropies below these count as these, so that log and division stay finite.
_MIN_DISTANCE = 1e-12
_MIN_ENTROPY = 1e-6


def rank_normalized(embedding: Array) -> Array:
    """Each column of (..., samples N, d) replaced by rank / N, ties sharing their mean rank."""
    return rankdata(embedding, axis=-2) / embedding.shape[-2]


def entropy(embedding: Array, neighbors: int) -> float:
    """k-nearest-neighbour entropy -mean(log(k / (N * rho_k^d))) in nats of (samples N, d).

    rho_k is a sample's distance to its k-th neighbour, itself not counted; needs N > k.
    """
    num_samples, dim = embedding.shape
    rho = KDTree(embedding).query(embedding, k=[neighbors + 1])[0][:, 0]  # neighbour 1 is the sample itself
    rho = np.maximum(rho, _MIN_DISTANCE)
    return float(-np.mean(np.log(neighbors / num_samples) - dim * np.log(rho)))


def mutual_information(source: Array, target: Array, neighbors: int, seed: int) -> float:
    """Mutual information in nats between (N, d) and (N, d), averaged over all pairs of their columns."""
    from sklearn.feature_selection import mutual_info_regression  # 90 MB, which methods without averages need not

    return float(
        np.mean(
            [mutual_info_regression(source, column, n_neighbors=neighbors, random_state=seed) for column in target.T]
        )
    )


def layer_similarity(
    embeddings: Array,
    *,
    mi_neighbors: int = 5,
    entropy_neighbors: int = 50,
    rank_normalize: bool = True,
    seed: int = 0,
) -> Array:
    """NPIB of every pair of layers, (layers L, layers L), by stage 2's coordinates (L, samples N, dims d).

    Symmetric; higher means that two layers arrange the samples alike. Settings are those of FusionConfig.
    """
    num_layers = len(embeddings)
    if rank_normalize:
        embeddings = rank_normalized(embeddings)
    entropies = np.array([entropy(embedding, entropy_neighbors) for embedding in embeddings])
    if entropies.min() <= 0 < entropies.max():
        remedy = "more samples or fewer entropy_neighbors avoid" if rank_normalize else "rank_normalize=True avoids"
        warnings.warn(
            f"Layer entropies have mixed signs, so NPIB is normalised by their magnitudes; {remedy} this.",
            stacklevel=2,
        )
    similarity = np.empty((num_layers, num_layers))
    for i in progress(range(num_layers), desc="Layer similarity", unit="layer"):
        for j in range(i, num_layers):
            normalizer = max(np.sqrt(abs(entropies[i] * entropies[j])), _MIN_ENTROPY)
            information = mutual_information(embeddings[i], embeddings[j], mi_neighbors, seed)
            similarity[i, j] = similarity[j, i] = information / normalizer
    return similarity
