"""Stage 2: embed the calibration samples, as one layer sees them, with a diffusion kernel.

Source: arXiv:2406.16330, section 3.1 (diffusion kernel manifold of a layer's activations).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh, qr

Array = NDArray[np.float64]


def diffusion_embedding(
    distances: Array, *, kernel_scale: float = 8.0, kernel_alpha: float = 0.5, embedding_dim: int = 2
) -> Array:
    """Manifold coordinates of N samples from their distances at one layer.

    Parameters
    ----------
    distances : float64 array of shape (samples N, samples N)
        Frobenius distances between the samples' activations, finite; N is above `embedding_dim`.
    kernel_scale, kernel_alpha, embedding_dim
        sigma_K, alpha and d.

    Returns
    -------
    array of shape (samples N, embedding_dim)
        Left singular vectors 1..d of the normalised kernel, each divided by vector 0. A vector's sign is
        arbitrary; its largest entry in magnitude is made positive. Where the kernel has no further direction (as
        with samples that are all the same) a coordinate is 0.

    Raises
    ------
    ValueError
        If the kernel does not reach from any sample to another, or `kernel_alpha` is too far from 0.
    """
    num_samples = len(distances)
    kernel = np.exp(-np.sqrt(distances) / np.sqrt(kernel_scale))  # K (N, N)
    others = ~np.eye(num_samples, dtype=bool)
    if kernel[others].max() < np.finfo(np.float64).tiny:
        raise ValueError(
            f"kernel_scale={kernel_scale:g} is too small: the nearest two calibration samples are "
            f"{distances[others].min():.3g} apart; set kernel_scale to about {np.median(distances[others]):.2g}."
        )
    density = kernel.sum(axis=1)  # p (N,)
    with np.errstate(all="ignore"):
        kernel /= np.outer(density, density) ** kernel_alpha  # K_1
        degree = np.sqrt(kernel.sum(axis=1))  # v (N,)
        # Samples that lie far apart make A the identity but for its last digits. So A - I is decomposed, which has the
        # same vectors. Its diagonal is what makes (A - I) v = 0.
        shifted = kernel / np.outer(degree, degree)  # A
        np.fill_diagonal(shifted, 0)
        np.fill_diagonal(shifted, -(shifted @ degree) / degree)  # A - I
        first = degree / np.linalg.norm(degree)  # (N,)
    if not (np.isfinite(shifted).all() and first.min() > 0):
        raise ValueError(f"kernel_alpha={kernel_alpha:g} is too far from 0 for these samples; use 0 to 1.")

    # No singular value of A is above 1, so vector 0 is v. The others are orthogonal to it.
    basis = qr(first[:, None])[0][:, 1:]  # (N, N - 1)
    values, vectors = eigh(basis.T @ shifted @ basis)  # of A - I: 0 down to -2
    below_one = np.minimum(-values, 2 + values)  # what the singular values |1 + value| lack
    order = np.argsort(below_one, kind="stable")[:embedding_dim]
    vectors = basis @ vectors[:, order]  # (N, d)
    vectors *= np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(embedding_dim)])
    vectors[:, 1 - below_one[order] < num_samples * np.finfo(np.float64).eps] = 0  # rounding noise
    return vectors / first[:, None]
