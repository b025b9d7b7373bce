"""Linear algebra for least-squares problems, in the memory of its operands: gigabytes each where models are wide."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 256  # that are moved at a time


def solved(factor: Tensor, right: Tensor) -> Tensor:
    """Solution x of L L^T x = right, in the memory of `right`, for a lower Cholesky factor L.

    `torch.cholesky_solve` would copy both.
    """
    torch.linalg.solve_triangular(factor, right, upper=False, out=right)
    return torch.linalg.solve_triangular(factor.mT, right, upper=True, out=right)


def saliency(inverse: Tensor, weight: Tensor, block: int) -> Tensor:
    """What each block of inputs is worth, from the inverse (m, m) and the solution W^T (m, d); shape (blocks,)."""
    if block == 1:
        return torch.linalg.vector_norm(weight, dim=1).square() / inverse.diagonal()
    inner = torch.stack([inverse[n : n + block, n : n + block] for n in range(0, len(inverse), block)])
    parts = weight.unflatten(0, (-1, block))  # (blocks, block, d)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(inner), parts, upper=False).square_().sum((1, 2))


def eliminated(inverse: Tensor, weight: Tensor, dropped: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse (m, m) and solution W^T (m, d) of a least-squares problem without some inputs, in the memory they have.

    With P the inverse and b what is dropped they are P - P_b P_bb^-1 P_b^T and W^T - P_b P_bb^-1 W_b^T. The last inputs
    take the places of those that are dropped, in the order of `last`.
    """
    size = len(inverse) - len(dropped)
    rows = inverse[dropped]
    root = torch.linalg.cholesky(rows[:, dropped])
    shared = torch.linalg.solve_triangular(root, rows, upper=False)  # (dropped, m)
    written = torch.linalg.solve_triangular(root, weight[dropped], upper=False)  # (dropped, d)
    for part in (inverse, inverse.T, shared.T, weight):
        part[dropped] = part[last]
    inverse, shared, weight = inverse[:size, :size], shared[:, :size], weight[:size]
    return inverse.addmm_(shared.T, shared, alpha=-1), weight.addmm_(shared.T, written, alpha=-1)


def compacted(matrix: Tensor, index: Tensor) -> Tensor:
    """Some rows and the same columns of a square matrix, in ascending order, moved to the front of its memory."""
    size, flat = len(index), matrix.view(-1)
    for first in range(0, size, _ROWS):
        # A row moves to where no row is that is still to be read, as index[n] >= n.
        block = matrix[index[first : first + _ROWS]][:, index]
        flat[first * size : first * size + block.numel()] = block.flatten()
    return flat[: size * size].view(size, size)


def power_of_two(size: Tensor) -> Tensor:
    """The nearest one that is not above a float32 `size` and has a reciprocal; 1 for 0, inf and NaN."""
    power = (size.view(torch.int32) & 0x7F800000).view(torch.float32)  # the exponent alone
    return torch.where((size > 0) & size.isfinite(), power.clamp(2.0**-126, 2.0**126), 1.0)
