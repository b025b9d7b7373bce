"""Least squares of fits, by sums over tokens or, where there are few, by the tokens themselves.

Matrices are gigabytes each where models are wide, so operations run in place. The host waits for none of them: errors
stay on the device, and so does what a `Solver` keeps, until a whole fit is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lf_hf.decoder.demand import Setup, Work
from lf_hf.runtime.amounts import EXACT_LIMIT, ROUGH_EXACT_LIMIT, solved_in_tokens
from lf_hf.runtime.numerics import bfloat16_products

_SELECTION_RIDGE = 1e-2
_TINY = torch.finfo(torch.float32).tiny  # so that a ridge is not 0 where nothing is read
_GRAM_ROWS = 512  # of a gram matrix that are added to at a time
_ROWS = 256  # that an error is summed over at a time
_COLUMNS = 512  # of an inverse of which blocks are computed at a time
PRUNING_ROUNDS = 4
_OVERFLOWS, _IS_UNSTABLE = 1, 2


class FitError(ValueError):
    """A fit has no result: a weight, or what it is fitted to, is beyond its dtype, or the text is too little for it."""


class Solver:
    """What factors the matrices of all problems of a fit, and keeps what went wrong: 0 for each that could be factored.

    What follows from one that could not is of no use, so `check` must be called before any result is used. A rough fit
    has `rough_tokens`; they are None for any other fit.
    """

    def __init__(self, rough_tokens: int | None = None) -> None:
        self.rough_tokens = rough_tokens
        self._codes: list[Tensor] = []

    def dtype(self, size: int) -> torch.dtype:
        """In which a system of so many equations is solved."""
        limit = EXACT_LIMIT if self.rough_tokens is None else ROUGH_EXACT_LIMIT
        return torch.float64 if size <= limit else torch.float32

    def cholesky(self, matrix: Tensor) -> Tensor:
        """Cholesky factors of symmetric matrices (..., m, m), of which the upper halves are read, in their memory."""
        is_finite = torch.isfinite(matrix.diagonal(dim1=-2, dim2=-1)).all()
        # In place: the transpose of a symmetric matrix has the layout that LAPACK takes.
        info = torch.empty(matrix.shape[:-2], dtype=torch.int32, device=matrix.device)
        factor, info = torch.linalg.cholesky_ex(matrix.mT, out=(matrix.mT, info))
        self._codes.append(info.any() * torch.where(is_finite, _IS_UNSTABLE, _OVERFLOWS))
        return factor

    def ridge_cholesky(self, gram: Tensor, pull: Tensor, dtype: torch.dtype) -> Tensor:
        """Cholesky factor of a symmetric matrix, of which the upper half is read, with a ridge on its diagonal."""
        matrix = gram.to(dtype, copy=True)
        matrix.diagonal().add_(pull)
        return self.cholesky(matrix)

    def codes(self) -> Tensor:
        """Of all matrices in their order, (matrices,)."""
        return torch.stack(self._codes)

    @staticmethod
    def check(codes: Sequence[float]) -> None:
        """Raise FitError for the first failure, if there is one."""
        failure = next(filter(None, codes), None)
        if failure == _OVERFLOWS:
            raise FitError("The activations of a layer that is refitted overflow; use a dtype of wider range.")
        if failure == _IS_UNSTABLE:
            raise FitError("The fit to this calibration text is not stable; give more text, or raise ridge.")


class Solution(NamedTuple):
    """A weight W, and relative errors of the weight that it was pulled to and of W, float64 tensors of shape ().

    An error is the weighted sum of |y - W x|^2 over that of |y|^2.
    """

    weight: Tensor
    error_before: Tensor
    error_after: Tensor


class LeastSquares:
    """A weighted problem y = W x, in float32 at least, and on the CPU where a device, Apple's mps, has no float64.

    x and y are computed in `dtype`; where that is bfloat16, sums are of bfloat16 products. `solver` is that of the fit
    which the problem is a part of.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, solver: Solver | None) -> None:
        self.solver = solver or Solver()
        self.device = torch.device("cpu") if device.type == "mps" else device
        self.dtype = torch.promote_types(dtype, torch.float32)
        self.is_bfloat16 = dtype == torch.bfloat16

    def weighted(self, x: Tensor, y: Tensor, token_weight: Tensor) -> tuple[Tensor, Tensor]:
        """x and y of tokens, times the root of the tokens' weights."""
        root = token_weight.float().to(self.device).sqrt()[:, None]
        # A product with float32 is the one copy of half-precision numbers.
        x = x.to(self.device) * root
        y = y.to(self.device) * root
        return x.to(self.dtype), y.to(self.dtype)

    def wide(self, weight: Tensor) -> Tensor:
        """A copy of a weight."""
        return weight.to(self.device, self.dtype, copy=True)


