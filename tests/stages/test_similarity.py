from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.feature_selection import mutual_info_regression

from lf_hf.stages.similarity import entropy, layer_similarity, rank_normalized


def embeddings(layers: int = 4, samples: int = 57, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(samples, 2))
    return np.stack([common + rng.normal(size=(samples, 2)) * 0.4 * layer for layer in range(layers)])


def literal_entropy(Y: np.ndarray, k: int) -> float:
    """-E[log(k / (N rho^d))], one sample after another."""
    N, d = Y.shape
    terms = []
    for y in Y:
        rho = sorted(math.dist(y, other) for other in Y)[k]  # position 0 is the sample itself
        terms.append(math.log(k / (N * rho**d)))
    return -sum(terms) / N


def literal_npib(Yi: np.ndarray, Yj: np.ndarray, k_mi: int, k_entropy: int, seed: int) -> float:
    information = 0.0
    for k in range(Yj.shape[1]):
        scores = mutual_info_regression(Yi, Yj[:, k], n_neighbors=k_mi, random_state=seed)
        information += sum(scores) / len(scores)
    information /= Yj.shape[1]
    return information / math.sqrt(abs(literal_entropy(Yi, k_entropy) * literal_entropy(Yj, k_entropy)))


def test_entropy_is_the_literal_formula() -> None:
    for Y in embeddings():
        assert entropy(Y, 50) == pytest.approx(literal_entropy(Y, 50), rel=1e-12)


def test_similarity_is_the_literal_formula() -> None:
    Y = embeddings()
    ranked = [np.array([[(column < x).sum() + 1 for x in column] for column in y.T]).T / len(y) for y in Y]
    actual = layer_similarity(Y, seed=3)
    for i in range(len(Y)):
        for j in range(i, len(Y)):
            assert actual[i, j] == pytest.approx(literal_npib(ranked[i], ranked[j], 5, 50, 3), rel=1e-12)
            assert actual[i, j] == actual[j, i]


def test_ranks_are_shared_by_ties() -> None:
    np.testing.assert_allclose(rank_normalized(np.array([[5.0], [1.0], [5.0], [9.0]])).T, [[0.625, 0.25, 0.625, 1.0]])


def test_mixed_signs_of_entropies_warn_once() -> None:
    Y = embeddings(layers=2)
    Y[1] *= 1e-3
    with pytest.warns(UserWarning, match="mixed signs"):
        assert np.isfinite(layer_similarity(Y, rank_normalize=False)).all()


def test_too_few_samples_name_both_numbers() -> None:
    with pytest.raises(ValueError, match="entropy_neighbors=50 needs at least 51 calibration samples, got 50"):
        entropy(np.random.default_rng(0).normal(size=(50, 2)), 50)
