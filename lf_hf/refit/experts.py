"""The fit of layers with experts: one layer's router and experts stand for a group's, and what they write is fitted.

An expert e writes p_e(u) D_e h_e(u) for the tokens u that the router gives it. So what all of them write is linear in
all D_e together, and they are fitted as one least-squares problem, with one penalty: experts that few tokens reach stay
nearly as they were. Its sums over tokens would be too large to keep, so it is solved expert by expert, each to what the
others leave (block Gauss-Seidel); after two sweeps over the experts little is left to gain.

The layer whose router and experts are kept is the one whose experts come nearest after the first sweep. In it the
channels of other layers' experts compete with its own, as all layers' channels do where there are no experts: beside
each expert stand the two of each other layer that worked most on its tokens, and the best channels of all stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from lf_hf.decoder.demand import Setup, Work, times
from lf_hf.families.shape import Shape
from lf_hf.families.table import Weights
from lf_hf.refit.half_fit import FittedHalf, HalfFit, Problem, maps_to
from lf_hf.refit.layer_parts import build_module, folded, normalized, with_shared_gain
from lf_hf.refit.regression import DualRegression, Regression, solving
from lf_hf.refit.states import States, drained
from lf_hf.runtime.amounts import MAX_CANDIDATES, solved_in_tokens
from lf_hf.runtime.numerics import bfloat16_products, in_float64

_ROWS = 8192  # tokens of an expert that are in float32 at a time
_NEAR = 1e-3  # ridge by which what experts get of tokens is told apart
_PARTNERS = 2  # experts of each other layer whose channels compete with those of one
_BUSIEST = 4  # times as many tokens as the mean that the busiest expert is given, about


def fit_experts(fit: HalfFit, group: list[dict[str, Tensor]], read: list[States]) -> FittedHalf:
    """The experts of a group's layers as one layer's.

    `group` has the layers' weights, and `read` the streams in front of their experts.
    """
    maps = maps_to(fit, [*drained(read)], group[0][f"{fit.half.writer}.weight"])
    normed = torch.cat([normalized(fit.decoder, fit.half, state).flatten(0, 1) for state in fit.states])
    competes = not fit.half.after and not fit.solver.rough_tokens
    best: tuple[float, _Mixture] | None = None
    nearest: list[tuple[float, list[_Block]]] = []  # as many as compete, the best one first
    group[:] = with_shared_gain(fit.half, group)
    for number, (weights, input_map) in enumerate(zip(drained(group), drained(maps), strict=True)):
        mixture = _Mixture(fit, folded(fit.half, weights, input_map), normed, number)
        mixture.sweep()
        error = float(mixture.error)
        if competes:
            nearest.append((error, mixture.as_given()))
            nearest.sort(key=lambda pair: pair[0])
            del nearest[max(1, MAX_CANDIDATES // nearest[0][1][0].start.shape[1]) :]
        if best is None or error < best[0]:
            best = error, mixture
        count = number + 1
    assert best is not None
    _, mixture = best
    error_before, error_after = mixture.error_before, mixture.error
    if not fit.solver.rough_tokens:
        if fit.half.after:  # sizes in front of norms are known better now
            mixture = _Mixture(fit, mixture.weights, normed, mixture.layer)
        else:
            mixture.compete([given for _, given in nearest[1:]])
        nearest.clear()
        mixture.sweep()
        error_after = mixture.error
    if fit.half.after:
        mixture.fit_gain()
    kept = torch.tensor([mixture.kept[number] for number in range(count)])
    return FittedHalf(mixture.weights, kept, error_before, error_after, mixture.unreached)


class _Block(NamedTuple):
    """An expert of a layer, or an MLP beside experts that works on all tokens."""

    layer: int  # number in the group
    readers: list[tuple[Tensor, Tensor | None]]  # weights (channels, hidden) and biases
    writer: Tensor  # (hidden, channels): a view of what is fitted
    start: Tensor  # as it was
    bias: Tensor | None  # of the writer
    after: str  # norm that what it writes goes through, or ""
    tokens: Tensor  # numbers of those that it works on, (n,)
    shares: Tensor  # float32, which what it writes for each is multiplied by, (n,)

    def parts(self) -> Iterator[_Block]:
        """The same of some tokens at a time."""
        for tokens, shares in zip(self.tokens.split(_ROWS), self.shares.split(_ROWS), strict=True):
            yield self._replace(tokens=tokens, shares=shares)

    def beside(self, others: Sequence[_Block]) -> _Block:
        """One with the channels of others behind its own, for the same tokens; it writes as this one does."""
        weights, biases = zip(*(zip(*block.readers, strict=True) for block in (self, *others)), strict=True)
        readers = [
            (torch.cat(weight), torch.cat(bias) if bias[0] is not None else None)
            for weight, bias in zip(zip(*weights, strict=True), zip(*biases, strict=True), strict=True)
        ]
        return self._replace(readers=readers, start=torch.cat([block.start for block in (self, *others)], dim=1))


def _block(
    layer: int, weights: Weights, module: str, start: Tensor, after: str, tokens: Tensor, shares: Tensor
) -> _Block:
    readers, writer = (f"{module}.gate_proj", f"{module}.up_proj"), f"{module}.down_proj"
    pairs = [(weights[f"{name}.weight"], weights.get(f"{name}.bias")) for name in readers]
    bias = weights.get(f"{writer}.bias")
    return _Block(layer, pairs, weights[f"{writer}.weight"], start, bias, after, tokens, shares)


class _Mixture:
    """One layer's experts, as they are fitted, and what they leave of the target.

    `layer` is its number in the group. `unreached` counts the experts that no token is given to, and `kept` the
    channels from each layer.
    """

    def __init__(self, fit: HalfFit, weights: Weights, read: Tensor, layer: int) -> None:
        names = fit.half.parameter_names
        self.weights = {name: weight for name, weight in weights.items() if name in names}
        for name, weight in self.weights.items():
            if name.endswith("_proj.bias"):  # the layer's own, unlike matrices that are folded, which change here
                self.weights[name] = weight.clone()
        self._fit, self._read, self.layer = fit, read, layer  # the latter by router and experts, (tokens T, hidden)
        equations = [fit.to_write(weights, *of_batch) for of_batch in zip(fit.targets, fit.states, strict=True)]
        self._left = torch.cat([y.float() for y, _ in equations])  # what is left to write, (T, hidden)
        self._weight = torch.cat([token_weight.float() for _, token_weight in equations])  # (T,)
        self._energy = self._weighted_square(self._left)
        self._as_given = sorted(self._make_blocks(), key=lambda block: -len(block.tokens))  # busiest first
        self._blocks = self._as_given  # with shares as norms behind them leave them
        self.unreached = sum(len(block.tokens) == 0 for block in self._blocks)
        self.kept = Counter({layer: sum(block.writer.shape[1] for block in self._blocks)})
        if fit.half.after:
            _, factors = self._written()
            self._blocks = [
                block._replace(shares=block.shares * factor[block.tokens])
                for block, factor in zip(self._blocks, factors, strict=True)
            ]
        squares = torch.zeros((), device=self._left.device)
        for part in chain.from_iterable(block.parts() for block in self._blocks):
            x = self._channels(part)
            self._add(part, x, alpha=-1)
            if part.bias is not None:
                self._left.index_add_(0, part.tokens, part.shares[:, None] * part.bias.float(), alpha=-1)
            squares += self._weight[part.tokens] @ torch.linalg.vecdot(x.float(), x.float())
        self._scale = squares / self.kept[layer]  # the mean of the diagonal of the gram matrix of all channels
        self.error_before = self.error

    def _make_blocks(self) -> list[_Block]:
        fit, weights, read = self._fit, self.weights, self._read
        experts = fit.half.experts
        assert experts is not None
        _, shares, chosen = build_module(fit.decoder, experts.router, weights)(read)  # the last two (T, chosen)
        given = chosen.flatten()
        order = given.argsort(stable=True)  # what each expert is given, one after the other
        sizes = torch.bincount(given, minlength=getattr(fit.decoder.config, experts.count)).tolist()
        tokens = (order // chosen.shape[1]).split(sizes)
        shares = shares.flatten()[order].float().split(sizes)
        start = self._to_fit(experts.module)
        blocks = []
        for number, of_expert in enumerate(zip(tokens, shares, strict=True)):
            own = {name: weight[number] for name, weight in weights.items() if name.startswith(experts.module)}
            blocks.append(_block(self.layer, own, experts.module, start[number], experts.after, *of_expert))
        if experts.shared:
            start = self._to_fit(experts.shared)
            share = torch.ones(len(read), device=read.device)
            if experts.shared_gate:
                share = linear(read, weights[f"{experts.shared_gate}.weight"])[:, 0].sigmoid().float()
            everything = torch.arange(len(read), device=read.device)
            blocks.append(_block(self.layer, weights, experts.shared, start, experts.shared_after, everything, share))
        return blocks

    def _gain(self, norm: str) -> Tensor:
        return self.weights[f"{norm}.weight"].float() if norm else torch.ones((), device=self._left.device)

    def _to_fit(self, module: str) -> Tensor:
        """What a module writes with, as it was; what is fitted is a copy in its place."""
        name = f"{module}.down_proj.weight"
        start = self.weights[name]
        self.weights[name] = start.clone(memory_format=torch.contiguous_format)
        return start

    def as_given(self) -> list[_Block]:
        """Its experts as they were, for others to compete with."""
        return [block._replace(writer=block.start) for block in self._blocks]

    def sweep(self) -> None:
        """Fit each expert to what all others leave."""
        for block in self._blocks:
            if len(block.tokens):
                self._fit_block(block)

    def compete(self, layers: Sequence[Sequence[_Block]]) -> None:
        """Fit each expert once more, with the best of its own channels and of those beside it from other layers.

        Experts that few tokens reach keep their own.
        """
        own = self._shares(self._blocks)
        weighted = own * self._weight[:, None]
        gram = weighted.T @ own
        gram.diagonal().add_(_NEAR * gram.diagonal().mean())
        nearest = [self._nearest(weighted, gram, theirs) for theirs in layers]
        for number, block in enumerate(self._blocks):
            width = block.writer.shape[1]
            others = [*chain(*zip(*(of_layer[number] for of_layer in nearest), strict=True))]  # the nearest first
            others = others[: MAX_CANDIDATES // width - 1]
            if not others or len(block.tokens) < 2 * width:
                continue
            origins = [part.layer for part in (block, *others) for _ in range(part.start.shape[1])]
            start, chosen = self._fit_block(block, others)
            self.kept.subtract({self.layer: width})
            self.kept.update(origins[channel] for channel in chosen.tolist())
            self._blocks[number] = block._replace(start=start)

    def _nearest(self, weighted: Tensor, gram: Tensor, theirs: Sequence[_Block]) -> list[list[_Block]]:
        """For each expert those of another layer that write most to its tokens, with the parts of them that are its.

        What an expert there writes is shared out among those here by least squares on how much of each token they get.
        """
        mass = weighted.T @ self._shares(theirs)  # (experts, theirs)
        sizes = torch.stack([torch.linalg.vector_norm(block.start.float()) for block in theirs])
        parts = torch.linalg.solve(gram, mass)
        chosen = (mass * sizes).topk(min(_PARTNERS, len(theirs)), dim=1).indices.tolist()
        starts = [block.start for block in theirs]
        return [
            [
                theirs[other]._replace(start=(starts[other] * parts[number, other]).to(starts[other].dtype))
                for other in partners
            ]
            for number, partners in enumerate(chosen)
        ]

    def _shares(self, blocks: Sequence[_Block]) -> Tensor:
        """How much of each token every expert gets: float32 of (T, experts)."""
        shares = self._weight.new_zeros(len(self._weight), len(blocks))
        for number, block in enumerate(blocks):
            shares[block.tokens, number] = block.shares
        return shares

    def _fit_block(self, block: _Block, others: Sequence[_Block] = ()) -> tuple[Tensor, Tensor]:
        """Fit an expert to what all others leave, with the best channels of its own and of others beside it.

        Returns where those are pulled to, and their numbers side by side.
        """
        wide = block.beside(others) if others else block
        start, width = wide.start, block.writer.shape[1]
        problem = self._problem(len(block.tokens), start)
        parts = [(part, self._channels(part)) for part in wide.parts()]
        for part, x in parts:
            self._add(part, x[:, :width], alpha=1)
            y = self._left[part.tokens]
            if part.after:
                gain = self._gain(part.after)
                y = torch.where(gain == 0, 0.0, y / gain)
            problem.add(x, y, self._weight[part.tokens])
        problem.complete()
        chosen = torch.arange(width, device=start.device)
        if others:
            chosen = problem.prune(start, width)
            start = start[:, chosen]
            for (weight, bias), (wide_weight, wide_bias) in zip(block.readers, wide.readers, strict=True):
                weight.copy_(wide_weight[chosen])
                if bias is not None and wide_bias is not None:
                    bias.copy_(wide_bias[chosen])
        block.writer.copy_(problem.ridge(start, self._fit.ridge, self._scale).weight)
        for part, x in parts:
            self._add(part, x[:, chosen], alpha=-1)
        return start, chosen

    def fit_gain(self) -> None:
        """Fit the gains of the norm behind all that is written."""
        fit = self._fit
        written, _ = self._written()
        sizes = [state.shape[:2].numel() for state in fit.states]
        self.weights[f"{fit.half.after}.weight"] = fit.fitted_gain(self.weights, written.split(sizes))

    @property
    def error(self) -> Tensor:
        """What is left, squared and weighted, over all that is to be written: float64 of shape ()."""
        return self._weighted_square(self._left) / self._energy.clamp(min=torch.finfo(torch.float32).tiny)

    def _weighted_square(self, y: Tensor) -> Tensor:
        return in_float64(self._weight) @ in_float64(torch.linalg.vecdot(y, y))

    def _written(self) -> tuple[Tensor, list[Tensor]]:
        """What is written in front of the norm behind all, (T, hidden), and for each block what that norm and the one
        behind the block multiply by, (T,), but for gains."""
        parts = {block.after: torch.zeros_like(self._left) for block in self._as_given}
        for part in chain.from_iterable(block.parts() for block in self._as_given):
            parts[part.after].index_add_(0, part.tokens, self._product(part, self._channels(part)))
        factors = {after: self._fit.mean_square(part).rsqrt() for after, part in parts.items()}
        normed = [self._gain(after) * part * factors[after][:, None] for after, part in parts.items()]
        written = torch.stack(normed).sum(0)
        factor = self._fit.mean_square(written).rsqrt()
        return written, [factors[block.after] * factor for block in self._as_given]

    def _channels(self, block: _Block) -> Tensor:
        """What a block's writer reads, times its shares: (n, channels)."""
        decoder = self._fit.decoder
        parts = (linear(self._read[block.tokens], weight, bias) for weight, bias in block.readers)
        channels = decoder.family.activated(decoder.config, *parts)
        return (channels.float() * block.shares[:, None]).to(channels.dtype)

    @staticmethod
    def _product(block: _Block, x: Tensor) -> Tensor:
        """What a block writes in front of a norm behind it: float32 of (n, hidden)."""
        with bfloat16_products(x.dtype == torch.bfloat16):
            return linear(x.float(), block.writer.float())

    def _add(self, block: _Block, x: Tensor, alpha: int) -> None:
        """Add what a block writes to what is left, or take it from that."""
        written = self._product(block, x) * self._gain(block.after)
        self._left.index_add_(0, block.tokens, written, alpha=alpha)

    def _problem(self, tokens: int, start: Tensor) -> Problem:
        """In tokens where they are few: so is that of an expert that hardly any are given to."""
        outputs, inputs = start.shape
        device, dtype, solver = start.device, start.dtype, self._fit.solver
        if solved_in_tokens(tokens, inputs):
            return DualRegression(device, dtype, solver)
        return Regression(inputs, outputs, device, dtype, solver)


