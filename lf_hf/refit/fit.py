"""The mathematics of `refit`: one layer that does what a group of layers did.

A layer adds to the residual stream twice, by its attention and by its MLP, and each of these halves is fitted alike:

1. The group's halves are put side by side as one wide half. What each reads, it reads through a linear map, fitted from
   the stream in front of the fused layer to the stream that it read in the group (`InputMap`).
2. What the wide half has to write is what the group added to the stream: a least-squares problem y = W x, of which the
   sums over tokens are kept (`HalfFit.build_problem`). x is what the heads or channels compute, and W writes it to the
   stream: o_proj or down_proj.
3. Heads or channels are kept whose loss costs y least (`Regression.prune`).
4. W is solved for, with a penalty that pulls it towards the columns that were kept (`HalfFit.fit_writer`).

`fit_group` does so for both halves; docs/how_it_works.md has the formulas. This module does not know how groups are
chosen, where states are kept or how layers are loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from lf_hf.decoder.decoder import Decoder
from lf_hf.families.table import DecoderLayer, Kind, Weights, head_dim
from lf_hf.refit.half_fit import HalfFit, InputMap, NormedHalfFit, token_weights
from lf_hf.refit.layer_parts import (
    build_layer,
    gated_channels,
    layer_weights,
    mid_state,
    normalized,
    selected,
    stacked,
    with_one_norm,
)
from lf_hf.refit.regression import Failures, FitOverflow, expanded
from lf_hf.refit.states import States, StateStore, on_device
from lf_hf.refit.traces import Traces
from lf_hf.report.data import FusedLayer, MadeLayer
from lf_hf.runtime.amounts import TOKEN_STRIDE, num_candidates
from lf_hf.runtime.numerics import in_float64, is_finite, to_host


class FittedHalf(NamedTuple):
    """One half for those of a group of layers.

    `kept` counts the key-value groups or channels from each layer, (layers,). Errors are those of what is written, with
    the writer as it was and as it was fitted, of shape ().
    """

    weights: dict[str, Tensor]
    kept: Tensor
    error_before: Tensor
    error_after: Tensor


@torch.no_grad()
def fit_group(
    decoder: Decoder,
    layers: list[DecoderLayer],
    traces: Traces,
    states: States,
    store: StateStore,
    *,
    ridge: float,
    rough: bool = False,
    first: int = 0,
) -> MadeLayer:
    """Fit one layer to do to `states` what a group of layers did to theirs.

    Parameters
    ----------
    decoder : Decoder
    layers : list of DecoderLayer
        The group. The list is emptied, so that layers which nobody else holds are freed.
    traces : Traces
        Of calibration text that passed the group; its lists are emptied as they are used.
    states : sequence of tensors of shape (sequences B, tokens T, hidden)
        The same text in front of the layer that is made.
    store : StateStore
    ridge : float
    rough : bool
        Keep the largest channels, choose key-value groups in one round, and fit once in front of norms: many times
        faster, and good enough to compare groups.
    first : int
        Number of the group's first layer, for the report.

    Raises
    ------
    FitOverflow
        If a weight that was fitted, or what it is fitted to, is beyond its dtype.
    ValueError
        If the text is too little for a fit that is stable.
    """
    family, start = decoder.family, layers[0]
    device = start.mlp.down_proj.weight.device
    kinds = [family.layer_kind(layer) for layer in layers]
    states = on_device(states, start, store)  # the layers of a model on several devices come together on the first
    del start
    group: list[dict[str, Tensor]] = []
    while layers:
        weights = layer_weights(decoder, layers.pop(0))
        group.append({name: weight.to(device) for name, weight in weights.items()})

    half_fit = NormedHalfFit if family.mlp.after else HalfFit  # families have such norms in both halves, or in none
    attention = half_fit(decoder, family.mixer(kinds[0]), states, traces.attended, traces.failures, ridge, rough)
    kind, attended = fit_attention(attention, group, traces.attention_fits, kinds)
    fused = build_layer(decoder, attended.weights, kind)
    mid_states = store.keep(mid_state(decoder, fused, state) for state in states)
    del fused
    mlp = half_fit(decoder, family.mlp, mid_states, traces.output, traces.failures, ridge, rough)
    gated = fit_mlp(mlp, group, traces.mid_states)

    mixer = family.mixer(kind)
    own = (f"{mixer.module}.", *mixer.norms)
    fitted = {name: weight for name, weight in attended.weights.items() if name.startswith(own)}
    fitted |= gated.weights
    for name, weight in fitted.items():
        fitted[name] = weight.contiguous()
        decoder.processes.broadcast(fitted[name])
    return MadeLayer(fitted, kind, _read_entry(attended, gated, fitted, traces.failures, first))


def _read_entry(attended: FittedHalf, gated: FittedHalf, fitted: Weights, failures: Failures, first: int) -> FusedLayer:
    """The report's entry of a fit, or its error, for which the host waits once; `first` is as for `fit_group`."""
    errors = torch.stack([gated.error_before, gated.error_after, attended.error_after])
    finite = torch.stack([is_finite(weight) for weight in fitted.values()])
    errors, heads, channels, finite, codes = to_host(errors, attended.kept, gated.kept, finite, failures.codes())
    failures.check(codes.tolist())
    for (name, weight), holds in zip(fitted.items(), finite.tolist(), strict=True):
        if not holds:
            raise FitOverflow(f"The {name} that was fitted overflows {weight.dtype}; use a dtype of wider range.")
    error_before, error_after, attention_error = errors.tolist()
    shares = channels / channels.sum()
    return FusedLayer(
        layers=list(range(first, first + len(heads))),
        shares=shares.tolist(),
        heads_kept=heads.int().tolist(),
        channels_kept=channels.int().tolist(),
        error_before=error_before,
        error_after=error_after,
        attention_error=attention_error,
    )


