from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_llama, shuffled_neurons

from lf_hf.families import PROJECTIONS
from lf_hf.report.records import RowMatch
from lf_hf.stages.alignment import match_neurons, match_rows, permute_neurons

LAYOUTS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "one key-value head": {"num_key_value_heads": 1},
    "a key-value head a query head": {"num_key_value_heads": 4},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 24},
}


def random(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def matched(w_i: torch.Tensor, w_j: torch.Tensor) -> tuple[torch.Tensor, RowMatch]:
    return match_rows({"w": (w_i, w_j)})["w"]


def literal_costs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    def unit(w: np.ndarray) -> np.ndarray:
        return w / (np.linalg.norm(w) + 1e-12)

    return np.array([[np.linalg.norm(unit(p) - unit(q)) for q in b] for p in a])


@pytest.mark.parametrize("rows", [1, 2, 5, 7])
def test_no_permutation_is_cheaper(rows: int) -> None:
    for seed in range(5):
        w_i, w_j = random(rows, 4, seed), random(rows, 4, seed + 100)
        costs = literal_costs(w_i.double().numpy(), w_j.double().numpy())
        cheapest = min(sum(costs[p, q] for p, q in enumerate(order)) for order in permutations(range(rows)))
        permutation, _ = matched(w_i, w_j)
        assert sorted(permutation.tolist()) == list(range(rows))
        assert costs[np.arange(rows), permutation.numpy()].sum() == pytest.approx(cheapest, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recovers_a_planted_permutation(dtype: torch.dtype) -> None:
    w_i = random(512, 64, 0).to(dtype)
    planted = torch.randperm(512, generator=torch.Generator().manual_seed(1))
    scales = torch.rand(512, 1, generator=torch.Generator().manual_seed(2)) + 0.5  # norms do not count
    shuffled = torch.empty_like(w_i)
    shuffled[planted] = (w_i * scales).to(dtype)
    permutation, match = matched(w_i, shuffled)
    assert torch.equal(permutation, planted)
    assert match.cosine_after == pytest.approx(1, abs=1e-3)
    assert abs(match.cosine_before) < 0.1
    assert match.rows_moved == pytest.approx((planted != torch.arange(512)).float().mean().item())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_recovers_shuffled_neurons_and_heads(layout: str) -> None:
    model = make_llama(**LAYOUTS[layout])
    head_dim = LAYOUTS[layout].get("head_dim", 8)
    weights = {name: p.detach() for name, p in model.model.layers[1].named_parameters()}
    shuffled = shuffled_neurons(weights, head_dim)
    permutations, matches = match_neurons(weights, shuffled, head_dim)
    for name, tensor in permute_neurons(shuffled, permutations).items():
        assert torch.equal(tensor, weights[name])
    assert set(matches) == set(PROJECTIONS)
    assert all(match.cosine_after == pytest.approx(1) for match in matches.values())
    assert matches["mlp.down_proj"].rows_moved == matches["mlp.up_proj"].rows_moved > 0.5


def test_no_order_of_heads_is_cheaper() -> None:
    """Against all orders of 3 key-value heads with 2 query heads each."""
    layout = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 24}
    model = make_llama(**layout)
    w_i, w_j = ({n: p.detach() for n, p in layer.named_parameters()} for layer in model.model.layers[1:3])

    def unit_blocks(weight: torch.Tensor) -> torch.Tensor:  # (heads, head_dim, m) -> unit vectors
        return torch.nn.functional.normalize(weight.double().unflatten(0, (-1, 4)).flatten(1), dim=1)

    def distance(name: str, order: list[int], transposed: bool = False) -> float:
        a, b = (w[f"self_attn.{name}.weight"] for w in (w_i, w_j))
        a, b = (unit_blocks(w.T if transposed else w) for w in (a, b))
        return (a - b[order]).norm(dim=1).sum().item()

    costs = {}
    for kv in permutations(range(3)):
        for flips in np.ndindex(2, 2, 2):
            query = [2 * b + (n ^ flip) for b, flip in zip(kv, flips, strict=True) for n in range(2)]
            keys = distance("k_proj", list(kv)) + distance("v_proj", list(kv))
            costs[tuple(query)] = keys + distance("q_proj", query) + distance("o_proj", query, transposed=True)
    found = match_neurons(w_i, w_j, 4)[0]["query"][::4] // 4
    assert costs[tuple(found.tolist())] == pytest.approx(min(costs.values()), rel=1e-6)
