"""Halves of decoder layers: building, widening and running attention and MLP apart.

Weights have the names of `Family.unpacked` here, and norms' gains are what they multiply by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lf_hf.decoder.decoder import Decoder
from lf_hf.families.table import DecoderLayer, Experts, Half, Kind, Weights

_LEAST_GAIN = 1e-4  # of a norm of heads; none that was learned is near it


def folded(half: Half, weights: Weights, input_map: Tensor | None = None) -> dict[str, Tensor]:
    """A layer with the gains of a half's norm, and a map that it reads through, (hidden, hidden), in its readers."""
    layer = dict(weights)
    for reader in half.readers:
        if f"{reader}.weight" not in weights:  # as values are not, where keys are values too
            continue
        weight = wide = weights[f"{reader}.weight"]
        if weight.dtype != torch.bfloat16:  # products of bfloat16 are rounded once, too
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        gain = half.gain(reader)
        if input_map is not None:
            wide = wide @ with_gain(weights, gain, input_map).to(wide)
        elif gain:
            wide = wide * weights[gain]
        layer[f"{reader}.weight"] = wide.to(weight.dtype)
        if gain:
            layer[gain] = torch.ones_like(weights[gain])
    return layer


def with_gain(weights: Weights, gain: str | None, input_map: Tensor) -> Tensor:
    """A map (hidden, hidden), followed by gains of some name in a layer, if there are any."""
    return input_map if gain is None else input_map.to(weights[gain].device) * weights[gain][:, None]


def stacked(half: Half, layers: Sequence[Weights], sizes: Tensor | None) -> dict[str, Tensor]:
    """One half of a wide layer that has all heads or all channels of some `folded` layers, in order."""
    wide = stacked_writers(half, layers, sizes)
    if half.before:
        wide[f"{half.before}.weight"] = layers[0][f"{half.before}.weight"]
    for reader in half.readers:
        for name in (f"{reader}.weight", f"{reader}.bias"):
            if name in layers[0]:
                wide[name] = torch.cat([layer[name] for layer in layers])
    for name in half.of_heads:
        wide[name] = torch.cat([layer[name] for layer in layers])
    return wide


def stacked_writers(half: Half, layers: Sequence[Weights], sizes: Tensor | None) -> dict[str, Tensor]:
    """What writes in a wide layer.

    If a norm follows the half, the layers' outputs must share one norm. Each writer is divided by its typical output
    size and multiplied by its own gains. The shared norm's gain is the root of the sum of the squares of all gains, as
    if the outputs were uncorrelated. A layer with zero gains contributes nothing.

    `sizes` are root mean squares of what layers write in front of a norm, float32 of shape (layers,): needed where they
    have one there.
    """
    wide = {}
    writers = [layer[f"{half.writer}.weight"] for layer in layers]
    biases = [layer[f"{half.writer}.bias"] for layer in layers if f"{half.writer}.bias" in layer]
    if half.after:
        gains = torch.stack([layer[f"{half.after}.weight"] for layer in layers])  # (layers, hidden)
        gain = gains[0]
        if sizes is not None and len(layers) > 1:
            gain = gains.to(torch.promote_types(gains.dtype, torch.float32)).square().sum(0).sqrt()
            shares = gains / torch.where(gain == 0, 1, gain) / sizes.to(gain.device)[:, None]
            writers = [(w * share[:, None]).to(w.dtype) for w, share in zip(writers, shares, strict=True)]
            biases = [(b * share).to(b.dtype) for b, share in zip(biases, shares)]  # noqa: B905 - there may be none
        wide[f"{half.after}.weight"] = gain.to(gains.dtype)
    wide[f"{half.writer}.weight"] = torch.cat(writers, dim=1)
    if biases:
        wide[f"{half.writer}.bias"] = torch.stack(biases).sum(0)
    return wide


