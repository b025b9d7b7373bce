"""The fit of one half of a layer, attention or MLP: what it is given, and the least-squares problem that it makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from lf_hf.decoder.decoder import Decoder
from lf_hf.families.table import Half, Kind, Weights
from lf_hf.refit.layer_parts import attention_heads, build_layer, mlp_channels, normalized
from lf_hf.refit.regression import DualRegression, Regression, Solver
from lf_hf.refit.states import States
from lf_hf.runtime.amounts import solved_in_tokens
from lf_hf.runtime.numerics import in_float64

# Share of the weight of a sequence that its first token has in fits. All later tokens attend to it: layers that write
# its huge state, or take it away, do it for this token alone, and the model is lost where a fit misses it.
_FIRST_SHARE = 1 / 32
_SIZE_TOKENS = 64  # of each sequence, on which sizes in front of a norm are measured

WriterInputs = Callable[[Tensor], Tensor]
"""What the writer of a half reads, from the stream: states (sequences B, tokens T, hidden) -> (B * T, channels)."""
Problem = Regression | DualRegression


def empty_problem(decoder: Decoder, shape: tuple[int, ...], like: Tensor, solver: Solver) -> Problem:
    """A problem of a weight's shape to add tokens to, on the device and in the dtype of `like`.

    A rough fit is solved in its tokens where there are many unknowns.
    """
    outputs, inputs = shape
    if solver.rough_tokens is not None and solved_in_tokens(solver.rough_tokens, inputs):
        return DualRegression(like.device, like.dtype, solver)
    return Regression(inputs, outputs, like.device, like.dtype, solver)


def add_to_maps(problem: Problem, decoder: Decoder, half: Half, state: Tensor, targets: Sequence[Tensor]) -> None:
    """Add tokens to the problem of maps, near the identity, from what half of a layer reads to what others read.

    In its weight they are one below the other. `state` and `targets` are the streams in front of the one half and of
    the others, (sequences B, tokens T, hidden).
    """
    if half.before:  # the norm gives all tokens the same scale
        token_weight = _with_first_share(torch.ones(state.shape[:2], device=state.device))
    else:
        token_weight = torch.stack([token_weights(decoder, part) for part in (state, *targets)]).amin(0)
    x, *read = (normalized(decoder, half, part).flatten(0, 1) for part in (state, *targets))
    wide = torch.promote_types(x.dtype, torch.float32)  # as float16 may not hold changes
    problem.add(x, torch.cat([y.to(wide) - x for y in read], dim=1), token_weight)


def solve_maps(problem: Problem, ridge: float) -> list[Tensor]:
    """The maps of a problem to which all was added, of shape (hidden, hidden) each, float32 at least."""
    problem.complete()
    changes = problem.ridge(None, ridge).weight  # from the identity
    maps = changes.unflatten(0, (-1, changes.shape[1]))
    maps.diagonal(dim1=1, dim2=2).add_(1)
    return list(maps)


class FittedHalf(NamedTuple):
    """One half for those of a group of layers.

    `kept` counts the key-value groups or channels from each layer, (layers,). Errors are those of what is written, with
    the writer as it was and after its first fit, of shape (). `unreached` counts experts that no token was given to.
    """

    weights: dict[str, Tensor]
    kept: Tensor
    error_before: Tensor
    error_after: Tensor
    unreached: int = 0


@dataclass(frozen=True)
class HalfFit:
    """The fit of one half of a layer.

    States are tensors of shape (sequences B, tokens T, hidden).

    What the half writes goes to the residual stream as it is or, as in Gemma and OLMo, through a norm. A norm discards
    each token's size, so only directions can be fitted. The writer is then fitted twice: first for the sizes that it
    writes before the fit, then for those that it writes after it. The norm's gains are fitted last.

    Attributes
    ----------
    states
        The stream in front of the half that is made.
    targets
        The stream as it should be after the half.
    solver
        Of all problems of the group's fit.
    scale
        What the stream is multiplied by behind the half that is made, of shape (1,) if it is a tensor.
    """

    decoder: Decoder
    half: Half
    states: Sequence[Tensor]
    targets: Sequence[Tensor]
    solver: Solver
    ridge: float
    scale: Tensor | float = 1.0

    def writer_inputs(self, weights: Weights, kind: Kind | None) -> WriterInputs:
        """What the writer reads in a half of these weights; `kind` is the layer's for attention, and None for an
        MLP."""
        if kind is None:
            return partial(mlp_channels, self.decoder, weights)
        return partial(attention_heads, self.decoder, build_layer(self.decoder, weights, kind))

    def measure_sizes(self, layers: Iterable[Weights], kinds: Sequence[Kind | None]) -> Tensor | None:
        """Root mean square of what the half of each of some `folded` layers writes for a token, as a geometric mean.

        The beginnings of sequences tell it well enough. None where no norm comes behind it.
        """
        if self.half.after is None:
            return None
        states = [state[:, :_SIZE_TOKENS] for state in self.states]
        totals = []
        for weights, kind in zip(layers, kinds, strict=True):
            x_of = self.writer_inputs(weights, kind)
            total = torch.zeros((), dtype=torch.float64)
            for state in states:
                squares = self.mean_square(self._written(weights, x_of(state)).float())  # (B * T,)
                total = total + in_float64(squares).log().sum() / 2
            totals.append(total)
        num_tokens = sum(state.shape[:2].numel() for state in states)
        sums = torch.stack([*totals, torch.full_like(totals[0], num_tokens)])
        return (sums[:-1] / sums[-1]).exp().float()

    def build_problem(self, weights: Weights, x_of: WriterInputs) -> Problem:
        """The least-squares problem of the half's writer, which is in `weights` as it is."""
        start = weights[f"{self.half.writer}.weight"]
        problem = empty_problem(self.decoder, start.shape, start, self.solver)
        for state, target in zip(self.states, self.targets, strict=True):
            problem.add(*self.equations(weights, x_of(state), target, state))
        problem.complete()
        return problem

    def equations(self, weights: Weights, x: Tensor, target: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, y and the weight of each token: (B * T, channels), (B * T, hidden) and (B * T,).

        In front of a norm y is what should come out of it, divided by its gains and brought to size 1, as only its
        direction passes the norm. The weight grows with its size. x is divided by the size that the norm divides by.
        """
        y, token_weight = self.to_write(weights, target, state)
        bias = weights.get(f"{self.half.writer}.bias")
        if self.half.after is None:
            return x, y if bias is None else y - bias, token_weight
        scale = self.mean_square(self._written(weights, x).float())[:, None].rsqrt()  # (B * T, 1)
        if bias is not None:
            y = y - bias * scale
        return x * scale, y, token_weight

    def to_write(self, weights: Weights, target: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """y and the weight of each token, as in `equations`, with what biases are of it."""
        y = self.residual_update(target, state)
        token_weight = token_weights(self.decoder, target)
        if self.half.after is None:
            return y, token_weight
        gain = weights[f"{self.half.after}.weight"].to(y.device)
        y = torch.where(gain == 0, 0.0, y.float() / gain)
        size = y.square().mean(-1, keepdim=True).sqrt()
        return y / size.clamp(min=torch.finfo(torch.float32).tiny), token_weight * size[:, 0]

    def residual_update(self, target: Tensor, state: Tensor) -> Tensor:
        """What the half should add to the stream: (sequences B, tokens T, hidden) -> (B * T, hidden)."""
        if isinstance(self.scale, Tensor):
            target = target / self.scale.to(target.device)
        return (target - state).flatten(0, 1) / self.decoder.family.residual_factor(self.decoder.config)

    def fit_writer(self, weights: dict[str, Tensor], kept: Tensor, problem: Problem, kind: Kind | None) -> FittedHalf:
        """Fit the half's writer in `weights`, and the gains of a norm behind it. `kind` is as in `writer_inputs`."""
        name = f"{self.half.writer}.weight"
        fitted, error_before, error_after = problem.ridge(weights[name], self.ridge)
        weights[name] = fitted.to(weights[name])
        if self.half.after:
            x_of = self.writer_inputs(weights, kind)
            if not self.solver.rough_tokens:  # again, as sizes in front of the norm are known better now
                fitted = self.build_problem(weights, x_of).ridge(weights[name], self.ridge).weight
                weights[name] = fitted.to(weights[name])
            written = (self._written(weights, x_of(state)) for state in self.states)
            weights[f"{self.half.after}.weight"] = self.fitted_gain(weights, written)
        return FittedHalf(weights, kept, error_before, error_after)

    def fitted_gain(self, weights: Weights, written: Iterable[Tensor]) -> Tensor:
        """The gains of the norm, by ridge regression of each channel by itself; `written` is what comes in front of it
        for each batch of states."""
        gain = weights[f"{self.half.after}.weight"]
        start = gain.to(torch.promote_types(gain.dtype, torch.float32))  # sums over tokens need it
        squares, products = torch.zeros_like(start), torch.zeros_like(start)
        for state, target, x in zip(self.states, self.targets, written, strict=True):
            x = x.to(start)
            x = x * self.mean_square(x)[:, None].rsqrt()
            token_weight = token_weights(self.decoder, target).to(start)
            squares += token_weight @ x.square()
            products += token_weight @ (x * self.residual_update(target, state).to(start))
        pull = self.ridge * squares.mean()
        fitted = (products + pull * start) / (squares + pull)
        return torch.where(squares + pull > 0, fitted, start).to(gain.dtype)  # 0: nothing written

    def _written(self, weights: Weights, x: Tensor) -> Tensor:
        return linear(x, weights[f"{self.half.writer}.weight"], weights.get(f"{self.half.writer}.bias"))

    def mean_square(self, written: Tensor) -> Tensor:
        """What a norm divides by, squared: (..., hidden) -> (...)."""
        return written.square().mean(-1) + self.decoder.config.rms_norm_eps


def maps_to(fit: HalfFit, read: Sequence[States], like: Tensor) -> list[Tensor]:
    """Maps from what the half that is made reads to what others read in front of it, on the device of `like`."""
    hidden = fit.decoder.config.hidden_size
    problem = empty_problem(fit.decoder, (len(read) * hidden, hidden), like, fit.solver)
    for state, *targets in zip(fit.states, *read, strict=True):
        add_to_maps(problem, fit.decoder, fit.half, state, targets)
    return [input_map.to(like.device) for input_map in solve_maps(problem, fit.ridge)]


def token_weights(decoder: Decoder, states: Tensor) -> Tensor:
    """1 / mean square of each token's state (sequences B, tokens T, hidden), as the next norm divides by it.

    So all tokens count alike, however large their states are, but a sequence's first one, which counts as T / 32
    tokens where that is more than one. The shape is (B * T,).
    """
    return _with_first_share((states.float().square().mean(-1) + decoder.config.rms_norm_eps).reciprocal())


def _with_first_share(token_weight: Tensor) -> Tensor:
    """Token weights of sequences, of shape (B, tokens T), with more of it on the first ones, as (B * T,); in place."""
    token_weight[:, 0] *= max(1, _FIRST_SHARE * token_weight.shape[1])
    return token_weight.flatten()
