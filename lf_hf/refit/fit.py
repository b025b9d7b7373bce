"""The mathematics of `refit`: one layer that does what a group of layers did.

A layer adds to the residual stream twice, by its attention and by its MLP, and each of these halves is fitted alike:

1. The group's halves are put side by side as one wide half. What each reads, it reads through a linear map, fitted from
   the stream in front of the fused layer to the stream that it read in the group (`solve_maps`).
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
from functools import partial
from itertools import compress

import torch
from torch import Tensor
from torch.nn.functional import linear

from lf_hf.decoder.decoder import Decoder
from lf_hf.decoder.demand import Setup, Work, times
from lf_hf.families.table import DecoderLayer, Kind, Weights
from lf_hf.refit.experts import fit_experts, fitting_experts
from lf_hf.refit.half_fit import FittedHalf, HalfFit, Problem, maps_to, solve_maps, token_weights
from lf_hf.refit.layer_parts import (
    build_layer,
    combined_channels,
    folded,
    mid_state,
    normalized,
    selected,
    stacked,
    stacked_writers,
    with_gain,
    with_heads,
    with_one_norm,
    with_shared_gain,
)
from lf_hf.refit.regression import FitError, Solver, solving
from lf_hf.refit.states import States, drained, keep
from lf_hf.refit.traces import Traces
from lf_hf.report.data import FusedLayer, MadeLayer
from lf_hf.runtime.amounts import TOKEN_STRIDE, num_candidates
from lf_hf.runtime.numerics import is_finite, to_host


@torch.no_grad()
def fit_group(
    decoder: Decoder,
    layers: list[DecoderLayer],
    traces: Traces,
    states: States,
    *,
    ridge: float,
    first: int = 0,
) -> MadeLayer:
    """Fit one layer to do to `states` what a group of layers did to theirs.

    `traces` are of calibration text that passed the group, and `states` (sequences B, tokens T, hidden) the same text
    in front of the layer that is made. The layers, whose first has the number `first`, and the traces are `drained`.

    A rough fit keeps the largest channels, chooses key-value groups in one round, and fits once in front of norms: many
    times faster, and good enough to compare groups.

    Raises FitError if a weight that was fitted, or what it is fitted to, is beyond its dtype, or the text is too little
    for a fit that is stable.
    """
    family, device = decoder.family, decoder.family.writer_weight(layers[0]).device
    kinds = [family.layer_kind(layer) for layer in layers]
    if states and states[0].device != device:  # the layers of a model on several devices come together on the first
        states = keep(decoder, (state.to(device) for state in states))
    group = [{name: weight.to(device) for name, weight in family.unpacked(layer).items()} for layer in drained(layers)]

    attention = HalfFit(decoder, family.mixer(kinds[0]), states, traces.attended, traces.solver, ridge)
    kind, attended = fit_attention(attention, group, traces.attention_maps, kinds)
    fused = build_layer(decoder, attended.weights, kind)
    mid_states = keep(decoder, (mid_state(decoder, fused, state) for state in states))
    del fused
    mlp = HalfFit(decoder, family.mlp, mid_states, traces.output, traces.solver, ridge, traces.scale)
    gated = (fit_experts if family.mlp.experts else fit_mlp)(mlp, group, traces.mid_states)

    fitted = attended.weights | gated.weights
    if family.scalar:
        fitted[family.scalar] = torch.as_tensor(traces.scale)
    for name, weight in fitted.items():
        fitted[name] = weight.contiguous()
    return MadeLayer(fitted, kind, _read_entry(attended, gated, fitted, traces.solver, first))


def _read_entry(attended: FittedHalf, gated: FittedHalf, fitted: Weights, solver: Solver, first: int) -> FusedLayer:
    """The report's entry of a fit, or its error, for which the host waits once; `first` is as for `fit_group`."""
    errors = torch.stack([gated.error_before, gated.error_after, attended.error_after])
    finite = torch.stack([is_finite(weight) for weight in fitted.values()])
    errors, heads, channels, finite, codes = to_host(errors, attended.kept, gated.kept, finite, solver.codes())
    solver.check(codes.tolist())
    for (name, weight), holds in zip(fitted.items(), finite.tolist(), strict=True):
        if not holds:
            raise FitError(f"The {name} that was fitted overflows {weight.dtype}; use a dtype of wider range.")
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
        experts_unreached=gated.unreached,
    )


