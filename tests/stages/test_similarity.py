"""Stages 1 to 3: distances between samples, their embeddings, and the similarity of layers, against the formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import torch
from builders import examples, no_warnings, normal
from conftest import make_llama
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from sklearn.feature_selection import mutual_info_regression

from lf_hf.decoder.decoder import Decoder, influence
from lf_hf.stages.activations import pairwise_distances, sample_distances
from lf_hf.stages.manifold import diffusion_embedding
from lf_hf.stages.similarity import layer_similarity


@pytest.mark.parametrize(("lengths", "shared"), [((4, 1, 9, 9), 0), ((5, 5, 5, 5), 4096)])
def test_distances_are_those_of_padded_states(lengths: tuple[int, ...], shared: float) -> None:
    """Also where they share a huge component, as attention-sink tokens do."""
    states = [normal(length, 7, seed=n) + shared for n, length in enumerate(lengths)]
    padded = np.zeros((4, max(lengths), 7))
    for n, state in enumerate(states):
        padded[n, : len(state)] = state
    expected = [[np.linalg.norm(a - b) for b in padded] for a in padded]
    np.testing.assert_allclose(pairwise_distances(states), expected, rtol=1e-10)


def test_equal_samples_are_exactly_zero_apart() -> None:
    """Also where a matrix product of the samples would round alike terms differently."""
    distances = pairwise_distances([normal(40, 33, seed=n % 19) for n in range(57)])
    np.testing.assert_array_equal(distances == 0, np.arange(57)[:, None] % 19 == np.arange(57) % 19)


@torch.no_grad()
def test_samples_are_compared_at_the_output_of_each_layer() -> None:
    model, samples = make_llama(), [torch.arange(2, 2 + length) for length in (3, 9, 6, 9)]
    found, _ = sample_distances(Decoder(model), samples)
    of_samples = [model.model(ids[None], output_hidden_states=True).hidden_states for ids in samples]
    assert found.shape == (5, 4, 4) and found.dtype == np.float64
    for index in range(4):  # transformers gives the states of the last layer after the final norm
        expected = pairwise_distances([states[index + 1][0] for states in of_samples])
        np.testing.assert_allclose(found[index], expected, rtol=1e-5, atol=1e-5)


def test_influence_is_the_mean_angle_without_the_first_token() -> None:
    x = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [0.0, 2.0]]])
    y = torch.tensor([[[-9.0, 9.0], [2.0, 0.0], [3.0, 0.0]]])
    assert influence([x], [y]) == pytest.approx(1 - (1 + 0) / 2)
    assert influence([x], [3 * x]) == pytest.approx(0)


@pytest.mark.parametrize(
    ("apart", "sigma", "alpha", "dim"),
    [*((apart, 8, 0.5, 2) for apart in (1e-3, 30, 1e4, 1e5, 1e6)), (30, 3, 1, 3), (30, 50, 0, 1)],
)
def test_embeddings_are_exact_however_far_apart_samples_are(apart: float, sigma: float, alpha: float, dim: int) -> None:
    """Against 400 digits: 10^4 apart, as at the last layers of real models, the kernel is 1 + 1e-15 times the rest.

    A is symmetric, so the magnitudes of its eigenvalues are its singular values.
    """
    points = np.random.default_rng(0).normal(size=(8, 300))
    D = cdist(points, points) * apart / np.sqrt(600)
    with mpmath.workdps(400):
        K, K1, A = mpmath.matrix(8), mpmath.matrix(8), mpmath.matrix(8)
        for i, j in np.ndindex(8, 8):
            K[i, j] = mpmath.exp(-mpmath.sqrt(mpmath.mpf(float(D[i, j])) / sigma))
        p = [mpmath.fsum(K[i, j] for j in range(8)) for i in range(8)]
        for i, j in np.ndindex(8, 8):
            K1[i, j] = K[i, j] / (p[i] * p[j]) ** alpha
        v = [mpmath.sqrt(mpmath.fsum(K1[i, j] for j in range(8))) for i in range(8)]
        for i, j in np.ndindex(8, 8):
            A[i, j] = K1[i, j] / (v[i] * v[j])
        values, vectors = mpmath.eigsy(A)
        first, *others = sorted(range(8), key=lambda k: -abs(values[k]))[: dim + 1]
        expected = np.array([[float(vectors[i, k] / vectors[i, first]) for k in others] for i in range(8)])
    actual = diffusion_embedding(D, kernel_scale=sigma, kernel_alpha=alpha, embedding_dim=dim)
    expected *= np.sign((actual * expected).sum(axis=0))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


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
    assume(dim < samples)
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
    assert any(name in message for name in ("kernel_scale=", "kernel_alpha="))
    assert kernel_scale < 8 or not 0 <= kernel_alpha <= 1 or exponent > 3


def embeddings(layers: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    common = rng.normal(size=(57, 2))
    return np.stack([common + rng.normal(size=(57, 2)) * 0.4 * layer for layer in range(layers)])


def literal_entropy(Y: np.ndarray, k: int) -> float:
    """-E[log(k / (N rho^d))], one sample after another."""
    N, d = Y.shape
    terms = []
    for y in Y:
        rho = sorted(math.dist(y, other) for other in Y)[k]  # position 0 is the sample itself
        terms.append(math.log(k / (N * rho**d)))
    return -sum(terms) / N


def literal_npib(Yi: np.ndarray, Yj: np.ndarray, k_mi: int, k_entropy: int, seed: int) -> float:
    scores = [mutual_info_regression(Yi, column, n_neighbors=k_mi, random_state=seed) for column in Yj.T]
    information = sum(map(sum, scores)) / (len(scores) * len(scores[0]))
    return information / math.sqrt(abs(literal_entropy(Yi, k_entropy) * literal_entropy(Yj, k_entropy)))


def test_similarity_is_the_literal_formula() -> None:
    """Of ranks, which ties share."""
    Y = embeddings(4).round(1)
    ranks = np.array(
        [[[(column < x).sum() + ((column == x).sum() + 1) / 2 for x in column] for column in y.T] for y in Y]
    )
    ranked = ranks.swapaxes(1, 2) / 57
    actual = layer_similarity(Y, seed=3)
    for i in range(len(Y)):
        for j in range(i, len(Y)):
            assert actual[i, j] == pytest.approx(literal_npib(ranked[i], ranked[j], 5, 50, 3), rel=1e-12)
            assert actual[i, j] == actual[j, i]


def test_mixed_signs_of_entropies_warn_once() -> None:
    Y = embeddings(2)
    Y[1] *= 1e-3
    with pytest.warns(UserWarning, match="mixed signs"):
        assert np.isfinite(layer_similarity(Y, rank_normalize=False)).all()


DEGENERATE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "zero": np.zeros_like,
    "constant column": lambda found: found * [1, 0] + [0, 3],
    "equal layers": lambda found: found[:1].repeat(3, axis=0),
    "two kinds of samples": np.sign,
    "huge": lambda found: found * 1e30,
    "tiny": lambda found: found * 1e-30,
}


@pytest.mark.parametrize("rank_normalize", [True, False])
@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_embeddings_have_a_finite_similarity(kind: str, rank_normalize: bool) -> None:
    embeddings = DEGENERATE[kind](np.random.default_rng(0).normal(size=(3, 51, 2)))
    with no_warnings():
        similarity = layer_similarity(embeddings, rank_normalize=rank_normalize)
    assert np.isfinite(similarity).all() and (similarity >= 0).all()
    np.testing.assert_array_equal(similarity, similarity.T)
    if kind == "equal layers":
        np.testing.assert_allclose(similarity, similarity[0, 0])
