"""Entries of a fusion report."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from lf_hf.runtime.words import plural


@dataclass(frozen=True)
class RowMatch:
    """How the rows of a weight matrix of layer j were matched to layer i's: mean cosines, and the share of rows moved.

    Where neurons are matched, rows of down_proj and o_proj are a neuron's outgoing weights.
    """

    cosine_before: float
    cosine_after: float
    rows_moved: float


@dataclass(frozen=True)
class FusedLayer:
    """Report entry of a fused layer. Layers are numbered from 0 as in the base.

    Attributes
    ----------
    layers, shares : list
        The group of layers, ascending, and each layer's part of the average or of the MLP channels; they add up to 1.
    ratios, matches : list
        Of averages, at each join from the top of the group down: the lower-numbered layer's share, and how rows were
        matched, by matrix.
    cost : float or None
        Nats a token that the group costs by itself, where it was measured.
    heads_kept, channels_kept : list of int or None
        Of fits: key-value groups (in Gated DeltaNet, heads of keys) and MLP channels from each layer.
    error_before, error_after, attention_error : float or None
        Of fits: squared relative error of the MLP's output before and after the fit, and of attention's after it.
    held_out_error, first_token_error : float or None
        Of fits: squared relative error on held-out text, a mean over channels, and of each sequence's first token.
    layer_instead : int or None
        The layer of the group that has a lower error as it is, and was taken instead of the fit.
    experts_unreached : int
        Of fits: experts that no token of the text was given to; they stay as they were.
    """

    layers: list[int]
    shares: list[float]
    ratios: list[float] = field(default_factory=list)
    matches: list[dict[str, RowMatch]] = field(default_factory=list)
    cost: float | None = None
    heads_kept: list[int] | None = None
    channels_kept: list[int] | None = None
    error_before: float | None = None
    error_after: float | None = None
    attention_error: float | None = None
    held_out_error: float | None = None
    first_token_error: float | None = None
    layer_instead: int | None = None
    experts_unreached: int = 0

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Neighbours in the group, from the top down, as averages join them."""
        return list(pairwise(self.layers))[::-1]

    def joined(self, layer: int, share: float, matches: dict[str, RowMatch]) -> FusedLayer:
        """The entry of the average of this layer and the one below it, which has such a share."""
        shares = [share, *((1 - share) * other for other in self.shares)]
        all_matches = [*self.matches, matches] if matches else self.matches
        return FusedLayer([layer, *self.layers], shares, [*self.ratios, share], all_matches)

    def summary(self) -> str:
        """One line: what of each layer is in the fused one, what it costs, and how well it was fitted or matched."""
        parts = [f"layer {self.layers[0]} stands for {self.layers[0]} to {self.layers[-1]}"]
        if self.ratios:
            parts.append(_listed(self.layers, [f"{share:.1%}" for share in self.shares]))
        if self.heads_kept:
            parts.append(f"key-value groups {_listed(self.layers, self.heads_kept)}")
        if self.channels_kept:
            parts.append(f"MLP channels {_listed(self.layers, self.channels_kept)}")
        if self.layer_instead is not None:
            parts.append(f"layer {self.layer_instead} taken as it is")
        if self.experts_unreached:
            parts.append(f"{self.experts_unreached} experts that no text reached stay as they were")
        if self.cost is not None:
            parts.append(f"costs {self.cost:.4f} nats a token by itself")
        if self.error_before is not None and self.error_after is not None:
            parts.append(f"error of the MLP {self.error_before:.3f} -> {self.error_after:.3f}")
        cosines = [match.cosine_after for matches in self.matches for match in matches.values()]
        if cosines:
            parts.append(f"mean matched cosine {statistics.mean(cosines):.4f}")
        return ", ".join(parts)


def _listed(layers: list[int], amounts: Sequence[object]) -> str:
    """What comes from each layer."""
    return " + ".join(f"{amount} of layer {layer}" for amount, layer in zip(amounts, layers, strict=True))


class MadeLayer(NamedTuple):
    """The layer that a group becomes, in place of the group's first layer, whose other values it keeps."""

    weights: Mapping[str, Any]
    kind: Mapping[str, Any]  # empty where it stays
    entry: FusedLayer


