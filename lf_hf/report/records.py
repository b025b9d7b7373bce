"""What a fusion report is made of: one record for each thing that a fusion finds out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lf_hf.runtime.fields import plural

_FITTED_ON = {"unseen": "it was not", "kin": "text of its kind was", "seen": "part of it was"}
"""How labels say a text's relation to what was fitted or trained on."""


@dataclass(frozen=True)
class RowMatch:
    """How the rows of one weight matrix of layer j were matched to those of layer i: mean cosines of rows side by side.

    `rows_moved` is the share of rows that changed place. Where neurons are matched, the rows of down_proj and o_proj
    are those of their transpose: one neuron's outgoing weights.
    """

    cosine_before: float
    cosine_after: float
    rows_moved: float


@dataclass(frozen=True)
class FusionStep:
    """One fusion of two layers. Layers are numbered from 0 as in the original model.

    `layers_i` and `layers_j` are the original layers that had become layer i and layer j. `ratio_i` + `ratio_j` = 1;
    `ratio_j` is 0 where weights are not averaged. `matches` has one entry for each aligned projection. Where the
    pair was chosen by it, `influence` is how much layer j changed the residual stream, or `divergence` how many nats a
    token the new group is expected to cost beyond what layer i's group costs; it may be negative. `heads_kept` and
    `channels_kept` count the key-value groups and MLP channels from each layer, where they were selected, and the
    errors are those of what the MLP adds to the stream (squared, relative), before and after the fit of this step.
    """

    layers_i: list[int]
    layers_j: list[int]
    ratio_i: float
    ratio_j: float
    matches: dict[str, RowMatch] = field(default_factory=dict)
    influence: float | None = None
    divergence: float | None = None
    heads_kept: list[int] | None = None
    channels_kept: list[int] | None = None
    error_before: float | None = None
    error_after: float | None = None

    @property
    def pair(self) -> tuple[int, int]:
        """Original indices (i, j): a fused layer keeps the index of its first layer."""
        return self.layers_i[0], self.layers_j[0]


@dataclass(frozen=True)
class FittedLayer:
    """The last fit of one fused layer, to the dense model's states.

    `layers` are the original layers that it stands for; counts and errors are as in FusionStep, and `attention_error`
    is that of what attention adds, after the fit. On held-out text, `held_out_error` is the part of what the original
    layers do to the stream that the fitted layer misses (squared, relative, a mean over channels), and
    `first_token_error` that of each sequence's first token. `layer_instead` is the one of `layers` that misses less as
    it is, and was taken for that.
    """

    layers: list[int]
    heads_kept: list[int] | None
    channels_kept: list[int] | None
    error_before: float
    error_after: float
    attention_error: float | None = None
    held_out_error: float | None = None
    first_token_error: float | None = None
    layer_instead: int | None = None


@dataclass(frozen=True)
class CalibrationInfo:
    """Source of the calibration text, and its size in samples and tokens."""

    source: str
    samples: int
    tokens: int


@dataclass(frozen=True)
class PerplexityInfo:
    """Perplexity of both models on `tokens` tokens of a text, `name` in short, and how far apart they are there.

    `relation` is that of the text to what was fitted or trained on: "unseen", "kin" (a text of its kind was) or "seen"
    (part of the text itself was). `divergence` is KL(dense || fused) in nats a token, and `agreement` the share of
    tokens, 0..1, at which both models have the same most likely next token.
    """

    name: str
    text: str
    tokens: int
    dense: float
    fused: float
    relation: str
    divergence: float
    agreement: float

    @property
    def ratio(self) -> float:
        """The fused model's perplexity over the dense model's."""
        return self.fused / self.dense

    @property
    def label(self) -> str:
        """The text, and what of it was fitted or trained on."""
        return f"{self.text}; {_FITTED_ON[self.relation]} fitted on"

    @property
    def source(self) -> str:
        """Name, size and label in one line."""
        return f"{self.name}: {self.tokens:,} tokens of {self.label}"


@dataclass(frozen=True)
class HealedText:
    """What healing did to the predictions of a text; the figures are those of PerplexityInfo."""

    name: str
    tokens: int
    perplexity_before: float
    perplexity_after: float
    divergence_before: float
    divergence_after: float
    agreement_before: float
    agreement_after: float


@dataclass(frozen=True)
class HealingPoint:
    """Divergence from the base on held-out text after `step` steps, in nats a token, by kind of text."""

    step: int
    divergences: dict[str, float]


@dataclass(frozen=True)
class HealingInfo:
    """What a healing did: a short distillation from the base, after the fusion.

    The kinds of `text` were gone through `epochs` times. `trained` parameters were changed at each of `steps` steps;
    the state of step `kept` was the best on held-out text, see `curve`; 0 is what came in. `teacher` is how the base's
    predictions were had.
    """

    settings: dict[str, Any]
    text: list[CalibrationInfo]
    epochs: float
    trained: int
    steps: int
    kept: int
    teacher: str
    curve: list[HealingPoint]
    judged: list[HealedText]
    seconds: float

    def summary(self) -> str:
        """One sentence about what was trained on what."""
        kinds = ", ".join(f"{info.tokens:,} of {info.source}" for info in self.text)
        steps = f"{self.steps} {plural(self.steps, 'step')}, of which step {self.kept} is kept"
        trained = f"{self.trained:,} parameters ({self.settings['train']})"
        return f"Trained {trained} for {steps}; {self.epochs:.1f} times through tokens: {kinds}."


@dataclass(frozen=True)
class Rate:
    """Tokens a second of both models, medians of several runs, and the median, least and largest ratio of a run."""

    dense: float
    fused: float
    ratio: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class SpeedInfo:
    """How fast a fused model is beside its base for one sequence, on a device and in a dtype: see `lf_hf.speed`.

    Each of `runs` runs reads a prompt of `prefill_tokens` and then decodes `decoded_tokens`. `weight_bytes` are those
    of all weights and `cache_bytes` those of the KV cache a token, of the base and of the fused model.
    """

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
        """What it was measured on, in one line."""
        tokens = f"a prompt of {self.prefill_tokens} tokens and {self.decoded_tokens} decoded"
        return f"speed: {self.device}, {self.dtype}, one sequence, {tokens}, {self.runs} runs of each model"


@dataclass(frozen=True)
class GroupCost:
    """What making one layer of layers `first` to `last` of the dense model costs by itself, in nats a token."""

    first: int
    last: int
    divergence: float


@dataclass(frozen=True)
class BudgetTrial:
    """What a fusion costs on text that nothing was fitted to: nats a token, and times the dense model's perplexity."""

    num_fusions: int
    divergence: float
    perplexity_ratio: float

    def costs(self, name: str) -> float:
        """The figure that a setting limits."""
        return self.divergence if name == "max_divergence" else self.perplexity_ratio


@dataclass(frozen=True)
class BudgetInfo:
    """The budget that a fusion was to keep, and what was tried for it, on `tokens` tokens of `text`."""

    name: str
    allowed: float
    tokens: int
    tried: list[BudgetTrial]
    text: str = "calibration text"

    def summary(self) -> str:
        """One sentence: what was allowed, and what came out."""
        tried = sorted(self.tried, key=lambda trial: trial.num_fusions)
        costs = ", ".join(f"{trial.costs(self.name):.4g} with {trial.num_fusions}" for trial in tried)
        return f"{self.name}={self.allowed:g} on {self.tokens:,} tokens of {self.text}, kept aside: {costs} fused."


@dataclass(frozen=True)
class Continuation:
    """How both models go on from a prompt: by their most likely token each time, to their end or for some tokens."""

    prompt: str
    dense: str
    fused: str
