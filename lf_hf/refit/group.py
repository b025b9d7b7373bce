"""Fusing layers by what they compute: selection of heads and channels, and closed-form fits on calibration text.

`fit_group` puts the layers of a group side by side as one wide layer, keeps those of its key-value groups and MLP
channels that the group's output needs most, and fits what writes into the residual stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lf_hf.decoder.interface import Decoder
from lf_hf.families import DecoderLayer, Half, Kind, Weights, head_dim
from lf_hf.refit.layer_parts import (
    after_attention,
    attention_heads,
    build_layer,
    layer_weights,
    mlp_channels,
    normalized,
    stacked,
    with_channels,
    with_heads,
    written_by_attention,
)
from lf_hf.refit.regression import Regression, expanded
from lf_hf.refit.states import StateStore
from lf_hf.refit.traces import Traces, on_device
from lf_hf.runtime.numerics import all_finite, in_float64

# Channels that are compared by regression at most, the largest ones: 6144, or 1.25 for each that is kept if that is
# more. Two float32 squares of them are in memory at a time: 2.6 GB for a width of 14336.
_MAX_CANDIDATES = 6144
_CANDIDATES_PER_KEPT = 1.25
# Share of the weight of a sequence that its first token has in fits. All later tokens attend to it: layers that write
# its huge state, or take it away, do it for this token alone, and the model is lost where a fit misses it.
_FIRST_SHARE = 1 / 32
_NORMS_OF_HEADS = {"q_proj": "self_attn.q_norm.weight", "k_proj": "self_attn.k_norm.weight"}
_LEAST_GAIN = 1e-4  # of such a norm; none that was learned is near it


@dataclass(frozen=True)
class GroupFit:
    """One layer for a group of layers, and how it came about.

    `heads_kept` and `channels_kept` count the key-value groups and MLP channels from each layer of the group, where
    they were selected. The errors are what is left of what the MLP should write, squared and relative, with
    down_proj as it was and as it is; where that goes through a norm, in front of it.
    """

    weights: dict[str, Tensor]
    kind: Kind
    heads_kept: list[int] | None
    channels_kept: list[int] | None
    error_before: float
    error_after: float


@torch.no_grad()
def fit_group(
    decoder: Decoder,
    layers: list[DecoderLayer],
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
    layers : list of DecoderLayer
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
    kinds = [decoder.family.layer_kind(layer) for layer in layers]
    parameters = [
        {name: weight.to(device) for name, weight in layer_weights(decoder, layers.pop(0)).items()}
        for _ in range(len(layers))
    ]
    weights, kind, heads_kept = parameters[0], kinds[0], None
    if refit == "projections":
        weights, kind, heads_kept = _fit_attention(decoder, parameters, kinds, traces, states, ridge, quick)
    fused = build_layer(decoder, weights, kind)
    residuals = store.keep(after_attention(decoder, fused, state) for state in states)
    del fused
    norms = [f"{norm}.weight" for norm in decoder.family.attention.norms]
    weights = {name: weight for name, weight in weights.items() if name.startswith("self_attn.") or name in norms}
    mlp = _fit_mlp(decoder, parameters, traces, residuals, refit, ridge, quick)
    weights |= mlp.weights
    for name, weight in weights.items():
        weights[name] = weight = weight.contiguous()
        decoder.processes.broadcast(weight)  # in case machines round differently
        if not all_finite(weight):
            raise ValueError(f"The {name} that was fitted overflows {weight.dtype}; use a dtype of wider range.")
    return GroupFit(weights, kind, heads_kept, mlp.channels_kept, mlp.error_before, mlp.error_after)


def _fit_attention(
    decoder: Decoder,
    parameters: Sequence[Weights],
    kinds: Sequence[Kind],
    traces: Traces,
    states: Sequence[Tensor],
    ridge: float,
    quick: bool,
) -> tuple[dict[str, Tensor], Kind, list[int] | None]:
    """Attention with key-value groups from all layers and an o_proj that writes what all of them wrote.

    Layers of different kinds cannot have their heads side by side, and where norms of queries and keys are over all
    heads, they depend on each other: there all are from one layer, whose kind it takes.
    """
    family, half, count = decoder.family, decoder.family.attention, len(parameters)
    device = parameters[0]["self_attn.o_proj.weight"].device
    maps = input_maps(decoder, half, states, traces.inputs, ridge, parameters[0]["self_attn.o_proj.weight"])
    whole = count > 1 and (family.head_norms == "all" or any(kind != kinds[0] for kind in kinds))
    apart = count > 1 and (whole or family.head_norms is not None)  # whether one layer cannot run all heads
    layers, sizes = [], None
    if apart or (half.after and count > 1):
        layers = [
            build_layer(decoder, {**of_layer, **stacked(half, [of_layer], [through])}, kind)
            for of_layer, through, kind in zip(parameters, maps, kinds, strict=True)
        ]
    if half.after and count > 1:
        sizes = _sizes(decoder, [partial(written_by_attention, decoder, layer) for layer in layers], states)
    wide = dict(parameters[0]) | stacked(half, parameters, maps, sizes)
    del maps
    if not apart:
        layers = [build_layer(decoder, wide, kinds[0])]
    regression = _attention_problem(decoder, wide, layers, traces, states)
    layers.clear()

    channels = head_dim(decoder.config)
    kv_heads = len(parameters[0]["self_attn.k_proj.weight"]) // channels
    units = 1 if whole else kv_heads  # of a layer, that are kept or not
    rows = len(parameters[0]["self_attn.k_proj.weight"]) // units
    block = len(parameters[0]["self_attn.q_proj.weight"]) // units  # channels of the queries of a unit
    start = wide["self_attn.o_proj.weight"]
    kept = torch.arange(units, device=start.device)
    if count > 1:
        rounds = 1 if quick else (count - 1) * units
        kept = decoder.processes.computed(lambda: regression.prune(start, units, block=block, rounds=rounds), device)
    queries, keys = expanded(kept, block), expanded(kept, rows)
    weights, kind, heads_kept = with_heads(wide, queries, keys), kinds[0], _counts(kept, units, count)
    if whole:
        chosen = int(kept)
        kind, heads_kept = kinds[chosen], [kv_heads * (layer == chosen) for layer in range(count)]
        weights |= {name: w for name, w in parameters[chosen].items() if name in _NORMS_OF_HEADS.values()}
    elif apart:
        weights |= _with_one_norm(parameters, wide, {"q_proj": queries, "k_proj": keys})
        layers = [build_layer(decoder, weights, kind)]
        regression = _attention_problem(decoder, weights, layers, traces, states)
    del wide, layers

    def fit(problem: Regression) -> None:
        before = weights["self_attn.o_proj.weight"]
        fitted = decoder.processes.computed(lambda: problem.ridge(before, ridge), device)
        weights["self_attn.o_proj.weight"] = fitted.to(before)

    fit(regression)
    if half.after:
        fused = build_layer(decoder, weights, kind)
        if not quick:  # again, as sizes in front of the norm are known better now
            fit(_attention_problem(decoder, weights, [fused], traces, states))
            fused = build_layer(decoder, weights, kind)
        written = (written_by_attention(decoder, fused, state) for state in states)
        weights |= _fitted_gain(decoder, half, weights, written, _after_attention_of_all(traces), states, ridge)
    return weights, kind, heads_kept


def _attention_problem(
    decoder: Decoder, weights: Weights, layers: Sequence[DecoderLayer], traces: Traces, states: Sequence[Tensor]
) -> Regression:
    """What an o_proj should write, from the heads of some layers side by side. `weights` has it as it is."""
    start = weights["self_attn.o_proj.weight"]
    regression = Regression.empty(start.shape[1], start.shape[0], start.device, start.dtype)
    for state, target in zip(states, _after_attention_of_all(traces), strict=True):
        heads = [attention_heads(decoder, layer, state) for layer in layers]
        read = heads[0] if len(heads) == 1 else torch.cat(heads, dim=1)
        regression.add(*_in_front(decoder, decoder.family.attention, weights, read, target, state))
    regression.all_reduce(decoder.processes)
    return regression


def _with_one_norm(parameters: Sequence[Weights], wide: Weights, chosen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Queries and keys of heads of several layers for one norm of each, in place of those that the layers had.

    Its gains are a geometric mean of the layers', weighted by their heads, and the rest is folded into the heads' rows.
    Each head comes out as it was, but for its size, which the norm sets: that is off by as much as the gains differ.
    This leaves less error than attention from one layer as a whole.

    Parameters
    ----------
    wide : mapping
        The layers side by side.
    chosen : mapping
        From "q_proj" and "k_proj" to the rows that are kept.
    """
    found: dict[str, Tensor] = {}
    for name, rows in chosen.items():
        norm, of_layer = _NORMS_OF_HEADS[name], rows // len(parameters[0][f"self_attn.{name}.weight"])
        gains = torch.stack([layer[norm] for layer in parameters])  # (layers, head_dim)
        shares = torch.bincount(of_layer, minlength=len(parameters)) / len(rows)
        found[norm] = torch.exp(shares @ gains.float().abs().clamp(min=_LEAST_GAIN).log()).to(gains.dtype)
        channel = rows % gains.shape[1]
        scale = gains[of_layer, channel] / found[norm][channel]
        for part, by_row in ((f"self_attn.{name}.weight", scale[:, None]), (f"self_attn.{name}.bias", scale)):
            if part in wide:
                found[part] = (wide[part][rows] * by_row).to(wide[part].dtype)
    return found