def fit_attention(
    fit: HalfFit, group: Sequence[Weights], problems: list[Problem], kinds: Sequence[Kind]
) -> tuple[Kind, FittedHalf]:
    """The attention of a group's layers as one, with the first layer's MLP; and the kind of the layer that it makes.

    Where layers differ in what they have there, as attention and Gated DeltaNet, those that are alike are fitted by
    themselves, and the best fit is taken. `problems` is a list of one, of maps from what the fused layer's attention
    reads to what theirs read.
    """
    family = fit.decoder.family
    maps = [None, *solve_maps(problems.pop(), fit.ridge)][-len(group) :]  # None for a first layer that reads the same
    layers = [
        folded(family.mixer(kind), weights, input_map)
        for weights, input_map, kind in zip(group, maps, kinds, strict=True)
    ]
    del maps
    shapes = [{name: weight.shape for name, weight in weights.items()} for weights in layers]
    different = [shape for number, shape in enumerate(shapes) if shape not in shapes[:number]]
    if len(different) > 1:
        layers = with_shared_gain(fit.half, layers)
    fitted = []
    for of_layer in different:
        alone = replace(fit, half=family.mixer(kinds[shapes.index(of_layer)]))
        is_alike = [shape == of_layer for shape in shapes]
        kind, half = _select_heads(alone, [*compress(layers, is_alike)], [*compress(kinds, is_alike)])
        counts = iter(half.kept)
        kept = torch.stack([next(counts) if alike else half.kept.new_zeros(()) for alike in is_alike])
        fitted.append((kind, half._replace(kept=kept)))
    if len(fitted) == 1:  # for which the host does not wait
        return fitted[0]
    return fitted[int(torch.stack([half.error_after for _, half in fitted]).argmin())]


