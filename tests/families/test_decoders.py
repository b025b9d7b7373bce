"""Models of every family through the decoder interface, against transformers' own forward."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tiny_models import LAYOUTS, decoders, logits, tiny_model

from lf_hf.families.models import MODEL_TYPES, family_of, text_model
from lf_hf.measure.generating import continue_prompts, generate

IDS = torch.randint(2, 320, (3, 19), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_decoder_gives_the_models_own_states_and_logits(model_type: str, attention: str, tmp_path: Path) -> None:
    if attention == "sdpa" and model_type == "gemma2":
        pytest.skip("transformers has no such attention for this family")
    model = tiny_model(model_type, attn_implementation=attention)
    with torch.no_grad():
        expected = model(IDS, output_hidden_states=True)
    for decoder in decoders(model, tmp_path):
        assert decoder.config._attn_implementation == attention
        *states, _ = (state for [state] in decoder.walk([IDS]))
        for found, after in zip(states, expected.hidden_states[1:-1], strict=True):  # the last is after the final norm
            torch.testing.assert_close(found, after, rtol=0, atol=1e-5)
        torch.testing.assert_close(logits(decoder, IDS), expected.logits, rtol=0, atol=1e-5)


# A window in all layers and in some, rotary embeddings of two kinds and of none, queries that grow with their position.
PLACED = [
    "llama",
    "mistral",
    "gemma3_text",
    "smollm3",
    "exaone4",
    "ministral3",
    "gemma3",
    "mistral3",
    "qwen3_vl",
    "eager attention",
]


@pytest.mark.parametrize("layout", PLACED)
def test_text_is_continued_as_by_the_models_own_generation(layout: str, tmp_path: Path) -> None:
    model_type, overrides = LAYOUTS[layout]
    model = tiny_model(model_type, **overrides)
    prompts = [IDS[0], IDS[1, :4], IDS[2, :11]]
    expected = []
    for prompt in prompts:
        ids = prompt[None]
        for _ in range(8):  # without a cache, and by itself
            with torch.no_grad():
                ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        expected.append(ids[0, len(prompt) :].tolist())
    for decoder in decoders(model, tmp_path):
        assert [added.tolist() for added in continue_prompts(decoder, prompts, 8)] == expected


@pytest.mark.parametrize("first", [[], [5]])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_a_model_writes_text_that_it_finds_likely(model_type: str, first: list[int], tmp_path: Path) -> None:
    """The same in memory and on disk; each token is the one at which its draw falls in the model's own predictions.

    Every other text goes on with any token after what begins a text, and none has a special token further on.
    """
    model = tiny_model(model_type, eos_token_id=[1, 7], pad_token_id=None)
    written, other = (
        torch.stack(generate(decoder, 4, 14, 3, prefix=first, special=[9])) for decoder in decoders(model, tmp_path)
    )
    assert torch.equal(written, other)
    random = torch.Generator().manual_seed(3)
    starts = torch.randint(320, (4,), generator=random)
    drawn, is_drawn = torch.rand(4, 13, generator=random), torch.ones(4, 13, dtype=torch.bool)
    assert (written[::2, 0] == (5 if first else model.config.bos_token_id)).all()
    assert torch.equal(written[1::2, len(first)], starts[1::2])
    if first:
        assert (written[:, 0] == 5).all()
        is_drawn[1::2, 0] = False
    with torch.no_grad():
        found = model(written).logits[:, :-1]
    found[..., [0, 1, 7, 9]] = -torch.inf
    ends = found.softmax(-1).cumsum(-1)  # (4, 13, vocab)
    token = written[:, 1:, None]
    above, below = ends.gather(-1, token)[..., 0], ends.gather(-1, (token - 1).clamp(min=0))[..., 0]
    assert bool(((drawn <= above + 1e-4) & (drawn >= below - 1e-4))[is_drawn].all())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_layers_that_are_removed_leave_the_config_of_those_that_stay(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    config = text_model(model).config
    lists = {name: getattr(config, name) for name in family_of(config).layer_lists}
    ids = IDS[:1]
    shorter = copy.deepcopy(model)
    for index in (3, 1):
        del text_model(shorter).layers[index]
    for decoder in decoders(model, tmp_path):
        for index in (3, 1):
            decoder.remove(index)
        assert decoder.config.num_hidden_layers == 4
        for name, values in lists.items():
            assert getattr(decoder.config, name) == [values[n] for n in (0, 2, 4, 5)]
        # transformers makes the same model of that config.
        fresh = type(model)(copy.deepcopy(decoder.model_config)).eval()
        fresh.load_state_dict(shorter.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(logits(decoder, ids), fresh(ids).logits, rtol=0, atol=1e-5)