def num_competing(shape: Shape, joined: int) -> int:
    """Of how many of `joined` layers the experts' channels compete for the places in one."""
    if not shape.experts or shape.has_norm_after:
        return 1
    return min(joined, max(1, MAX_CANDIDATES // shape.expert_width))


def fitting_experts(setup: Setup, tokens: int, joined: int, *, is_rough: bool) -> tuple[int, Work]:
    """Bytes and work of the fit of the experts of `joined` layers as one layer's."""
    shape = setup.shape
    inside, sweep = _sweeping(setup, tokens, 1)
    layers = 1 if is_rough else num_competing(shape, joined)
    # The matrices of layers that compete, or of the best one so far, and of the next; what these two leave to write.
    inside += (layers + 1) * shape.layer_bytes + 8 * tokens * shape.hidden
    work = Work({setup.own_product: joined * 2 * shape.hidden**2 * shape.readers * shape.experts * shape.expert_width})
    work += Work(layer=2 * tokens * shape.hidden * shape.mlp * joined * (shape.readers + 1))
    work += times(sweep, joined if is_rough else joined + 1)
    if layers > 1:
        wide = min(1 + _PARTNERS * (layers - 1), MAX_CANDIDATES // shape.expert_width)
        of_blocks, competing = _sweeping(setup, tokens, wide)
        inside = max(inside, layers * shape.layer_bytes + of_blocks + 4 * tokens * (shape.hidden + 3 * shape.experts))
        work += competing
    return inside + tokens * shape.hidden * shape.size, work


def _sweeping(setup: Setup, tokens: int, wide: int) -> tuple[int, Work]:
    """Bytes beside matrices and states, and work, of a sweep over experts of which so many compete for each place."""
    shape = setup.shape
    hidden, width = shape.hidden, wide * max(shape.expert_width, shape.shared)
    busiest = tokens if shape.shared else min(tokens, _BUSIEST * tokens * shape.chosen // shape.experts)
    inside = busiest * width * shape.size + _ROWS * (16 * width + 12 * hidden) + 16 * width**2 + 24 * width * hidden
    work = Work(layer=2 * tokens * hidden * wide * shape.mlp * shape.readers)
    work += Work(product=4 * tokens * hidden * shape.mlp)  # taken out of what is left, and put back
    blocks = [(shape.experts, tokens * shape.chosen // shape.experts, shape.expert_width)]
    if shape.shared:
        blocks.append((1, tokens, shape.shared))
    for count, given, kept in blocks:
        work += times(solving(setup, given, wide * kept, kept, hidden, is_rough=False)[1], count)
    return inside, work
