"""Properties that hold for any input, and what degenerate input and extreme scales give."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis
import numpy as np
import pytest
import torch
from conftest import make_llama, make_texts, make_tokenizer, shuffled_neurons
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.linalg import eigh
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from two_devices import TwoDevices, spread

from lf_hf import FusionConfig, fuse_checkpoint
from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.decoder.influence import influence
from lf_hf.pipeline import fuse
from lf_hf.refit.group import fit_group
from lf_hf.refit.layer_parts import build_layer
from lf_hf.refit.regression import Regression
from lf_hf.refit.states import StateStore
from lf_hf.refit.traces import trace
from lf_hf.report.report import FusionReport
from lf_hf.stages.activations import pairwise_distances
from lf_hf.stages.alignment import match_neurons, match_rows, permute_neurons
from lf_hf.stages.fusion import fuse_layers, fusion_ratio
from lf_hf.stages.manifold import diffusion_embedding
from lf_hf.stages.similarity import layer_similarity
from lf_hf.text.calibration import Calibration, Corpus

SEED = st.integers(0, 1000)
SETTINGS: dict[str, dict[str, Any]] = {
    "neural_alignment": {},
    "mka": {},
    "truncate": {},
    "refit": {},
    "mka, neurons matched": {"method": "mka", "alignment": "neurons"},
    "mka, refitted": {"method": "mka", "refit": "down_proj"},
    "least divergent dropped": {"method": "truncate", "selection": "least_divergence"},
    "least divergent averaged and refitted": {"method": "mka", "selection": "least_divergence", "refit": "down_proj"},
    "least influential averaged": {"method": "neural_alignment", "selection": "least_influence"},
}


def examples(count: int) -> Callable[[Any], Any]:
    return hypothesis.settings(max_examples=count, deadline=None, derandomize=True, database=None)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def point_distances(samples: int, seed: int, scale: float = 1.0) -> np.ndarray:
    points = np.random.default_rng(seed).normal(size=(samples, 5)) * scale
    return cdist(points, points)


@contextmanager
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def run(model: Any, *, samples: list[str] | None = None, **overrides: Any) -> FusionReport:
    config: dict[str, Any] = {"num_fusions": 2, "perplexity_tokens": 0, "calibration_tokens": 1024}
    return fuse(
        ModelDecoder(model, keep_originals=True),
        make_tokenizer(),
        FusionConfig(**config | {"calibration_length": 64} | overrides),
        Calibration(samples or make_texts(), "random sentences"),
        Corpus([" ".join(make_texts(400))], "random text"),
        base="tiny",
    )


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


@given(st.floats(-30, 30), SEED)
@examples(20)
def test_influence_does_not_depend_on_the_size_of_states(exponent: float, seed: int) -> None:
    x, y = normal(1, 9, 6, seed=seed), normal(1, 9, 6, seed=seed + 1)
    assert influence([x * 10.0**exponent], [y * 10.0**exponent]) == pytest.approx(influence([x], [y]), rel=1e-5)


# Stage 2


@given(SEED, st.integers(3, 40), st.integers(1, 4), st.data())
@examples(25)
def test_signs_of_singular_vectors_do_not_count(seed: int, samples: int, dim: int, data: st.DataObject) -> None:
    assume(dim < samples)
    distances = point_distances(samples, seed, 20)
    signs = np.array(data.draw(st.lists(st.sampled_from([-1, 1]), min_size=samples, max_size=samples)))

    def flipped(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values, vectors = eigh(matrix)
        return values, vectors * signs[: len(values)]

    expected = diffusion_embedding(distances, embedding_dim=dim)
    with mock.patch("lf_hf.stages.manifold.eigh", flipped):
        np.testing.assert_array_equal(diffusion_embedding(distances, embedding_dim=dim), expected)


@given(SEED, st.integers(4, 40), st.floats(-2, 3))
@examples(25)
def test_embeddings_follow_the_order_of_samples(seed: int, samples: int, exponent: float) -> None:
    distances = point_distances(samples, seed, 10**exponent)
    order = np.random.default_rng(seed).permutation(samples)
    np.testing.assert_allclose(
        diffusion_embedding(distances[order][:, order]), diffusion_embedding(distances)[order], rtol=1e-4, atol=1e-6
    )


def test_samples_that_are_all_alike_have_no_coordinates() -> None:
    with no_warnings():
        np.testing.assert_array_equal(diffusion_embedding(np.zeros((57, 57))), np.zeros((57, 2)))
        two_kinds = np.kron(np.array([[0.0, 20.0], [20.0, 0.0]]), np.ones((5, 5)))
        embedding = diffusion_embedding(two_kinds)
    assert (np.ptp(embedding[:5, 0]), np.ptp(embedding[5:, 0])) == pytest.approx((0, 0), abs=1e-12)
    assert embedding[0, 0] == pytest.approx(-embedding[9, 0]) and abs(embedding[0, 0]) == pytest.approx(1)
    np.testing.assert_array_equal(embedding[:, 1], np.zeros(10))


def test_groups_of_samples_out_of_each_others_reach_are_told_apart() -> None:
    distances = np.full((30, 30), 1e9)
    distances[:10, :10], distances[10:, 10:] = point_distances(10, 0), point_distances(20, 1)
    with no_warnings():
        coordinate = diffusion_embedding(distances)[:, 0]
    assert np.ptp(coordinate[:10]) < 1e-9 and np.ptp(coordinate[10:]) < 1e-9
    assert coordinate[0] * coordinate[-1] < 0


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


@given(SEED, st.permutations(range(4)), st.lists(st.sampled_from([-1.0, 1.0]), min_size=8, max_size=8))
@examples(8)
def test_similarity_follows_the_order_of_layers_and_takes_any_order_and_sign_of_coordinates(
    seed: int, order: list[int], signs: list[float]
) -> None:
    rng = np.random.default_rng(seed)
    embeddings = rng.normal(size=(60, 2)) + rng.normal(size=(4, 60, 2))
    # Ranks have ties in distance, which the estimator breaks by noise: compare without them.
    similarity = layer_similarity(embeddings, rank_normalize=False)
    expected = similarity[order][:, order]
    for changed in (
        embeddings[order],
        embeddings[order][:, rng.permutation(60)],
        embeddings[order] * np.reshape(signs, (4, 1, 2)),
    ):
        np.testing.assert_allclose(layer_similarity(changed, rank_normalize=False), expected, rtol=1e-6, atol=1e-9)


@given(SEED)
@examples(5)
def test_ranked_similarity_sees_only_the_order_of_values(seed: int) -> None:
    embeddings = np.random.default_rng(seed).normal(size=(3, 60, 2))
    np.testing.assert_array_equal(layer_similarity(embeddings), layer_similarity(np.exp(embeddings) * 1e30))


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


@given(SEED, st.integers(1, 40), st.integers(1, 12))
@examples(30)
def test_matching_rows_follows_the_order_of_either_matrix(seed: int, rows: int, columns: int) -> None:
    assume(columns > 1 or rows == 1)  # a normalised row of one column is 1 or -1: many optima
    w_i, w_j = normal(rows, columns, seed=seed), normal(rows, columns, seed=seed + 5000)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    matched = {
        name: permutation
        for name, (permutation, _) in match_rows(
            {"": (w_i, w_j), "i": (w_i[order], w_j), "j": (w_i, w_j[order])}
        ).items()
    }
    assert torch.equal(matched["i"], matched[""][order])
    assert torch.equal(order[matched["j"]], matched[""])


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


@given(
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([2, 4, 6]),
    neurons=st.integers(1, 40),
    attention_bias=st.booleans(),
    mlp_bias=st.booleans(),
)
@examples(20)
def test_a_layer_aligned_by_neurons_computes_what_it_did(
    kv_heads: int, group: int, head_dim: int, neurons: int, attention_bias: bool, mlp_bias: bool
) -> None:
    width = 6 * kv_heads * group
    model = make_llama(
        num_hidden_layers=2,
        hidden_size=width,
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=neurons,
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
        dtype=torch.float64,
    )
    decoder = ModelDecoder(model)
    state = normal(1, 7, width, dtype=torch.float64)
    weights = [{name: p.detach() for name, p in layer.named_parameters()} for layer in model.model.layers]
    permutations, _ = match_neurons(weights[0], weights[1], head_dim)
    with torch.no_grad():
        expected = decoder.run_layer(model.model.layers[1], state)
        aligned = decoder.run_layer(build_layer(decoder, permute_neurons(weights[1], permutations)), state)
    torch.testing.assert_close(aligned, expected, rtol=0, atol=1e-10)
    # And the same match is found for the same layer in another order.
    shuffled = shuffled_neurons(weights[0], head_dim)
    for name, tensor in permute_neurons(shuffled, match_neurons(weights[0], shuffled, head_dim)[0]).items():
        assert torch.equal(tensor, weights[0][name])


# Stage 5


@given(
    st.lists(st.floats(0, 1e300), min_size=2, max_size=5), st.floats(allow_nan=False, allow_infinity=False), st.data()
)
@examples(80)
def test_a_ratio_is_a_share_whatever_the_similarities(means: list[float], beta: float, data: st.DataObject) -> None:
    similarity = np.repeat(np.array(means)[:, None], len(means), axis=1) / len(means)
    i, j = data.draw(st.integers(0, len(means) - 1)), data.draw(st.integers(0, len(means) - 1))
    with no_warnings():
        warnings.filterwarnings("ignore", "Layers .* have no similarity")
        ratios = [fusion_ratio(similarity, *pair, beta) for pair in ((i, j), (j, i))]
    assert all(0 <= ratio <= 1 for ratio in ratios)
    if abs(beta) < 30:  # the raw shares add up to 1, and so do the logits to beta
        assert sum(math.log(ratio / (1 - ratio)) for ratio in ratios) == pytest.approx(beta, abs=1e-3)


@given(SEED, st.integers(-80, 80), st.sampled_from(["none", "rows", "neurons"]))
@examples(20)
def test_layers_of_another_scale_fuse_to_a_layer_of_that_scale(seed: int, power: int, alignment: str) -> None:
    """By powers of two; for matched neurons as long as norms are far above the 1e-12 that is added to them."""
    if alignment != "none":
        power = max(power, -10)
    model = make_llama(num_hidden_layers=2, attention_bias=True, mlp_bias=True)
    layers = [{n: p.detach() + seed * 1e-3 for n, p in layer.named_parameters()} for layer in model.model.layers]
    scaled = [{name: tensor * 2.0**power for name, tensor in weights.items()} for weights in layers]
    kinds: dict[str, Any] = {"ratio": 0.61, "alignment": alignment, "merge": "average", "head_dim": 8}
    fused, matches = fuse_layers(layers[0], layers[1], **kinds)
    other, other_matches = fuse_layers(scaled[0], scaled[1], **kinds)
    assert all(torch.equal(other[name], fused[name] * 2.0**power) for name in fused)
    for name, match in matches.items():
        assert vars(other_matches[name]) == pytest.approx(vars(match), abs=1e-6)


# Refit


def problem(seed: int) -> tuple[torch.Tensor, ...]:
    x = normal(150, 8, seed=seed) @ normal(8, 8, seed=seed + 1)
    return x, x @ normal(8, 3, seed=seed + 2) + normal(150, 3, seed=seed + 3), normal(150, seed=seed).square() + 0.1


def regression(x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> Regression:
    made = Regression.empty(x.shape[1], y.shape[1], x.device)
    for part in torch.arange(len(x)).split(64):
        made.add(x[part], y[part], weights[part])
    return made


@given(SEED, st.integers(-100, 100), st.integers(-60, 60))
@examples(30)
def test_a_fit_follows_the_scale_of_what_it_reads_and_writes(seed: int, read: int, write: int) -> None:
    x, y, weights = problem(seed)
    scale_x, scale_y = 2.0**read, 2.0**write
    start = normal(3, 8, seed=seed + 9)
    plain, scaled = regression(x, y, weights), regression(x * scale_x, y * scale_y, weights)
    assume(abs(write - read) < 120)
    scaled_start = (start.double() * scale_y / scale_x).float()
    expected = plain.ridge(start, 0.1).double() * scale_y / scale_x
    assert torch.equal(scaled.ridge(scaled_start, 0.1).double(), expected)
    assert scaled.relative_error(scaled_start) == pytest.approx(plain.relative_error(start), rel=1e-5)
    assert torch.equal(scaled.prune(scaled_start, 4), plain.prune(start, 4))


@pytest.mark.parametrize("strength", [1e-30, 1e-9, 1e-2, 1e9])
@pytest.mark.parametrize(
    "kind", ["zero", "zero column", "equal columns", "fewer tokens than inputs", "nothing to write"]
)
def test_degenerate_fits_are_finite_or_one_error(kind: str, strength: float) -> None:
    x, y, weights = problem(0)
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
        fitted = made.ridge(torch.zeros(3, 8), strength)
    except ValueError as error:
        message = str(error)
        assert strength < 1e-6 and f"ridge={strength:g} is too small" in message
    else:
        assert torch.isfinite(fitted).all() and -1e-4 < made.relative_error(fitted) < 1 + 1e-4
    kept = made.prune(torch.zeros(3, 8), 4)
    assert len(set(kept.tolist())) == 4
    assert made.relative_error(torch.zeros(3, 4)) == (0 if kind == "nothing to write" else 1)


SEQUENCES = [torch.randint(1, 320, (64,), generator=torch.Generator().manual_seed(n)) for n in range(12)]


def fitted_pair(model: Any, refit: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Weights that layers 1 and 2 are fitted to, and what they compute."""
    decoder = ModelDecoder(model)
    layers = [model.model.layers[n] for n in (1, 2)]
    states = decoder.embed(SEQUENCES)
    with torch.no_grad():
        traces = trace(decoder, layers, states, StateStore(0))
        fit = fit_group(decoder, [*layers], traces, states, StateStore(0), refit=refit, ridge=0.1)
        return fit.weights, decoder.run_layer(build_layer(decoder, fit.weights), states[0])


