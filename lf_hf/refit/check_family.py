"""Whether layers compute what the table of families says, tried out before any long work."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import linear
from transformers import PretrainedConfig

from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.families import family_of, head_dim
from lf_hf.refit.layer_parts import (
    after_mlp,
    attention_heads,
    build_layer,
    expanded,
    layer_weights,
    mid_state,
    mlp_channels,
    stacked,
    with_heads,
    written_by_mlp,
)
from lf_hf.stages.alignment import permute_neurons

_TOKENS = 8
_TOLERANCE = 1e-4  # relative: a layer that differs is off by far more
_WIDTHS = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 6,
    "vocab_size": 16,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "_attn_implementation": "eager",
}


def check_computes(config: PretrainedConfig) -> None:
    """Compare a tiny model of the same config with what fusing takes its layers to compute; some milliseconds.

    The model is in float64, so that no setting of float32 products matters.

    Raises
    ------
    ValueError
        If anything differs, as with a config that changes layers in a way that the table does not know, or if there
        is no such family.
    """
    family = family_of(config)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(0)  # not those of GPUs, which are not put back
        model = family.causal_lm(_tiny(config)).eval().double()
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.1 if name.endswith("bias") else parameter.shape[-1] ** -0.5)
            if "norm" in name:
                parameter.uniform_(0.5, 1.5).sub_(family.gain_offset)
        for what, ours, theirs in _compared(ModelDecoder(model)):
            if not (ours - theirs).norm() <= _TOLERANCE * theirs.norm():
                raise ValueError(
                    f"The config makes transformers {transformers.__version__} compute {what} of a {family.title} "
                    "model in another way than lf_hf's table of families says, so it would be fused wrongly; take "
                    f"another version of transformers or of the config ({family.decoder_layer.__module__} has the "
                    "layer)."
                )


def _tiny(config: PretrainedConfig) -> Any:
    """The config with tiny widths, and a layer of each kind."""
    tiny, family = copy.deepcopy(config), family_of(config)
    kinds = family.config_kinds(config)
    numbers = [n for n, kind in enumerate(kinds) if kind not in kinds[:n]]
    changes = _WIDTHS | {name: [kinds[n][name] for n in numbers] for name in family.layer_lists}
    changes |= {"num_hidden_layers": len(numbers), "hidden_size": 4 * head_dim(config)}
    if getattr(config, "sliding_window", None) is not None:
        changes["sliding_window"] = _TOKENS // 2
    for name, value in changes.items():
        setattr(tiny, name, value)
    return tiny


def _compared(decoder: ModelDecoder) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What is compared, what we compute, and what the model does."""
    family, model, channels = decoder.family, decoder.model, head_dim(decoder.config)
    ids = torch.randint(model.config.vocab_size, (1, _TOKENS))
    states = torch.randn(1, _TOKENS, model.config.hidden_size, dtype=torch.float64)
    query_heads, key_heads = torch.tensor([3, 2, 0, 1]), torch.tensor([1, 0])
    orders = {
        "mlp": torch.arange(6).flip(0),
        "query": expanded(query_heads, channels),
        "key_value": expanded(key_heads, channels),
    }
    for layer in model.model.layers:
        weights, kind, expected = (
            layer_weights(decoder, layer),
            family.layer_kind(layer),
            decoder.run_layer(layer, states),
        )
        if unknown := weights.keys() - family.parameters:
            yield f"a layer with {min(unknown)}", torch.zeros(1), torch.ones(1)
        yield "a layer", after_mlp(decoder, layer, mid_state(decoder, layer, states)), expected
        moved = permute_neurons(weights, orders, family.symmetry)
        folded = moved | stacked(family.attention, [moved]) | stacked(family.mlp, [moved])
        found = decoder.run_layer(build_layer(decoder, folded, kind), states)
        yield "a layer with its neurons in another order and without norm gains", found, expected
        read = mlp_channels(decoder, folded, states)
        found = linear(read, folded["mlp.down_proj.weight"], folded.get("mlp.down_proj.bias"))
        yield "the MLP", found.view_as(states), written_by_mlp(decoder, layer, states)
        if family.head_norms != "all":  # where the heads that stay depend on those that go
            rows = torch.arange(2 * channels)
            narrow = build_layer(decoder, with_heads(weights, rows, rows[:channels]), kind)
            found, expected = (attention_heads(decoder, of_layer, states) for of_layer in (narrow, layer))
            yield "attention with fewer heads", found, expected[:, rows]
    *_, last = decoder.walk([ids])
    with decoder.head() as head:
        yield "the predictions", head(last[0]), model(ids).logits
