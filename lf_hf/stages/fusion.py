"""Stage 5: how much of each layer goes into the fused one, and the fused weights themselves."""

from __future__ import annotations

import warnings
from collections import ChainMap
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor

from lf_hf.families import PROJECTIONS, Axis
from lf_hf.report.records import RowMatch
from lf_hf.runtime.launch import ALONE, Processes
from lf_hf.stages.alignment import SYMMETRY, match_neurons, match_rows, permute_neurons

_ROW_AXES = [Axis(f"{name}.{kind}", 0, name) for name in PROJECTIONS for kind in ("weight", "bias")]
"""Rows of each matrix that are permuted by themselves: no symmetry, as the layer then computes something else."""
_ROWS = 256  # of a matrix that are merged at a time, in a wider type


def fusion_ratio(similarity: NDArray[np.float64], i: int, j: int, beta: float = 1.0) -> float:
    """Share alpha_i of layer i in its fusion with layer j; layer j's is 1 - alpha_i.

    alpha_i = sigmoid(beta * s_i / (s_i + s_j)), where s is a layer's mean similarity to all layers. For
    beta = 1 and positive similarities the result lies in 0.5 to 0.74.

    Parameters
    ----------
    similarity : array of shape (layers L, layers L)
    i, j : int
        Layer indices in the original model.
    """
    s_i, s_j = similarity[i].mean(), similarity[j].mean()
    if s_i + s_j == 0:
        warnings.warn(f"Layers {i} and {j} have no similarity to any layer; both count alike.", stacklevel=2)
        raw = 0.5
    else:
        raw = s_i / (s_i + s_j)
    return float(expit(beta * raw))


def average_layers(
    weights_i: Mapping[str, Tensor],
    weights_j: Mapping[str, Tensor],
    *,
    ratio: float,
    alignment: str,
    head_dim: int,
    symmetry: Sequence[Axis] = SYMMETRY,
    processes: Processes = ALONE,
) -> tuple[dict[str, Tensor], dict[str, RowMatch]]:
    """Weights of the layer that replaces layers i and j: their average, with layer j's neurons aligned first.

    Parameters
    ----------
    weights_i, weights_j : mappings from a parameter's name inside the layer ("mlp.up_proj.weight") to its tensor
    ratio : float
        alpha_i, the share of layer i.
    alignment : str
        As in FusionConfig.
    head_dim : int
        Channels of an attention head.
    symmetry : sequence of Axis
        The layers' own.
    processes : Processes
        Those that have the same weights; each matches the rows of some matrices.

    Returns
    -------
    fused : dict
        New tensors under the names of `weights_i` that change: the seven projections and their biases. Its norms stay
        layer i's.
    matches : dict
        How each projection's rows were matched, unless alignment="none".
    """
    matches: dict[str, RowMatch] = {}
    if alignment == "neurons":
        permutations, matches = match_neurons(weights_i, weights_j, head_dim, symmetry)
        weights_j = permute_neurons(weights_j, permutations, symmetry)
    elif alignment == "rows":
        weights = {projection: f"{projection}.weight" for projection in processes.shard(PROJECTIONS)}
        mine = match_rows({projection: (weights_i[name], weights_j[name]) for projection, name in weights.items()})
        matched = dict(ChainMap(*processes.all_gather_object(mine)))
        permutations = {projection: permutation for projection, (permutation, _) in matched.items()}
        matches = {projection: matched[projection][1] for projection in PROJECTIONS}
        weights_j = permute_neurons(weights_j, permutations, _ROW_AXES)
    names = [axis.parameter for axis in _ROW_AXES if axis.parameter in weights_i]
    return {name: weighted_sum(weights_i[name], weights_j[name], ratio) for name in names}, matches


def weighted_sum(tensor_i: Tensor, tensor_j: Tensor, ratio: float) -> Tensor:
    """ratio * tensor_i + (1 - ratio) * tensor_j, computed in float64 and rounded once to their dtype."""
    dtype = torch.float32 if tensor_i.device.type == "mps" else torch.float64  # mps has no float64
    fused = torch.empty_like(tensor_i)
    for rows, rows_i, rows_j in zip(*(tensor.split(_ROWS) for tensor in (fused, tensor_i, tensor_j)), strict=True):
        rows.copy_(rows_i.to(dtype) * ratio + rows_j.to(rows_i.device, dtype) * (1 - ratio))
    return fused
