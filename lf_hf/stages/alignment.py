"""Stage 4: match the neurons of two layers by optimal assignment."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

_EPSILON = 1e-12
_COST_BLOCK = 2048  # rows of the cost matrix that are computed at a time


@dataclass(frozen=True)
class RowMatch:
    """How the rows of one weight matrix of layer j were matched to those of layer i.

    `cosine_before` and `cosine_after` are the mean cosines between row p of layer i and the row of layer j
    beside it, in 0..1 for useful matches; `rows_moved` is the share of rows that changed place.
    """

    cosine_before: float
    cosine_after: float
    rows_moved: float


def normalized_rows(weight: Tensor) -> Tensor:
    """Rows of (rows n, columns m) in float32, divided by their norm + 1e-12."""
    weight = weight.to(torch.float32)
    return weight / (weight.norm(dim=1, keepdim=True) + _EPSILON)


def row_costs(weight_i: Tensor, weight_j: Tensor) -> NDArray[np.float64]:
    """L2 distances between the normalised rows of two (rows n, columns m) matrices.

    The result (rows of i, rows of j) is the only n x n array: it is filled block by block from float32
    products, and is float64 since the solver would otherwise copy it.
    """
    rows_i, rows_j = normalized_rows(weight_i), normalized_rows(weight_j)
    squares_i, squares_j = rows_i.square().sum(1), rows_j.square().sum(1)
    costs = np.empty((len(rows_i), len(rows_j)))
    for start in range(0, len(rows_i), _COST_BLOCK):
        block = slice(start, start + _COST_BLOCK)
        squared = squares_i[block, None] + squares_j[None, :] - 2 * (rows_i[block] @ rows_j.T)
        costs[block] = squared.clamp_(min=0).sqrt_().cpu().numpy()
    return costs


def match_rows(weight_i: Tensor, weight_j: Tensor) -> tuple[Tensor, RowMatch]:
    """The permutation of layer j's rows that lies closest to layer i's, row by row.

    Minimises the sum over p of || w_i[p] - w_j[permutation[p]] || with rows normalised.

    Parameters
    ----------
    weight_i, weight_j : tensors of shape (rows n, columns m)

    Returns
    -------
    permutation : int64 tensor of shape (rows n,)
        Row p of the aligned matrix is row permutation[p] of `weight_j`.
    match : RowMatch
    """
    permutation = torch.from_numpy(linear_sum_assignment(row_costs(weight_i, weight_j))[1]).to(weight_j.device)
    rows_i, rows_j = normalized_rows(weight_i), normalized_rows(weight_j)
    match = RowMatch(
        cosine_before=float((rows_i * rows_j).sum(1).mean()),
        cosine_after=float((rows_i * rows_j[permutation]).sum(1).mean()),
        rows_moved=float((permutation != torch.arange(len(permutation), device=permutation.device)).float().mean()),
    )
    return permutation, match
