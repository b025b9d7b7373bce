"""Fusing layers by what they compute: selection of heads and channels, and closed-form fits on calibration text.

`fit_group` puts the layers of a group side by side as one wide layer, keeps those of its key-value groups and MLP
channels that the group's output needs most, and fits what writes into the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lf_hf.decoder.interface import Decoder
from lf_hf.numerics import all_finite, in_float64
from lf_hf.refit.layer_parts import (
    Weights,
    after_attention,
    attention_heads,
    build_layer,
    mlp_channels,
    normalized,
    stacked,
    with_channels,
)
from lf_hf.refit.regression import Regression, expanded
from lf_hf.refit.states import StateStore
from lf_hf.refit.traces import Traces, on_device

# Channels that are compared by regression at most, the largest ones: 6144, or 1.25 for each that is kept if that is
# more. Two float32 squares of them are in memory at a time: 2.6 GB for a width of 14336.
_MAX_CANDIDATES = 6144
_CANDIDATES_PER_KEPT = 1.25
# Share of the weight of a sequence that its first token has in fits. All later tokens attend to it: layers that write
# its huge state, or take it away, do it for this token alone, and the model is lost where a fit misses it.
_FIRST_SHARE = 1 / 32


@dataclass(frozen=True)
class GroupFit:
    """One layer for a group of layers, and how it came about.

    `heads_kept` and `channels_kept` count the key-value groups and MLP channels from each layer of the group, where
    they were selected. The errors are what is left of what the MLP should write, squared and relative, with
    down_proj as it was and as it is.
    """

    weights: dict[str, Tensor]
    heads_kept: list[int] | None
    channels_kept: list[int] | None
    error_before: float
    error_after: float


@torch.no_grad()
def fit_group(
    decoder: Decoder,
    layers: list[LlamaDecoderLayer],
    traces: Traces,
    states: Sequence[Tensor],
    store: StateStore,
    *,
    refit: str,
    ridge: float,
    quick: bool = False,
) -> GroupFit:
    """One layer that does to `states` what a group of layers did to theirs.

    Parameters
    ----------
    decoder : Decoder
    layers : list of LlamaDecoderLayer
        The group; a single layer is only fitted. The list is emptied: layers that nobody else holds make room.
    traces : Traces
        Calibration text on its way through the group.
    states : sequence of tensors of shape (sequences B, tokens T, hidden)
        The same text before the layer that is made: the traces' first inputs unless layers below were fused.
    store : StateStore
    refit : {"none", "down_proj", "projections"}
    ridge : float
    quick : bool
        Keep the largest channels, and choose key-value groups in one round: many times faster, and good enough to
        compare groups.
    """
    # Layers of a model that is spread over devices come together on the first one's.
    states = on_device(states, layers[0], store)
    device = layers[0].mlp.down_proj.weight.device
    parameters = [
        {name: weight.to(device) for name, weight in layers.pop(0).named_parameters()} for _ in range(len(layers))
    ]
    weights, heads_kept = parameters[0], None
    if refit == "projections":
        weights, heads_kept = _fit_attention(decoder, parameters, traces, states, ridge, quick)
    fused = build_layer(decoder, weights)
    residuals = store.keep(after_attention(decoder, fused, state) for state in states)
    del fused
    weights = {name: weight for name, weight in weights.items() if "attn" in name or "input_layernorm" in name}
    mlp = _fit_mlp(decoder, parameters, traces, residuals, refit, ridge, quick)
    weights |= mlp.weights
    for name, weight in weights.items():
        weights[name] = weight = weight.contiguous()
        decoder.processes.given_by_first(weight)  # in case machines round differently
        if not all_finite(weight):
            raise ValueError(f"The {name} that was fitted overflows {weight.dtype}; use a dtype of wider range.")
    return GroupFit(weights, heads_kept, mlp.channels_kept, mlp.error_before, mlp.error_after)


def _fit_attention(
    decoder: Decoder,
    parameters: Sequence[Weights],
    traces: Traces,
    states: Sequence[Tensor],
    ridge: float,
    quick: bool,
) -> tuple[dict[str, Tensor], list[int] | None]:
    """Attention with key-value groups from all layers and an o_proj that writes what all of them wrote."""
    config, count = decoder.config, len(parameters)
    device = parameters[0]["self_attn.o_proj.weight"].device
    maps = input_maps(decoder, states, traces.inputs, ridge, parameters[0]["self_attn.o_proj.weight"])
    weights = dict(parameters[0]) | stacked(parameters, "input_layernorm", maps)
    wide = build_layer(decoder, weights)
    start, bias = wide.self_attn.o_proj.weight, wide.self_attn.o_proj.bias
    regression = Regression.empty(start.shape[1], start.shape[0], device, start.dtype)
    for n, state in enumerate(states):
        target = traces.inputs[0][n] + sum(r[n] - i[n] for r, i in zip(traces.residuals, traces.inputs, strict=True))
        wanted = target - state if bias is None else target - state - bias
        regression.add(attention_heads(decoder, wide, state), wanted.flatten(0, 1), token_weights(decoder, target))
    regression.add_up(decoder.processes)

    head_dim = wide.self_attn.head_dim
    kv_heads = len(parameters[0]["self_attn.k_proj.weight"]) // head_dim
    block = config.num_attention_heads // kv_heads * head_dim  # channels of the queries that share a key-value head
    kept = torch.arange(kv_heads, device=start.device)
    if count > 1:
        rounds = 1 if quick else (count - 1) * kv_heads
        kept = decoder.processes.computed(lambda: regression.prune(start, kv_heads, block=block, rounds=rounds), device)
    queries, keys = expanded(kept, block), expanded(kept, head_dim)
    for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        for kind in ("weight", "bias"):
            if f"self_attn.{name}.{kind}" in weights:
                weights[f"self_attn.{name}.{kind}"] = weights[f"self_attn.{name}.{kind}"][rows]
    fitted = decoder.processes.computed(lambda: regression.ridge(start[:, queries], ridge), device)
    weights["self_attn.o_proj.weight"] = fitted.to(start)
    return weights, _counts(kept, kv_heads, count)


def _fit_mlp(
    decoder: Decoder,
    parameters: list[dict[str, Tensor]],
    traces: Traces,
    residuals: Sequence[Tensor],
    refit: str,
    ridge: float,
    quick: bool,
) -> GroupFit:
    """An MLP with channels from all layers and a down_proj that brings the stream to the group's output.

    Empties `parameters`.
    """
    count, keep, processes = len(parameters), decoder.config.intermediate_size, decoder.processes
    maps = None
    device = parameters[0]["mlp.down_proj.weight"].device
    if refit == "projections":
        maps = input_maps(decoder, residuals, traces.residuals, ridge, parameters[0]["mlp.down_proj.weight"])
    weights = stacked(parameters, "post_attention_layernorm", maps)
    del maps
    parameters.clear()
    limit = keep if quick else num_candidates(weights["mlp.down_proj.weight"].shape[1], keep)
    channels = _largest(decoder, weights, residuals, limit)
    if len(channels) < weights["mlp.down_proj.weight"].shape[1]:
        weights = with_channels(weights, channels)
    bias = weights.get("mlp.down_proj.bias")
    regression = Regression.empty(
        len(channels), decoder.config.hidden_size, device, weights["mlp.down_proj.weight"].dtype
    )
    for residual, output in zip(residuals, traces.output, strict=True):
        wanted = output - residual if bias is None else output - residual - bias
        regression.add(mlp_channels(decoder, weights, residual), wanted.flatten(0, 1), token_weights(decoder, output))
    regression.add_up(processes)
    if len(channels) > keep:
        chosen = processes.computed(lambda: regression.prune(weights["mlp.down_proj.weight"], keep), device)
        channels, weights = channels[chosen], with_channels(weights, chosen)

    start = weights["mlp.down_proj.weight"]
    error_before = error_after = processes.told_by_first(lambda: regression.relative_error(start))
    if refit != "none":
        fitted = processes.computed(lambda: regression.ridge(start, ridge), device)
        error_after = processes.told_by_first(lambda: regression.relative_error(fitted))
        weights["mlp.down_proj.weight"] = fitted.to(start)
    return GroupFit(weights, None, _counts(channels, keep, count), error_before, error_after)


def _largest(decoder: Decoder, weights: Weights, residuals: Sequence[Tensor], limit: int) -> Tensor:
    """Sorted numbers of the channels of an MLP that write most, `limit` of them."""
    down = weights["mlp.down_proj.weight"]
    if limit == down.shape[1]:
        return torch.arange(limit, device=down.device)
    # What each writes, squared; the norms are in float64, as the squares of weights may not be in range.
    norms = torch.cat([in_float64(part).norm(dim=0) for part in down.split(256, dim=1)]).float().to(down.device)
    size = torch.zeros(down.shape[1], device=down.device)
    for residual in residuals:
        size += token_weights(decoder, residual) @ (mlp_channels(decoder, weights, residual).float() * norms).square()
    decoder.processes.add_up(size)
    return size.topk(limit).indices.sort().values


def num_candidates(channels: int, keep: int) -> int:
    """How many MLP channels of a group are compared by regression, where `keep` of them are kept."""
    return min(channels, max(_MAX_CANDIDATES, int(_CANDIDATES_PER_KEPT * keep)))


def input_maps(
    decoder: Decoder,
    states: Sequence[Tensor],
    wanted: Sequence[Sequence[Tensor]],
    ridge: float,
    weight: Tensor,
) -> list[Tensor]:
    """Linear maps, near the identity, from the normalised states to each of some normalised states that were wanted.

    Parameters
    ----------
    states, and each of `wanted` : sequences of tensors of shape (sequences B, tokens T, hidden)
    weight : tensor
        One of the layer's, for device and dtype.

    Returns
    -------
    list of tensors of shape (hidden, hidden), float32 at least
    """
    hidden, device, dtype = decoder.config.hidden_size, weight.device, weight.dtype
    identity = torch.eye(hidden, device=device)
    solves: list[Callable[[], Tensor]] = []
    for owner, of_map in enumerate(wanted):
        if of_map is states:
            solves.append(lambda: identity)
            continue
        regression = Regression.empty(hidden, hidden, device, dtype)
        for state, want in zip(states, of_map, strict=True):
            weights = _with_first_share(torch.ones(state.shape[:2], device=state.device))
            regression.add(normalized(decoder, state).flatten(0, 1), normalized(decoder, want).flatten(0, 1), weights)
        regression.add_up(decoder.processes, owner)
        solves.append(partial(regression.ridge, identity, ridge))
    return decoder.processes.computed_apart(solves, device)


def token_weights(decoder: Decoder, states: Tensor) -> Tensor:
    """1 / mean square of each token's state (sequences B, tokens T, hidden), as the next norm divides by it.

    So all tokens count alike, however large their states are, but a sequence's first one, which counts as T / 32
    tokens. The shape is (B * T,).
    """
    return _with_first_share((states.float().square().mean(-1) + decoder.config.rms_norm_eps).reciprocal())


def _with_first_share(weights: Tensor) -> Tensor:
    """Token weights of sequences, of shape (B, tokens T), with more of it on the first ones, as (B * T,); in place."""
    weights[:, 0] *= max(1, _FIRST_SHARE * weights.shape[1])
    return weights.flatten()


def _counts(kept: Tensor, each: int, layers: int) -> list[int] | None:
    """How many of `kept` are from each of some layers that had `each`; None for a single layer."""
    return torch.bincount(kept // each, minlength=layers).tolist() if layers > 1 else None
