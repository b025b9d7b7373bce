"""Stage 3: similarity of layers as a normalised mutual information (NPIB) of their embeddings.

Source: arXiv:2406.16330, section 3.2.
"""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree
from scipy.special import digamma

from lf_hf.runtime.progress import progress

Array = NDArray[np.float64]

# Distances and entropies below these count as these, so that log and division stay finite.
_MIN_DISTANCE = 1e-12
_MIN_ENTROPY = 1e-6
_NOISE = 1e-10  # of a column, relative to its size


def rank_normalized(embedding: Array) -> Array:
    """Each column of (samples N, d) replaced by rank / N, ties sharing their mean rank."""
    ranks = np.empty_like(embedding)
    for column, ranked in zip(embedding.T, ranks.T, strict=True):
        _, place, count = np.unique(column, return_inverse=True, return_counts=True)
        ranked[:] = (count.cumsum() - (count - 1) / 2)[place]
    return ranks / len(embedding)


def entropy(embedding: Array, neighbors: int) -> float:
    """k-nearest-neighbour entropy -mean(log(k / (N * rho_k^d))) in nats of (samples N, d).

    rho_k is a sample's distance to its k-th neighbour, itself not counted; needs N > k.
    """
    num_samples, dim = embedding.shape
    rho = KDTree(embedding).query(embedding, k=[neighbors + 1])[0][:, 0]  # neighbour 1 is the sample itself
    rho = np.maximum(rho, _MIN_DISTANCE)
    return float(-np.mean(np.log(neighbors / num_samples) - dim * np.log(rho)))


def mutual_information(source: Array, target: Array, neighbors: int, seed: int) -> float:
    """Mutual information in nats between (N, d) and (N, d), averaged over all pairs of their columns.

    The first estimator of Kraskov et al. (arXiv:cond-mat/0305641), with the numbers of scikit-learn's
    `mutual_info_regression`, whose import alone takes 90 MB.
    """
    found = []
    for column in target.T:
        random = np.random.RandomState(seed)
        noise = random.standard_normal(source.shape).T
        target_column = _standardized(column, random.standard_normal(len(column)))
        columns = map(_standardized, source.T, noise)
        found.append([_information(source_column, target_column, neighbors) for source_column in columns])
    return float(np.mean(found))


def _standardized(column: Array, noise: Array) -> Array:
    """Values (N,) in units of their standard deviation, with noise that tells equal ones apart."""
    column = np.ascontiguousarray(column)
    deviation = column.std()
    if deviation >= 10 * np.finfo(np.float64).eps:
        column = column / deviation
    return column + _NOISE * max(1, np.abs(column).mean()) * noise


def _information(x: Array, y: Array, neighbors: int) -> float:
    """Mutual information in nats of two variables (N,), at least 0."""
    both = np.column_stack([x, y])
    radius = np.nextafter(KDTree(both).query(both, k=[neighbors + 1], p=np.inf)[0][:, 0], 0)
    information = digamma(len(x)) + digamma(neighbors)
    for values in (x, y):
        points = values[:, None]
        within = KDTree(points).query_ball_point(points, radius, p=np.inf, return_length=True)  # with the point itself
        information -= digamma(within).mean()
    return max(0, information)


def layer_similarity(
    embeddings: Array,
    *,
    mi_neighbors: int = 5,
    entropy_neighbors: int = 50,
    rank_normalize: bool = True,
    seed: int = 0,
) -> Array:
    """NPIB of every pair of layers.

    Parameters
    ----------
    embeddings : array of shape (layers L, samples N, dims d)
        Stage 2's coordinates.
    mi_neighbors, entropy_neighbors, rank_normalize, seed
        As in FusionConfig.

    Returns
    -------
    array of shape (layers L, layers L)
        Symmetric; higher means that two layers arrange the samples alike.
    """
    num_layers = len(embeddings)
    if rank_normalize:
        embeddings = np.stack([rank_normalized(embedding) for embedding in embeddings])
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
