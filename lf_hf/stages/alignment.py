"""Stage 4: match the neurons of two layers by optimal assignment.

Two ways: by `_ROW_AXES` each weight matrix is taken on its own, as the published method does; by the layers' symmetry
whole neurons and attention heads move, with all that belongs to them, so that the layer computes what it did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lf_hf.decoder.decoder import Decoder
from lf_hf.families.table import PROJECTIONS, Axis, Weights
from lf_hf.report.data import RowMatch
from lf_hf.runtime.numerics import bfloat16_products, in_float64
from lf_hf.runtime.progress import progress

try:
    from lap import lapjvs
except ImportError:  # the extra "fast"
    lapjvs = None

Costs = NDArray[np.floating]
Pair = tuple[Tensor, Tensor]

_ROW_AXES = [Axis(f"{name}.{kind}", 0, name) for name in PROJECTIONS for kind in ("weight", "bias")]
"""Rows of each matrix that are permuted by themselves: no symmetry, as the layer then computes something else."""
_ROWS = 256  # rows that are compared at a time, in float32
_EPSILON = 1e-12
BLOCK = 1 << 24  # entries of a cost matrix that are computed at a time
ALIVE_BYTES = 7 << 29  # 3.5 GiB of cost matrices at a time, or a single larger one


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
    writer = weights_i.get("self_attn.o_proj.weight")
    head_dim = writer.shape[1] // decoder.config.num_attention_heads if writer is not None else 1
    permutations, matches = match_neurons(weights_i, weights_j, head_dim, symmetry)
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

    Closest in the sense of `row_costs`, summed over the matrices that a permutation acts on: an MLP neuron
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


def row_costs(*pairs: Pair, dtype: torch.dtype = torch.float32) -> Costs:
    """L2 distances between normalised rows, w / (norm(w) + 1e-12), summed over some pairs of matrices (rows, columns).

    Of shape (rows of the first, rows of the second), and computed in float32. Products are made where the first weights
    are, block by block, so this is the only array of that size.
    """
    costs = torch.zeros(len(pairs[0][0]), len(pairs[0][1]), dtype=dtype)
    for weight_i, weight_j in pairs:
        rows_i, factors_i, squares_i = float_rows(weight_i)
        rows_j, factors_j, squares_j = (part.to(rows_i.device) for part in float_rows(weight_j))
        step = max(1, BLOCK // len(rows_j))
        # Which changes nothing, as these rows are bfloat16 numbers.
        with bfloat16_products(weight_i.dtype == weight_j.dtype == torch.bfloat16):
            for start in range(0, len(rows_i), step):
                block = slice(start, start + step)
                squared = rows_i[block] @ rows_j.T  # (block, n)
                squared.mul_(factors_i[block, None] * -2).mul_(factors_j).add_(squares_i[block, None]).add_(squares_j)
                costs[block] += squared.clamp_(min=0).sqrt_().cpu()
    return costs.numpy()


def assign(problems: Mapping[str, Sequence[Pair]]) -> dict[str, NDArray[np.int64]]:
    """For each problem the permutation of the second matrices' rows that lies closest to the first ones'.

    Minimises the sum over p of row_costs(*pairs)[p, permutation[p]]. Problems are independent: costs are computed one
    after the other, largest first, and solved meanwhile; no more matrices exist at a time than torch uses threads.
    lapx, where it is installed, works in float32, and is about three times as fast as scipy on large matrices; both
    find an optimum.
    """
    dtype = torch.float64 if lapjvs is None else torch.float32
    largest = max((len(pairs[0][0]) for pairs in problems.values()), default=1)
    together = max(1, min(torch.get_num_threads(), ALIVE_BYTES // (largest**2 * dtype.itemsize)))
    one_at_a_time = Lock()

    def solve(pairs: Sequence[Pair]) -> NDArray[np.int64]:
        with one_at_a_time, torch.no_grad():
            costs = row_costs(*pairs, dtype=dtype)
        return linear_sum_assignment(costs)[1] if lapjvs is None else lapjvs(costs, return_cost=False)[1]

    names = sorted(problems, key=lambda name: -len(problems[name][0][0]))
    with ThreadPoolExecutor(together) as pool:
        solved = pool.map(solve, [problems[name] for name in names])
        bar = progress(solved, total=len(names), desc="Assignment", unit="matrix", leave=False)
        return dict(zip(names, bar, strict=True))


def float_rows(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in float32, what each is multiplied by to be normalised, and the squared norms of the normalised rows."""
    rows = weight.float()
    norms = rows.norm(dim=1)
    factors = 1 / (norms + _EPSILON)
    return rows, factors, (norms * factors).square()
