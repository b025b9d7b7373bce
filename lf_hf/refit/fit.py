"""The mathematics of `refit`: one layer that does what a group of layers did.

A layer adds to the residual stream twice, by its attention and by its MLP, and each of these halves is fitted alike:

1. The group's halves are put side by side as one wide half. What each reads, it reads through a linear map, fitted from
   the stream in front of the fused layer to the stream that it read in the group (`HalfFit.input_maps`).
2. What the wide half has to write is what the group added to the stream: a least-squares problem y = W x, of which the
   sums over tokens are kept (`HalfFit.problem`, `Regression.add`). x is what the heads or channels compute, and W is
   what writes it to the stream, o_proj or down_proj.
3. Heads or channels are kept whose loss costs y least (`Regression.prune`).
4. W is solved for, with a penalty that pulls it towards the columns that were kept (`Regression.ridge`).

`fit_attention` and `fit_mlp` are these steps. This module does not know how groups are chosen, where states are kept or
how layers are loaded. What changes where a norm follows a half is in `normed_half`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lf_hf.decoder.interface import Decoder
from lf_hf.families import Half, Kind, Weights, head_dim
from lf_hf.refit.layer_parts import (
    HEAD_NORMS,
    attention_heads,
    build_layer,
    expanded,
    mlp_channels,
    normalized,
    selected,
    stacked,
    with_one_norm,
)
from lf_hf.refit.linalg import compacted, eliminated, power_of_two, saliency, solved
from lf_hf.runtime.launch import ALONE, Processes
from lf_hf.runtime.numerics import bfloat16_products, in_float64

# Of the largest channels, which regression compares: 6144, or 1.25 for each that is kept if that is more. Two float32
# squares of them are in memory at a time: 2.6 GB for a width of 14336.
_MAX_CANDIDATES = 6144
_CANDIDATES_PER_KEPT = 1.25
# Share of the weight of a sequence that its first token has in fits. All later tokens attend to it: layers that write
# its huge state, or take it away, do it for this token alone, and the model is lost where a fit misses it.
_FIRST_SHARE = 1 / 32
_SELECTION_RIDGE = 1e-2
_GRAM_ROWS = 512  # of a gram matrix that are added to at a time
_ROWS = 256  # of a weight that an error is summed over at a time, in float64
PRUNING_ROUNDS = 4
EXACT_LIMIT = 4096  # up to this size systems are solved in float64

WriterInputs = Callable[[Tensor], Tensor]
"""What the writer of a half reads, from the stream: states (sequences B, tokens T, hidden) -> (B * T, channels)."""


class FitOverflow(ValueError):
    """A weight that is fitted, or what it is fitted to, is beyond its dtype."""


def fit_attention(
    fit: HalfFit, group: Sequence[dict[str, Tensor]], kinds: Sequence[Kind]
) -> tuple[dict[str, Tensor], Kind, list[int] | None, float]:
    """The attention of a group's layers as one: the best heads of all layers, and an o_proj that writes what all wrote.

    What is kept or dropped as a whole is a key-value group with its queries, or else all attention of a layer: heads of
    layers of different kinds cannot be side by side, and where a norm is over all heads, they depend on each other.
    `group` and `kinds` are the layers' weights and kinds.

    Returns
    -------
    weights, kind
        Of the fused layer, with the first layer's MLP.
    heads_kept : list of int or None
        How many key-value groups are from each layer, where there are several layers.
    error : float
        Of what is written, squared and relative, as fitted.
    """
    decoder, half, norms, count = fit.decoder, fit.half, fit.decoder.family.head_norms, len(group)
    maps = fit.input_maps(group[0]["self_attn.o_proj.weight"])

    def reader_of(weights: Weights, kind: Kind) -> WriterInputs:
        return partial(attention_heads, decoder, build_layer(decoder, weights, kind))

    apart = count > 1 and (norms is not None or any(kind != kinds[0] for kind in kinds))
    readers = [
        reader_of({**weights, **stacked(half, [weights], [through])}, kind)
        for weights, through, kind in zip(group, maps, kinds, strict=True)
        if apart or half.after
    ]
    sizes = fit.sizes(group, readers)
    wide, kind, heads_kept = group[0] | stacked(half, group, maps, sizes), kinds[0], None
    if not apart:  # one layer runs the heads of all
        readers = [reader_of(wide, kind)]
    problem = fit.problem(wide, lambda state: torch.cat([of_layer(state) for of_layer in readers], dim=1))
    weights = wide
    readers.clear()
    del maps

    if count > 1:
        from_one_layer = norms == "all" or any(kind != kinds[0] for kind in kinds)
        kv_heads = len(group[0]["self_attn.k_proj.weight"]) // head_dim(decoder.config)
        units = 1 if from_one_layer else kv_heads  # of a layer
        queries, keys = (len(group[0][f"self_attn.{name}.weight"]) // units for name in ("q_proj", "k_proj"))
        rounds = 1 if fit.quick else (count - 1) * units
        kept = problem.prune(wide["self_attn.o_proj.weight"], units, block=queries, rounds=rounds)
        rows = {"q_proj": expanded(kept, queries), "k_proj": expanded(kept, keys)}
        weights = selected(half, wide, rows["q_proj"], rows["k_proj"], rows["k_proj"])
        heads_kept = [n * kv_heads // units for n in _counts(kept, units, count)]
        if from_one_layer:
            kind, norms_of = kinds[int(kept)], group[int(kept)]
            weights |= {name: norms_of[name] for name in HEAD_NORMS.values() if name in norms_of}
        elif norms:  # one norm gives heads other sizes than their own ones did
            weights |= with_one_norm(group, wide, rows)
            problem = fit.problem(weights, reader_of(weights, kind))
    _, error = fit.fit_writer(weights, reader_of(weights, kind), problem)
    return weights, kind, heads_kept, error


def fit_mlp(
    fit: HalfFit, group: list[dict[str, Tensor]], refit: str
) -> tuple[dict[str, Tensor], list[int] | None, tuple[float, float]]:
    """The MLPs of a group's layers as one: the best channels of all layers, and a down_proj for them.

    `group` has the layers' weights; it is emptied, to make room.

    Returns
    -------
    weights : dict
    channels_kept : list of int or None
        How many channels are from each layer, where there are several layers.
    errors : pair of float
        Of what is written, squared and relative: with the columns as they were, and fitted.
    """
    decoder, half, count, keep = fit.decoder, fit.half, len(group), fit.decoder.config.intermediate_size
    maps = fit.input_maps(group[0]["mlp.down_proj.weight"]) if refit == "projections" else None
    alone = [stacked(half, [layer], maps and [maps[n]]) for n, layer in enumerate(group)] if half.after else group
    sizes = fit.sizes(alone, [partial(mlp_channels, decoder, weights) for weights in alone])
    weights = stacked(half, group, maps, sizes)
    del maps, alone
    group.clear()
    width = weights["mlp.down_proj.weight"].shape[1]
    channels = _largest(fit, weights, keep if fit.quick else num_candidates(width, keep))
    if len(channels) < width:
        weights = selected(half, weights, channels, channels)
    problem = fit.problem(weights, partial(mlp_channels, decoder, weights))
    if len(channels) > keep:
        chosen = problem.prune(weights["mlp.down_proj.weight"], keep)
        channels, weights = channels[chosen], selected(half, weights, chosen, chosen)
    if refit == "none":
        errors = (problem.relative_error(weights["mlp.down_proj.weight"]),) * 2
    else:
        errors = fit.fit_writer(weights, partial(mlp_channels, decoder, weights), problem)
    return weights, _counts(channels, keep, count) if count > 1 else None, errors


def _largest(fit: HalfFit, weights: Weights, limit: int) -> Tensor:
    """Sorted numbers of the channels of an MLP that write most, `limit` of them."""
    down = weights["mlp.down_proj.weight"]
    if limit == down.shape[1]:
        return torch.arange(limit, device=down.device)
    # What each writes, squared; the norms are in float64, as the squares of weights may not be in range.
    norms = torch.cat([in_float64(part).norm(dim=0) for part in down.split(256, dim=1)]).float().to(down.device)
    size = torch.zeros(down.shape[1], device=down.device)
    for state in fit.states:
        written = mlp_channels(fit.decoder, weights, state).float() * norms
        size += token_weights(fit.decoder, state) @ written.square()
    fit.decoder.processes.all_reduce(size)
    return size.topk(limit).indices.sort().values


def num_candidates(channels: int, keep: int) -> int:
    """How many MLP channels of a group are compared by regression, where `keep` of them are kept."""
    return min(channels, max(_MAX_CANDIDATES, int(_CANDIDATES_PER_KEPT * keep)))


@dataclass(frozen=True)
class HalfFit:
    """The fit of one half of a layer: what it is given, and what is asked of it.

    States are tensors of shape (sequences B, tokens T, hidden), of this process's share of the text.
    """

    decoder: Decoder
    half: Half
    states: Sequence[Tensor]  # the stream in front of the half that is made
    inputs: list[Sequence[Tensor]]  # the stream in front of the same half of each layer of the group
    targets: Callable[[], Iterable[Tensor]]  # gives the stream as it should be after the half, batch by batch
    ridge: float
    quick: bool = False

    def input_maps(self, weight: Tensor) -> list[Tensor]:
        """For each layer a map, near the identity, from what the half reads to what it read in the group.

        Of shape (hidden, hidden), float32 at least. `weight` is one of the layer's, for device and dtype.
        """
        identity = torch.eye(self.decoder.config.hidden_size, device=weight.device)
        maps = []
        for inputs in self.inputs:
            if inputs is self.states:
                maps.append(identity)
                continue
            problem = self._empty(identity.shape, weight)
            for state, target in zip(self.states, inputs, strict=True):
                token_weight = token_weights(self.decoder, target)
                if self.half.before:  # which makes all tokens alike
                    token_weight = _with_first_share(torch.ones(state.shape[:2], device=state.device))
                x, y = (normalized(self.decoder, self.half, part).flatten(0, 1) for part in (state, target))
                problem.add(x, y, token_weight)
            problem.complete()
            maps.append(problem.ridge(identity, self.ridge).to(weight.device))
        return maps

    def problem(self, weights: Weights, x_of: WriterInputs) -> Regression:
        """The least-squares problem of the half's writer, which is in `weights` as it is."""
        start = weights[f"{self.half.writer}.weight"]
        problem = self._empty(start.shape, start)
        for state, target in zip(self.states, self.targets(), strict=True):
            problem.add(*self.equations(weights, x_of(state), target, state))
        problem.complete()
        return problem

    def _empty(self, shape: tuple[int, ...], like: Tensor) -> Regression:
        return Regression(shape[1], shape[0], like.device, like.dtype, self.decoder.processes)

    def fit_writer(self, weights: dict[str, Tensor], x_of: WriterInputs, problem: Regression) -> tuple[float, float]:
        """Fit the half's writer in `weights`, which reads what `x_of` gives; the errors before and after."""
        name = f"{self.half.writer}.weight"
        start = weights[name]
        before = problem.relative_error(start)
        fitted = problem.ridge(start, self.ridge)
        weights[name] = fitted.to(start)
        return before, problem.relative_error(fitted)

    def sizes(self, group: Sequence[Weights], readers: Sequence[WriterInputs]) -> list[float] | None:
        """For `stacked`: what each layer's half writes has a size of its own only where it goes through a norm."""
        return None

    def equations(self, weights: Weights, x: Tensor, target: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, y and the weight of each token: (B * T, channels), (B * T, hidden) and (B * T,)."""
        y, bias = self.residual_update(target, state), weights.get(f"{self.half.writer}.bias")
        return x, y if bias is None else y - bias, token_weights(self.decoder, target)

    def residual_update(self, target: Tensor, state: Tensor) -> Tensor:
        """What the half should add to the stream: (sequences B, tokens T, hidden) -> (B * T, hidden)."""
        return (target - state).flatten(0, 1) / self.decoder.family.residual_factor(self.decoder.config)


def token_weights(decoder: Decoder, states: Tensor) -> Tensor:
    """1 / mean square of each token's state (sequences B, tokens T, hidden), as the next norm divides by it.

    So all tokens count alike, however large their states are, but a sequence's first one, which counts as T / 32
    tokens. The shape is (B * T,).
    """
    return _with_first_share((states.float().square().mean(-1) + decoder.config.rms_norm_eps).reciprocal())


def _with_first_share(token_weight: Tensor) -> Tensor:
    """Token weights of sequences, of shape (B, tokens T), with more of it on the first ones, as (B * T,); in place."""
    token_weight[:, 0] *= max(1, _FIRST_SHARE * token_weight.shape[1])
    return token_weight.flatten()


def _counts(kept: Tensor, each: int, layers: int) -> list[int]:
    """How many of `kept` are from each of some layers that had `each`."""
    return torch.bincount(kept // each, minlength=layers).tolist()


class Regression:
    """Sums of a weighted least-squares problem y = W x, from which W and its error follow.

    Parameters
    ----------
    inputs, outputs : int
        How many numbers x and y have.
    device : torch.device
        The sums are on the CPU where it, Apple's mps, has no float64 to solve the problem in.
    dtype : torch.dtype
        In which x and y are computed. Sums are in float32 at least, and of bfloat16 products where this is bfloat16.
    processes : Processes
        Those that each add a share of the tokens, and then solve the same problem.

    Attributes
    ----------
    gram : tensor of shape (inputs m, inputs m)
        Sum of weight * x x^T over tokens, with x in units of `unit`. Until `complete` it lacks what is left of blocks
        on the diagonal.
    cross : tensor of shape (outputs d, inputs m)
        Sum of weight * y x^T, likewise.
    energy : float64 tensor of shape ()
        Sum of weight * |y|^2.
    unit : float32 tensor of shape ()
        A power of two near the largest of the first x, so that squares are in range; 1 before there is one.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        processes: Processes = ALONE,
    ) -> None:
        device = torch.device("cpu") if device.type == "mps" else device
        wide = torch.promote_types(dtype, torch.float32)
        self.gram, self.cross = (torch.zeros(rows, inputs, dtype=wide, device=device) for rows in (inputs, outputs))
        self.energy = torch.zeros((), dtype=torch.float64, device=device)
        self.unit, self._scaled = torch.ones((), device=device), False
        self._processes, self._of_bfloat16 = processes, dtype == torch.bfloat16

    def add(self, x: Tensor, y: Tensor, token_weight: Tensor) -> None:
        """Add tokens: x (tokens T, inputs m), y (tokens T, outputs d), token_weight (tokens T,)."""
        x, y, token_weight = (part.to(self.gram.device) for part in (x, y, token_weight.float()))
        root = token_weight.sqrt()[:, None]
        if not self._scaled:
            # Row by row, as a product with all of x would be a copy of it. Rounding keeps the order of products.
            largest = (torch.linalg.vector_norm(x, torch.inf, dim=1).float() * root[:, 0]).amax()
            self.unit, self._scaled = power_of_two(largest), True
        # A product with float32 is the one copy of half-precision numbers.
        x, y = ((part * root).to(self.gram.dtype) for part in (x, y))
        x *= self.unit.reciprocal()
        with bfloat16_products(self._of_bfloat16):
            for first, rows in self._blocks():  # half of a symmetric matrix: as fast again
                rows[:, first:].addmm_(x[:, first : first + len(rows)].T, x[:, first:])
            self.cross.addmm_(y.T, x)
        for rows in y.split(_ROWS):
            self.energy += rows.double().square_().sum()

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Blocks of rows of the gram matrix, and where each begins."""
        return zip(range(0, len(self.gram), _GRAM_ROWS), self.gram.split(_GRAM_ROWS), strict=True)

    def complete(self) -> None:
        """Add up the sums of all processes, in each of them, after the last tokens."""
        for first, rows in self._blocks():
            end = first + len(rows)
            self.gram[end:, first:end] = rows[:, end:].T
        if self._processes.world_size == 1:
            return
        units = self._processes.all_gather_object(float(self.unit) if self._scaled else 0.0)
        unit = max(units) or 1.0
        scale = units[self._processes.rank] / unit  # a power of two, so that nothing is rounded
        self.unit = torch.full_like(self.unit, unit)
        for sums in (self.gram.mul_(scale**2), self.cross.mul_(scale), self.energy):
            self._processes.all_reduce(sums)

    def relative_error(self, weight: Tensor) -> float:
        """Weighted sum of |y - W x|^2 over that of |y|^2, for W of shape (outputs d, inputs m)."""
        left = self.energy.clone()
        for rows, cross in zip(weight.split(_ROWS), self.cross.split(_ROWS), strict=True):
            rows = self._in_units(rows)
            left += ((rows @ self.gram).double() - 2 * cross.double()).mul_(rows).sum()
        error, energy = torch.stack([left, self.energy]).tolist()
        if energy == 0:
            return math.inf if error else 0.0
        return error / energy

    def ridge(self, start: Tensor, strength: float) -> Tensor:
        """The W that minimises sum |y - W x|^2 + strength * mean(diag(gram)) * |W - start|^2.

        `start`, of shape (outputs d, inputs m), is where the penalty pulls to.
        """
        start = self._in_units(start)
        factor = self._factor(strength)
        residual = torch.addmm(self.cross, start, self.gram, alpha=-1).to(factor.dtype)  # (d, m)
        start += solved(factor, residual.T).T.to(start.dtype)
        return start.div_(self.unit)

    def prune(self, start: Tensor, keep: int, *, block: int = 1, rounds: int = PRUNING_ROUNDS) -> Tensor:
        """Restrict the problem to the `keep` blocks of `block` adjacent inputs whose loss costs it least.

        Backward elimination: in each of some rounds the blocks of smallest saliency are dropped together. For one
        input k it is |w_k|^2 / (inverse gram)_kk, with w_k its column of the ridge solution: the increase in squared
        error if it goes and all others adapt (the optimal brain surgeon's measure). For a block it is
        trace(W_b (inverse gram)_bb^-1 W_b^T). The inverse is computed once and updated with each round, so the small
        ridge in it is that of the whole problem in all of them. Memory: the gram matrix and one more of its size.

        Parameters
        ----------
        start : tensor of shape (outputs d, inputs m)
            Where the ridge penalty pulls to.

        Returns
        -------
        int64 tensor of shape (keep,)
            Sorted block numbers.
        """
        total = self.gram.shape[0] // block
        blocks = torch.arange(total, device=self.gram.device)
        factor = self._factor(_SELECTION_RIDGE)
        pull = _SELECTION_RIDGE * self.gram.diagonal().mean()
        target = self._in_units(start).mul_(pull).add_(self.cross).to(factor.dtype)
        weight = solved(factor, target.T)  # W^T (m, d)
        inverse = torch.cholesky_inverse(factor, out=factor)  # (m, m)
        del factor, target
        # How many are left too many after each round, in which some are dropped.
        for surplus in sorted({(total - keep) * step // rounds for step in range(rounds)}, reverse=True):
            size = keep + surplus
            dropped = saliency(inverse, weight, block).argsort(descending=True)[size:].sort().values
            # Those that are left among the last take the places of those that are dropped: few are moved.
            last = torch.arange(size, len(blocks), device=blocks.device)
            last = last[torch.isin(last, dropped).argsort(stable=True)]
            if surplus:
                inverse, weight = eliminated(inverse, weight, expanded(dropped, block), expanded(last, block))
            blocks[dropped] = blocks[last]
            blocks = blocks[:size]
        del inverse, weight
        blocks = blocks.sort().values
        self._processes.broadcast(blocks)  # in case machines round differently
        index = expanded(blocks, block)
        self.gram, self.cross = compacted(self.gram, index), self.cross[:, index]
        return blocks

    def _in_units(self, weight: Tensor) -> Tensor:
        """A weight that is for x, as one for x in units of `unit`."""
        return weight.to(self.gram, copy=True).mul_(self.unit)

    def _factor(self, strength: float) -> Tensor:
        """Cholesky factor of the gram matrix plus the ridge."""
        matrix = self.gram.to(torch.float64 if len(self.gram) <= EXACT_LIMIT else torch.float32, copy=True)
        matrix.diagonal().add_(strength * self.gram.diagonal().mean() + torch.finfo(torch.float32).tiny)
        # In place: the transpose of a symmetric matrix has the layout that LAPACK takes.
        factor, info = torch.linalg.cholesky_ex(
            matrix.mT, out=(matrix.mT, torch.empty((), dtype=torch.int32, device=matrix.device))
        )
        if info.item():
            if not torch.isfinite(self.gram.diagonal()).all():
                raise FitOverflow("The activations of a layer that is refitted overflow; use a dtype of wider range.")
            raise ValueError(f"ridge={strength:g} is too small for a stable fit to this calibration text; raise it.")
        return factor
