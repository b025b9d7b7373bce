"""Whether layers compute what the table of families says, tried out before any long work."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig

from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.families import DecoderLayer, Family, family_of, head_dim
from lf_hf.refit.layer_parts import (
    after_attention,
    after_mlp,
    attention_heads,
    build_layer,
    layer_weights,
    mlp_channels,
    stacked,
    with_heads,
    written_by_attention,
    written_by_mlp,
)
from lf_hf.stages.alignment import permute_neurons

_TOKENS = 8
_TOLERANCE = 1e-4  # relative: a layer that differs is off by far more


def check_computes(config: PretrainedConfig) -> None:
    """Try out, on a tiny model of the same config, all that fusing takes for granted; some milliseconds.

    The model's predictions through the decoder interface, both halves of a layer of each kind, a layer with its neurons
    and heads in another order, and one without some of its heads.

    Raises
    ------
    ValueError
        If anything differs, as with a config that changes layers in a way that the table does not know; or if there
        is no such family.
    """
    family = family_of(config)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(0)  # not those of GPUs, which are not put back
        model = family.causal_lm(_tiny(family, config)).eval().float()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
                parameter -= family.gain_offset
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        ids = torch.randint(model.config.vocab_size, (1, _TOKENS))
        states = torch.randn(1, _TOKENS, model.config.hidden_size, dtype=torch.float32)
        for what, found, expected in _compared(model, ids, states):
            if not (found - expected).norm() <= _TOLERANCE * expected.norm():
                raise ValueError(_refusal(family, what))


def _refusal(family: Family, what: str) -> str:
    return (
        f"The config makes transformers {transformers.__version__} compute {what} of a {family.title} model in another "
        "way than lf_hf's table of families says, so it would be fused wrongly; take another version of transformers "
        f"or of the config ({family.decoder_layer.__module__} has the layer)."
    )


def _tiny(family: Family, config: PretrainedConfig) -> Any:
    """The config with tiny widths, and a layer of each kind."""
    tiny, channels = copy.deepcopy(config), head_dim(config)
    kinds = [family.config_kind(config, index) for index in range(config.num_hidden_layers)]
    numbers = [n for n, kind in enumerate(kinds) if kind not in kinds[:n]]
    for name in family.layer_lists:
        setattr(tiny, name, [kinds[n][name] for n in numbers])
    window = getattr(config, "sliding_window", None)
    changes = {
        "num_hidden_layers": len(numbers),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 4 * channels,
        "intermediate_size": 6,
        "vocab_size": 16,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "_attn_implementation": "eager",
    }
    for name, value in (changes if window is None else changes | {"sliding_window": _TOKENS // 2}).items():
        setattr(tiny, name, value)
    return tiny


def _compared(model: Any, ids: Tensor, states: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What it is, what we compute, and what the model does."""
    decoder, layers = ModelDecoder(model), list(model.model.layers)
    family = decoder.family
    for layer in layers:
        unknown = layer_weights(decoder, layer).keys() - family.parameters
        if unknown:
            raise ValueError(_refusal(family, f"a layer with {min(unknown)}"))
    for layer in layers:
        yield from _layer_compared(decoder, layer, states)
    *_, last = decoder.walk([ids])
    with decoder.head() as head:
        yield "the predictions", head(last[0]), model(ids).logits


def _layer_compared(decoder: ModelDecoder, layer: DecoderLayer, states: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    family, kind, expected = decoder.family, decoder.family.layer_kind(layer), decoder.run_layer(layer, states)
    yield "a layer", after_mlp(decoder, layer, after_attention(decoder, layer, states)), expected

    weights, channels = layer_weights(decoder, layer), head_dim(decoder.config)
    queries, keys = (
        (torch.tensor(order)[:, None] * channels + torch.arange(channels)).flatten() for order in ([3, 2, 0, 1], [1, 0])
    )
    moved = {"mlp": torch.arange(6).flip(0), "query": queries, "key_value": keys}
    permuted = build_layer(decoder, permute_neurons(weights, moved, family.symmetry), kind)
    yield "a layer with its neurons in another order", decoder.run_layer(permuted, states), expected

    mlp = stacked(family.mlp, [weights])
    found = mlp_channels(decoder, mlp, states) @ mlp["mlp.down_proj.weight"].T + mlp.get("mlp.down_proj.bias", 0)
    yield "the MLP", found.view(states.shape), written_by_mlp(decoder, layer, states)

    folded = build_layer(decoder, weights | stacked(family.attention, [weights]), kind)
    found, expected = (written_by_attention(decoder, of_layer, states) for of_layer in (folded, layer))
    yield "attention without norm gains", found, expected

    if family.head_norms != "all":  # where the heads that stay depend on those that go
        queries, keys = torch.arange(2 * channels), torch.arange(channels)
        narrow = build_layer(decoder, with_heads(weights, queries, keys), kind)
        found, expected = (attention_heads(decoder, of_layer, states) for of_layer in (narrow, layer))
        yield "attention with fewer heads", found, expected[:, queries]
