from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_llama, shuffled_neurons

from lf_hf.families import PROJECTIONS
from lf_hf.stages.fusion import average_layers, fusion_ratio

Weights = dict[str, torch.Tensor]


def layer_weights(index: int, **overrides: object) -> Weights:
    return {name: p.detach().clone() for name, p in make_llama(**overrides).model.layers[index].named_parameters()}


def permuted_rows(weights: Weights) -> Weights:
    permuted = {name: tensor.clone() for name, tensor in weights.items()}
    for seed, projection in enumerate(PROJECTIONS):
        order = torch.randperm(len(weights[f"{projection}.weight"]), generator=torch.Generator().manual_seed(seed))
        for name in (f"{projection}.weight", f"{projection}.bias"):
            if name in weights:
                permuted[name] = weights[name][order]
    return permuted


@pytest.mark.parametrize("beta", [1.0, 0.0, 3.0])
def test_ratio_is_the_formula_in_extended_precision(beta: float) -> None:
    S = np.random.default_rng(0).uniform(0.1, 2, size=(6, 6))
    wide = S.astype(np.longdouble)
    s_i, s_j = wide[2].sum() / 6, wide[4].sum() / 6
    power = np.exp(np.longdouble(beta) * s_i / (s_i + s_j))
    assert fusion_ratio(S, 2, 4, beta) == pytest.approx(float(power / (1 + power)), rel=1e-14)


def test_ratio_by_hand_and_its_bounds() -> None:
    S = np.array([[3.0, 1.0], [1.0, 1.0]])  # s = 2, 1: raw share 2/3
    assert fusion_ratio(S, 0, 1) == pytest.approx(1 / (1 + math.exp(-2 / 3)))
    for seed in range(50):
        random = np.random.default_rng(seed).uniform(0, 5, size=(8, 8))
        assert 0.5 < fusion_ratio(random, 0, 7) < 0.74


def test_no_similarity_at_all_counts_both_alike_and_warns() -> None:
    with pytest.warns(UserWarning, match="Layers 0 and 1 have no similarity"):
        assert fusion_ratio(np.zeros((2, 2)), 0, 1) == pytest.approx(1 / (1 + math.exp(-0.5)))


@pytest.mark.parametrize("overrides", [{}, {"attention_bias": True, "mlp_bias": True}])
def test_a_row_permuted_copy_fuses_to_the_layer_itself(overrides: dict[str, bool]) -> None:
    weights = layer_weights(1, **overrides)
    fused, matches = average_layers(weights, permuted_rows(weights), ratio=0.6, alignment="rows", head_dim=8)
    assert set(matches) == set(PROJECTIONS)
    assert set(fused) == {name for name in weights if "norm" not in name}
    for name, tensor in fused.items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mka_is_the_weighted_sum_rounded_once(dtype: torch.dtype) -> None:
    w_i, w_j = layer_weights(1, dtype=dtype), layer_weights(2, dtype=dtype)
    fused, matches = average_layers(w_i, w_j, ratio=0.6123, alignment="none", head_dim=8)
    assert not matches and len(fused) == 7
    for name, tensor in fused.items():
        exact = 0.6123 * w_i[name].numpy(force=True).astype(np.float64) if dtype != torch.bfloat16 else None
        if exact is not None:
            exact += (1 - 0.6123) * w_j[name].numpy(force=True).astype(np.float64)
            expected = torch.from_numpy(exact).to(dtype)
        else:  # numpy has no bfloat16
            expected = (w_i[name].double() * 0.6123 + w_j[name].double() * (1 - 0.6123)).to(dtype)
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize("overrides", [{}, {"num_key_value_heads": 4}, {"attention_bias": True, "mlp_bias": True}])
def test_a_layer_with_its_neurons_in_another_order_fuses_to_the_layer_itself(overrides: dict[str, Any]) -> None:
    weights = layer_weights(1, **overrides)
    fused, matches = average_layers(weights, shuffled_neurons(weights, 8), ratio=0.6, alignment="neurons", head_dim=8)
    assert set(matches) == set(PROJECTIONS)
    assert all(match.cosine_after == pytest.approx(1) for match in matches.values())
    for name, tensor in fused.items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-6, atol=0)