def _after_attention_of_all(traces: Traces) -> Iterator[Tensor]:
    """The states that the first layer read, with all that the attention of any layer wrote added."""
    for n, first in enumerate(traces.inputs[0]):
        yield first + sum(r[n] - i[n] for r, i in zip(traces.residuals, traces.inputs, strict=True))


def _sizes(decoder: Decoder, writers: Sequence[Callable[[Tensor], Tensor]], states: Sequence[Tensor]) -> list[float]:
    """Root mean square of what each of some writers writes for each token of some states, as a geometric mean."""
    sums = torch.zeros(len(writers) + 1, dtype=torch.float64)
    for state in states:
        means = [written(state).float().square().mean(-1) + decoder.config.rms_norm_eps for written in writers]
        found = [in_float64(mean).log().sum() / 2 for mean in means]
        found.append(torch.full_like(found[0], means[0].numel()))
        sums = sums.to(found[0].device) + torch.stack(found)
    *of_writers, tokens = decoder.processes.all_reduce_sums(sums)
    return [math.exp(total / tokens) for total in of_writers]


def _in_front(
    decoder: Decoder, half: Half, weights: Weights, read: Tensor, target: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What a writer reads and should write for each token, and the tokens' weights.

    Where what it writes goes through a norm, that divides each token by its size, which is taken to be the size that
    the writer's weights as they are give it. What is wanted is divided by the norm's gains and brought to size 1: its
    direction is all that the norm lets through, and counts as much as its size.

    Parameters
    ----------
    read : tensor of shape (tokens B * T, channels)
    target, state : tensors of shape (sequences B, tokens T, hidden)
        The stream as it should be after the half, and before it.
    """
    wanted, counted = _wanted(decoder, target, state), token_weights(decoder, target)
    bias = weights.get(f"{half.writer}.bias")
    if half.after is None:
        return read, wanted if bias is None else wanted - bias, counted
    written = nn.functional.linear(read, weights[f"{half.writer}.weight"], bias).float()
    scale = (written.square().mean(-1, keepdim=True) + decoder.config.rms_norm_eps).rsqrt()  # (B * T, 1)
    gain = weights[f"{half.after}.weight"].to(wanted.device)
    wanted = torch.where(gain == 0, 0.0, wanted.float() / gain)
    size = wanted.square().mean(-1, keepdim=True).sqrt()
    wanted = wanted / size.clamp(min=torch.finfo(torch.float32).tiny)
    return read * scale, wanted if bias is None else wanted - bias * scale, counted * size[:, 0]


def _wanted(decoder: Decoder, target: Tensor, state: Tensor) -> Tensor:
    """What a half should write, or its norm let through: (sequences B, tokens T, hidden) -> (B * T, hidden)."""
    factor = decoder.family.residual_factor(decoder.config)
    wanted = (target - state).flatten(0, 1)
    return wanted if factor == 1 else wanted / factor


def _fitted_gain(
    decoder: Decoder,
    half: Half,
    weights: Weights,
    written: Iterable[Tensor],
    targets: Iterable[Tensor],
    states: Iterable[Tensor],
    ridge: float,
) -> dict[str, Tensor]:
    """The gains of the norm after a half for what it writes, by ridge regression of each channel by itself.

    Parameters
    ----------
    written, targets, states : tensors of shape (sequences B, tokens T, hidden)
        What is in front of the norm, and the stream as it should be after the half, and before it.
    """
    gain = weights[f"{half.after}.weight"]
    start = gain.to(torch.promote_types(gain.dtype, torch.float32))  # sums over tokens need it
    squares, products = torch.zeros_like(start), torch.zeros_like(start)
    for found, target, state in zip(written, targets, states, strict=True):
        normed = found.to(start).flatten(0, 1)
        normed = normed * (normed.square().mean(-1, keepdim=True) + decoder.config.rms_norm_eps).rsqrt()
        counted = token_weights(decoder, target).to(start)
        squares += counted @ normed.square()
        products += counted @ (normed * _wanted(decoder, target, state).to(start))
    for sums in (squares, products):
        decoder.processes.all_reduce(sums)
    pull = ridge * squares.mean()
    fitted = (products + pull * start) / (squares + pull)
    return {f"{half.after}.weight": torch.where(squares + pull > 0, fitted, start).to(gain.dtype)}  # 0: nothing written


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
    half, maps, sizes = decoder.family.mlp, None, None
    device = parameters[0]["mlp.down_proj.weight"].device
    if refit == "projections":
        maps = input_maps(decoder, half, residuals, traces.residuals, ridge, parameters[0]["mlp.down_proj.weight"])
    if half.after and count > 1:
        alone = [stacked(half, [layer], maps and [maps[n]]) for n, layer in enumerate(parameters)]
        sizes = _sizes(decoder, [partial(_written_by_channels, decoder, of_layer) for of_layer in alone], residuals)
        del alone
    weights = stacked(half, parameters, maps, sizes)
    del maps
    parameters.clear()
    limit = keep if quick else num_candidates(weights["mlp.down_proj.weight"].shape[1], keep)
    channels = _largest(decoder, weights, residuals, limit)
    if len(channels) < weights["mlp.down_proj.weight"].shape[1]:
        weights = with_channels(weights, channels)
    regression = _mlp_problem(decoder, weights, traces, residuals)
    if len(channels) > keep:
        chosen = processes.computed(lambda: regression.prune(weights["mlp.down_proj.weight"], keep), device)
        channels, weights = channels[chosen], with_channels(weights, chosen)

    start = weights["mlp.down_proj.weight"]
    error_before = error_after = processes.broadcast_object(lambda: regression.relative_error(start))
    if refit != "none":
        fitted = processes.computed(lambda: regression.ridge(start, ridge), device)
        error_after = processes.broadcast_object(lambda: regression.relative_error(fitted))
        weights["mlp.down_proj.weight"] = fitted.to(start)
        if half.after:
            if not quick:  # again, as sizes in front of the norm are known better now
                regression = _mlp_problem(decoder, weights, traces, residuals)
                again = processes.computed(lambda: regression.ridge(weights["mlp.down_proj.weight"], ridge), device)
                weights["mlp.down_proj.weight"] = again.to(start)
            written = (_written_by_channels(decoder, weights, residual) for residual in residuals)
            weights |= _fitted_gain(decoder, half, weights, written, traces.output, residuals, ridge)
    return GroupFit(weights, {}, None, _counts(channels, keep, count), error_before, error_after)


def _mlp_problem(decoder: Decoder, weights: Weights, traces: Traces, residuals: Sequence[Tensor]) -> Regression:
    """What a down_proj should write, from an MLP's channels. `weights` has it as it is."""
    start = weights["mlp.down_proj.weight"]
    regression = Regression.empty(start.shape[1], start.shape[0], start.device, start.dtype)
    for residual, output in zip(residuals, traces.output, strict=True):
        read = mlp_channels(decoder, weights, residual)
        regression.add(*_in_front(decoder, decoder.family.mlp, weights, read, output, residual))
    regression.all_reduce(decoder.processes)
    return regression


def _written_by_channels(decoder: Decoder, weights: Weights, residual: Tensor) -> Tensor:
    """What an MLP that `stacked` made writes, in front of a norm: (sequences B, tokens T, hidden)."""
    read = mlp_channels(decoder, weights, residual)
    written = nn.functional.linear(read, weights["mlp.down_proj.weight"], weights.get("mlp.down_proj.bias"))
    return written.view(residual.shape)


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
    decoder.processes.all_reduce(size)
    return size.topk(limit).indices.sort().values


def num_candidates(channels: int, keep: int) -> int:
    """How many MLP channels of a group are compared by regression, where `keep` of them are kept."""
    return min(channels, max(_MAX_CANDIDATES, int(_CANDIDATES_PER_KEPT * keep)))


def input_maps(
    decoder: Decoder,
    half: Half,
    states: Sequence[Tensor],
    wanted: Sequence[Sequence[Tensor]],
    ridge: float,
    weight: Tensor,
) -> list[Tensor]:
    """Linear maps, near the identity, from what a half reads of some states to what it should read.

    Parameters
    ----------
    half : Half
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
            weights = token_weights(decoder, want)
            if half.before:
                weights = _with_first_share(torch.ones(state.shape[:2], device=state.device))
            read, wished = (normalized(decoder, half, of_token).flatten(0, 1) for of_token in (state, want))
            regression.add(read, wished, weights)
        regression.all_reduce(decoder.processes, owner)
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
