"""Stage 4: match the neurons of two layers by optimal assignment.

Two ways: `match_rows` takes each weight matrix on its own, as the published method does; `match_neurons`
moves whole neurons and attention heads, with all that belongs to them, so that the layer computes what it did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lf_hf.decoder.decoder import Decoder
from lf_hf.families.table import PROJECTIONS, Axis, Weights, head_dim
from lf_hf.report.data import RowMatch
from lf_hf.runtime.numerics import in_float64
from lf_hf.stages.assignment import Costs, Pair, assign, row_costs, scaled_rows

_ROW_AXES = [Axis(f"{name}.{kind}", 0, name) for name in PROJECTIONS for kind in ("weight", "bias")]
"""Rows of each matrix that are permuted by themselves: no symmetry, as the layer then computes something else."""
_ROWS = 256  # rows that are compared at a time, in float32


def align_layer(
    decoder: Decoder, weights_i: Weights, weights_j: Weights, alignment: str
) -> tuple[Weights, dict[str, RowMatch]]:
    """Layer j with its neurons in the order that lies closest to layer i's, and how each matrix was matched.

    `alignment` is as in FusionConfig. Of several processes each matches the rows of some matrices.
    """
    if alignment == "none":
        return weights_j, {}
    if alignment == "neurons":
        symmetry = decoder.family.symmetry
        permutations, matches = match_neurons(weights_i, weights_j, head_dim(decoder.config), symmetry)
        return permute_neurons(weights_j, permutations, symmetry), matches
    symmetric = {axis.parameter for axis in decoder.family.symmetry}
    names = [name for name in PROJECTIONS if f"{name}.weight" in symmetric]
    share = decoder.processes.shard(names)
    pairs = {name: (weights_i[f"{name}.weight"], weights_j[f"{name}.weight"]) for name in share}
    matched: dict[str, tuple[Tensor, RowMatch]] = {}
    for part in decoder.processes.all_gather_object(match_rows(pairs)):
        matched |= part
    permutations = {name: permutation for name, (permutation, _) in matched.items()}
    matches = {name: matched[name][1] for name in names}
    return permute_neurons(weights_j, permutations, _ROW_AXES), matches


def normalized_rows(weight: Tensor) -> Tensor:
    """Rows of (rows n, columns m) in float32, divided by their norm + 1e-12."""
    rows, factors, _ = scaled_rows(weight)
    return rows * factors[:, None]


def match_rows(pairs: Mapping[str, Pair]) -> dict[str, tuple[Tensor, RowMatch]]:
    """For each pair of matrices the permutation of layer j's rows that lies closest to layer i's, row by row.

    Minimises the sum over p of || w_i[p] - w_j[permutation[p]] || with rows normalised.

    Parameters
    ----------
    pairs : mapping from a name to tensors of shape (rows n, columns m), of layer i and of layer j

    Returns
    -------
    dict from the same names to
        permutation : int64 tensor of shape (rows n,), on the CPU
            Row p of the aligned matrix is row permutation[p] of layer j's.
        match : RowMatch
    """
    matched = {}
    for name, permutation in assign({name: [pair] for name, pair in pairs.items()}).items():
        weight_i, weight_j = pairs[name]
        order = torch.from_numpy(permutation)
        matched[name] = order, _row_match(weight_i, weight_j, order)
    return matched


def match_neurons(
    weights_i: Mapping[str, Tensor],
    weights_j: Mapping[str, Tensor],
    head_dim: int,
    symmetry: Sequence[Axis],
) -> tuple[dict[str, Tensor], dict[str, RowMatch]]:
    """The permutations in layer j's symmetry group that bring it closest to layer i.

    Closest in the sense of `assignment.row_costs`, summed over the matrices that a permutation acts on: an MLP neuron
    costs the distance of its gate row, up row and down column; a key-value head that of its key and value blocks
    plus its query heads' in their best order, each by its query and output block.

    Parameters
    ----------
    weights_i, weights_j : mappings from a parameter's name inside the layer to its tensor
    head_dim : int
        Channels of an attention head.
    symmetry : sequence of Axis
        The layers' own.

    Returns
    -------
    permutations : dict from the symmetry's permutation names to int64 tensors
        Channel p of the aligned layer is channel permutation[p] of layer j.
    matches : dict from projection names to RowMatch
    """
    matrices = [axis for axis in symmetry if axis.parameter.endswith("_proj.weight")]

    def rows(permutation: str) -> list[Pair]:
        """The matrices that a permutation acts on, of both layers, with its axis first."""
        axes = [axis for axis in matrices if axis.permutation == permutation]
        return [(weights_i[a.parameter].movedim(a.dim, 0), weights_j[a.parameter].movedim(a.dim, 0)) for a in axes]

    def head_costs(permutation: str) -> Costs:  # (heads of i, heads of j)
        costs = [
            row_costs(tuple(w.unflatten(0, (-1, head_dim)).flatten(1) for w in pair), dtype=np.float64)
            for pair in rows(permutation)
        ]
        return np.sum(costs, axis=0)

    permutations = {"mlp": torch.from_numpy(assign({"mlp": rows("mlp")})["mlp"])}
    if rows("key_value"):
        for name, heads in _match_heads(head_costs("query"), head_costs("key_value")).items():
            channels = (heads[:, None] * head_dim + np.arange(head_dim)).ravel()
            permutations[name] = torch.from_numpy(channels)
    matches = {
        axis.parameter.removesuffix(".weight"): _row_match(
            weights_i[axis.parameter].movedim(axis.dim, 0),
            weights_j[axis.parameter].movedim(axis.dim, 0),
            permutations[axis.permutation],
        )
        for axis in matrices
    }
    return permutations, matches


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


def permute_neurons(
    weights: Mapping[str, Tensor], permutations: Mapping[str, Tensor], symmetry: Sequence[Axis]
) -> dict[str, Tensor]:
    """The same layer with its neurons and heads in another order; what is outside the symmetry is passed through."""
    permuted = dict(weights)
    for axis in symmetry:
        if axis.parameter in permuted:
            weight = permuted[axis.parameter]
            permuted[axis.parameter] = weight.index_select(axis.dim, permutations[axis.permutation].to(weight.device))
    return permuted


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
