"""The published method against its formulas: similarity of layers, matching of neurons, averages of layers."""

import math
from functools import partial
from importlib.util import find_spec
from itertools import permutations

import mpmath
import numpy as np
import pytest
import torch
from builders import examples, no_warnings, normal
from conftest import make_llama, same
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from sklearn.feature_selection import mutual_info_regression

from lf_hf.decoder.decoder import Decoder
from lf_hf.decoder.hidden_states import cosine_sums, influences
from lf_hf.families.table import FAMILIES, PROJECTIONS
from lf_hf.report.data import MadeLayer
from lf_hf.stages import alignment
from lf_hf.stages.activations import pairwise_distances, sample_distances
from lf_hf.stages.alignment import Pair, assign, match_neurons, row_costs
from lf_hf.stages.averaging import AverageKey, average
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
    sums = [cosine_sums([x], [y]), cosine_sums([x], [3 * x])]
    assert influences(sums) == pytest.approx([1 - (1 + 0) / 2, 0])


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


Weights = dict[str, torch.Tensor]


def shuffled(weight: torch.Tensor) -> torch.Tensor:
    return weight[torch.randperm(len(weight), generator=torch.Generator().manual_seed(9))]


W, OTHER, FEW = normal(300, 64), normal(300, 64, seed=2), normal(12, 64, seed=1)
PAIRS: dict[str, Pair] = {
    "unlike": (W, OTHER),
    "unlike, bfloat16": (W.bfloat16(), OTHER.bfloat16()),
    "permuted": (W, shuffled(W)),
    "permuted, nearly equal": (W, shuffled(W + 0.1 * OTHER)),
    "half alike": (W, shuffled(W + 2 * OTHER)),
    "ties": (FEW.repeat(25, 1), FEW[torch.arange(300) % 7]),
    "all rows alike": (FEW[:1].repeat(300, 1), FEW[1:2].repeat(300, 1)),
    "zero rows": (W * (torch.arange(300) % 3 > 0)[:, None], OTHER * (torch.arange(300) % 2)[:, None]),
    "one row": (W[:1], W[1:2]),
    "few columns": (normal(300, 16), normal(300, 16, seed=1)),
    "rows of all sizes": (W * 10.0 ** torch.arange(-15, 15).repeat(10)[:, None], OTHER * 1e-9),
}


def exact_costs(pair: Pair) -> NDArray[np.float64]:
    """The formula, in float64."""
    rows = [weight.double().numpy() for weight in pair]
    a, b = (w / (np.linalg.norm(w, axis=1, keepdims=True) + 1e-12) for w in rows)
    return np.linalg.norm(a[:, None] - b[None], axis=2)


def total(costs: NDArray[np.float64], permutation: NDArray[np.int64]) -> float:
    assert sorted(permutation.tolist()) == list(range(len(costs)))
    return float(costs[np.arange(len(costs)), permutation].sum())


@pytest.mark.parametrize("solver", ["scipy", "lapx"])
def test_no_assignment_is_cheaper(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if solver == "scipy":
        monkeypatch.setattr(alignment, "lapjvs", None)
    elif not find_spec("lap"):
        pytest.skip("lapx is missing")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    found = assign({kind: [pair] for kind, pair in PAIRS.items()})
    assert found.keys() == PAIRS.keys()
    for kind, pair in PAIRS.items():
        exact = exact_costs(pair)
        # As squares: a small distance is the root of a difference of float32 numbers near 1.
        np.testing.assert_allclose(row_costs(pair) ** 2, exact**2, rtol=0, atol=2e-6, err_msg=kind)
        optimum = total(exact, linear_sum_assignment(exact)[1])
        assert total(exact, found[kind]) == pytest.approx(optimum, rel=1e-6, abs=1e-9), kind


def test_no_order_of_heads_is_cheaper() -> None:
    """Against all orders of 3 key-value heads with 2 query heads each."""
    layout = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 24}
    w_i, w_j = layer_weights(1, **layout), layer_weights(2, **layout)

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
    found = match_neurons(w_i, w_j, 4, FAMILIES["llama"].symmetry)[0]["query"][::4] // 4
    assert costs[tuple(found.tolist())] == pytest.approx(min(costs.values()), rel=1e-6)


def layer_weights(index: int, **overrides: object) -> Weights:
    return {name: p.detach().clone() for name, p in make_llama(**overrides).model.layers[index].named_parameters()}


def folded(
    layers: list[Weights], similarity: NDArray[np.float64], beta: float, alignment: str
) -> dict[str, torch.Tensor]:
    """The published method, literally: from the top, each layer's rows in the order that costs least."""
    fused = layers[-1]
    for i in reversed(range(len(layers) - 1)):
        s_i, s_j = similarity[[i, i + 1]].astype(np.longdouble).mean(axis=1)
        power = np.exp(beta * s_i / (s_i + s_j))
        ratio = float(power / (1 + power))
        for projection in PROJECTIONS if alignment == "rows" else ():
            costs = exact_costs((layers[i][f"{projection}.weight"], fused[f"{projection}.weight"]))
            order = linear_sum_assignment(costs)[1]
            fused = fused | {name: fused[name][order] for name in fused if name.startswith(projection)}
        wide = {
            name: ratio * weight.double() + (1 - ratio) * fused[name].double() for name, weight in layers[i].items()
        }
        fused = {name: weight.to(fused[name].dtype) for name, weight in wide.items()}
    return {name: weight for name, weight in fused.items() if "norm" not in name}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("alignment", "beta"), [("none", 3.0), ("rows", 1.0)])
def test_a_group_is_folded_from_its_top_and_goes_on(alignment: str, beta: float, dtype: torch.dtype) -> None:
    """Each sum is rounded once."""
    decoder = Decoder(make_llama(attention_bias=True, dtype=dtype))
    similarity = np.random.default_rng(0).uniform(0.1, 2, size=(5, 5))
    make = partial(average, decoder, similarity=similarity, alignment=alignment, ratio_beta=beta)
    known: dict[AverageKey, MadeLayer] = {}
    upper, whole, further = make((3, 4), known=known), make((0, 4)), make((0, 4), known=known)
    assert upper.entry.layers == [3, 4] and further.entry == whole.entry
    assert whole.entry.layers == [0, 1, 2, 3, 4] and sum(whole.entry.shares) == pytest.approx(1)
    expected = folded(
        [layer_weights(n, attention_bias=True, dtype=dtype) for n in range(5)], similarity, beta, alignment
    )
    assert same(whole.weights, expected) and same(further.weights, expected)