def fit_attention(
    fit: HalfFit, group: Sequence[Weights], map_fits: list[InputMap | None], kinds: Sequence[Kind]
) -> tuple[Kind, FittedHalf]:
    """The attention of a group's layers as one, with the first layer's MLP; and the kind of the layer that it makes.

    Heads of layers of different kinds cannot be side by side. Where a norm is over all heads of a layer, they depend on
    each other; and where it comes behind rotary embeddings, its gains cannot move into heads' rows. Then all attention
    of one layer is kept. So is a hybrid's, or what is in its place.

    `map_fits` are of maps from what the fused layer's attention reads to what each layer's reads, None for the
    identity; the list is emptied.
    """
    maps = []
    while map_fits:
        map_fit = map_fits.pop(0)
        maps.append(None if map_fit is None else map_fit.solve(fit.ridge))
    if fit.decoder.family.linear:
        return _keep_one_mixer(fit, group, maps, kinds)
    whole = fit.decoder.family.head_norms in ("turned", "all") or any(kind != kinds[0] for kind in kinds)
    return _select_heads(fit, group, maps, kinds, whole=whole)


def _keep_one_mixer(
    fit: HalfFit, group: Sequence[Weights], maps: Sequence[Tensor | None], kinds: Sequence[Kind]
) -> tuple[Kind, FittedHalf]:
    """All that one layer has before its MLP: each layer's is fitted by itself, and the best fit is taken."""
    fitted = []
    for layer, input_map, kind in zip(group, maps, kinds, strict=True):
        alone = replace(fit, half=fit.decoder.family.mixer(kind))
        weights = {**layer, **stacked(alone.half, [layer], [input_map])}
        problem = alone.build_problem(weights, alone.writer_inputs(weights, kind))
        is_kept = torch.tensor([other is layer for other in group])
        num_kept = fit.decoder.family.num_key_heads(fit.decoder.config, kind) * is_kept
        fitted.append(FittedHalf(weights, num_kept, *alone.fit_writer(weights, problem, kind)))
    errors = torch.stack([half.error_after for half in fitted]).tolist()
    number = fit.decoder.processes.compute_once(lambda: errors.index(min(errors)))
    return kinds[number], fitted[number]