@pytest.mark.parametrize("refit", ["none", "down_proj", "projections"])
@pytest.mark.parametrize("power", [-80, 80])
@pytest.mark.parametrize(
    ("reader", "writer"), [("mlp.up_proj", "mlp.down_proj"), ("self_attn.v_proj", "self_attn.o_proj")]
)
def test_layers_that_differ_in_scale_but_not_in_function_are_fitted_alike(
    reader: str, writer: str, power: int, refit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a share of the channels is compared by regression only."""
    monkeypatch.setattr("lf_hf.refit.group._MAX_CANDIDATES", 0)
    weights, output = fitted_pair(make_llama(), refit)
    model = make_llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.get_submodule(reader).weight.mul_(2.0**power)
            layer.get_submodule(writer).weight.mul_(2.0**-power)
    other, other_output = fitted_pair(model, refit)
    torch.testing.assert_close(
        other[f"{writer}.weight"] * 2.0**power, weights[f"{writer}.weight"], rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(other_output, output, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("refit", ["down_proj", "projections"])
def test_a_token_without_an_embedding_does_not_spoil_the_fit(refit: str) -> None:
    """As reserved tokens have none, which text that the model writes may start with."""
    model = make_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[SEQUENCES[0][0]] = 0
    weights, output = fitted_pair(model, refit)
    assert all(torch.isfinite(tensor).all() for tensor in weights.values()) and torch.isfinite(output).all()


# The whole pipeline


def scaled_model(dtype: torch.dtype, exponent: int) -> Any:
    model, largest = make_llama(dtype=dtype), torch.finfo(dtype).max / 2
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.copy_((parameter.double() * 10.0**exponent).clamp(-largest, largest))
    return model


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_any_scale_fuse_to_finite_ones_or_give_one_error(dtype: torch.dtype, kind: str) -> None:
    for exponent in (-30, -3, 3, 30):
        model = scaled_model(dtype, exponent)
        with no_warnings():
            try:
                run(model, **{"method": kind} | SETTINGS[kind])
            except ValueError:
                assert exponent > 0
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def equal_layers(model: Any) -> None:
    for layer in model.model.layers[1:]:
        layer.load_state_dict(model.model.layers[0].state_dict())


def zero_rows(model: Any) -> None:
    for layer in model.model.layers:
        for name, parameter in layer.named_parameters():
            if "proj" in name:
                parameter[::2] = 0


def idle_layers(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()


def equal_embeddings(model: Any) -> None:
    model.model.embed_tokens.weight[:] = model.model.embed_tokens.weight[0]


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("damage", [None, equal_layers, zero_rows, idle_layers, equal_embeddings])
def test_degenerate_models_and_samples_fuse_to_finite_weights(damage: Callable[[Any], None] | None, kind: str) -> None:
    model = make_llama()
    samples = make_texts(51)  # one more than neighbours
    if damage is None:
        samples = [samples[0]] * 51
    else:
        with torch.no_grad():
            damage(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = run(model, samples=samples, **{"method": kind} | SETTINGS[kind])
    messages = [str(warning.message) for warning in caught]
    assert all("have no similarity" in message or "mixed signs" in message for message in messages), messages
    assert len(messages) <= 3
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("kind", ["refit", "mka, refitted", "neural_alignment"])
def test_activations_that_overflow_are_named(kind: str) -> None:
    model = make_llama(dtype=torch.float16)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(6e4)
    with pytest.raises(ValueError, match="The activations of layer 2 contain NaN or inf"):
        run(model, **{"method": kind} | SETTINGS[kind])


def test_a_fit_that_overflows_its_dtype_is_named() -> None:
    model = make_llama(dtype=torch.float16)
    huge = mock.patch.object(Regression, "ridge", lambda _, start, __: torch.full_like(start, 1e6, dtype=torch.float32))
    with huge, pytest.raises(ValueError, match=r"mlp.down_proj.weight that was fitted overflows torch.float16"):
        fitted_pair(model, "down_proj")
    with torch.no_grad():
        for layer in model.model.layers:  # folded into each other they overflow
            layer.post_attention_layernorm.weight[0] = layer.mlp.up_proj.weight[:, 0] = 500
    with pytest.raises(ValueError, match="activations of a layer that is refitted overflow"):
        fitted_pair(model, "down_proj")


# Determinism


def fuse_all(base: str, out: Path) -> None:
    for kind in SETTINGS:
        write(base, out / kind, kind, low_memory=False)


def write(base: str, out: Path, kind: str, **arguments: Any) -> FusionReport:
    config: dict[str, Any] = {"num_fusions": 2, "perplexity_tokens": 200, "calibration_length": 64}
    config |= {"method": kind} | SETTINGS[kind] | arguments
    return fuse_checkpoint(base, out, calibration=make_texts(), **config)


def test_another_process_writes_the_same_bytes(base: str, tmp_path: Path) -> None:
    fuse_all(base, tmp_path / "here")
    code = (
        f"import pathlib, test_properties; test_properties.fuse_all({base!r}, pathlib.Path({str(tmp_path)!r}, 'there'))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)
    for kind in SETTINGS:
        here, there = (
            {path.name: path.read_bytes() for path in (tmp_path / side / kind).iterdir()} for side in ("here", "there")
        )
        differing = {name for name in here if here[name] != there.get(name)}
        assert differing <= {"fusion_report.json", "README.md"}  # which say how many seconds it took
        reports = [
            FusionReport.load(tmp_path / side / kind).to_dict() | {"seconds": None} for side in ("here", "there")
        ]
        assert reports[0] == reports[1]


@pytest.mark.parametrize("kind", [kind for kind in SETTINGS if SETTINGS[kind]])
def test_low_memory_writes_the_same_bytes(kind: str, base: str, tmp_path: Path) -> None:
    """The plain methods are in test_checkpoint."""
    reports = [
        write(base, tmp_path / str(low_memory), kind, low_memory=low_memory).to_dict() | {"seconds": None}
        for low_memory in (True, False)
    ]
    assert reports[0] == reports[1]
    low, high = (load_file(tmp_path / str(low_memory) / "model.safetensors") for low_memory in (True, False))
    assert low.keys() == high.keys() and all(torch.equal(low[name], high[name]) for name in low)


@pytest.mark.parametrize("kind", SETTINGS)
def test_results_of_one_and_of_two_threads_are_close(kind: str, base: str) -> None:
    """Within 1e-4 of the largest weight: threads only change the order in which float32 numbers are added."""
    threads, models = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            models.append(make_llama())
            run(models[-1], **{"method": kind} | SETTINGS[kind])
    finally:
        torch.set_num_threads(threads)
    for (name, one), (_, two) in zip(*(model.named_parameters() for model in models), strict=True):
        assert (one - two).abs().max() <= 1e-4 * one.abs().max(), name


# Devices

OUTER = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
LAYERS = {f"model.layers.{n}": "cpu" for n in range(5)}


@pytest.mark.parametrize("method", ["neural_alignment", "refit"])
@pytest.mark.parametrize(
    "device_map",
    [
        {"": "disk"},
        {"": "meta"},
        OUTER | LAYERS | {"model.layers.0": "disk"},
        OUTER | LAYERS | {"lm_head": "disk"},
        OUTER | LAYERS | {"model.embed_tokens": "disk"},
        OUTER | dict.fromkeys(LAYERS, "disk"),
    ],
)
def test_offloaded_models_are_refused_and_left_as_they_are(
    device_map: dict[str, str], method: str, make_base: Callable[..., str], tmp_path: Path
) -> None:
    base = make_base()
    before = {path.name: path.read_bytes() for path in Path(base).iterdir()}
    with pytest.raises(ValueError, match=r"is offloaded, so it cannot be fused in place; .* or use fuse_checkpoint"):
        write(
            *(base, tmp_path / "out", method),
            low_memory=False,
            device_map=device_map,
            offload_folder=str(tmp_path / "offload"),
        )
    assert not (tmp_path / "out").exists()
    assert {path.name: path.read_bytes() for path in Path(base).iterdir()} == before


@pytest.mark.parametrize("kind", ["neural_alignment", "refit"])
def test_a_device_map_that_fits_changes_nothing(kind: str, base: str, tmp_path: Path) -> None:
    for name, device_map in (("plain", None), ("one", {"": "cpu"}), ("parts", OUTER | LAYERS), ("auto", "auto")):
        write(base, tmp_path / name, kind, low_memory=False, device_map=device_map)
        for file in ("model.safetensors", "config.json"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


@pytest.mark.parametrize(
    ("kind", "first"),
    [*((kind, 3) for kind in SETTINGS), ("refit", 2), ("refit", 4), ("least influential averaged", 2)],
)
def test_a_model_on_two_devices_fuses_as_on_one(kind: str, first: int) -> None:
    whole, parts = make_llama(), make_llama()
    settings: dict[str, Any] = {"method": kind, "perplexity_tokens": 200} | SETTINGS[kind]
    run(whole, **settings)
    with TwoDevices() as devices:
        spread(parts, first, devices)
        run(parts, **settings)
        ids = torch.arange(2, 9)[None]
        with torch.no_grad():
            logits = parts(ids).logits
    assert devices.moved > 0
    for (name, one), (_, two) in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        assert torch.equal(one, two), name
    with torch.no_grad():
        assert torch.equal(whole(ids).logits, logits)
