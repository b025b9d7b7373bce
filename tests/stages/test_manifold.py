from __future__ import annotations

import mpmath
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


@pytest.mark.parametrize("apart", [1e-3, 30, 1e4, 1e5, 1e6])
def test_is_exact_however_far_apart_samples_are(apart: float) -> None:
    """Against 400 digits: 10^4 apart, as at the last layers of real models, the kernel is 1 + 1e-15 times the rest."""
    points = np.random.default_rng(0).normal(size=(8, 300))
    D = cdist(points, points) * apart / np.sqrt(600)
    with mpmath.workdps(400):
        K = mpmath.matrix(8)
        for i, j in np.ndindex(8, 8):
            K[i, j] = mpmath.exp(-mpmath.sqrt(mpmath.mpf(float(D[i, j])) / 8))
        p = [mpmath.fsum(K[i, j] for j in range(8)) for i in range(8)]
        K1 = mpmath.matrix(8)
        for i, j in np.ndindex(8, 8):
            K1[i, j] = K[i, j] / mpmath.sqrt(p[i] * p[j])
        v = [mpmath.sqrt(mpmath.fsum(K1[i, j] for j in range(8))) for i in range(8)]
        A = mpmath.matrix(8)
        for i, j in np.ndindex(8, 8):
            A[i, j] = K1[i, j] / (v[i] * v[j])
        values, vectors = mpmath.eigsy(A)
        order = sorted(range(8), key=lambda k: -abs(values[k]))
        expected = np.array([[float(vectors[i, k] / vectors[i, order[0]]) for k in order[1:3]] for i in range(8)])
    actual = diffusion_embedding(D)
    expected *= np.sign((actual * expected).sum(axis=0))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_too_few_samples_and_nan_are_named() -> None:
    with pytest.raises(ValueError, match="embedding_dim=2 needs at least 3 calibration samples, got 2"):
        diffusion_embedding(distances(2))
    bad = distances()
    bad[1, 2] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        diffusion_embedding(bad)
