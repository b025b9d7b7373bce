from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from lf_hf.stages.manifold import diffusion_embedding


def distances(samples: int = 30, seed: int = 0) -> np.ndarray:
    points = np.random.default_rng(seed).normal(size=(samples, 6)) * 20
    return cdist(points, points)


def reference(D: np.ndarray, sigma: float, alpha: float, d: int) -> np.ndarray:
    """The definition with loops and an eigendecomposition: A is symmetric, so |eigenvalues| are its singular values."""
    n = len(D)
    K = np.array([[np.exp(-((D[i, j] / sigma) ** 0.5)) for j in range(n)] for i in range(n)])
    p = K.sum(axis=1)
    K1 = np.array([[K[i, j] / (p[i] * p[j]) ** alpha for j in range(n)] for i in range(n)])
    v = np.sqrt(K1.sum(axis=1))
    A = K1 / v[:, None] / v[None, :]
    values, vectors = np.linalg.eigh(A)
    vectors = vectors[:, np.argsort(-np.abs(values))][:, : d + 1]
    return vectors[:, 1:] / vectors[:, :1]


@pytest.mark.parametrize(("sigma", "alpha", "d"), [(8.0, 0.5, 2), (3.0, 1.0, 3), (50.0, 0.0, 1)])
def test_matches_an_eigendecomposition_up_to_sign(sigma: float, alpha: float, d: int) -> None:
    actual = diffusion_embedding(distances(), kernel_scale=sigma, kernel_alpha=alpha, embedding_dim=d)
    expected = reference(distances(), sigma, alpha, d)
    expected *= np.sign((actual * expected).sum(axis=0))
    np.testing.assert_allclose(actual, expected, rtol=1e-7, atol=1e-9)


def test_follows_the_order_of_samples() -> None:
    order = np.random.default_rng(1).permutation(30)
    embedding = diffusion_embedding(distances())
    np.testing.assert_allclose(diffusion_embedding(distances()[order][:, order]), embedding[order], atol=1e-9)


def test_too_few_samples_and_nan_are_named() -> None:
    with pytest.raises(ValueError, match="embedding_dim=2 needs at least 3 calibration samples, got 2"):
        diffusion_embedding(distances(2))
    bad = distances()
    bad[1, 2] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        diffusion_embedding(bad)
