"""Least squares for fused layers: which MLP channels to keep, and the down projection that serves them best."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lf_hf.processes import Processes

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
        Sum of weight * x x^T over tokens, float32, with x in units of `unit`.
    cross : tensor of shape (outputs d, inputs m)
        Sum of weight * y x^T, likewise.
    energy : float
        Sum of weight * |y|^2.
    unit : float
        A power of two near the largest of the first x, so that squares are in range; 0 before the first token.
    """

    gram: Tensor
    cross: Tensor
    energy: float = 0.0
    unit: float = 0.0

    @classmethod
    def empty(cls, inputs: int, outputs: int, device: torch.device) -> Regression:
        """A problem without tokens yet; on the CPU where the device, Apple's mps, has no float64 to solve it in."""
        device = torch.device("cpu") if device.type == "mps" else device
        return cls(torch.zeros(inputs, inputs, device=device), torch.zeros(outputs, inputs, device=device))

    def add(self, x: Tensor, y: Tensor, weights: Tensor) -> None:
        """Add tokens: x (tokens T, inputs m), y (tokens T, outputs d), weights (tokens T,)."""
        x, y, weights = x.to(self.gram), y.to(self.gram), weights.to(self.gram)
        root = weights.sqrt()[:, None]
        x, y = x * root, y * root
        if not self.unit:
            self.unit = _power_of_two(float(x.abs().max()))
        x *= 1 / (self.unit or 1)
        self.gram.addmm_(x.T, x)
        self.cross.addmm_(y.T, x)
        self.energy += float(y.double().square().sum())

    def add_up(self, processes: Processes, owner: int = 0) -> None:
        """Add all processes' sums, for one of them to solve the problem; in all others they are lost."""
        if processes.count == 1:
            return
        unit = processes.largest(self.unit)
        scale = self.unit / (unit or 1)  # exact, as a power of two
        self.unit = unit
        for sums, factor in ((self.gram, scale**2), (self.cross, scale)):
            processes.add_up_for(owner, sums.mul_(factor))
        self.energy = sum(processes.gathered(self.energy))

    def restrict(self, index: Tensor) -> None:
        """Leave only some of the inputs, sorted ones, in the memory that the problem has."""
        self.gram = _compacted(self.gram, index)
        self.cross = self.cross[:, index]

    def relative_error(self, weight: Tensor) -> float:
        """Weighted sum of |y - W x|^2 over that of |y|^2, for W of shape (outputs d, inputs m)."""
        left = self.energy
        for rows, cross in zip(weight.split(_ROWS), self.cross.split(_ROWS), strict=True):
            rows = self._in_units(rows)
            left += float(((rows @ self.gram).double() - 2 * cross.double()).mul_(rows).sum())
        if self.energy == 0:
            return math.inf if left else 0.0
        return left / self.energy

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
        return start.div_(self.unit or 1)

    def prune(self, start: Tensor, keep: int, *, block: int = 1, rounds: int = PRUNING_ROUNDS) -> Tensor:
        """Restrict the problem to the `keep` blocks of `block` adjacent inputs whose loss costs it least.

        Backward elimination: in each of some rounds the blocks of smallest saliency are dropped together. For one
        input k it is |w_k|^2 / (inverse gram)_kk, with w_k its column of the ridge solution: the increase in squared
        error if it goes and all others adapt (the optimal brain surgeon's measure). For a block it is
        trace(W_b (inverse gram)_bb^-1 W_b^T). Memory: the gram matrix and one more of its size.

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
        for step in range(rounds):
            surplus = (total - keep) * (rounds - 1 - step) // rounds
            saliency = self._saliency(start[:, expanded(blocks, block)], block)
            left = saliency.topk(keep + surplus).indices.sort().values
            self.restrict(expanded(left, block))
            blocks = blocks[left]
        return blocks

    def _in_units(self, weight: Tensor) -> Tensor:
        """A weight that is for x, as one for x in units of `unit`."""
        return weight.to(self.gram, copy=True).mul_(self.unit or 1)

    def _saliency(self, start: Tensor, block: int) -> Tensor:
        """What each block of inputs is worth; shape (blocks,)."""
        factor = self._factor(_SELECTION_RIDGE)
        pull = _SELECTION_RIDGE * float(self.gram.diagonal().mean())
        target = self._in_units(start).mul_(pull).add_(self.cross).to(factor.dtype)
        del start
        weight = _solved(factor, target.T).unflatten(0, (-1, block))  # (blocks left, block, d)
        inverse = torch.cholesky_inverse(factor, out=factor)
        if block == 1:
            return torch.linalg.vector_norm(weight[:, 0], dim=1).square() / inverse.diagonal()
        inner = torch.stack([inverse[n : n + block, n : n + block] for n in range(0, len(inverse), block)])
        return (torch.cholesky_solve(weight, torch.linalg.cholesky(inner)) * weight).sum((1, 2))

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


def _power_of_two(size: float) -> float:
    """The nearest one that is not above `size` and has a reciprocal in float32; 0 for 0."""
    return math.ldexp(1, min(max(math.frexp(size)[1] - 1, -126), 126)) if size and math.isfinite(size) else 0.0


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
