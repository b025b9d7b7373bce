"""Stage 1: how far apart the calibration samples are at the output of each layer.

Only distances are kept: the activations themselves are those of one layer at any time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lf_hf.decoder.decoder import Decoder
from lf_hf.decoder.hidden_states import are_finite, check_finite, cosine_sums, influences
from lf_hf.runtime.numerics import in_float64, to_host
from lf_hf.runtime.progress import progress

PADDED = 1 << 22
"""Numbers of all samples, padded to one length, that are in float64 at a time."""
_ROUNDING = 64 * torch.finfo(torch.float64).eps  # relative error of sums of products, with a margin


def pairwise_distances(states: Sequence[Tensor]) -> Tensor:
    """Frobenius distances between N samples (tokens T_i, hidden), shorter ones taken as zero-padded at the end.

    Squared distances come from a Gram matrix, accumulated over positions in float64. Each position is
    centred over the samples first: that leaves distances as they are and keeps the large component that all
    samples share from cancelling. What is left below the rounding of its terms, some 1e-7 of the states' size, is 0.
    """
    gram = torch.zeros((), dtype=torch.float64)
    block = max(1, PADDED // (len(states) * states[0].shape[1]))  # positions at a time
    for start in range(0, max(map(len, states)), block):
        parts = [state[start : start + block] for state in states]
        padded = in_float64(pad_sequence(parts, batch_first=True))  # (N, block, hidden)
        padded -= padded.mean(dim=0)
        flat = padded.flatten(1)  # (N, block * hidden)
        gram = gram + flat @ flat.T
    sums = gram.diagonal()[:, None] + gram.diagonal()
    squared = sums - gram - gram.T
    return torch.where(squared <= _ROUNDING * sums, 0, squared).sqrt_()


@torch.no_grad()
def sample_distances(decoder: Decoder, samples: Sequence[Tensor]) -> tuple[NDArray[np.float64], list[float]]:
    """Distances between N samples, token ids (tokens T_i,), at the output of every layer, (layers L, N, N), and how
    much each layer changes the residual stream.

    Raises ValueError if a layer's output contains NaN or inf; the layer is named.
    """
    distances, sums_of_layers = [], []
    batches = decoder.make_batches(samples)
    order = np.argsort(np.concatenate(decoder.batch_indices(samples)))  # of the samples, in the batches
    before = decoder.embed(batches)
    layers = progress(decoder.walk(batches), total=decoder.num_layers, desc="Calibration", unit="layer")
    finite = list[bool]()
    for states in layers:
        between = pairwise_distances([sample for batch in states for sample in batch])
        between, sums, is_finite = to_host(between, cosine_sums(before, states), are_finite(states))
        finite.append(bool(is_finite))
        check_finite(finite)
        distances.append(between.numpy()[np.ix_(order, order)])
        sums_of_layers.append(sums)
        before = list(states)
    return np.stack(distances), influences(sums_of_layers)
