"""Every setting of a fusion (FusionConfig) and of a healing (HealSettings), validated, in one frozen object each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field
from pydantic.dataclasses import dataclass

from lf_hf.runtime.settings_base import NOT_GIVEN, RULES, Needs, OneOf, Settings, checked
from lf_hf.runtime.words import plural

Messages = Sequence[Mapping[str, Any]]
"""A chat, as chat templates take it: [{"role": "user", "content": "..."}, ...]."""
TextSource = Sequence[str | Messages] | str | Path
"""What text a user gives: strings and chats, or where they are: a .txt, .jsonl, .csv or .parquet file, or
NAME[:CONFIG[:SPLIT[:COLUMN]]] of a data set on the hub or in a folder."""

ALGORITHM = 29
"""Number of what a fusion computes: raised whenever results change, so that kept ones are not used again."""

TRAINED = {"layers": "all layers", "all": "all parameters", "fused": "the fused layers", "lora": "adapters"}
"""What a healing may train, in a setting's word and in people's."""

LEAST_HEAL_TOKENS = 1024
"""Fewest tokens of a healing."""

LARGEST_SEED = 2**32 - 1
"""The largest seed that every library takes."""

SHORTEST_LENGTH = 16
"""Tokens of a sequence that is healed on, at least."""

LEVELS = ("num_fusions", "target_layers", "max_divergence", "max_perplexity_ratio")
"""Fields of FusionConfig that say how many layers to fuse: one of them is given."""

MOST_CALIBRATION_TOKENS, CHANNEL_TOKENS = 262144, 32
"""Default number of tokens that layers are fitted to: so many for each channel of the MLP, up to the most."""

_FIT = "The method refit fits the fused layers to the base and keeps far more of it."
_FIT_BETTER = "Fewer fusions, or calibration text of the kind that the model will be used for, keep more of it."


class Method(NamedTuple):
    """What settings and people know of a method; `choose.methods` has what it does to a group of layers.

    A field that the user gives overrides the preset, and what is None there follows from the model.
    """

    purpose: str
    preset: dict[str, Any]
    selections: tuple[str, ...] = ("last", "least_influence")
    averages: bool = False
    """Whether weights of layers are averaged, by their similarities (stages 1 to 3)."""
    fits: bool = False
    """Whether fused layers are fitted to calibration text."""
    least_tokens: int = 49152
    """Of calibration text, by default."""
    advice: str = _FIT
    """To those whose model lost much."""
    unhealed: str | None = None
    """The method that makes the same layers and trains nothing, where this one trains the model."""


_PRESET = {"selection": "last", "alignment": "none", "heal_tokens": 0}
_REFIT = Method(
    "a model that is to be used",
    _PRESET | {"selection": "groups"},
    ("last", "least_influence", "groups"),
    fits=True,
    advice=_FIT_BETTER,
)
METHODS = {
    "neural_alignment": Method(
        "MKA with matched neurons; the default in Python", _PRESET | {"alignment": "rows"}, averages=True
    ),
    "mka": Method("[Pruning via Merging](https://arxiv.org/abs/2406.16330)", _PRESET, averages=True),
    "truncate": Method("the plainest baseline", _PRESET),
    "refit": _REFIT,
    "healed": _REFIT._replace(
        purpose="the same, with a short training after it; the default of `lf-hf fuse`",
        preset=_REFIT.preset | {"heal_tokens": None},
        least_tokens=131072,
        unhealed="refit",
    ),
}
"""All methods by their names."""


def default_heal_tokens(layer_parameters: int) -> int:
    """Tokens of a healing: one for a hundred parameters of a layer, from 131,072 to 2,097,152."""
    return min(max(131072, layer_parameters // 100), 2097152)


def _named(methods: Iterable[str]) -> str:
    return " and ".join(methods)


_PUBLISHED = Needs("averages", heading="Hyper-parameters of the published method")


@checked
@dataclass(frozen=True, config=RULES)
class FusionConfig(Settings):
    """Settings of a fusion. Raises ValueError for a value that is not allowed, and for some that exclude each other."""

    one_of = LEVELS
    given_beside = ("calibration", "fused_dir", "tokenizer", "overwrite")

    num_fusions: Annotated[int, Field(ge=1)] = NOT_GIVEN
    """How many times two layers become one: 1 to L - 1 for a model of L layers, or to L - 3 unless selection="last".
    Give exactly one of num_fusions, target_layers, max_divergence and max_perplexity_ratio."""

    method: Annotated[str, OneOf(METHODS)] = "neural_alignment"
    """How layers are fused. "refit" and "healed" are for models that are to be used: one layer is fitted to what a
    group of layers computes, and "healed" trains the whole model afterwards. The others are for research, and ruin most
    models: "neural_alignment" (the published method) and "mka" average layers, "truncate" keeps the first one."""

    selection: Annotated[str, OneOf(["last", "least_influence", "groups"])] = NOT_GIVEN
    """Which layers are fused, by default as method has it. "last": the last ones of the model. "least_influence": those
    that change the residual stream least, each with the one before it. "groups", for "refit" and "healed": those groups
    of two layers or more whose fusion, tried as a set on several kinds of text, changes the model's predictions least.
    With the latter two the first and the last layer stay as they are."""

    alignment: Annotated[str, OneOf(["none", "rows", "neurons"])] = NOT_GIVEN
    """How layer j's neurons are matched to layer i's before both are averaged, by default as method has it. "rows": an
    optimal assignment of the rows of each weight matrix on its own. "neurons": MLP neurons and attention heads move as
    wholes, so that the aligned layer j computes what it did."""

    ridge: Annotated[float, Field(gt=0), Needs("fits")] = 0.1
    """Strength of a fit's pull towards the weights as they were, in units of the mean diagonal of the activations' Gram
    matrix."""

    calibration_tokens: Annotated[int, Field(ge=1024), Needs("needs_text")] = NOT_GIVEN
    """Most tokens of calibration text to use, for influence and fits. By default 32 for each channel of the model's
    MLP, but at least 49152 (131072 for method="healed") and at most 262144. The base writes a third of them itself, or
    half where the text is the bundled one; a fifth, some ten thousand at most, are questions with answers."""

    calibration_length: Annotated[int, Field(ge=16), Needs("needs_text")] = 512
    """Tokens of a sequence of calibration text."""

    heal_tokens: Annotated[int, Field(ge=0), Needs("heal_tokens")] = NOT_GIVEN
    """Tokens on which the fused model is then trained to predict what its base predicts, as by lf_hf.heal; 0 for no
    training. By default 0, and for method="healed" one for each hundred parameters of a layer, from 131072 to
    2097152."""

    target_layers: Annotated[int | None, Field(ge=1)] = None
    """How many layers to leave, in place of num_fusions."""

    max_divergence: Annotated[float | None, Field(gt=0)] = None
    """Fuse as many layers as possible while the fused model's predictions diverge from the base's by no more than this,
    in nats a token, before any healing. That is measured on an eighth of the calibration text that was given, to which
    nothing is fitted."""

    max_perplexity_ratio: Annotated[float | None, Field(gt=1)] = None
    """Like max_divergence, while perplexity, before any healing, is no more than this many times the base's."""

    perplexity_tokens: Annotated[int, Field(ge=0)] = 4000
    """Tokens of each text that both models are judged on, by their perplexity and by how far predictions moved; 0 skips
    this, and the sample texts that both write."""

    speed: bool = True
    """Measure the speed of the fused model and of its base, which takes some seconds; only where no weights are
    offloaded."""

    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED), Needs("is_random")] = 0
    """Seed of the mutual information estimate, of the calibration text that the model writes, and of healing."""

    kernel_scale: Annotated[float, Field(gt=0), _PUBLISHED] = 8.0
    """sigma_K of the diffusion kernel."""

    kernel_alpha: Annotated[float, _PUBLISHED] = 0.5
    """alpha of the diffusion kernel's density normalisation."""

    embedding_dim: Annotated[int, Field(ge=1), _PUBLISHED] = 2
    """d, the number of manifold coordinates of each sample."""

    mi_neighbors: Annotated[int, Field(ge=1), _PUBLISHED] = 5
    """k of the mutual information estimate."""

    entropy_neighbors: Annotated[int, Field(ge=1), _PUBLISHED] = 50
    """k of the entropy estimate, of k + 1 samples or more."""

    rank_normalize: Annotated[bool, _PUBLISHED] = True
    """Replace each embedding coordinate by its rank / N; without it entropies may differ in sign."""

    ratio_beta: Annotated[float, _PUBLISHED] = 1.0
    """beta, slope of the sigmoid that makes fusion ratios of similarities."""

    sample_length: Annotated[int, Field(ge=1), _PUBLISHED] = 512
    """T_max, the most tokens of a calibration sample."""

    samples_per_subject: Annotated[int, Field(ge=1), _PUBLISHED] = 1
    """Questions of each MMLU subject to calibrate on."""

    def _preset(self) -> dict[str, Any]:
        return METHODS[self.method].preset

    def _check_together(self) -> None:
        given = [name for name in LEVELS if getattr(self, name) is not None]
        if len(given) != 1:
            named = " and ".join(f"{name}={getattr(self, name)!r}" for name in given) or "none of them"
            raise ValueError(f"Give one of {', '.join(LEVELS)}, which say how many layers to fuse; got {named}.")
        if self.selection not in METHODS[self.method].selections:
            named = _named(method for method in METHODS if self.selection in METHODS[method].selections)
            raise ValueError(
                f"selection={self.selection!r} is for the methods {named}, got method={self.method!r}; give 'last'."
            )
        if self.alignment != "none" and not self.averages:
            named = _named(method for method in METHODS if METHODS[method].averages)
            problem = f"alignment={self.alignment!r} is for the methods {named}"
            raise ValueError(f"{problem}, got method={self.method!r}; give 'none'.")
        if self.heal_tokens and self.heal_tokens < LEAST_HEAL_TOKENS:
            raise ValueError(f"heal_tokens must be 0 or an integer >= {LEAST_HEAL_TOKENS}, got {self.heal_tokens}.")

    @property
    def averages(self) -> bool:
        """Whether the weights of layers are averaged, by their similarities (stages 1 to 3)."""
        return METHODS[self.method].averages

    @property
    def fits(self) -> bool:
        """Whether fused layers are fitted to calibration text."""
        return METHODS[self.method].fits

    @property
    def needs_text(self) -> bool:
        """Whether calibration text runs through the layers: for influence, fits or a budget."""
        return self.selection != "last" or self.fits or self.within_budget

    @property
    def within_budget(self) -> bool:
        """Whether a budget says how many layers are fused."""
        return self.max_divergence is not None or self.max_perplexity_ratio is not None

    @property
    def least_fusions(self) -> int:
        """How many fusions there are, or, where a budget says how many, one."""
        return self.num_fusions or 1

    def without_effect(self, calibration: object) -> list[str]:
        """Names of what was set to no use, with this calibration text or None."""
        usual = FusionConfig(1, self.method, heal_tokens=self.heal_tokens)  # of which 0 has an effect
        unused = [name for name in self.known if not self.takes_effect(name)]
        names = [name for name in unused if getattr(self, name) != getattr(usual, name)]
        if calibration is not None and not (self.averages or self.needs_text or self.heal_tokens):
            names.append("calibration")
        return names

    @property
    def unhealed(self) -> FusionConfig:
        """The same fusion without the healing that follows it."""
        return replace(self, method=METHODS[self.method].unhealed or self.method, heal_tokens=0)

    @property
    def healing(self) -> HealSettings | None:
        """Settings of the healing that follows, which are the defaults, if one does."""
        return HealSettings(tokens=self.heal_tokens, seed=self.seed) if self.heal_tokens else None

    @property
    def is_random(self) -> bool:
        """Whether anything depends on the seed."""
        return self.averages or self.needs_text or self.heal_tokens > 0

    @property
    def samples_needed(self) -> int:
        """Fewest samples that stages 2 and 3 can use."""
        return max(self.entropy_neighbors, self.embedding_dim, self.mi_neighbors) + 1

    def for_width(self, channels: int, layer_parameters: int) -> FusionConfig:
        """The settings with as many tokens as a model gets by default, by its MLP's channels and a layer's size."""
        config, least = self, METHODS[self.method].least_tokens
        if self.needs_text and self.calibration_tokens is None:
            tokens = min(max(least, CHANNEL_TOKENS * channels), MOST_CALIBRATION_TOKENS)
            config = replace(config, calibration_tokens=tokens)
        if self.heal_tokens is None:
            config = replace(config, heal_tokens=default_heal_tokens(layer_parameters))
        return config

    def for_layers(self, num_hidden_layers: int, free: range, why: str = "") -> FusionConfig:
        """The settings with `num_fusions` in place of `target_layers`, for a model of so many layers.

        Only those in `free` may be in groups; `why` says for what reason. Raises ValueError if the model has too few.
        """
        most = free.stop - free.start - 1
        layers = f"{num_hidden_layers} {plural(num_hidden_layers, 'layer')}"
        if why:
            layers += f" ({why})"
        if most < 1:
            least = num_hidden_layers - most + 1
            raise ValueError(f"The model has {layers}; selection={self.selection!r} needs at least {least}.")
        if self.num_fusions is not None and self.num_fusions > most:
            raise ValueError(
                f"num_fusions must be 1 to {most} for a model of {layers} and selection={self.selection!r}, got "
                f"{self.num_fusions}."
            )
        if self.target_layers is None:
            return self
        least = num_hidden_layers - most
        if not least <= self.target_layers < num_hidden_layers:
            raise ValueError(
                f"target_layers must be {least} to {num_hidden_layers - 1} for a base of {num_hidden_layers} layers, "
                f"got {self.target_layers}."
            )
        return replace(self, num_fusions=num_hidden_layers - self.target_layers, target_layers=None)

    def check_num_samples(self, num_samples: int) -> None:
        """Raise ValueError unless `num_samples` calibration samples are enough for stages 2 and 3."""
        if self.averages and num_samples < self.samples_needed:
            raise ValueError(
                f"entropy_neighbors={self.entropy_neighbors}, mi_neighbors={self.mi_neighbors} and "
                f"embedding_dim={self.embedding_dim} need at least {self.samples_needed} calibration samples, got "
                f"{num_samples}; give more samples or lower the largest of the three."
            )