@dataclass(frozen=True)
class CalibrationInfo:
    """Source and size of a calibration text."""

    source: str
    samples: int
    tokens: int

    def summary(self) -> str:
        """Source and size in one line."""
        return f"calibration: {self.source} ({self.samples} samples, {self.tokens} tokens)"


@dataclass(frozen=True)
class PerplexityInfo:
    """The dense model's perplexity on a text of so many tokens, and the fused model's figures by their names.

    `text` says what it is, and whether text of its kind is in the bundled calibration text.
    """

    name: str
    text: str
    tokens: int
    dense: float
    figures: dict[str, float]

    @property
    def fused(self) -> float:
        """The fused model's perplexity."""
        return self.figures["perplexity"]

    @property
    def ratio(self) -> float:
        """The fused model's perplexity over the dense model's."""
        return self.fused / self.dense

    @property
    def source(self) -> str:
        """Name, size and what it is."""
        return f"{self.name}: {self.tokens:,} tokens of {self.text}"


@dataclass(frozen=True)
class HealingPoint:
    """Divergence from the base on held-out text after some steps, in nats a token, by kind of text."""

    step: int
    divergences: dict[str, float]


@dataclass(frozen=True)
class HealingInfo:
    """A healing: `trained` parameters were trained for `steps` steps, `epochs` times through `text`.

    `why` says why these were trained. The state after step `kept` was the best on held-out text; 0 is the model that
    came in, of which `judged` has the figures. `seconds` is how long this took, from the last interruption on. The
    model that came in may have been healed `before`.
    """

    settings: dict[str, Any]
    text: list[CalibrationInfo]
    epochs: float
    trained: int
    steps: int
    kept: int
    why: str
    curve: list[HealingPoint]
    judged: list[PerplexityInfo]
    seconds: float
    training_args: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # one sentence each
    before: HealingInfo | None = None

    @property
    def all(self) -> list[HealingInfo]:
        """The healings of a model in their order, of which this is the last."""
        return [*(self.before.all if self.before else []), self]

    def summary(self) -> str:
        """One sentence: what was trained on what."""
        kinds = ", ".join(f"{info.tokens:,} of {info.source}" for info in self.text)
        steps = f"{self.steps} {plural(self.steps, 'step')}, of which step {self.kept} is kept"
        trained = f"{self.trained:,} parameters ({self.settings['train']})"
        return f"Trained {trained} for {steps}; {self.epochs:.1f} times through tokens: {kinds}."


@dataclass(frozen=True)
class Rate:
    """Tokens a second of both models, medians of all runs; median, lowest and highest ratio of a run."""

    dense: float
    fused: float
    ratio: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class SpeedInfo:
    """Speed of one sequence; bytes of all weights and of the KV cache a token, of the base and of the fused model."""

    device: str
    dtype: str
    prefill_tokens: int
    decoded_tokens: int
    prefill: Rate
    decoding: Rate
    weight_bytes: list[int]
    cache_bytes: list[int]
    runs: int

    @property
    def source(self) -> str:
        """What it was measured on."""
        tokens = f"a prompt of {self.prefill_tokens} tokens and {self.decoded_tokens} decoded"
        return f"speed: {self.device}, {self.dtype}, one sequence, {tokens}, {self.runs} runs of each model"


@dataclass(frozen=True)
class BudgetInfo:
    """The budget of a fusion, and what each number of fusions that was tried costs, on so many tokens kept aside."""

    name: str
    allowed: float
    tokens: int
    tried: dict[int, float]

    def summary(self) -> str:
        """One sentence: what was allowed and measured."""
        costs = ", ".join(f"{cost:.4g} with {count}" for count, cost in sorted(self.tried.items()))
        aside = f"{self.tokens:,} tokens of calibration text that were kept aside"
        return f"{self.name}={self.allowed:g} before any healing, on {aside}: {costs} fused."


@dataclass(frozen=True)
class Continuation:
    """What both models write after a prompt, by the most likely token each time."""

    prompt: str
    dense: str
    fused: str
