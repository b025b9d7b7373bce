"""Stage 4: match the neurons of two layers by optimal assignment.

Two ways: by `_ROW_AXES` each weight matrix is taken on its own, as the published method does; by the layers' symmetry
whole neurons and attention heads move, with all that belongs to them, so that the layer computes what it did.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lf_hf.decoder.decoder import Decoder
from lf_hf.families.table import PROJECTIONS, Axis, Weights, head_dim
from lf_hf.report.data import RowMatch
from lf_hf.runtime.numerics import in_float64
from lf_hf.stages.assignment import Costs, Pair, assign, float_rows, row_costs

_ROW_AXES = [Axis(f"{name}.{kind}", 0, name) for name in PROJECTIONS for kind in ("weight", "bias")]
"""Rows of each matrix that are permuted by themselves: no symmetry, as the layer then computes something else."""
_ROWS = 256  # rows that are compared at a time, in float32


def align_layer(
    decoder: Decoder, weights_i: Weights, weights_j: dict[str, Tensor], alignment: str
) -> tuple[dict[str, Tensor], dict[str, RowMatch]]:
    """Layer j with its neurons in the order that lies closest to layer i's, and how each matrix was matched.

    What is outside the symmetry is passed through. `alignment` is as in FusionConfig.
    """
    if alignment == "none":
        return weights_j, {}
    symmetry = decoder.family.symmetry
    if alignment == "rows":
        symmetric = {axis.parameter for axis in symmetry}
        symmetry = tuple(axis for axis in _ROW_AXES if f"{axis.permutation}.weight" in symmetric)
    permutations, matches = match_neurons(weights_i, weights_j, head_dim(decoder.config), symmetry)
    aligned = dict(weights_j)
    for axis in symmetry:
        if (weight := aligned.get(axis.parameter)) is not None:
            aligned[axis.parameter] = weight.index_select(axis.dim, permutations[axis.permutation].to(weight.device))
    return aligned, matches


def normalized_rows(weight: Tensor) -> Tensor:
    """Rows of (rows n, columns m) in float32, divided by their norm + 1e-12."""
    rows, factors, _ = float_rows(weight)
    return rows * factors[:, None]


def match_neurons(
    weights_i: Weights, weights_j: Weights, head_dim: int, symmetry: Sequence[Axis]
) -> tuple[dict[str, Tensor], dict[str, RowMatch]]:
    """The permutations in a symmetry group that bring layer j closest to layer i.

    Closest in the sense of `assignment.row_costs`, summed over the matrices that a permutation acts on: an MLP neuron
    costs the distance of its gate row, up row and down column; a key-value head that of its key and value blocks
    plus its query heads' in their best order, each by its query and output block. An attention head has `head_dim`
    channels.

    Returns int64 tensors by the symmetry's names of permutations, where channel p of the aligned layer is channel
    permutation[p] of layer j, and by names of projections how each was matched.
    """
    pairs: dict[Axis, Pair] = {}  # matrices of both layers, with the axis that is permuted first
    problems: dict[str, list[Pair]] = {}
    for axis in symmetry:
        if axis.parameter.endswith("_proj.weight"):
            weight_i, weight_j = weights_i[axis.parameter], weights_j[axis.parameter]
            pairs[axis] = weight_i.movedim(axis.dim, 0), weight_j.movedim(axis.dim, 0)
            problems.setdefault(axis.permutation, []).append(pairs[axis])
    heads = [_head_costs(problems.pop(name), head_dim) for name in ("query", "key_value") if name in problems]
    permutations = {name: torch.from_numpy(permutation) for name, permutation in assign(problems).items()}
    if heads:
        for name, order in _match_heads(*heads).items():
            channels = (order[:, None] * head_dim + np.arange(head_dim)).ravel()
            permutations[name] = torch.from_numpy(channels)
    matches = {}
    for axis, pair in pairs.items():
        matches[axis.parameter.removesuffix(".weight")] = _row_match(*pair, permutations[axis.permutation])
    return permutations, matches


def _head_costs(pairs: Sequence[Pair], head_dim: int) -> Costs:
    """Distances of heads, (heads of i, heads of j), summed over the matrices that have them in their rows."""
    blocks = [tuple(weight.unflatten(0, (-1, head_dim)).flatten(1) for weight in pair) for pair in pairs]
    return row_costs(*blocks, dtype=torch.float64)


def _match_heads(query_costs: Costs, key_value_costs: Costs) -> dict[str, NDArray[np.intp]]:
    """The orders of layer j's query heads and of its key-value heads that cost least: (heads of i, heads of j) each."""
    group = len(query_costs) // len(key_value_costs)  # query heads that share a key-value head
    costs, orders = key_value_costs.copy(), {}
    for a, b in np.ndindex(costs.shape):
        block = query_costs[a * group : (a + 1) * group, b * group : (b + 1) * group]
        places, orders[a, b] = linear_sum_assignment(block)
        costs[a, b] += block[places, orders[a, b]].sum()
    key_value = linear_sum_assignment(costs)[1]
    query = np.concatenate([b * group + orders[a, b] for a, b in enumerate(key_value)])
    return {"query": query, "key_value": key_value}


def _row_match(weight_i: Tensor, weight_j: Tensor, permutation: Tensor) -> RowMatch:
    permutation = permutation.to(weight_j.device)
    place = torch.arange(len(permutation), device=permutation.device)
    before = after = 0.0
    for rows, here, there in zip(weight_i.split(_ROWS), place.split(_ROWS), permutation.split(_ROWS), strict=True):
        unit = normalized_rows(rows)
        before += float((unit * normalized_rows(weight_j[here]).to(unit.device)).sum())
        after += float((unit * normalized_rows(weight_j[there]).to(unit.device)).sum())
    count = len(permutation)
    return RowMatch(before / count, after / count, float(in_float64(permutation != place).mean()))
