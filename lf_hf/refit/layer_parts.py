"""Halves of decoder layers: building, widening and running attention and MLP apart.

Weights have the names of `Family.unpacked` here, and norms' gains are what they multiply by.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lf_hf.decoder.decoder import Decoder
from lf_hf.families.table import DecoderLayer, Experts, Half, Kind, Weights
from lf_hf.refit.regression import expanded

_LEAST_GAIN = 1e-4  # of a norm of heads; none that was learned is near it


def folded(half: Half, weights: Weights, input_map: Tensor | None = None) -> dict[str, Tensor]:
    """A layer with the gains of a half's norm, and a map that it reads through, (hidden, hidden), in its readers.

    What the writer reads has no gains either, so that heads of several layers can be side by side.
    """
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
    if half.head_gain:
        gains, written = weights[half.head_gain], weights[f"{half.writer}.weight"]
        layer[f"{half.writer}.weight"] = written * gains.repeat(written.shape[1] // len(gains)).to(written.dtype)
        layer[half.head_gain] = torch.ones_like(gains)
    return layer


def with_gain(weights: Weights, gain: str | None, input_map: Tensor) -> Tensor:
    """A map (hidden, hidden), followed by gains of some name in a layer, if there are any."""
    return input_map if gain is None else input_map.to(weights[gain].device) * weights[gain][:, None]


def stacked(half: Half, layers: Sequence[Weights], sizes: Tensor | None) -> dict[str, Tensor]:
    """The MLP of a wide layer that has all channels of some `folded` layers, in order."""
    wide = stacked_writers(half, layers, sizes)
    if half.before:
        wide[f"{half.before}.weight"] = layers[0][f"{half.before}.weight"]
    for reader in half.readers:
        for name in (f"{reader}.weight", f"{reader}.bias"):
            if name in layers[0]:
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
    return selection


def with_heads(half: Half, layers: Sequence[Weights], wide: Weights, kept: Tensor, each: int) -> dict[str, Tensor]:
    """The heads of some `folded` layers that are kept, in a wide layer that has all their writers.

    All that a layer has for its heads is in `each` blocks, of which `kept` are the numbers, counted over all layers.
    """
    writer = f"{half.writer}.weight"
    of_layer = layers[0][writer].shape[1]  # channels
    weights = {**wide, writer: wide[writer][:, expanded(kept, of_layer // each)]}
    names = [f"{reader}.{kind}" for reader in half.readers for kind in ("weight", "bias")]
    for name in filter(layers[0].__contains__, (*names, *half.of_heads)):
        parts = [[layer[name]] for layer in layers]
        if name in half.joined:
            others = len(layers[0][name]) - of_layer  # of queries and keys
            parts = [list(layer[name].split((others // 2, others // 2, of_layer))) for layer in layers]
        chosen = [torch.cat(part)[expanded(kept, len(part[0]) // each)] for part in zip(*parts, strict=True)]
        weights[name] = torch.cat(chosen)
    return weights


def with_one_norm(
    parameters: Sequence[Weights], weights: Weights, origins: Tensor, norms: Sequence[str]
) -> dict[str, Tensor]:
    """Queries and keys of heads of several layers for one norm of each, in place of those that the layers had.

    Its gains are a geometric mean of the layers', weighted by their heads, and the rest is folded into the heads' rows.
    Each head comes out as it was, but for its size, which the norm sets: that is off by as much as the gains differ.
    This leaves less error than attention from one layer as a whole. `weights` have the heads side by side, and
    `origins` the number of the layer of each key-value group; `norms` are those of queries and of keys.
    """
    merged: dict[str, Tensor] = {}
    for name, module in zip(("self_attn.q_proj", "self_attn.k_proj"), norms, strict=True):
        norm, rows = f"{module}.weight", len(weights[f"{name}.weight"])
        gains = torch.stack([layer[norm] for layer in parameters])  # (layers, head_dim)
        shares = torch.bincount(origins, minlength=len(parameters)) / len(origins)
        log_gains = gains.float().abs().clamp(min=_LEAST_GAIN).log()
        merged[norm] = torch.exp(shares @ log_gains).to(gains.dtype)
        scale = (gains / merged[norm])[origins]  # (groups, head_dim)
        scale = scale.repeat_interleave(rows // scale.numel(), dim=0).flatten()
        for parameter in (f"{name}.weight", f"{name}.bias"):
            if parameter in weights:
                weight = weights[parameter]
                merged[parameter] = (weight * scale.view(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)
    return merged