class Regression(LeastSquares):
    """Sums of a problem over tokens, from which W and its error follow.

    Attributes
    ----------
    gram : tensor of shape (inputs m, inputs m)
        Sum of weight * x x^T over tokens. Until `complete` it lacks what is left of blocks on the diagonal.
    cross : tensor of shape (outputs d, inputs m)
        Sum of weight * y x^T, likewise.
    energy : float64 tensor of shape ()
        Sum of weight * |y|^2.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        solver: Solver | None = None,
    ) -> None:
        super().__init__(device, dtype, solver)
        self.gram = torch.zeros(inputs, inputs, dtype=self.dtype, device=self.device)
        self.cross = torch.zeros(outputs, inputs, dtype=self.dtype, device=self.device)
        self.energy = torch.zeros((), dtype=torch.float64, device=self.device)

    def add(self, x: Tensor, y: Tensor, token_weight: Tensor) -> None:
        """Add tokens: x (tokens T, inputs m), y (tokens T, outputs d), token_weight (tokens T,)."""
        x, y = self.weighted(x, y, token_weight)
        with bfloat16_products(self.is_bfloat16):
            add_gram(self.gram, x)
            self.cross.addmm_(y.T, x)
        for rows in y.split(_ROWS):
            self.energy += rows.double().square_().sum()

    def complete(self) -> None:
        """Fill in what the sums lack, after the last tokens."""
        for first in range(0, len(self.gram), _GRAM_ROWS):
            end = first + _GRAM_ROWS
            self.gram[end:, first:end] = self.gram[first:end, end:].T

    def ridge(self, start: Tensor | None, strength: float, scale: Tensor | None = None) -> Solution:
        """The W that minimises sum |y - W x|^2 + pull * |W - start|^2, where pull = strength * scale.

        `start`, of shape (outputs d, inputs m), is where the penalty pulls to, and None stands for 0. `scale` is
        mean(diag(gram)), or that of a problem which this one is a part of. The squared errors need no product with the
        gram matrix but that of the solution: with R = cross - start gram, and W gram = cross - pull (W - start), they
        are energy - <cross + R, start> and energy - <cross + pull (W - start), W>.
        """
        weight = torch.zeros_like(self.cross) if start is None else self.wide(start)
        pull = strength * (self.gram.diagonal().mean() if scale is None else scale.to(self.device)) + _TINY
        factor = self._factor(pull)
        residual = self.cross.clone()  # (d, m)
        if start is not None:
            residual.addmm_(weight, self.gram, alpha=-1)
        before = self.energy - _dot(self.cross, weight) - _dot(residual, weight)
        change = solve(factor, residual.to(factor.dtype).T).T.to(weight.dtype)
        weight += change
        after = self.energy - _dot(self.cross, weight) - pull * _dot(change, weight)
        errors = (error / self.energy.clamp(min=_TINY) for error in (before, after))
        return Solution(weight, *errors)

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
        pull = _SELECTION_RIDGE * self.gram.diagonal().mean() + _TINY
        factor = self._factor(pull)
        target = self.wide(start).mul_(pull).add_(self.cross).to(factor.dtype)
        weight = solve(factor, target.T)  # W^T (m, d)
        inverse = torch.cholesky_inverse(factor, out=factor)  # (m, m)
        del factor, target
        for size in _sizes(total, keep, rounds):
            inner = inverse.unflatten(0, (-1, block)).unflatten(2, (-1, block)).diagonal(dim1=0, dim2=2)
            worth = saliency(inner.movedim(2, 0).clone(), weight, self.solver)
            dropped = worth.argsort(descending=True)[size:].sort().values
            # Those that are left among the last take the places of those that are dropped: few are moved.
            last = torch.arange(size, len(blocks), device=blocks.device)
            last = last[torch.isin(last, dropped).argsort(stable=True)]
            if size > keep:
                members = expanded(dropped, block), expanded(last, block)
                inverse, weight = eliminate(inverse, weight, *members, self.solver)
            blocks[dropped] = blocks[last]
            blocks = blocks[:size]
        del inverse, weight
        blocks = blocks.sort().values
        index = expanded(blocks, block)
        self.gram = self.gram[index[:, None], index]
        self.cross = self.cross[:, index]
        return blocks

    def _factor(self, pull: Tensor) -> Tensor:
        return self.solver.ridge_cholesky(self.gram, pull, self.solver.dtype(len(self.gram)))


class DualRegression(LeastSquares):
    """The same problem by the tokens, where they are fewer than x has numbers: with no matrix of shape (m, m).

    Tokens are kept: X of shape (tokens T, inputs m) and Y (tokens T, outputs d). With the kernel K = X X^T + pull I, of
    shape (T, T), the solution leaves pull K^-1 (Y - X start^T) of Y, and the inverse of the gram matrix with its ridge
    is (I - X^T K^-1 X) / pull, a difference for which float64 is needed. Methods are those of `Regression`.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32, solver: Solver | None = None) -> None:
        super().__init__(device, dtype, solver)
        self._own = torch.bfloat16 if self.is_bfloat16 else self.dtype
        self._parts: list[tuple[Tensor, Tensor]] = []

    def add(self, x: Tensor, y: Tensor, token_weight: Tensor) -> None:
        x, y = self.weighted(x, y, token_weight)
        self._parts.append((x.to(self._own), y.T))  # x as products take it: the kernel is one of what solutions take

    def complete(self) -> None:
        self._x = torch.cat([x for x, _ in self._parts])
        self._y = torch.cat([y for _, y in self._parts], dim=1)  # (outputs d, tokens T)
        self._parts.clear()

    def ridge(self, start: Tensor | None, strength: float, scale: Tensor | None = None) -> Solution:
        weight = None if start is None else self.wide(start)
        pull = self._pull(strength) if scale is None else strength * scale.to(self.device) + _TINY
        _, missed, left = self._solved(weight, pull, self.solver.dtype(len(self._x)))
        change = self._change(left, pull)
        weight = change if weight is None else weight.add_(change)
        energy = _dot(self._y, self._y).clamp(min=_TINY)
        errors = (_dot(part, part) / energy for part in (missed, left))
        return Solution(weight, *errors)

    def prune(self, start: Tensor, keep: int, *, block: int = 1, rounds: int = PRUNING_ROUNDS) -> Tensor:
        start = self.wide(start)
        blocks = torch.arange(start.shape[1] // block, device=start.device)
        identity = torch.eye(block, dtype=torch.float64, device=start.device)
        at_once = block * max(1, _COLUMNS // block)
        pull = self._pull(_SELECTION_RIDGE)
        for size in _sizes(len(blocks), keep, rounds):
            factor, _, left = self._solved(start, pull, torch.float64)
            weight = self._change(left, pull).add_(start)
            worth = []
            for x, columns in zip(self._x.split(at_once, dim=1), weight.split(at_once, dim=1), strict=True):
                root = torch.linalg.solve_triangular(factor, x.double(), upper=False)
                root = root.unflatten(1, (-1, block)).movedim(1, 0)  # (blocks, T, block)
                inner = (identity - root.mT @ root).div_(pull)
                worth.append(saliency(inner, columns.T.double(), self.solver))
            chosen = torch.cat(worth).argsort(descending=True)[:size].sort().values
            index = expanded(chosen, block)
            blocks, start, self._x = blocks[chosen], start[:, index], self._x[:, index]
        return blocks

    def _pull(self, strength: float) -> Tensor:
        return strength * torch.linalg.vector_norm(self._x, dtype=self.dtype).square() / self._x.shape[1] + _TINY

    def _solved(self, start: Tensor | None, pull: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The factor of K, and what `start` and what the solution leave of y, of shape (outputs d, tokens T)."""
        x = self._x.to(self.dtype)
        kernel = x.new_zeros(len(x), len(x))
        with bfloat16_products(self.is_bfloat16):
            add_gram(kernel, x.T)
        missed = self._y if start is None else self._y - start.to(self._own) @ self._x.T
        factor = self.solver.ridge_cholesky(kernel, pull, dtype)
        left = solve(factor, missed.to(dtype, copy=True).T).T
        return factor, missed, left.mul_(pull).to(missed.dtype)

    def _change(self, left: Tensor, pull: Tensor) -> Tensor:
        """How far the solution is from where it is pulled to."""
        return (left.to(self._own) @ self._x).to(left.dtype).div_(pull)


def add_gram(gram: Tensor, x: Tensor) -> None:
    """Add x^T x, of x (T, m), to a matrix (m, m), but for what is left of blocks on its diagonal: twice as fast."""
    for first in range(0, len(gram), _GRAM_ROWS):
        columns = x[:, first : first + _GRAM_ROWS]
        gram[first : first + _GRAM_ROWS, first:].addmm_(columns.T, x[:, first:])


def _sizes(total: int, keep: int, rounds: int) -> list[int]:
    """How many blocks are left after each round, of `total` in front of the first one."""
    return sorted({keep + (total - keep) * step // rounds for step in range(rounds)}, reverse=True)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Sum of the products of all numbers of two matrices, in float64."""
    parts = zip(left.split(_ROWS), right.split(_ROWS), strict=True)
    return torch.stack([(rows.double() * others).sum() for rows, others in parts]).sum()


def solve(factor: Tensor, right: Tensor) -> Tensor:
    """Solution x of L L^T x = right, in the memory of `right`, for a lower Cholesky factor L.

    `torch.cholesky_solve` would copy both.
    """
    torch.linalg.solve_triangular(factor, right, upper=False, out=right)
    return torch.linalg.solve_triangular(factor.mT, right, upper=True, out=right)


def saliency(inner: Tensor, weight: Tensor, solver: Solver) -> Tensor:
    """What each block of inputs is worth, from the blocks (blocks, block, block) on the diagonal of the inverse, which
    are overwritten, and the solution W^T (m, d); shape (blocks,)."""
    block = inner.shape[1]
    if block == 1:
        return torch.linalg.vector_norm(weight, dim=1).square() / inner[:, 0, 0]
    parts = weight.unflatten(0, (-1, block))  # (blocks, block, d)
    return torch.linalg.solve_triangular(solver.cholesky(inner), parts, upper=False).square_().sum((1, 2))


def eliminate(inverse: Tensor, weight: Tensor, dropped: Tensor, last: Tensor, solver: Solver) -> tuple[Tensor, Tensor]:
    """Inverse (m, m) and solution W^T (m, d) of a least-squares problem without some inputs, in the memory they have.

    With P the inverse and b what is dropped they are P - P_b P_bb^-1 P_b^T and W^T - P_b P_bb^-1 W_b^T. The last inputs
    take the places of those that are dropped, in the order of `last`.
    """
    size = len(inverse) - len(dropped)
    rows = inverse[dropped]
    root = solver.cholesky(rows[:, dropped])
    shared = torch.linalg.solve_triangular(root, rows, upper=False)  # (dropped, m)
    written = torch.linalg.solve_triangular(root, weight[dropped], upper=False)  # (dropped, d)
    for part in (inverse, inverse.T, shared.T, weight):
        part[dropped] = part[last]
    inverse, shared, weight = inverse[:size, :size], shared[:, :size], weight[:size]
    return inverse.addmm_(shared.T, shared, alpha=-1), weight.addmm_(shared.T, written, alpha=-1)


def expanded(blocks: Tensor, block: int) -> Tensor:
    """Indices of all members of some blocks of `block` adjacent ones."""
    return (blocks[:, None] * block + torch.arange(block, device=blocks.device)).flatten()


def solving(setup: Setup, tokens: int, unknowns: int, kept: int, outputs: int, *, is_rough: bool) -> tuple[int, Work]:
    """Bytes and work of a problem: sums, a pruning by an inverse, and the solution of the rest."""
    if is_rough and solved_in_tokens(tokens, unknowns):
        return _dual_solving(setup, tokens, unknowns, kept, outputs)
    solver = Solver(tokens if is_rough else None)
    squares = 3 if setup.on_card and kept < unknowns else 1  # an inverse on a card is made beside its factor
    exact = solver.dtype(unknowns).itemsize
    size = (4 + squares * exact) * unknowns**2 + (12 + 2 * exact) * unknowns * outputs
    work = Work(product=tokens * unknowns * (unknowns + 2 * outputs))  # half of a gram matrix, and what it is for
    for size_of in {unknowns, kept}:
        flops = size_of**3 // 3 + 2 * size_of**2 * outputs
        if size_of > kept:  # the inverse, and its updates
            flops += 2 * size_of**3 // 3 + 2 * (size_of**3 - kept**3) // 3
        rate = "solve" if solver.dtype(size_of) == torch.float64 else "product"
        work += Work({rate: flops}) + Work(product=2 * size_of**2 * outputs)
    return size, work


def _dual_solving(setup: Setup, tokens: int, unknowns: int, kept: int, outputs: int) -> tuple[int, Work]:
    """The same where it is solved in the tokens: no more of the inverse than blocks on its diagonal."""
    # x twice; the kernel, and it in float64; two weights; what is to be written, and what is missed of it.
    size = 8 * tokens * unknowns + 12 * tokens**2 + 8 * unknowns * outputs + 32 * tokens * outputs
    work = Work()
    for inputs in {unknowns, kept}:
        work += Work({setup.own_product: tokens**2 * inputs + 4 * tokens * inputs * outputs})
        work += Work(solve=tokens**3 // 3 + 2 * tokens**2 * outputs + tokens**2 * inputs * (inputs > kept))
    return size, work
