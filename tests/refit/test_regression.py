from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from lf_hf.refit.regression import Regression, expanded


def problem(tokens: int = 200, inputs: int = 6, outputs: int = 3, seed: int = 0) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=random)
    x = torch.randn(tokens, inputs, generator=random) @ mixing
    y = x @ torch.randn(inputs, outputs, generator=random) + torch.randn(tokens, outputs, generator=random)
    return x, y, torch.rand(tokens, generator=random) + 0.1


def accumulated(x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> Regression:
    regression = Regression.empty(x.shape[1], y.shape[1], x.device)
    for start in range(0, len(x), 64):  # sequence by sequence
        part = slice(start, start + 64)
        regression.add(x[part], y[part], weights[part])
    return regression


def squared_error(x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor, weight: torch.Tensor) -> float:
    return float((weights[:, None] * (y - x @ weight.T) ** 2).double().sum())


def test_ridge_minimises_its_objective() -> None:
    """Against least squares on rows that write the penalty out."""
    x, y, weights = problem()
    start = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    regression = accumulated(x, y, weights)
    strength = 0.3
    penalty = strength * float((weights[:, None] * x**2).sum(0).mean())
    rows = np.concatenate([weights.sqrt()[:, None] * x, np.sqrt(penalty) * np.eye(6)])
    wanted = np.concatenate([weights.sqrt()[:, None] * y, np.sqrt(penalty) * start.T])
    expected = np.linalg.lstsq(rows.astype(np.float64), wanted.astype(np.float64), rcond=None)[0].T
    np.testing.assert_allclose(regression.ridge(start, strength), expected, rtol=1e-4, atol=1e-4)


def test_a_strong_ridge_keeps_the_start_and_a_weak_one_fits() -> None:
    x, y, weights = problem()
    regression, start = accumulated(x, y, weights), torch.ones(3, 6)
    torch.testing.assert_close(regression.ridge(start, 1e6), start, rtol=0, atol=1e-3)
    errors = [regression.relative_error(regression.ridge(start, strength)) for strength in (1e-4, 1e-1, 10.0)]
    assert errors == sorted(errors) and errors[-1] < regression.relative_error(start)


def test_relative_error_is_that_of_the_tokens() -> None:
    x, y, weights = problem()
    weight = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    expected = squared_error(x, y, weights, weight) / float((weights[:, None] * y**2).double().sum())
    assert accumulated(x, y, weights).relative_error(weight) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("block", [1, 2])
def test_selection_finds_the_best_single_removal(block: int) -> None:
    """Removing one input or block, refitted, against all other choices."""
    for seed in range(5):
        x, y, weights = problem(seed=seed)
        regression = accumulated(x, y, weights)
        count = 6 // block
        errors = {}
        for kept in combinations(range(count), count - 1):
            index = expanded(torch.tensor(kept), block)
            inputs, wanted = ((weights.sqrt()[:, None] * part).numpy() for part in (x[:, index], y))
            best = torch.from_numpy(np.linalg.lstsq(inputs, wanted, rcond=None)[0].T)
            errors[kept] = squared_error(x[:, index], y, weights, best)
        chosen = regression.prune(torch.zeros(3, 6), count - 1, block=block, rounds=1)
        assert errors[tuple(chosen.tolist())] <= min(errors.values()) * 1.1  # a small ridge is in the selection


def test_inputs_without_use_go_first() -> None:
    x, y, weights = problem(inputs=8)
    x[:, [1, 4, 6]] = torch.randn(len(x), 3, generator=torch.Generator().manual_seed(3))
    y = x[:, [0, 2, 3, 5, 7]] @ torch.randn(5, 3, generator=torch.Generator().manual_seed(4))
    assert accumulated(x, y, weights).prune(torch.zeros(3, 8), 5).tolist() == [0, 2, 3, 5, 7]


def test_pruning_leaves_the_problem_of_what_is_kept() -> None:
    x, y, weights = problem(tokens=900, inputs=600)
    regression = accumulated(x, y, weights)
    kept = regression.prune(torch.zeros(3, 600), 400)
    alone, start = accumulated(x[:, kept], y, weights), torch.ones(3, 400)
    torch.testing.assert_close(regression.ridge(start, 0.1), alone.ridge(start, 0.1))
