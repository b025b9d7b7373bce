"""Stage 2: embed the calibration samples, as one layer sees them, with a diffusion kernel.

Source: arXiv:2406.16330, section 3.1 (diffusion kernel manifold of a layer's activations).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import svd

Array = NDArray[np.float64]

_EPSILON = np.finfo(np.float64).eps


def diffusion_embedding(
    distances: Array, *, kernel_scale: float = 8.0, kernel_alpha: float = 0.5, embedding_dim: int = 2
) -> Array:
    """Manifold coordinates of N samples from their distances at one layer.

    Parameters
    ----------
    distances : array of shape (samples N, samples N)
        Frobenius distances between the samples' activations.
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
        If there are not more samples than `embedding_dim`, a distance is not finite, or the kernel does not reach
        from any sample to another.
    """
    num_samples = len(distances)
    if num_samples <= embedding_dim:
        raise ValueError(
            f"embedding_dim={embedding_dim} needs at least {embedding_dim + 1} calibration samples, got {num_samples}."
        )
    if not np.isfinite(distances).all():
        raise ValueError("The distances between calibration samples contain NaN or inf.")
    distances = np.asarray(distances, dtype=np.float64)
    kernel = np.exp(-np.sqrt(distances) / np.sqrt(kernel_scale))  # K (N, N)
    others = ~np.eye(num_samples, dtype=bool)
    if kernel[others].max() < _EPSILON:
        raise ValueError(
            f"kernel_scale={kernel_scale:g} is too small: the nearest two calibration samples are "
            f"{distances[others].min():.3g} apart; set kernel_scale to about {np.median(distances[others]):.2g}."
        )
    density = kernel.sum(axis=1)  # p (N,)
    with np.errstate(all="ignore"):
        kernel /= np.outer(density, density) ** kernel_alpha  # K_1
        degree = np.sqrt(kernel.sum(axis=1))  # v (N,)
        kernel /= np.outer(degree, degree)  # A
        # A v = v, and no singular value of A is above 1. So v is vector 0, and is taken out: where groups of samples
        # lie far apart 1 is a multiple singular value, of which vector 0 could be any vector, with zeros in it.
        first = degree / np.linalg.norm(degree)  # (N,)
        kernel -= np.outer(first, first)
    if not (np.isfinite(kernel).all() and first.min() > 0):
        raise ValueError(f"kernel_alpha={kernel_alpha:g} is too far from 0 for these samples; use 0 to 1.")

    vectors, values, _ = svd(kernel)
    vectors = vectors[:, :embedding_dim]  # (N, d)
    vectors *= np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(embedding_dim)])
    vectors[:, values[:embedding_dim] < num_samples * _EPSILON] = 0  # rounding noise
    return vectors / first[:, None]
