from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from builders import normal
from torch import Tensor

from lf_hf.refit.fit import Regression
from lf_hf.refit.layer_parts import expanded
from lf_hf.runtime.launch import Processes


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


def test_pruning_leaves_the_problem_of_what_is_kept() -> None:
    x, y, weights = problem(tokens=900, inputs=600)
    regression = accumulated(x, y, weights)
    kept = regression.prune(torch.zeros(3, 600), 400)
    alone, start = accumulated(x[:, kept], y, weights), torch.ones(3, 400)
    torch.testing.assert_close(regression.ridge(start, 0.1), alone.ridge(start, 0.1))


def correlated(tokens: int, inputs: int, outputs: int, shared: float, seed: int) -> tuple[torch.Tensor, ...]:
    """Inputs of unlike sizes that have a direction in common, which dwarfs the others where `shared` is large."""
    x = normal(tokens, inputs // 4, seed=seed) @ normal(inputs // 4, inputs, seed=seed + 1)
    x += normal(tokens, inputs, seed=seed + 2) + shared * normal(tokens, 1, seed=seed + 3) * normal(
        inputs, seed=seed + 4
    )
    x *= normal(inputs, seed=seed + 5).exp()
    y = x @ normal(inputs, outputs, seed=seed + 6) / inputs + normal(tokens, outputs, seed=seed + 7)
    return x, y, normal(tokens, seed=seed + 8).square() + 0.1


def eliminated(problem: tuple[torch.Tensor, ...], start: torch.Tensor, keep: int, block: int, rounds: int) -> list[int]:
    """What is left where the loss of each block is computed by solving without it, all from the tokens."""
    x, y, weights = (part.double().numpy() for part in problem)
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
        monkeypatch.setattr("lf_hf.refit.fit.EXACT_LIMIT", 0)
    for seed in range(4):
        given, start = correlated(300, inputs, 5, 3.0, seed), normal(5, inputs, seed=seed) / inputs
        kept = accumulated(*given).prune(start, keep, block=block, rounds=rounds)
        assert kept.tolist() == eliminated(given, start, keep, block, rounds)


@pytest.mark.parametrize("block", [4, 16])
@pytest.mark.parametrize("shared", [30.0, 1000.0])
def test_large_problems_in_float32_leave_what_they_leave_in_float64(
    block: int, shared: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block a round, where nearly all of the inputs' energy is in one direction."""
    given, start = correlated(1000, 512, 8, shared, seed=0), normal(8, 512) / 512
    total = 512 // block
    arguments = {"block": block, "rounds": total - total // 6}
    exact = accumulated(*given).prune(start, total // 6, **arguments)
    monkeypatch.setattr("lf_hf.refit.fit.EXACT_LIMIT", 0)
    assert torch.equal(accumulated(*given).prune(start, total // 6, **arguments), exact)


class Seen(Processes):
    """One of three processes, of which the units are known; keeps what it would send."""

    sent: list[Tensor]
    units: list[float]

    def all_gather_object(self, value: Any) -> list[Any]:
        assert value == self.units[self.rank]
        return self.units

    def all_reduce(self, tensor: Tensor) -> None:
        self.sent.append(tensor)


def test_problems_of_several_processes_add_up() -> None:
    x, y, weights = problem()
    x[100:] *= 1000  # parts that choose different units; a third process has no part
    parts = [accumulated(x[:100], y[:100], weights[:100]), accumulated(x[100:], y[100:], weights[100:])]
    summed, *_ = parts = [*parts, Regression.empty(6, 3, x.device)]
    units = [float(part.unit) if part.scaled else 0.0 for part in parts]
    assert len(set(units)) == 3
    sent = []
    for rank, part in enumerate(parts):
        seen = Seen(rank, 3)
        vars(seen).update(sent=[], units=units)
        part.processes = seen
        part.all_reduce()
        sent.append(seen.sent)
    for tensors in zip(*sent, strict=True):
        tensors[0].copy_(torch.stack(tensors).sum(0))
    alone, start = accumulated(x, y, weights), torch.ones(3, 6)
    torch.testing.assert_close(summed.ridge(start, 0.1), alone.ridge(start, 0.1))
    assert summed.relative_error(start) == pytest.approx(alone.relative_error(start))
