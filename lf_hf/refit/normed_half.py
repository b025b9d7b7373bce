"""The fit of a half whose output goes through a norm before it is added to the stream, as in Gemma and OLMo.

The norm divides each token by its size, so only directions can be fitted in front of it. Sizes are taken to be those
that the writer as it is gives: the writer is fitted, once more with the sizes that it then gives, and last the gains of
the norm are fitted to what it writes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from lf_hf.families import Weights
from lf_hf.refit.fit import HalfFit, Regression, WriterInputs, token_weights
from lf_hf.runtime.numerics import in_float64


class NormedHalfFit(HalfFit):
    """As `HalfFit`, with the writer's problem in front of the norm."""

    def equations(self, weights: Weights, x: Tensor, target: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, y and the weight of each token.

        y is what the norm should let through, divided by its gains and brought to size 1: its direction is all that the
        norm lets through, and counts as much as its size. x is divided by the size that the norm divides by.
        """
        y, bias = self.residual_update(target, state), weights.get(f"{self.half.writer}.bias")
        scale = self._mean_square(self._written(weights, x).float())[:, None].rsqrt()  # (B * T, 1)
        gain = weights[f"{self.half.after}.weight"].to(y.device)
        y = torch.where(gain == 0, 0.0, y.float() / gain)
        size = y.square().mean(-1, keepdim=True).sqrt()
        y = y / size.clamp(min=torch.finfo(torch.float32).tiny)
        return x * scale, y if bias is None else y - bias * scale, token_weights(self.decoder, target) * size[:, 0]

    def sizes(self, group: Sequence[Weights], readers: Sequence[WriterInputs]) -> list[float] | None:
        """Root mean square of what each layer's half writes for each token, as a geometric mean; None for one layer."""
        if len(group) == 1:
            return None
        sums = torch.zeros(len(group) + 1, dtype=torch.float64)
        for state in self.states:
            logs = []
            for weights, of_layer in zip(group, readers, strict=True):
                squares = self._mean_square(self._written(weights, of_layer(state)).float())  # (B * T,)
                logs.append(in_float64(squares).log().sum() / 2)
            logs.append(torch.full_like(logs[0], len(squares)))
            sums = sums.to(logs[0].device) + torch.stack(logs)
        *of_layers, tokens = self.decoder.processes.all_reduce_sums(sums)
        return [math.exp(total / tokens) for total in of_layers]

    def fit_writer(self, weights: dict[str, Tensor], x_of: WriterInputs, problem: Regression) -> tuple[float, float]:
        """Fit the writer and the gains of its norm in `weights`; the errors before and after the first fit."""
        errors = super().fit_writer(weights, x_of, problem)
        if not self.quick:  # again, as sizes in front of the norm are known better now
            name = f"{self.half.writer}.weight"
            weights[name] = self.problem(weights, x_of).ridge(weights[name], self.ridge).to(weights[name])
        weights[f"{self.half.after}.weight"] = self._fitted_gain(weights, x_of)
        return errors

    def _fitted_gain(self, weights: Weights, x_of: WriterInputs) -> Tensor:
        """The gains of the norm, by ridge regression of each channel by itself."""
        gain = weights[f"{self.half.after}.weight"]
        start = gain.to(torch.promote_types(gain.dtype, torch.float32))  # sums over tokens need it
        squares, products = torch.zeros_like(start), torch.zeros_like(start)
        for state, target in zip(self.states, self.targets(), strict=True):
            x = self._written(weights, x_of(state)).to(start)
            x = x * self._mean_square(x)[:, None].rsqrt()
            token_weight = token_weights(self.decoder, target).to(start)
            squares += token_weight @ x.square()
            products += token_weight @ (x * self.residual_update(target, state).to(start))
        for sums in (squares, products):
            self.decoder.processes.all_reduce(sums)
        pull = self.ridge * squares.mean()
        fitted = (products + pull * start) / (squares + pull)
        return torch.where(squares + pull > 0, fitted, start).to(gain.dtype)  # 0: nothing written

    def _written(self, weights: Weights, x: Tensor) -> Tensor:
        return linear(x, weights[f"{self.half.writer}.weight"], weights.get(f"{self.half.writer}.bias"))

    def _mean_square(self, written: Tensor) -> Tensor:
        return written.square().mean(-1) + self.decoder.config.rms_norm_eps