def _select_heads(
    fit: HalfFit, group: Sequence[Weights], maps: list[Tensor | None], kinds: Sequence[Kind], *, whole: bool
) -> tuple[Kind, FittedHalf]:
    """The best key-value groups, each with its query heads, of all layers; those of one layer where `whole`.

    `maps` is emptied, to make room.
    """
    half, count, family = fit.half, len(group), fit.decoder.family
    query_rows, key_rows = (len(group[0][f"self_attn.{name}.weight"]) for name in ("q_proj", "k_proj"))
    num_groups = key_rows // head_dim(fit.decoder.config)
    keep = 1 if whole else num_groups
    wide = {**group[0], **stacked(half, group, maps, fit.measure_sizes(group, maps, kinds))}
    if whole or family.head_norms:  # those of a layer are for its own heads, so each layer runs its own
        x_of = fit.joint_writer_inputs(group, maps, kinds)
    else:
        x_of = fit.writer_inputs(wide, kinds[0])
    problem = fit.build_problem(wide, x_of)
    maps.clear()
    del x_of
    block = query_rows // keep
    rounds = 1 if fit.rough else (count - 1) * keep
    kept = problem.prune(wide["self_attn.o_proj.weight"], keep, block=block, rounds=rounds)
    rows = {"q_proj": expanded(kept, block), "k_proj": expanded(kept, key_rows // keep)}
    weights = selected(half, wide, rows["q_proj"], rows["k_proj"], rows["k_proj"])
    kind = kinds[0]
    if whole:
        number = int(kept)
        kind = kinds[number]
        weights |= {f"{norm}.weight": group[number][f"{norm}.weight"] for norm in family.norms_of_heads}
    elif family.head_norms:  # one norm gives heads other sizes than their own ones did
        weights |= with_one_norm(group, wide, rows, family.norms_of_heads)
        problem = fit.build_problem(weights, fit.writer_inputs(weights, kind))
    errors = fit.fit_writer(weights, problem, kind)
    num_kept = _counts(kept, keep, count) * num_groups // keep
    return kind, FittedHalf(weights, num_kept, *errors)


def fit_mlp(fit: HalfFit, group: list[dict[str, Tensor]], read: list[States]) -> FittedHalf:
    """The MLPs of a group's layers as one: the best channels of all layers, and a down_proj for them.

    `group` has the layers' weights, and `read` the streams in front of their MLPs; both are emptied, to make room.
    """
    half, count, keep = fit.half, len(group), fit.decoder.config.intermediate_size
    maps = []
    while read:
        map_fit = InputMap(fit.decoder, half, group[0]["mlp.down_proj.weight"], fit.failures, fit.rough_tokens)
        for state, target in zip(fit.states, read.pop(0), strict=True):
            map_fit.add(state, target)
        maps.append(map_fit.solve(fit.ridge))
    sizes, width = fit.measure_sizes(group, maps), count * keep
    limit = keep if fit.rough else num_candidates(width, keep)
    channels = torch.arange(width, device=maps[0].device)
    if limit < width:
        channels = _largest(fit, stacked(half, group, [None] * count, sizes), maps, limit)
        of_layers = _counts(channels, keep, count).tolist()  # shapes, for which the host has to wait
        for number, chosen in enumerate(channels.split(of_layers)):
            rows = chosen - number * keep
            group[number] = selected(half, group[number], rows, rows)
    weights = stacked(half, group, maps, sizes)
    del maps
    group.clear()
    problem = fit.build_problem(weights, fit.writer_inputs(weights, kind=None))
    if len(channels) > keep:
        chosen = problem.prune(weights["mlp.down_proj.weight"], keep)
        channels = channels[chosen]
        weights = selected(half, weights, chosen, chosen)
    errors = fit.fit_writer(weights, problem, kind=None)
    return FittedHalf(weights, _counts(channels, keep, count), *errors)


def _largest(fit: HalfFit, wide: Weights, maps: Sequence[Tensor], limit: int) -> Tensor:
    """Sorted numbers of the channels of some MLPs side by side that write most to some of the tokens, `limit` of them.

    The maps are not folded into `wide`: to map what is read takes less than to map all that reads it.
    """
    half, down = fit.half, wide["mlp.down_proj.weight"]
    keep = down.shape[1] // len(maps)
    layers = [slice(number * keep, (number + 1) * keep) for number in range(len(maps))]
    # What each writes, squared; the norms are in float64, as the squares of weights may not be in range.
    norms = torch.cat([in_float64(part).norm(dim=0) for part in down.split(256, dim=1)]).float().to(down.device)
    size = torch.zeros(down.shape[1], device=down.device)
    for state in fit.states:
        some = state[:, ::TOKEN_STRIDE]
        token_weight = token_weights(fit.decoder, some)
        read = normalized(fit.decoder, half, some).flatten(0, 1)
        for rows, input_map in zip(layers, maps, strict=True):
            mapped = linear(read, input_map.to(read))
            x = gated_channels(fit.decoder, selected(half, wide, rows, rows), mapped)
            size[rows] += token_weight @ (x.float() * norms[rows]).square()
    fit.decoder.processes.all_reduce(size)
    return size.topk(limit).indices.sort().values


def _counts(kept: Tensor, each: int, layers: int) -> Tensor:
    """How many of `kept` are from each of some layers that had `each`: (layers,)."""
    numbers = torch.arange(layers, device=kept.device)[:, None]
    return (kept // each == numbers).sum(1)  # a count by bins would wait for their number
