"""Properties of the stages of the method that hold for any input, and what degenerate input gives."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from builders import SEED, examples, no_warnings, normal
from conftest import make_llama
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from lf_hf.stages.activations import pairwise_distances
from lf_hf.stages.alignment import match_rows
from lf_hf.stages.fusion import average_layers
from lf_hf.stages.manifold import diffusion_embedding
from lf_hf.stages.similarity import layer_similarity


def point_distances(samples: int, seed: int, scale: float = 1.0) -> np.ndarray:
    points = np.random.default_rng(seed).normal(size=(samples, 5)) * scale
    return cdist(points, points)


# Stage 1


@given(SEED, st.integers(1, 9), st.integers(1, 6), st.floats(-30, 30))
@examples(30)
def test_distances_follow_order_and_scale(seed: int, samples: int, hidden: int, exponent: float) -> None:
    rng = np.random.default_rng(seed)
    states = [normal(length, hidden, seed=seed + n) for n, length in enumerate(rng.integers(1, 8, samples))]
    distances = pairwise_distances(states)
    order = rng.permutation(samples)
    np.testing.assert_allclose(pairwise_distances([states[n] for n in order]), distances[order][:, order], rtol=1e-12)
    factor = 2.0 ** round(exponent / math.log10(2))
    np.testing.assert_array_equal(pairwise_distances([state * factor for state in states]), distances * factor)


# Stage 2


def test_samples_that_are_all_alike_have_no_coordinates() -> None:
    with no_warnings():
        np.testing.assert_array_equal(diffusion_embedding(np.zeros((57, 57))), np.zeros((57, 2)))
        two_kinds = np.kron(np.array([[0.0, 20.0], [20.0, 0.0]]), np.ones((5, 5)))
        embedding = diffusion_embedding(two_kinds)
    assert (np.ptp(embedding[:5, 0]), np.ptp(embedding[5:, 0])) == pytest.approx((0, 0), abs=1e-12)
    assert embedding[0, 0] == pytest.approx(-embedding[9, 0]) and abs(embedding[0, 0]) == pytest.approx(1)
    np.testing.assert_array_equal(embedding[:, 1], np.zeros(10))


@given(
    samples=st.integers(2, 20),
    dim=st.integers(1, 20),
    exponent=st.floats(-35, 35),
    kernel_scale=st.sampled_from([1e-300, 1e-3, 8.0, 1e300]),
    kernel_alpha=st.sampled_from([-1e300, -40.0, 0.5, 1.0, 300.0, 1e300]),
    equal=st.integers(0, 20),
)
@examples(150)
def test_any_distances_give_a_finite_embedding_or_one_error(
    samples: int, dim: int, exponent: float, kernel_scale: float, kernel_alpha: float, equal: int
) -> None:
    points = np.random.default_rng(0).normal(size=(samples, 5))
    points[:equal] = points[0]
    distances = cdist(points, points) * 10**exponent
    with no_warnings():
        try:
            embedding = diffusion_embedding(
                distances, kernel_scale=kernel_scale, kernel_alpha=kernel_alpha, embedding_dim=dim
            )
        except ValueError as error:
            message = str(error)
        else:
            assert embedding.shape == (samples, dim) and np.isfinite(embedding).all()
            return
    assert any(name in message for name in ("embedding_dim=", "kernel_scale=", "kernel_alpha="))
    assert dim >= samples or kernel_scale < 8 or not 0 <= kernel_alpha <= 1 or exponent > 3


# Stage 3


@pytest.mark.parametrize("rank_normalize", [True, False])
@pytest.mark.parametrize("kind", ["zero", "constant column", "equal layers", "two kinds of samples", "huge", "tiny"])
def test_degenerate_embeddings_have_a_finite_similarity(kind: str, rank_normalize: bool) -> None:
    """With one sample more than neighbours."""
    embeddings = np.random.default_rng(0).normal(size=(3, 51, 2))
    if kind == "zero":
        embeddings[:] = 0
    elif kind == "constant column":
        embeddings[..., 1] = 3
    elif kind == "equal layers":
        embeddings[:] = embeddings[0]
    elif kind == "two kinds of samples":
        embeddings = np.sign(embeddings)
    else:
        embeddings *= {"huge": 1e30, "tiny": 1e-30}[kind]
    with no_warnings():
        similarity = layer_similarity(embeddings, rank_normalize=rank_normalize)
    assert np.isfinite(similarity).all() and (similarity >= 0).all()
    np.testing.assert_array_equal(similarity, similarity.T)
    if kind == "equal layers":
        np.testing.assert_allclose(similarity, similarity[0, 0])


# Stage 4


@given(
    seed=SEED,
    exponents=st.tuples(st.integers(-30, 30), st.integers(-30, 30)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    zero=st.integers(0, 8),
)
@examples(60)
def test_rows_of_any_scale_are_matched_best(
    seed: int, exponents: tuple[int, int], dtype: torch.dtype, zero: int
) -> None:
    if dtype == torch.float16:
        exponents = (exponents[0] // 10, exponents[1] // 10)
    w_i, w_j = ((normal(24, 16, seed=seed + n).double() * 10.0**power).to(dtype) for n, power in enumerate(exponents))
    w_i[:zero] = 0
    w_j[4 : 4 + zero] = 0
    units = [w.double() / (w.double().norm(dim=1, keepdim=True) + 1e-12) for w in (w_i, w_j)]
    costs = (units[0][:, None] - units[1]).norm(dim=2).numpy()
    best = costs[linear_sum_assignment(costs)].sum()
    permutation, match = match_rows({"w": (w_i, w_j)})["w"]
    assert sorted(permutation.tolist()) == list(range(24))
    assert costs[np.arange(24), permutation.numpy()].sum() == pytest.approx(best, rel=1e-5, abs=1e-30)
    assert match.cosine_before == pytest.approx(float((units[0] * units[1]).sum(1).mean()), rel=1e-4, abs=1e-7)
    assert match.cosine_after == pytest.approx(
        float((units[0] * units[1][permutation]).sum(1).mean()), rel=1e-4, abs=1e-7
    )


# Stage 5


@given(SEED, st.integers(-80, 80), st.sampled_from(["none", "rows", "neurons"]))
@examples(20)
def test_layers_of_another_scale_fuse_to_a_layer_of_that_scale(seed: int, power: int, alignment: str) -> None:
    """By powers of two; for matched neurons as long as norms are far above the 1e-12 that is added to them."""
    if alignment != "none":
        power = max(power, -10)
    model = make_llama(num_hidden_layers=2, attention_bias=True, mlp_bias=True)
    layers = [{n: p.detach() + seed * 1e-3 for n, p in layer.named_parameters()} for layer in model.model.layers]
    scaled = [{name: tensor * 2.0**power for name, tensor in weights.items()} for weights in layers]
    kinds: dict[str, Any] = {"ratio": 0.61, "alignment": alignment, "head_dim": 8}
    fused, matches = average_layers(layers[0], layers[1], **kinds)
    other, other_matches = average_layers(scaled[0], scaled[1], **kinds)
    assert all(torch.equal(other[name], fused[name] * 2.0**power) for name in fused)
    for name, match in matches.items():
        assert vars(other_matches[name]) == pytest.approx(vars(match), abs=1e-6)
