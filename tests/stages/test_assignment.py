from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

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


def test_costs_add_up_over_pairs() -> None:
    other = (normal(300, 5, 5), normal(300, 5, 6))
    np.testing.assert_allclose(row_costs(PAIRS["unlike"], other), row_costs(PAIRS["unlike"]) + row_costs(other))


def test_costs_do_not_depend_on_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = row_costs(PAIRS["unlike"])
    monkeypatch.setattr(assignment, "BLOCK", 7 * 300)
    np.testing.assert_allclose(row_costs(PAIRS["unlike"]), whole, rtol=1e-6)


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


def test_no_costs_are_made_while_others_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    make, (dtype, solve) = assignment.row_costs, assignment.solver()

    def logged(event: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            events.append(event)
            return result

        return run

    monkeypatch.setattr(assignment, "row_costs", logged("costs", make))
    monkeypatch.setattr(assignment, "solver", lambda: (dtype, logged("solved", solve)))
    monkeypatch.setattr(assignment, "ALIVE_BYTES", 300 * 300 * np.dtype(dtype).itemsize)
    assign({name: [PAIRS["unlike"]] for name in "abc"})
    assert events == ["costs", "solved"] * 3


def test_a_solver_that_fails_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(assignment, "solver", lambda: (np.float32, fail))
    with pytest.raises(MemoryError, match="no room"):
        assign({"a": [PAIRS["unlike"]]})
