"""A model in memory, layer by layer; that it computes what transformers does is in families/test_decoders.py."""

from __future__ import annotations

import pytest
import torch
from accelerate import dispatch_model
from conftest import make_llama

from lf_hf.decoder.decoder import Decoder
from lf_hf.measure.generating import generate

IDS = torch.tensor([[9, 31, 5]])


def test_predictions_that_overflow_are_named() -> None:
    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight[5] = torch.inf
    with pytest.raises(ValueError, match=r"predictions contain NaN or inf.*use a dtype of wider range"):
        generate(Decoder(model), 2, 3, seed=0)


@pytest.mark.parametrize(
    ("attention", "mask"), [("eager", True), ("sdpa", False), ("kernels-community/flash-attn2", False)]
)
def test_only_attention_that_is_not_causal_by_itself_gets_a_mask(attention: str, mask: bool) -> None:
    model = make_llama()
    model.config._attn_implementation_internal = attention  # which takes a GPU and packages to set
    decoder = Decoder(model)
    [hidden_states] = decoder.embed([IDS])
    assert (decoder.layer_inputs(hidden_states, model.model.layers[0])["attention_mask"] is not None) == mask


@pytest.mark.parametrize("hooked", [False, True])
def test_a_copy_has_the_same_tensors_until_one_of_the_two_is_changed(hooked: bool) -> None:
    model = make_llama()
    if hooked:  # as a device map of several devices leaves it
        dispatch_model(model, {"": "cpu"}, force_hooks=True)
    decoder = Decoder(model)
    copy = decoder.copy()
    with torch.no_grad():
        expected = model(IDS).logits
    before = [p.clone() for p in model.parameters()]
    for ours, other in zip(model.parameters(), copy.model.parameters(), strict=True):
        assert ours.data_ptr() == other.data_ptr()
    decoder.replace(1, {"mlp.up_proj.weight": torch.ones(48, 32)})
    decoder.remove(3)
    assert (model.model.layers[1].mlp.up_proj.weight == 1).all()
    assert (model.config.num_hidden_layers, copy.model.config.num_hidden_layers) == (4, 5)
    assert all(torch.equal(a, b) for a, b in zip(copy.model.parameters(), before, strict=True))
    assert copy.model.model.layers[4].self_attn.layer_idx == 4
    with torch.no_grad():
        assert torch.equal(copy.model(IDS).logits, expected)
        assert not torch.equal(model(IDS).logits, expected)


def test_removing_a_layer_renumbers_what_the_cache_and_the_device_map_need() -> None:
    model = make_llama(eos_token_id=[1, 2, 3, 4, 5])  # as long as a list of layers, but none
    kept = [model.model.layers[n] for n in (0, 1, 3, 4)]
    vars(model)["hf_device_map"] = {"lm_head": 0} | {f"model.layers.{n}": n for n in range(5)}
    Decoder(model).remove(2)
    assert list(model.model.layers) == kept
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]
    assert model.config.eos_token_id == [1, 2, 3, 4, 5]
    assert model.hf_device_map == {"lm_head": 0} | {
        f"model.layers.{n}": device for n, device in enumerate([0, 1, 3, 4])
    }
