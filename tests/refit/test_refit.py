"""Fits of one layer to what a group of layers does, and the states of calibration text that they need.

That a layer and an idle one fuse to the layer is in families/test_fusions.py.
"""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import psutil
import pytest
import torch
from builders import normal
from conftest import make_llama
from tiny_models import fitted, tiny_model

from lf_hf.decoder.decoder import Decoder
from lf_hf.refit.bottom_up import fit_groups
from lf_hf.refit.layer_parts import layer_weights
from lf_hf.refit.regression import Regression, Solution
from lf_hf.refit.states import StateStore

SEQUENCES = [torch.randint(1, 320, (64,), generator=torch.Generator().manual_seed(n)) for n in range(24)]


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@torch.no_grad()
@pytest.mark.parametrize("rough", [False, True])
def test_a_fit_comes_closer_to_its_group_than_a_layer_of_it_on_text_that_it_has_not_seen(rough: bool) -> None:
    decoder = Decoder(make_llama())
    states = decoder.embed(decoder.make_batches(SEQUENCES[:20]))
    [unseen] = decoder.embed(decoder.make_batches(SEQUENCES[20:]))
    first, second = decoder.model.model.layers[1:3]
    wanted = decoder.run_layer(second, decoder.run_layer(first, unseen))
    fit, fused, _ = fitted(decoder, (1, 2), states, ridge=0.01, rough=rough)
    entry = fit.entry
    assert entry.layers == [1, 2] and entry.channels_kept is not None and sum(entry.channels_kept) == 48
    assert entry.error_after is not None and entry.error_before is not None and entry.error_after < entry.error_before
    missed, *by_layers = (relative(decoder.run_layer(layer, unseen), wanted) for layer in (fused, first, second))
    assert missed < min(by_layers)


@torch.no_grad()
@pytest.mark.parametrize("rough", [False, True])
@pytest.mark.parametrize("power", [-80, 80])
@pytest.mark.parametrize(
    ("reader", "writer"), [("mlp.up_proj", "mlp.down_proj"), ("self_attn.v_proj", "self_attn.o_proj")]
)
def test_layers_that_differ_in_scale_but_not_in_function_are_fitted_alike(
    reader: str, writer: str, power: int, rough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a share of the channels is compared by regression only."""
    monkeypatch.setattr("lf_hf.refit.fit.MAX_CANDIDATES", 0)
    outputs, writers = [], []
    for scale in (1.0, 2.0**power):
        decoder = Decoder(make_llama())
        for layer in decoder.model.model.layers:
            layer.get_submodule(reader).weight.mul_(scale)
            layer.get_submodule(writer).weight.div_(scale)
        states = decoder.embed(decoder.make_batches(SEQUENCES[:12]))
        fit, fused, _ = fitted(decoder, (1, 2), states, rough=rough)
        writers.append(fit.weights[f"{writer}.weight"] * scale)
        outputs.append(decoder.run_layer(fused, states[0]))
    for one, other in (outputs, writers):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_token_without_an_embedding_does_not_spoil_the_fit() -> None:
    """As reserved tokens have none, which text that the model writes may start with."""
    decoder = Decoder(make_llama())
    decoder.model.model.embed_tokens.weight[SEQUENCES[0][0]] = 0
    states = decoder.embed(decoder.make_batches(SEQUENCES[:12]))
    fit, fused, _ = fitted(decoder, (1, 2), states)
    assert all(torch.isfinite(tensor).all() for tensor in (*fit.weights.values(), decoder.run_layer(fused, states[0])))


@torch.no_grad()
def test_a_fit_that_overflows_its_dtype_is_named() -> None:
    decoder = Decoder(make_llama(dtype=torch.float16))
    states = decoder.embed(decoder.make_batches(SEQUENCES[:12]))
    ridge = Regression.ridge

    def huge(problem: Regression, start: torch.Tensor, strength: float) -> Solution:
        solution = ridge(problem, start, strength)
        return solution._replace(weight=solution.weight * (1e9 if start.shape == (32, 48) else 1))

    with (
        mock.patch.object(Regression, "ridge", huge),
        pytest.raises(ValueError, match=r"mlp.down_proj.weight that was fitted overflows torch.float16"),
    ):
        fitted(decoder, (1, 2), states)
    for layer in decoder.model.model.layers:  # folded into each other they overflow
        layer.post_attention_layernorm.weight[0] = layer.mlp.up_proj.weight[:, 0] = 500
    with pytest.raises(ValueError, match="activations of a layer that is refitted overflow"):
        fitted(decoder, (1, 2), states)


@torch.no_grad()
def test_what_is_written_for_the_first_token_alone_survives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lf_hf.refit.fit.MAX_CANDIDATES", 0)  # 1.25 times as many as are kept stand for election
    decoder = Decoder(make_llama())
    layer = decoder.model.model.layers[2]
    for weight in (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight):
        weight[7] = 0
        weight[7, 0] = 3
    states = [normal(1, 512, 32, seed=n) for n in range(8)]
    for state in states:
        state[..., 0] = -9  # the gate is shut
        state[0, 0] = 0
        state[0, 0, 0] = 99
    layer.post_attention_layernorm.weight[0] = 1
    layer.mlp.down_proj.weight[:, 7] = normal(32, seed=99) * 3
    layer.mlp.down_proj.weight[0, 7] = 0
    _, fused, traces = fitted(decoder, (1, 2), states)
    for state, output in zip(states, traces.output, strict=True):
        assert output[0, 0].norm() > 10 * output[0, 1:].norm(dim=-1).max()
        assert relative(decoder.run_layer(fused, state)[0, 0], output[0, 0]) < 0.2


@torch.no_grad()
def test_fits_from_the_bottom_are_aimed_at_the_dense_model() -> None:
    """So groups above make up for what groups below miss."""
    model, ids = make_llama(num_hidden_layers=6), torch.stack(SEQUENCES)
    dense = model.model(ids, output_hidden_states=True).hidden_states[5]
    groups, missed = [(1, 2), (3, 4)], []
    for at_a_time in (2, 1):
        decoder = Decoder(model).copy()
        for start in range(0, 2, at_a_time):
            some = groups[start : start + at_a_time]
            for (first, last), fit in fit_groups(Decoder(model), some, SEQUENCES, [], ridge=0.01):
                decoder.join((first - first // 3, last - first // 3), fit.weights)
        assert decoder.num_layers == 4
        missed.append(relative(decoder.model.model(ids, output_hidden_states=True).hidden_states[3], dense))
    assert missed[0] < 0.95 * missed[1]


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["gemma2", "olmo2"])
def test_attention_that_writes_nothing_keeps_the_gain_of_its_norm(model_type: str) -> None:
    decoder = Decoder(tiny_model(model_type))
    layer, name = decoder.model.model.layers[1], f"{decoder.family.attention.after}.weight"
    layer.self_attn.o_proj.weight.zero_()
    gain = layer_weights(decoder, layer)[name]
    fit, _, _ = fitted(decoder, (1,), [normal(1, 16, 32, seed=n) for n in range(3)])
    assert torch.equal(fit.weights[name], gain)


def test_states_on_disk_are_the_same_and_leave_it_when_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = [normal(2, 5, 4, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with StateStore("disk") as store:
        kept, other = store.keep(states), store.keep(states)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(kept, states, strict=True))
        assert len(kept) == 2 and torch.equal(kept[-1], states[-1])
        assert torch.equal(other[0], states[0])
        opened = psutil.Process().num_fds()
        del kept
        assert psutil.Process().num_fds() == opened - 1
    assert not list(tmp_path.iterdir())
