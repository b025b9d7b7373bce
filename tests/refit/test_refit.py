from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from builders import normal
from conftest import make_llama
from tiny_models import tiny_model

from lf_hf import FusionConfig
from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.refit.fit import HalfFit, token_weights
from lf_hf.refit.group import fit_group
from lf_hf.refit.last_pass import fit_from_bottom
from lf_hf.refit.layer_parts import build_layer, layer_weights
from lf_hf.refit.states import Place, StateStore
from lf_hf.refit.traces import Boundaries, trace

SEQUENCES = [torch.randint(0, 320, (64,), generator=torch.Generator().manual_seed(n)) for n in range(24)]
LAYOUTS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "a key-value head a query head": {"num_key_value_heads": 4},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "eager attention": {"attn_implementation": "eager"},
}


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("refit", ["none", "down_proj", "projections"])
def test_a_layer_and_an_idle_one_fuse_to_the_layer(layout: str, refit: str) -> None:
    model = make_llama(**LAYOUTS[layout])
    with torch.no_grad():
        for name, parameter in model.model.layers[2].named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
    decoder = ModelDecoder(model)
    layers = [model.model.layers[n] for n in (1, 2)]
    states = decoder.embed(decoder.batches(SEQUENCES))
    traces = trace(decoder, layers, states, StateStore())
    fit = fit_group(decoder, [*layers], traces, states, StateStore(), refit=refit, ridge=1e-3)
    assert fit.channels_kept == [48, 0]
    assert fit.heads_kept in (None, [model.config.num_key_value_heads, 0])
    fused = build_layer(decoder, fit.weights)
    assert relative(decoder.run_layer(fused, states[0]), traces.output[0]) < 1e-4


@pytest.mark.parametrize("refit", ["down_proj", "projections"])
def test_fitting_brings_the_group_closer_on_text_that_it_has_not_seen(refit: str) -> None:
    model = make_llama()
    decoder = ModelDecoder(model)
    layers = [model.model.layers[n] for n in (1, 2)]
    states, unseen = decoder.embed(decoder.batches(SEQUENCES[:20])), decoder.embed(decoder.batches(SEQUENCES[20:]))
    traces, wanted = (trace(decoder, layers, some, StateStore()) for some in (states, unseen))
    errors = {}
    for kind in ("none", refit):
        fit = fit_group(decoder, [*layers], traces, states, StateStore(), refit=kind, ridge=1e-2)
        fused = build_layer(decoder, fit.weights)
        errors[kind] = sum(
            relative(decoder.run_layer(fused, state), output)
            for state, output in zip(unseen, wanted.output, strict=True)
        )
        assert sum(fit.channels_kept or []) == 48
    assert fit.error_after < fit.error_before
    assert errors[refit] < errors["none"]


def test_an_input_map_undoes_a_rotation() -> None:
    decoder = ModelDecoder(make_llama())
    states = [torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(n)) for n in range(20)]
    rotation = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(99))).Q
    rotated = [state @ rotation.T for state in states]
    fit = HalfFit(decoder, decoder.family.attention, states, [states, rotated], lambda: states, ridge=1e-6)
    same, found = fit.input_maps(states[0])
    torch.testing.assert_close(found, rotation, rtol=0, atol=1e-3)
    assert torch.equal(same, torch.eye(32))


def test_tokens_count_alike_whatever_their_size_but_the_first_counts_for_what_attends_to_it() -> None:
    decoder = ModelDecoder(make_llama())
    states = torch.randn(1, 128, 32) * torch.logspace(-1, 3, 128)[:, None]
    shares = token_weights(decoder, states) * states[0].square().mean(-1)
    torch.testing.assert_close(shares, torch.tensor([4.0, *[1.0] * 127]), rtol=1e-3, atol=1e-3)
    assert token_weights(decoder, states[:, -8:])[0] * states[0, -8].square().mean() == pytest.approx(1)


