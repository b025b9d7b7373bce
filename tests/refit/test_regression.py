"""The least-squares problems of fits: what they minimise and what is left of them, against sums over the tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import SEED, examples, normal
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from lf_hf.refit.regression import Regression

Problem = tuple[Tensor, Tensor, Tensor]
"""What is read (tokens, inputs), what is to be written (tokens, outputs), and the weights of tokens."""


def problem(seed: int = 0, tokens: int = 200, inputs: int = 8, outputs: int = 3, shared: float = 0.0) -> Problem:
    """Inputs of unlike sizes that have a direction in common, which dwarfs the others where `shared` is large."""
    x = normal(tokens, inputs // 4, seed=seed) @ normal(inputs // 4, inputs, seed=seed + 1)
    common = normal(tokens, 1, seed=seed + 3) * normal(inputs, seed=seed + 4)
    x = (x + normal(tokens, inputs, seed=seed + 2) + shared * common) * normal(inputs, seed=seed + 5).exp()
    y = x @ normal(inputs, outputs, seed=seed + 6) / inputs + normal(tokens, outputs, seed=seed + 7)
    return x, y, normal(tokens, seed=seed + 8).square() + 0.1


def regression(x: Tensor, y: Tensor, weights: Tensor) -> Regression:
    made = Regression(x.shape[1], y.shape[1], x.device)
    for part in torch.arange(len(x)).split(64):  # sequence by sequence
        made.add(x[part], y[part], weights[part])
    made.complete()
    return made


@pytest.mark.parametrize("inputs", [8, 1100])
def test_ridge_minimises_its_objective(inputs: int) -> None:
    """Against least squares on rows that write the penalty out; the error is that of the tokens."""
    x, y, weights = problem(inputs=inputs)
    start, strength = normal(3, inputs, seed=1), 0.3
    penalty = strength * float((weights[:, None] * x**2).sum(0).mean())
    rows = np.concatenate([weights.sqrt()[:, None] * x, np.sqrt(penalty) * np.eye(inputs)])
    wanted = np.concatenate([weights.sqrt()[:, None] * y, np.sqrt(penalty) * start.T])
    expected = np.linalg.lstsq(rows.astype(np.float64), wanted.astype(np.float64), rcond=None)[0].T
    made = regression(x, y, weights)
    solution = made.ridge(start, strength)
    np.testing.assert_allclose(solution.weight, expected, rtol=1e-4, atol=1e-4)
    for weight, error in ((start, solution.error_before), (torch.tensor(expected).float(), solution.error_after)):
        missed = (weights[:, None] * (y - x @ weight.T) ** 2).double().sum() / (weights[:, None] * y**2).double().sum()
        assert error == pytest.approx(float(missed), rel=1e-4)


@given(SEED, st.integers(-100, 100), st.integers(-60, 60))
@examples(30)
def test_a_fit_follows_the_scale_of_what_it_reads_and_writes(seed: int, read: int, write: int) -> None:
    x, y, weights = problem(seed)
    scale_x, scale_y = 2.0**read, 2.0**write
    start = normal(3, 8, seed=seed + 9)
    plain, scaled = regression(x, y, weights), regression(x * scale_x, y * scale_y, weights)
    assume(abs(write - read) < 120)
    scaled_start = (start.double() * scale_y / scale_x).float()
    expected = plain.ridge(start, 0.1).weight.double() * scale_y / scale_x
    weight, *errors = scaled.ridge(scaled_start, 0.1)
    assert torch.equal(weight.double(), expected)
    assert errors == pytest.approx(plain.ridge(start, 0.1)[1:], rel=1e-5)
    assert torch.equal(scaled.prune(scaled_start, 4), plain.prune(start, 4))


@pytest.mark.parametrize("strength", [1e-30, 1e-9, 1e-2, 1e9])
@pytest.mark.parametrize(
    "kind", ["zero", "zero column", "equal columns", "fewer tokens than inputs", "nothing to write"]
)
def test_degenerate_fits_are_finite_or_one_error(kind: str, strength: float) -> None:
    x, y, weights = problem()
    if kind == "zero":
        x = torch.zeros_like(x)
    elif kind == "zero column":
        x[:, 2] = 0
    elif kind == "equal columns":
        x[:] = x[:, :1]
    elif kind == "fewer tokens than inputs":
        x, y, weights = x[:3], y[:3], weights[:3]
    else:
        y = torch.zeros_like(y)
    made = regression(x, y, weights)
    try:
        fitted, before, after = made.ridge(torch.zeros(3, 8), strength)
    except ValueError as error:
        message = str(error)
        assert strength < 1e-6 and "is not stable; give more text, or raise ridge" in message
    else:
        assert torch.isfinite(fitted).all() and -1e-4 < after < 1 + 1e-4
        assert before == (0 if kind == "nothing to write" else 1)
    kept = made.prune(torch.zeros(3, 8), 4)
    assert len(set(kept.tolist())) == 4


def test_pruning_leaves_the_problem_of_what_is_kept() -> None:
    x, y, weights = problem(tokens=900, inputs=600)
    made = regression(x, y, weights)
    kept = made.prune(torch.zeros(3, 600), 400)
    alone, start = regression(x[:, kept], y, weights), torch.ones(3, 400)
    torch.testing.assert_close(made.ridge(start, 0.1).weight, alone.ridge(start, 0.1).weight)


def eliminated(given: Problem, start: Tensor, keep: int, block: int, rounds: int) -> list[int]:
    """What is left where the loss of each block is computed by solving without it, all from the tokens."""
    x, y, weights = (part.double().numpy() for part in given)
    gram, ridge = (x.T * weights) @ x, 1e-2 * np.mean(weights @ x**2)
    target = (x.T * weights) @ y + ridge * start.double().numpy().T
    gram += ridge * np.eye(len(gram))

    def explained(blocks: list[int]) -> float:
        index = np.concatenate([np.arange(block * n, block * (n + 1)) for n in blocks])
        return float((target[index] * np.linalg.solve(gram[np.ix_(index, index)], target[index])).sum())

    left = list(range(x.shape[1] // block))
    surplus = len(left) - keep
    for step in range(rounds):
        worth = {n: -explained([other for other in left if other != n]) for n in left}
        size = keep + surplus * (rounds - 1 - step) // rounds
        left = sorted(sorted(left, key=lambda n: -worth[n])[:size])
    return left


@pytest.mark.parametrize(
    ("inputs", "block", "keep", "rounds"),
    [(24, 1, 10, 4), (24, 1, 5, 19), (48, 4, 5, 7), (48, 4, 3, 3), (60, 6, 9, 4), (40, 8, 5, 2), (12, 4, 3, 3)],
)
@pytest.mark.parametrize("exact", [True, False])
def test_what_is_left_is_what_elimination_from_scratch_leaves(
    inputs: int, block: int, keep: int, rounds: int, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exact:
        monkeypatch.setattr("lf_hf.refit.regression.EXACT_LIMIT", 0)
    for seed in range(4):
        given, start = problem(seed, 300, inputs, 5, shared=3.0), normal(5, inputs, seed=seed) / inputs
        kept = regression(*given).prune(start, keep, block=block, rounds=rounds)
        assert kept.tolist() == eliminated(given, start, keep, block, rounds)


@pytest.mark.parametrize("block", [4, 16])
@pytest.mark.parametrize("shared", [30.0, 1000.0])
def test_large_problems_in_float32_leave_the_same(block: int, shared: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block a round, where nearly all of the inputs' energy is in one direction."""
    made, start = (lambda: regression(*problem(0, 1000, 512, 8, shared))), normal(8, 512) / 512
    total = 512 // block
    arguments = {"block": block, "rounds": total - total // 6}
    exact = made().prune(start, total // 6, **arguments)
    monkeypatch.setattr("lf_hf.refit.regression.EXACT_LIMIT", 0)
    assert torch.equal(made().prune(start, total // 6, **arguments), exact)
