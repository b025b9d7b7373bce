"""Properties of a fit that hold for any input, and what degenerate input and extreme scales give."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from builders import SEED, examples, normal
from conftest import make_llama
from hypothesis import assume, given
from hypothesis import strategies as st

from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.refit.fit import Regression
from lf_hf.refit.group import fit_group
from lf_hf.refit.layer_parts import build_layer
from lf_hf.refit.states import StateStore
from lf_hf.refit.traces import trace


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
    states = decoder.embed(decoder.batches(SEQUENCES))
    with torch.no_grad():
        traces = trace(decoder, layers, states, StateStore())
        fit = fit_group(decoder, [*layers], traces, states, StateStore(), refit=refit, ridge=0.1)
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
    monkeypatch.setattr("lf_hf.refit.fit._MAX_CANDIDATES", 0)
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
