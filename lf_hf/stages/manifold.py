"""Stage 2: embed the calibration samples, as one layer sees them, with a diffusion kernel.

Source: arXiv:2406.16330, section 3.1 (diffusion kernel manifold of a layer's activations).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import svd

Array = NDArray[np.float64]


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
        arbitrary; its largest entry in magnitude is made positive.

    Raises
    ------
    ValueError
        If there are not more samples than `embedding_dim`, or a distance is not finite.
    """
    num_samples = len(distances)
    if num_samples <= embedding_dim:
        raise ValueError(
            f"embedding_dim={embedding_dim} needs at least {embedding_dim + 1} calibration samples, got {num_samples}."
        )
    if not np.isfinite(distances).all():
        raise ValueError("The distances between calibration samples contain NaN or inf.")
    kernel = np.exp(-np.sqrt(np.asarray(distances, dtype=np.float64) / kernel_scale))  # K (N, N)
    density = kernel.sum(axis=1)  # p (N,)
    kernel /= np.outer(density, density) ** kernel_alpha  # K_1
    degree = np.sqrt(kernel.sum(axis=1))  # v (N,)
    kernel /= np.outer(degree, degree)  # A

    vectors = svd(kernel)[0][:, : embedding_dim + 1]  # (N, d + 1)
    largest = np.abs(vectors).argmax(axis=0)
    vectors *= np.sign(vectors[largest, np.arange(embedding_dim + 1)])
    return vectors[:, 1:] / vectors[:, :1]  # (N, d); vector 0 has no zero entry (Perron-Frobenius)
