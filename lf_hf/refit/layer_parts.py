"""Halves of decoder layers: building, widening and running attention and MLP apart."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lf_hf.decoder.interface import Decoder

_READERS_AND_WRITER = {  # of each norm
    "input_layernorm": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj"),
    "post_attention_layernorm": (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
}
Weights = Mapping[str, Tensor]  # of a layer, by the parameters' names inside it


def stacked(parameters: Sequence[Weights], norm: str, maps: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
    """One half of a wide layer that has all heads or all channels of some layers, in order.

    The layers' norm gains are folded into what reads the norms, so that all of them read one norm without gains.

    Parameters
    ----------
    parameters : the layers' weights
    norm : {"input_layernorm", "post_attention_layernorm"}
        The half that reads it: attention or MLP.
    maps : a tensor of shape (hidden, hidden) for each layer, optional
        What the readers of the norm read through.
    """
    readers, writer = _READERS_AND_WRITER[norm]
    wide = {f"{norm}.weight": torch.ones_like(parameters[0][f"{norm}.weight"])}
    for reader in readers:
        rows = []
        for n, layer in enumerate(parameters):
            weight = layer[f"{reader}.weight"]
            row = weight.to(torch.promote_types(weight.dtype, torch.float32)) * layer[f"{norm}.weight"]
            rows.append((row if maps is None else row @ maps[n].to(row)).to(weight.dtype))
        wide[f"{reader}.weight"] = torch.cat(rows)
        if f"{reader}.bias" in parameters[0]:
            wide[f"{reader}.bias"] = torch.cat([layer[f"{reader}.bias"] for layer in parameters])
    wide[f"{writer}.weight"] = torch.cat([layer[f"{writer}.weight"] for layer in parameters], dim=1)
    if f"{writer}.bias" in parameters[0]:
        wide[f"{writer}.bias"] = torch.stack([layer[f"{writer}.bias"] for layer in parameters]).sum(0)
    return wide


def build_layer(decoder: Decoder, weights: Weights) -> LlamaDecoderLayer:
    """A decoder layer of given weights; it has as many heads and channels as they have."""
    config = copy.copy(decoder.config)
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads  # LlamaConfig always fills it
    queries, keys = (len(weights[f"self_attn.{name}_proj.weight"]) for name in "qk")
    config.num_attention_heads = queries // head_dim
    config.num_key_value_heads = keys // head_dim
    config.intermediate_size = len(weights["mlp.gate_proj.weight"])
    with torch.device("meta"):
        layer = LlamaDecoderLayer(config, layer_idx=0)
    layer.load_state_dict(weights, assign=True)
    return layer.eval().requires_grad_(False)


def normalized(decoder: Decoder, states: Tensor) -> Tensor:
    """States as a norm without gains gives them."""
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + decoder.config.rms_norm_eps)).to(states.dtype)


@torch.no_grad()
def after_attention(decoder: Decoder, layer: LlamaDecoderLayer, state: Tensor) -> Tensor:
    """The residual stream between a layer's attention and its MLP: (sequences B, tokens T, hidden)."""
    inputs = decoder.layer_inputs(state)
    return state + layer.self_attn(hidden_states=layer.input_layernorm(state), **inputs)[0].to(state.device)


@torch.no_grad()
def after_mlp(layer: LlamaDecoderLayer, residual: Tensor) -> Tensor:
    """A layer's output from the residual stream after its attention: (sequences B, tokens T, hidden)."""
    return residual + layer.mlp(layer.post_attention_layernorm(residual)).to(residual.device)


def attention_heads(decoder: Decoder, layer: LlamaDecoderLayer, state: Tensor) -> Tensor:
    """What o_proj reads: (sequences B, tokens T, hidden) -> (B * T, query heads * head_dim)."""
    heads: list[Tensor] = []
    hook = layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: heads.append(args[0]))
    after_attention(decoder, layer, state)
    hook.remove()
    return heads[0].flatten(0, 1)


def mlp_channels(decoder: Decoder, weights: Weights, residual: Tensor) -> Tensor:
    """What down_proj reads: (sequences B, tokens T, hidden) -> (B * T, channels)."""
    normed = normalized(decoder, residual).flatten(0, 1)
    gate, up = (
        nn.functional.linear(normed, weights[f"mlp.{name}.weight"], weights.get(f"mlp.{name}.bias"))
        for name in ("gate_proj", "up_proj")
    )
    return ACT2FN[decoder.config.hidden_act](gate) * up


def with_channels(weights: Weights, channels: Tensor) -> dict[str, Tensor]:
    """An MLP with some of its channels."""
    kept = dict(weights)
    for name in ("mlp.gate_proj.weight", "mlp.gate_proj.bias", "mlp.up_proj.weight", "mlp.up_proj.bias"):
        if name in kept:
            kept[name] = kept[name][channels]
    kept["mlp.down_proj.weight"] = kept["mlp.down_proj.weight"][:, channels]
    return kept
