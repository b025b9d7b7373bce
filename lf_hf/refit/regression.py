"""Least squares for fused layers: which MLP channels to keep, and the down projection that serves them best."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lf_hf.runtime.launch import Processes

_SELECTION_RIDGE = 1e-2
_ROWS = 256  # of a weight that an error is summed over at a time, in float64
PRUNING_ROUNDS = 4
EXACT_LIMIT = 4096  # up to this size systems are solved in float64


@dataclass
class Regression:
    """Sums of a weighted least-squares problem y = W x, from which W and its error follow.

    Attributes
    ----------
    gram : tensor of shape (inputs m, inputs m)
        Sum of weight * x x^T over tokens, float32 at least, with x in units of `unit`.
    cross : tensor of shape (outputs d, inputs m)
        Sum of weight * y x^T, likewise.
    energy : float64 tensor of shape ()
        Sum of weight * |y|^2.
    unit : float32 tensor of shape ()
        A power of two near the largest of the first x, so that squares are in range.
    scaled : bool
        Whether `unit` was set; it is 1 before.
    """

    gram: Tensor
    cross: Tensor
    energy: Tensor
    unit: Tensor
    scaled: bool = False

    @classmethod
    def empty(cls, inputs: int, outputs: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Regression:
        """A problem without tokens yet, for tokens of some dtype.

        It is on the CPU where the device, Apple's mps, has no float64 to solve it in.
        """
        device = torch.device("cpu") if device.type == "mps" else device
        dtype = torch.promote_types(dtype, torch.float32)
        gram, cross = (torch.zeros(rows, inputs, dtype=dtype, device=device) for rows in (inputs, outputs))
        return cls(gram, cross, torch.zeros((), dtype=torch.float64, device=device), torch.ones((), device=device))

    def add(self, x: Tensor, y: Tensor, weights: Tensor) -> None:
        """Add tokens: x (tokens T, inputs m), y (tokens T, outputs d), weights (tokens T,)."""
        x, y, weights = (part.to(self.gram.device) for part in (x, y, weights.float()))
        root = weights.sqrt()[:, None]
        if not self.scaled:
            # Row by row, as a product with all of x would be a copy of it. Rounding keeps the order of products.
            largest = (torch.linalg.vector_norm(x, torch.inf, dim=1).float() * root[:, 0]).amax()
            self.unit, self.scaled = _power_of_two(largest), True
        # A product with float32 is the one copy of half-precision numbers; another dtype is for float64 alone.
        x, y = ((part * root).to(self.gram.dtype) for part in (x, y))
        x *= self.unit.reciprocal()
        self.gram.addmm_(x.T, x)
        self.cross.addmm_(y.T, x)
        for rows in y.split(_ROWS):
            self.energy += rows.double().square_().sum()

    def all_reduce(self, processes: Processes, owner: int = 0) -> None:
        """Add all processes' sums, for one of them to solve the problem; in all others they are lost."""
        if processes.world_size == 1:
            return
        units = processes.all_gather_object(float(self.unit) if self.scaled else 0.0)
        unit = max(units) or 1.0
        scale = units[processes.rank] / unit  # a power of two, so that nothing is rounded
        self.unit = torch.full_like(self.unit, unit)
        for sums in (self.gram.mul_(scale**2), self.cross.mul_(scale), self.energy):
            processes.reduce(owner, sums)

    def restrict(self, index: Tensor) -> None:
        """Leave only some of the inputs, sorted ones, in the memory that the problem has."""
        self.gram = _compacted(self.gram, index)
        self.cross = self.cross[:, index]

    def relative_error(self, weight: Tensor) -> float:
        """Weighted sum of |y - W x|^2 over that of |y|^2, for W of shape (outputs d, inputs m)."""
        left = self.energy.clone()
        for rows, cross in zip(weight.split(_ROWS), self.cross.split(_ROWS), strict=True):
            rows = self._in_units(rows)
            left += ((rows @ self.gram).double() - 2 * cross.double()).mul_(rows).sum()
        error, energy = torch.stack([left, self.energy]).tolist()
        if energy == 0:
            return math.inf if error else 0.0
        return error / energy

    def ridge(self, start: Tensor, strength: float) -> Tensor:
        """The W that minimises sum |y - W x|^2 + strength * mean(diag(gram)) * |W - start|^2.

        Parameters
        ----------
        start : tensor of shape (outputs d, inputs m)
            Where the penalty pulls to.
        strength : float
        """
        start = self._in_units(start)
        factor = self._factor(strength)
        residual = torch.addmm(self.cross, start, self.gram, alpha=-1).to(factor.dtype)  # (d, m)
        start += _solved(factor, residual.T).T.to(start.dtype)
        return start.div_(self.unit)

    def prune(self, start: Tensor, keep: int, *, block: int = 1, rounds: int = PRUNING_ROUNDS) -> Tensor:
        """Restrict the problem to the `keep` blocks of `block` adjacent inputs whose loss costs it least.

        Backward elimination: in each of some rounds the blocks of smallest saliency are dropped together. For one
        input k it is |w_k|^2 / (inverse gram)_kk, with w_k its column of the ridge solution: the increase in squared
        error if it goes and all others adapt (the optimal brain surgeon's measure). For a block it is
        trace(W_b (inverse gram)_bb^-1 W_b^T). The inverse is computed once and updated with each round, so the small
        ridge in it is that of the whole problem in all of them. Memory: the gram matrix and one more of its size.

        Parameters
        ----------
        start : tensor of shape (outputs d, inputs m)
            Where the ridge penalty pulls to.

        Returns
        -------
        int64 tensor of shape (keep,)
            Sorted block numbers.
        """
        total = self.gram.shape[0] // block
        blocks = torch.arange(total, device=self.gram.device)
        inverse, weight = self._inverse_and_solution(start)
        # How many are left too many after each round, in which some are dropped.
        for surplus in sorted({(total - keep) * step // rounds for step in range(rounds)}, reverse=True):
            size = keep + surplus
            dropped = _saliency(inverse, weight, block).argsort(descending=True)[size:].sort().values
            # Those that are left among the last take the places of those that are dropped: few are moved.
            last = torch.arange(size, len(blocks), device=blocks.device)
            last = last[torch.isin(last, dropped).argsort(stable=True)]
            if surplus:
                inverse, weight = _eliminated(inverse, weight, expanded(dropped, block), expanded(last, block))
            blocks[dropped] = blocks[last]
            blocks = blocks[:size]
        del inverse, weight
        blocks = blocks.sort().values
        self.restrict(expanded(blocks, block))
        return blocks

    def _in_units(self, weight: Tensor) -> Tensor:
        """A weight that is for x, as one for x in units of `unit`."""
        return weight.to(self.gram, copy=True).mul_(self.unit)

    def _inverse_and_solution(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """Inverse of the gram matrix plus the ridge that inputs are chosen with, and W^T: (m, m) and (m, d)."""
        factor = self._factor(_SELECTION_RIDGE)
        pull = _SELECTION_RIDGE * self.gram.diagonal().mean()
        target = self._in_units(start).mul_(pull).add_(self.cross).to(factor.dtype)
        weight = _solved(factor, target.T)
        return torch.cholesky_inverse(factor, out=factor), weight

    def _factor(self, strength: float) -> Tensor:
        """Cholesky factor of the gram matrix plus the ridge."""
        matrix = self.gram.to(torch.float64 if len(self.gram) <= EXACT_LIMIT else torch.float32, copy=True)
        matrix.diagonal().add_(strength * self.gram.diagonal().mean() + torch.finfo(torch.float32).tiny)
        # In place: the transpose of a symmetric matrix has the layout that LAPACK takes.
        factor, info = torch.linalg.cholesky_ex(
            matrix.mT, out=(matrix.mT, torch.empty((), dtype=torch.int32, device=matrix.device))
        )
        if info.item():
            if not torch.isfinite(self.gram.diagonal()).all():
                raise ValueError("The activations of a layer that is refitted overflow; use a dtype of wider range.")
            raise ValueError(f"ridge={strength:g} is too small for a stable fit to this calibration text; raise it.")
        return factor


def _solved(factor: Tensor, right: Tensor) -> Tensor:
    """Solution x of L L^T x = right, in the memory of `right`, for a lower Cholesky factor L.

    `torch.cholesky_solve` would copy both.
    """
    torch.linalg.solve_triangular(factor, right, upper=False, out=right)
    return torch.linalg.solve_triangular(factor.mT, right, upper=True, out=right)


def _saliency(inverse: Tensor, weight: Tensor, block: int) -> Tensor:
    """What each block of inputs is worth, from the inverse (m, m) and the solution (m, d); shape (blocks,)."""
    if block == 1:
        return torch.linalg.vector_norm(weight, dim=1).square() / inverse.diagonal()
    inner = torch.stack([inverse[n : n + block, n : n + block] for n in range(0, len(inverse), block)])
    parts = weight.unflatten(0, (-1, block))  # (blocks, block, d)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(inner), parts, upper=False).square_().sum((1, 2))


def _eliminated(inverse: Tensor, weight: Tensor, dropped: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse and solution of the problem without some inputs, in the memory they have.

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


def _power_of_two(size: Tensor) -> Tensor:
    """The nearest one that is not above a float32 `size` and has a reciprocal; 1 for 0, inf and NaN."""
    power = (size.view(torch.int32) & 0x7F800000).view(torch.float32)  # the exponent alone
    return torch.where((size > 0) & size.isfinite(), power.clamp(2.0**-126, 2.0**126), 1.0)


def expanded(blocks: Tensor, block: int) -> Tensor:
    """Indices of all members of some blocks of `block` adjacent ones."""
    return (blocks[:, None] * block + torch.arange(block, device=blocks.device)).flatten()


def _compacted(matrix: Tensor, index: Tensor) -> Tensor:
    """Some rows and the same columns of a square matrix, in ascending order, moved to the front of its memory."""
    size, rows = len(index), 256
    flat = matrix.view(-1)
    for first in range(0, size, rows):
        # A row moves to where no row is that is still to be read, as index[n] >= n.
        block = matrix[index[first : first + rows]][:, index]
        flat[first * size : first * size + block.numel()] = block.flatten()
    return flat[: size * size].view(size, size)
