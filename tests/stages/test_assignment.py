from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from lf_hf.stages import assignment
from lf_hf.stages.assignment import Pair, assign, row_costs

SOLVERS = ["scipy", pytest.param("lapx", marks=pytest.mark.skipif(not find_spec("lap"), reason="lapx is missing"))]


def normal(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def shuffled(weight: torch.Tensor) -> torch.Tensor:
    return weight[torch.randperm(len(weight), generator=torch.Generator().manual_seed(9))]


W = normal(300, 64, 0)
FEW = normal(12, 64, 1)
PAIRS: dict[str, Pair] = {
    "unlike": (W, normal(300, 64, 2)),
    "unlike, bfloat16": (W.bfloat16(), normal(300, 64, 2).bfloat16()),
    "equal": (W, W.clone()),
    "nearly equal": (W, W + 0.1 * normal(300, 64, 3)),
    "permuted": (W, shuffled(W)),
    "permuted, nearly equal": (W, shuffled(W + 0.1 * normal(300, 64, 3))),
    "half alike": (W, shuffled(W + 2 * normal(300, 64, 3))),
    "ties": (FEW.repeat(25, 1), FEW[torch.arange(300) % 7]),
    "all rows alike": (FEW[:1].repeat(300, 1), FEW[1:2].repeat(300, 1)),
    "zero rows": (W * (torch.arange(300) % 3 > 0)[:, None], normal(300, 64, 2) * (torch.arange(300) % 2)[:, None]),
    "one row": (W[:1], W[1:2]),
    "few columns": (normal(300, 16, 0), normal(300, 16, 1)),
    "rows of all sizes": (W * 10.0 ** torch.arange(-15, 15).repeat(10)[:, None], normal(300, 64, 2) * 1e-9),
}


def exact_costs(pair: Pair) -> NDArray[np.float64]:
    """The formula, in float64."""
    rows = [weight.double().numpy() for weight in pair]
    a, b = (w / (np.linalg.norm(w, axis=1, keepdims=True) + 1e-12) for w in rows)
    return np.linalg.norm(a[:, None] - b[None], axis=2)


def total(costs: NDArray[np.float64], permutation: NDArray[np.int64]) -> float:
    assert sorted(permutation.tolist()) == list(range(len(costs)))
    return float(costs[np.arange(len(costs)), permutation].sum())


@pytest.mark.parametrize("kind", PAIRS)
def test_costs_are_the_formula(kind: str) -> None:
    # As squares: a small distance is the root of a difference of float32 numbers near 1.
    np.testing.assert_allclose(row_costs(PAIRS[kind]) ** 2, exact_costs(PAIRS[kind]) ** 2, rtol=0, atol=2e-6)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", PAIRS)
def test_no_assignment_is_cheaper(kind: str, solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if solver == "scipy":
        monkeypatch.setattr(assignment, "lapjvs", None)
    exact = exact_costs(PAIRS[kind])
    optimum = total(exact, linear_sum_assignment(exact)[1])
    found = total(exact, assign({kind: [PAIRS[kind]]})[kind])
    assert found == pytest.approx(optimum, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
def test_problems_solved_together_are_solved_as_alone(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if solver == "scipy":
        monkeypatch.setattr(assignment, "lapjvs", None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    together = assign({kind: [pair] for kind, pair in PAIRS.items()})
    assert list(together) == list(PAIRS)
    for kind, pair in PAIRS.items():
        np.testing.assert_array_equal(together[kind], assign({kind: [pair]})[kind])