def test_what_is_written_for_the_first_token_alone_survives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lf_hf.refit.fit._MAX_CANDIDATES", 0)  # 1.25 times as many as are kept stand for election
    model = make_llama()
    decoder, layers = ModelDecoder(model), list(model.model.layers[1:3])
    mlp = layers[1].mlp
    for weight in (mlp.gate_proj.weight, mlp.up_proj.weight):
        weight.data[7] = 0
        weight.data[7, 0] = 3
    states = [torch.randn(1, 512, 32, generator=torch.Generator().manual_seed(n)) for n in range(8)]
    for state in states:
        state[..., 0] = -9  # the gate is shut
        state[0, 0] = 0
        state[0, 0, 0] = 99
    layers[1].post_attention_layernorm.weight.data[0] = 1
    mlp.down_proj.weight.data[:, 7] = torch.randn(32, generator=torch.Generator().manual_seed(99)) * 3
    mlp.down_proj.weight.data[0, 7] = 0
    store = StateStore()
    traces = trace(decoder, layers, states, store)
    fit = fit_group(decoder, [*layers], traces, states, store, refit="projections", ridge=0.1)
    fused = build_layer(decoder, fit.weights)
    for state, output in zip(states, traces.output, strict=True):
        assert output[0, 0].norm() > 10 * output[0, 1:].norm(dim=-1).max()
        assert relative(decoder.run_layer(fused, state)[0, 0], output[0, 0]) < 0.2


def test_refitting_from_the_bottom_is_aimed_at_the_dense_model() -> None:
    with torch.no_grad():
        dense = make_llama().model(SEQUENCES[0][None], output_hidden_states=True).hidden_states[4]
    model = make_llama()
    decoder = ModelDecoder(model, keep_originals=True)
    decoder.remove(3)
    decoder.remove(1)
    groups = [[0, 1], [2, 3], [4]]

    def error() -> float:  # at the output of original layer 3
        with torch.no_grad():
            hidden_states = model.model(SEQUENCES[0][None], output_hidden_states=True).hidden_states[2]
        return relative(hidden_states, dense)

    before = error()
    config = FusionConfig(2, "refit", ridge=0.01)
    fitted = fit_from_bottom(decoder, groups, SEQUENCES, config)
    assert [layer.layers for layer in fitted] == [[0, 1], [2, 3]]
    assert error() < before
    assert model.num_parameters() == make_llama(num_hidden_layers=3).num_parameters()


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_boundaries_follow_a_change_wherever_they_are(place: Place) -> None:
    model = make_llama()
    decoder = ModelDecoder(model)
    embedded = decoder.embed(decoder.batches(SEQUENCES[:3]))
    with StateStore(place) as store:
        boundaries = Boundaries(decoder, embedded, store)
        decoder.replace(2, {"mlp.down_proj.weight": torch.zeros(32, 48)})
        decoder.remove(3)
        boundaries.update(2)
        fresh = Boundaries(decoder, embedded, store)
        assert boundaries.influences == fresh.influences and len(fresh.influences) == 4
        for index in range(5):
            for a, b in zip(boundaries.before(index), fresh.before(index), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("device", "spared", "place"),
    [("cpu", 1000, "device"), ("cpu", 10, "disk"), ("cuda:1", 1000, "device"), ("cuda:1", 10, "host")],
)
def test_states_are_kept_where_there_is_room(
    device: str, spared: int, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {torch.device("cpu"): 400, torch.device(device): 2 * spared}
    monkeypatch.setattr("lf_hf.refit.states.free_memory", free.__getitem__)
    decoder = ModelDecoder(make_llama())
    decoder.device = torch.device(device)
    with StateStore.with_room(decoder, 100) as store:
        assert store.place == place
    decoder.states_in_memory = 0
    with StateStore.with_room(decoder, 100) as store:
        assert store.place == ("device" if device != "cpu" and spared > 100 else "disk")


def test_states_on_disk_are_the_same_and_leave_it_when_they_are_dropped(tmp_path: Path) -> None:
    states = [torch.randn(2, 5, 4).to(dtype) for dtype in (torch.float32, torch.bfloat16)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path))
        with StateStore("disk") as store:
            kept, other = store.keep(states), store.keep(states)
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(kept, states, strict=True))
            assert len(kept[1:]) == 1 and torch.equal(kept[-1], states[-1])
            assert torch.equal(other[0], states[0])
            opened = psutil.Process().num_fds()
            del kept
            assert psutil.Process().num_fds() == opened - 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model_type", ["gemma2", "olmo2"])
def test_attention_that_writes_nothing_keeps_the_gain_of_its_norm(model_type: str) -> None:
    decoder = ModelDecoder(tiny_model(model_type))
    layers = [decoder.model.model.layers[1]]
    layers[0].self_attn.o_proj.weight.data.zero_()
    gains = layer_weights(decoder, layers[0])
    states = [normal(1, 16, 32, seed=n) for n in range(3)]
    traces = trace(decoder, layers, states, StateStore())
    fit = fit_group(decoder, layers, traces, states, StateStore(), refit="projections", ridge=0.1)
    name = f"{decoder.family.attention.after}.weight"
    assert torch.equal(fit.weights[name], gains[name])