def _select_heads(fit: HalfFit, layers: Sequence[dict[str, Tensor]], kinds: Sequence[Kind]) -> tuple[Kind, FittedHalf]:
    """The best key-value groups, each with its query heads, of all layers; or all those of one layer.

    Heads of layers of different kinds cannot be side by side. Where a norm is over all heads of a layer, they depend on
    each other; and where it comes behind rotary embeddings, keys are values too, or queries have gates beside them, as
    in hybrids, its gains cannot move into heads' rows. Then all attention of one layer is kept.
    """
    half, count, family = fit.half, len(layers), fit.decoder.family
    is_attention = half is family.attention
    whole = family.head_norms in ("turned", "all") or family.delta_net is not None
    whole |= any(kind != kinds[0] for kind in kinds) or "self_attn.v_proj.weight" not in layers[0]
    whole &= is_attention
    num_groups = family.num_key_heads(fit.decoder.config, kinds[0])
    keep = 1 if whole else num_groups
    wide = layers[0] | stacked_writers(half, layers, fit.measure_sizes(layers, kinds))
    parts = [fit.writer_inputs(weights, kind) for weights, kind in zip(layers, kinds, strict=True)]
    problem = fit.build_problem(wide, lambda state: torch.cat([part(state) for part in parts], dim=1))
    start = wide[f"{half.writer}.weight"]
    rounds = 1 if fit.solver.rough_tokens else (count - 1) * keep
    kept = problem.prune(start, keep, block=start.shape[1] // (count * keep), rounds=rounds)
    weights = with_heads(half, layers, wide, kept, keep)
    kind = kinds[0]
    if whole:
        if any(other != kind for other in kinds):  # else the host does not wait
            kind = kinds[int(kept)]
        norms = [f"{norm}.weight" for norm in family.norms_of_heads]
        weights |= {name: torch.stack([layer[name] for layer in layers])[kept].squeeze(0) for name in norms}
    elif is_attention and family.head_norms:  # one norm gives heads other sizes than their own ones did
        weights |= with_one_norm(layers, weights, kept // keep, family.norms_of_heads)
        problem = fit.build_problem(weights, fit.writer_inputs(weights, kind))
    return kind, fit.fit_writer(weights, _counts(kept, keep, count) * num_groups // keep, problem, kind)


def fit_mlp(fit: HalfFit, group: list[dict[str, Tensor]], read: list[States]) -> FittedHalf:
    """The MLPs of a group's layers as one: the best channels of all layers, and a down_proj for them.

    `group` has the layers' weights, and `read` the streams in front of their MLPs.
    """
    half, count, keep = fit.half, len(group), fit.decoder.family.mlp_width(fit.decoder.config)
    maps = maps_to(fit, [*drained(read)], group[0][f"{half.writer}.weight"])
    sizes = fit.measure_sizes(map(partial(folded, half), group, maps), [None] * count)
    limit = keep if fit.solver.rough_tokens else num_candidates(count * keep, keep)
    channels = torch.arange(count * keep, device=maps[0].device)
    if limit < len(channels):
        channels = _largest(fit, group, sizes, maps, limit)
        of_layers = _counts(channels, keep, count).tolist()  # shapes, for which the host has to wait
        for number, chosen in enumerate(channels.split(of_layers)):
            rows = chosen - number * keep
            group[number] = selected(half, group[number], *[rows] * len(half.readers))
    group = [folded(half, weights, input_map) for weights, input_map in zip(drained(group), drained(maps), strict=True)]
    weights = stacked(half, group, sizes)
    del group
    problem = fit.build_problem(weights, fit.writer_inputs(weights, kind=None))
    if len(channels) > keep:
        chosen = problem.prune(weights[f"{half.writer}.weight"], keep)
        channels = channels[chosen]
        weights = selected(half, weights, *[chosen] * len(half.readers))
    return fit.fit_writer(weights, _counts(channels, keep, count), problem, kind=None)


def _largest(
    fit: HalfFit, group: Sequence[Weights], sizes: Tensor | None, maps: Sequence[Tensor], limit: int
) -> Tensor:
    """Sorted numbers of the channels of some MLPs side by side that write most to some of the tokens, `limit` of them.

    The maps are not folded into the layers: to map what is read takes less than to map all that reads it.
    """
    half, decoder = fit.half, fit.decoder
    down = stacked_writers(half, group, sizes)[f"{half.writer}.weight"]
    norms = torch.cat([part.float().square().sum(0) for part in down.split(256, dim=1)]).sqrt()  # of what each writes
    maps = [
        with_gain(weights, half.gain(half.readers[0]), input_map).to(down)
        for weights, input_map in zip(group, maps, strict=True)
    ]
    size = torch.zeros_like(norms)
    for state in fit.states:
        some = state[:, ::TOKEN_STRIDE]
        token_weight = token_weights(decoder, some)
        read = normalized(decoder, half, some).flatten(0, 1)
        parts = zip(size.chunk(len(maps)), norms.chunk(len(maps)), group, maps, strict=True)
        for of_layer, written, weights, input_map in parts:
            x = combined_channels(decoder, weights, linear(read, input_map))
            of_layer += token_weight @ (x.float() * written).square()
    return size.topk(limit).indices.sort().values


def _counts(kept: Tensor, each: int, layers: int) -> Tensor:
    """How many of `kept` are from each of some layers that had `each`: (layers,)."""
    numbers = torch.arange(layers, device=kept.device)[:, None]
    return (kept // each == numbers).sum(1)  # a count by bins would wait for their number


def fitting(setup: Setup, length: int, tokens: int, joined: int, *, is_rough: bool) -> tuple[int, Work]:
    """Bytes, but for lists of states, and work of the fit of `joined` layers as one, to sequences of `length`."""
    shape, batch = setup.shape, setup.batch(length, tokens)
    hidden, mlp, size = shape.hidden, shape.mlp, shape.size
    heads, matrices = joined * shape.queries, shape.readers + 1
    of_maps, of_heads, work = _fitting_heads(setup, tokens, joined, is_rough=is_rough)
    if shape.experts:
        of_experts, expert_work = fitting_experts(setup, tokens, joined, is_rough=is_rough)
        return batch * heads * (matrices * size + 4) + max(of_maps, of_heads, of_experts), work + expert_work
    wide = joined * mlp
    compared = mlp if is_rough else num_candidates(wide, mlp)
    # The maps, a reader in float32, and the wide half in its own numbers; then its compared channels, twice.
    widened = 4 * joined * hidden**2 + 8 * hidden * mlp + matrices * hidden * max(wide, 2 * compared) * size
    chosen = matrices * hidden * (compared + mlp) * size
    solved = partial(solving, setup, tokens, is_rough=is_rough)
    of_channels, channel_work = solved(compared, mlp, hidden)
    if shape.has_norm_after:  # the second problem beside the first one
        of_channels += 4 * (mlp**2 + hidden * mlp)
    channels = batch * max(compared, heads) * (matrices * size + 4)  # of readers, and their product
    inside = channels + max(widened, of_maps, chosen + of_channels, chosen + of_heads)
    work += Work({setup.own_product: 2 * hidden**2 * shape.readers * compared})
    if compared < wide:  # by some of the tokens
        work += Work(layer=tokens // TOKEN_STRIDE * hidden * (2 * shape.readers * wide + 2 * joined * hidden))
    work += Work(layer=2 * shape.readers * tokens * hidden * compared) + channel_work
    if shape.has_norm_after:
        work += Work(layer=12 * tokens * hidden * (mlp + shape.queries))
        if not is_rough:
            work += solved(mlp, mlp, hidden)[1]
    return inside, work


def _fitting_heads(setup: Setup, tokens: int, joined: int, *, is_rough: bool) -> tuple[int, int, Work]:
    """Bytes of maps and of attention's problem, and all work of a fit but for that of the MLP by itself."""
    shape = setup.shape
    solved = partial(solving, setup, tokens, is_rough=is_rough)
    of_maps, map_work = solved(shape.hidden, shape.hidden, joined * shape.hidden)
    of_heads, head_work = solved(joined * shape.queries, shape.queries, shape.hidden)
    rows = joined * (shape.queries + 2 * shape.keys)  # of readers
    work = setup.forward(tokens, 0 if is_rough else joined)  # in choosing layers run once for all groups
    work += times(map_work, 2) + head_work
    work += Work({setup.own_product: 2 * shape.hidden**2 * rows})
    work += Work(layer=2 * tokens * shape.hidden * rows * (1 + shape.has_head_norms))
    return of_maps, of_heads, work
