"""Optimal assignments between the rows of weight matrices, several at a time and within bounded memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lf_hf.runtime.numerics import bfloat16_products
from lf_hf.runtime.progress import progress

try:
    from lap import lapjvs
except ImportError:  # the extra "fast"
    lapjvs = None

Costs = NDArray[np.floating]
Pair = tuple[Tensor, Tensor]

_EPSILON = 1e-12
BLOCK = 1 << 24  # entries of a cost matrix that are computed at a time
ALIVE_BYTES = 7 << 29  # 3.5 GiB of cost matrices at a time, or a single larger one


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