def with_shared_gain(half: Half, layers: Sequence[Weights]) -> list[dict[str, Tensor]]:
    """Layers that write as they did but for size, with one gain of the norm behind a half: so their fits compare.

    It is that of `stacked_writers`. What their own gains differ by goes into what writes, or into norms in front.
    """
    if half.after is None:
        return [dict(layer) for layer in layers]
    name, shared = f"{half.after}.weight", []
    gains = torch.stack([layer[name] for layer in layers])  # (layers, hidden)
    gain = gains.to(torch.promote_types(gains.dtype, torch.float32)).square().sum(0).sqrt()
    inner = [f"{norm}.weight" for norm in (half.experts.after, half.experts.shared_after)] if half.experts else []
    for layer, share in zip(layers, gains / torch.where(gain == 0, 1, gain), strict=True):
        new = {**layer, name: gain.to(gains.dtype)}
        for weight in inner or [f"{half.writer}.weight"]:
            factor = share if layer[weight].dim() == 1 else share[:, None]
            new[weight] = (layer[weight] * factor).to(layer[weight].dtype)
        shared.append(new)
    return shared


def build_layer(decoder: Decoder, weights: Weights, kind: Kind) -> DecoderLayer:
    """A decoder layer of given weights."""
    layer = decoder.family.new_layer(decoder.config, kind)
    layer.load_state_dict(decoder.family.packed(weights), assign=True)
    return layer.eval().requires_grad_(False)


def build_module(decoder: Decoder, name: str, weights: Weights) -> Any:
    """A module of a decoder layer, by its name there, of given weights."""
    family, begins = decoder.family, f"{name}."
    module = family.new_layer(decoder.config, family.config_kinds(decoder.config)[0]).get_submodule(name)
    own = {key.removeprefix(begins): tensor for key, tensor in weights.items() if key.startswith(begins)}
    module.load_state_dict(own, assign=True)
    return module.eval().requires_grad_(False)


def normalized(decoder: Decoder, half: Half, states: Tensor) -> Tensor:
    """States as the readers of a half read them, but for gains: as a norm without them gives them, if there is one."""
    if half.before is None:
        return states
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + decoder.config.rms_norm_eps)).to(states.dtype)


@torch.no_grad()
def written_by(decoder: Decoder, half: Half, layer: DecoderLayer, state: Tensor) -> Tensor:
    """What a half of a layer writes, in front of a norm if it goes through one: (sequences B, tokens T, hidden)."""
    read = layer.get_submodule(half.before)(state) if half.before else state
    module, family = layer.get_submodule(half.module), decoder.family
    if half.experts and half.experts.before:
        return _written_beside(half.experts, layer, read, state)
    if half is family.mlp:
        written = module(read)
        return written[0] if isinstance(written, tuple) else written  # beside which some routers' choices are
    inputs = decoder.layer_inputs(state, layer)
    if half is family.delta_net:
        return module(read, attention_mask=inputs["attention_mask"])
    return module(hidden_states=read, **inputs)[0]


def _written_beside(experts: Experts, layer: DecoderLayer, read: Tensor, state: Tensor) -> Tensor:
    """What an MLP writes, and experts beside it, which read the stream by themselves."""
    tokens = state.flatten(0, 1)
    _, shares, chosen = layer.get_submodule(experts.router)(tokens)
    by_experts = layer.get_submodule(experts.module)(layer.get_submodule(experts.before)(tokens), chosen, shares)
    by_mlp = layer.get_submodule(experts.shared_after)(layer.get_submodule(experts.shared)(read))
    return by_mlp + layer.get_submodule(experts.after)(by_experts).view_as(state)


@torch.no_grad()
def after_half(decoder: Decoder, half: Half, layer: DecoderLayer, state: Tensor) -> Tensor:
    """The residual stream after a half of a layer, from the stream in front of it: (sequences B, tokens T, hidden)."""
    written = written_by(decoder, half, layer, state)
    if half.after:
        written = layer.get_submodule(half.after)(written)
    after = state + (written * decoder.family.residual_factor(decoder.config)).to(state.device)
    if not decoder.family.scalar or half is not decoder.family.mlp:
        return after
    return after * decoder.family.scale(layer, after.device)