@checked
@dataclass(frozen=True, config=RULES)
class HealSettings(Settings):
    """Settings of a healing. Raises ValueError for a value that is not allowed."""

    tokens: Annotated[int, Field(ge=LEAST_HEAL_TOKENS)] = NOT_GIVEN
    """Tokens to train on, repeats counted. By default one for each hundred parameters of a layer, from 131072 to
    2097152."""

    train: Annotated[str | None, OneOf(TRAINED)] = None
    """What is trained. "layers": all layers and the last norm, but not the embeddings and the head. "all": these too.
    "fused": the fused layers and all norms. "lora": adapters on every projection, which are merged at the end. By
    default it is the first of layers, fused and lora that the memory has room for."""

    learning_rate: Annotated[float | None, Field(gt=0, le=1)] = None
    """The highest learning rate, after the warm-up. By default it follows from the size of the weights: 1e-4 for
    SmolLM2-135M, 2e-5 for Gemma 3 270M, and five times that for "lora"."""

    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    """What both models' logits are divided by before they are compared."""

    next_token_share: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Share of the loss that is for the text's own next token; the rest is for the base's predictions."""

    written_share: Annotated[float | None, Field(ge=0, le=0.9)] = None
    """Share of the tokens that the base writes itself; a third by default."""

    length: Annotated[int, Field(ge=SHORTEST_LENGTH)] = 512
    """Tokens of a sequence that is trained on."""

    batch_tokens: Annotated[int, Field(ge=16)] = 2048
    """Tokens of a training step, over all processes."""

    lora_rank: Annotated[int, Field(ge=1), Needs("with_adapters")] = 32
    """Rank of the adapters of train="lora"."""

    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] = 0
    """Seed of the text that the base writes and of the order of sequences."""

    def _check_together(self) -> None:
        if self.batch_tokens < self.length:
            raise ValueError(f"batch_tokens={self.batch_tokens} holds no sequence of length={self.length}; raise it.")

    @property
    def with_adapters(self) -> bool:
        """Whether adapters are trained and not the weights themselves."""
        return self.train == "lora"

    @property
    def batch(self) -> int:
        """Sequences of a step, over all processes."""
        return self.batch_tokens // self.length

    @property
    def steps(self) -> int:
        """Steps of the whole training."""
        return max(1, self.tokens // (self.batch * self.length))

    @property
    def sequences(self) -> int:
        """Sequences of the whole training, repeats counted."""
        return self.steps * self.batch
