from __future__ import annotations

import pytest
import torch
from accelerate import dispatch_model
from conftest import make_llama

from lf_hf.decoder.generating import generate
from lf_hf.decoder.in_memory import ModelDecoder

SAMPLES = [torch.randint(0, 320, (length,), generator=torch.Generator().manual_seed(length)) for length in (3, 9, 6)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_walking_layers_gives_the_states_of_a_whole_forward_pass(attention: str) -> None:
    model = make_llama()
    model.set_attn_implementation(attention)
    decoder = ModelDecoder(model)
    with torch.no_grad():
        expected = [model.model(ids[None], output_hidden_states=True).hidden_states for ids in SAMPLES]
    for index, states in enumerate(decoder.walk([ids[None] for ids in SAMPLES])):
        for n, state in enumerate(states):
            if index == len(model.model.layers) - 1:  # transformers gives the last one after the final norm
                state = model.model.norm(state)
            torch.testing.assert_close(state, expected[n][index + 1], rtol=0, atol=1e-6)


def test_text_that_a_model_writes_is_its_own() -> None:
    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight *= 1000  # so that one token has all the probability
    written = generate(ModelDecoder(model), 3, 9, seed=0)
    again = generate(ModelDecoder(model), 3, 9, seed=1)
    starts = torch.stack(written)[:, :1]
    assert starts[0] == model.config.bos_token_id and not torch.equal(starts, torch.stack(again)[:, :1])
    expected = model.generate(
        starts, max_new_tokens=8, do_sample=False, eos_token_id=None, suppress_tokens=[0, 1], use_cache=False
    )
    assert torch.equal(torch.stack(written), expected)


def test_text_that_a_model_writes_begins_as_its_tokenizer_begins_texts() -> None:
    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight *= 1000
    written = torch.stack(generate(ModelDecoder(model), 6, 9, seed=0, first=[5]))
    assert (written[:, 0] == 5).all()
    assert (written[::2] == written[0]).all()  # what it writes after that token
    assert len(written[1::2, 1].unique()) == 3  # each goes on with any token, and then with what the model writes
    starts = written[1::2, :2]
    expected = model.generate(
        starts, max_new_tokens=7, do_sample=False, eos_token_id=None, suppress_tokens=[0, 1], use_cache=False
    )
    assert torch.equal(written[1::2], expected)


def test_text_that_a_model_writes_goes_on_without_special_tokens() -> None:
    model = make_llama(eos_token_id=[1, 7], pad_token_id=None)
    with torch.no_grad():
        model.lm_head.weight *= 0  # so that all tokens are alike
    written = torch.stack(generate(ModelDecoder(model), 10, 200, seed=0))[:, 1:]
    assert not torch.isin(written, torch.tensor([0, 1, 7])).any()
    assert torch.isin(torch.arange(2, 320), written).sum() > 300


def test_predictions_that_overflow_are_named() -> None:
    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight[5] = torch.inf
    with pytest.raises(ValueError, match=r"predictions contain NaN or inf.*use a dtype of wider range"):
        generate(ModelDecoder(model), 2, 3, seed=0)


@pytest.mark.parametrize(
    ("attention", "mask"), [("eager", True), ("sdpa", False), ("kernels-community/flash-attn2", False)]
)
def test_only_attention_that_is_not_causal_by_itself_gets_a_mask(attention: str, mask: bool) -> None:
    model = make_llama()
    model.config._attn_implementation_internal = attention  # which takes a GPU and packages to set
    decoder = ModelDecoder(model)
    [hidden_states] = decoder.embed([SAMPLES[0][None]])
    assert (decoder.layer_inputs(hidden_states, model.model.layers[0])["attention_mask"] is not None) == mask


@pytest.mark.parametrize("hooked", [False, True])
def test_a_copy_has_the_same_tensors_until_one_of_the_two_is_changed(hooked: bool) -> None:
    model = make_llama()
    if hooked:  # as a device map of several devices leaves it
        dispatch_model(model, {"": "cpu"}, force_hooks=True)
    decoder = ModelDecoder(model)
    copy = decoder.copy()
    with torch.no_grad():
        expected = model(SAMPLES[0][None]).logits
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
        assert torch.equal(copy.model(SAMPLES[0][None]).logits, expected)
        assert not torch.equal(model(SAMPLES[0][None]).logits, expected)


def test_removing_a_layer_renumbers_what_the_cache_and_config_need() -> None:
    model = make_llama()
    kept = [model.model.layers[n] for n in (0, 1, 3, 4)]
    model.config.layer_types = ["a", "b", "c", "d", "e"]
    model.config.eos_token_id = [1, 2, 3, 4, 5]
    vars(model)["hf_device_map"] = {"model.embed_tokens": 0} | {f"model.layers.{n}": n for n in range(5)}
    ModelDecoder(model).remove(2)
    assert list(model.model.layers) == kept
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]
    assert model.config.num_hidden_layers == 4
    assert model.config.layer_types == ["a", "b", "d", "e"]
    assert model.config.eos_token_id == [1, 2, 3, 4, 5]
    assert model.hf_device_map == {
        "model.embed_tokens": 0,
        "model.layers.0": 0,
        "model.layers.1": 1,
        "model.layers.2": 3,
        "model.layers.3": 4,
    }