def mid_state(decoder: Decoder, layer: DecoderLayer, state: Tensor) -> Tensor:
    """The residual stream between a layer's attention and its MLP: (sequences B, tokens T, hidden)."""
    return after_half(decoder, decoder.family.layer_mixer(layer), layer, state)


def attention_heads(decoder: Decoder, layer: DecoderLayer, state: Tensor) -> Tensor:
    """What o_proj reads, or its like: (sequences B, tokens T, hidden) -> (B * T, query heads * head_dim)."""
    heads: list[Tensor] = []
    mixer = decoder.family.layer_mixer(layer)
    hook = layer.get_submodule(mixer.writer).register_forward_pre_hook(lambda _, args: heads.append(args[0]))
    written_by(decoder, mixer, layer, state)
    hook.remove()
    return heads[0].flatten(0, 1)


def mlp_channels(decoder: Decoder, weights: Weights, residual: Tensor) -> Tensor:
    """What an MLP's writer reads, of one that `stacked` made: (sequences B, tokens T, hidden) -> (B * T, channels)."""
    return combined_channels(decoder, weights, normalized(decoder, decoder.family.mlp, residual).flatten(0, 1))


def combined_channels(decoder: Decoder, weights: Weights, read: Tensor) -> Tensor:
    """The same from what its readers read, of shape (tokens T, hidden)."""
    family = decoder.family
    parts = (linear(read, weights[f"{name}.weight"], weights.get(f"{name}.bias")) for name in family.mlp.readers)
    return family.activated(decoder.config, *parts)


def selected(half: Half, weights: Weights, *rows: Tensor | slice) -> dict[str, Tensor]:
    """A half with some rows of each of its readers, and the columns of its writer that read the first one's."""
    selection = dict(weights)
    for reader, chosen in zip(half.readers, rows, strict=True):
        for name in (f"{reader}.weight", f"{reader}.bias"):
            if name in weights:
                selection[name] = weights[name][chosen]
    writer = f"{half.writer}.weight"
    selection[writer] = weights[writer][:, rows[0]]
    for name in half.of_heads:
        each = weights[writer].shape[1] // len(weights[name])  # channels of a head
        selection[name] = weights[name].repeat_interleave(each)[rows[0]][::each]
    return selection


def with_one_norm(
    parameters: Sequence[Weights], wide: Weights, chosen: Mapping[str, Tensor], norms: Sequence[str]
) -> dict[str, Tensor]:
    """Queries and keys of heads of several layers for one norm of each, in place of those that the layers had.

    Its gains are a geometric mean of the layers', weighted by their heads, and the rest is folded into the heads' rows.
    Each head comes out as it was, but for its size, which the norm sets: that is off by as much as the gains differ.
    This leaves less error than attention from one layer as a whole. `wide` has the layers side by side, and `chosen`,
    for "q_proj" and "k_proj", the rows that are kept; `norms` are those of the two.
    """
    merged: dict[str, Tensor] = {}
    for (name, rows), module in zip(chosen.items(), norms, strict=True):
        norm = f"{module}.weight"
        layer_numbers = rows // len(parameters[0][f"self_attn.{name}.weight"])
        gains = torch.stack([layer[norm] for layer in parameters])  # (layers, head_dim)
        shares = torch.bincount(layer_numbers, minlength=len(parameters)) / len(rows)
        log_gains = gains.float().abs().clamp(min=_LEAST_GAIN).log()
        merged[norm] = torch.exp(shares @ log_gains).to(gains.dtype)
        channels = rows % gains.shape[1]
        scale = gains[layer_numbers, channels] / merged[norm][channels]
        weight, bias = f"self_attn.{name}.weight", f"self_attn.{name}.bias"
        merged[weight] = (wide[weight][rows] * scale[:, None]).to(wide[weight].dtype)
        if bias in wide:
            merged[bias] = (wide[bias][rows] * scale).to(wide[bias].dtype)
    return merged
