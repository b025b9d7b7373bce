"""FusionConfig: every hyper-parameter of a fusion, validated, in one frozen object."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import operator
from dataclasses import dataclass
from typing import Any, SupportsIndex

ALGORITHM = 8
"""Number of what a fusion computes; raise it whenever results change, so that kept ones are not used again."""

LEAST_HEAL_TOKENS = 1024
"""Of a healing: fewer teach nothing."""

METHODS: dict[str, dict[str, str]] = {
    "neural_alignment": {"selection": "last", "alignment": "rows", "merge": "average", "refit": "none"},
    "mka": {"selection": "last", "alignment": "none", "merge": "average", "refit": "none"},
    "truncate": {"selection": "last", "alignment": "none", "merge": "keep_first", "refit": "none"},
    "refit": {"selection": "least_influence", "alignment": "none", "merge": "select", "refit": "projections"},
}
"""What each preset sets. A field that the user gives overrides its preset."""

LONGEST_GROUP = 6
"""Layers that selection="groups" makes one, at most."""

CHOICES: dict[str, tuple[str, ...]] = {
    "method": tuple(METHODS),
    "selection": ("last", "least_influence", "groups"),
    "alignment": ("none", "rows", "neurons"),
    "merge": ("average", "keep_first", "select"),
    "refit": ("none", "down_proj", "projections"),
}

# Inclusive lower bounds of the integer fields and (exclusive lower, inclusive upper) bounds of the floats.
_INT_MINIMUM = {
    "num_fusions": 1,
    "embedding_dim": 1,
    "mi_neighbors": 1,
    "entropy_neighbors": 1,
    "sample_length": 1,
    "samples_per_subject": 1,
    "calibration_tokens": 1024,
    "calibration_length": 16,
    "perplexity_tokens": 0,
    "heal_tokens": 0,
    "seed": 0,
}
# What some fields say is needed for some fusions only; all other fields always have an effect.
_SIMILARITY_FIELDS = {
    "kernel_scale",
    "kernel_alpha",
    "embedding_dim",
    "mi_neighbors",
    "entropy_neighbors",
    "rank_normalize",
    "ratio_beta",
    "sample_length",
    "samples_per_subject",
}
_TEXT_FIELDS = {"calibration_tokens", "calibration_length"}
LARGEST_INTEGER = 2**32 - 1  # what every library below takes, as a seed too
_FLOAT_RANGE = {
    "kernel_scale": (0.0, math.inf),
    "kernel_alpha": (-math.inf, math.inf),
    "ratio_beta": (-math.inf, math.inf),
    "ridge": (0.0, math.inf),
    "max_divergence": (0.0, math.inf),
    "max_perplexity_ratio": (1.0, math.inf),
}
LEVELS = ("num_fusions", "max_divergence", "max_perplexity_ratio")
"""Fields of FusionConfig that say how many layers to fuse: one of them is given."""


@dataclass(frozen=True)
class FusionConfig:
    """Settings of a fusion.

    Parameters
    ----------
    num_fusions : int
        How many times two layers become one: 1 to L - 1 for a model of L layers; to L - 3 unless selection="last", and
        with "groups" as many as leave one layer of every six. One of this and the next two is given.
    max_divergence : float > 0
        Fuse as many as keep the divergence of the fused model's predictions from the dense one's within this, in nats a
        token. It is measured on an eighth of the calibration text, which nothing is fitted to then.
    max_perplexity_ratio : float > 1
        Fuse as many as keep the perplexity of that text within this many times the dense model's.
    method : {"neural_alignment", "mka", "truncate", "refit"}, default="neural_alignment"
        Preset of `selection`, `alignment`, `merge` and `refit`.
    selection : {"last", "least_influence", "groups"}, default from `method`
        Which pair each step fuses. "last": the last two layers of the model. "least_influence":
        the layer that changes the residual stream least, with the one before it. "groups": those groups of two to six
        layers that, each made one layer and tried on calibration text, move the model's predictions least together.
        In the latter two the first and the last layer stay.
    alignment : {"none", "rows", "neurons"}, default from `method`
        How layer j's neurons are matched to layer i's before merging. "rows": an optimal assignment of the
        rows of each weight matrix on its own. "neurons": MLP neurons and attention heads move as wholes, so
        that the aligned layer j computes what it did.
    merge : {"average", "keep_first", "select"}, default from `method`
        "average": ratio-weighted sum of both layers' weights. "keep_first": layer i as it is. "select": the MLP
        channels of both layers that the pair's output needs most; attention is layer i's, unless refit="projections".
    refit : {"none", "down_proj", "projections"}, default from `method`
        "down_proj": fit the fused layers' down projections to the dense model's states, by ridge regression on
        calibration text. "projections", for merge="select": also choose the key-value groups of both layers that the
        output needs most, fit o_proj, and let each layer's heads and channels read the stream through a fitted map.
    ridge : float > 0, default=0.1
        Strength of the refit's pull towards the weights as they were, in units of the mean diagonal of the
        activations' Gram matrix.
    calibration_tokens : int >= 1024, default=49152
        Tokens of calibration text that influence, channel selection and refit use at most. The model writes a third
        of them itself and answered questions are a fifth; where no text is given it writes half.
    calibration_length : int >= 16, default=512
        Tokens of a sequence of that text.
    kernel_scale : float > 0, default=8.0
        sigma_K of the diffusion kernel.
    kernel_alpha : float, default=0.5
        Power alpha of the kernel's density normalisation.
    embedding_dim : int >= 1, default=2
        d, the number of manifold coordinates of each sample.
    mi_neighbors : int >= 1, default=5
        k of the mutual information estimate.
    entropy_neighbors : int >= 1, default=50
        k of the entropy estimate; needs at least k + 1 calibration samples.
    rank_normalize : bool, default=True
        Replace each embedding coordinate by its rank / N before stage 3. Without it entropies may differ in
        sign between layers.
    ratio_beta : float, default=1.0
        beta, the slope of the sigmoid that makes fusion ratios of similarities.
    sample_length : int >= 1, default=512
        T_max, tokens of a calibration sample; longer ones are cut.
    samples_per_subject : int >= 1, default=1
        Questions of each of the 57 MMLU subjects in the default calibration set.
    perplexity_tokens : int >= 0, default=4000
        Tokens of each judging text, on which perplexity is measured before and after fusing, and how far predictions
        moved; 0 leaves that out, and what both models write.
    heal_tokens : int, 0 or >= 1024, default=0
        Tokens on which the fused model is trained to predict what its base predicts, see `lf_hf.heal`; 0 leaves it out.
    seed : int >= 0, default=0
        Seed of the mutual information estimate, of the calibration text that the model writes, and of healing.

    Raises
    ------
    ValueError
        If a value has the wrong type, is out of range, or is no known choice.
    """

    num_fusions: int = None  # type: ignore[assignment]  # None where a budget is given
    method: str = "neural_alignment"
    selection: str = None  # type: ignore[assignment]  # filled from `method` in __post_init__
    alignment: str = None  # type: ignore[assignment]
    merge: str = None  # type: ignore[assignment]
    refit: str = None  # type: ignore[assignment]
    ridge: float = 0.1
    calibration_tokens: int = 49152
    calibration_length: int = 512
    kernel_scale: float = 8.0
    kernel_alpha: float = 0.5
    embedding_dim: int = 2
    mi_neighbors: int = 5
    entropy_neighbors: int = 50
    rank_normalize: bool = True
    ratio_beta: float = 1.0
    sample_length: int = 512
    samples_per_subject: int = 1
    perplexity_tokens: int = 4000
    heal_tokens: int = 0
    seed: int = 0
    max_divergence: float | None = None
    max_perplexity_ratio: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in LEVELS if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(f"{name}={getattr(self, name)!r:.80}" for name in given) or "none of them"
            raise ValueError(f"Give one of {', '.join(LEVELS)}, which say how many layers to fuse; got {found}.")
        _check_choice("method", self.method)
        for name, preset in METHODS[self.method].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, preset)
            _check_choice(name, getattr(self, name))
        for name, minimum in _INT_MINIMUM.items():
            value = getattr(self, name)
            if name in LEVELS and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, SupportsIndex) or operator.index(value) < minimum:
                raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r:.80}.")
            if operator.index(value) > LARGEST_INTEGER:
                raise ValueError(f"{name} must be at most {LARGEST_INTEGER}, got {value!r:.80}.")
            object.__setattr__(self, name, operator.index(value))  # of numpy's integers, too
        for name, (lower, upper) in _FLOAT_RANGE.items():
            if name in LEVELS and getattr(self, name) is None:
                continue
            number = _finite(getattr(self, name))
            if number is None:
                raise ValueError(f"{name} must be a finite number, got {getattr(self, name)!r:.80}.")
            if not lower < number <= upper:
                raise ValueError(f"{name} must be greater than {lower:g}, got {getattr(self, name)!r}.")
            object.__setattr__(self, name, number)
        if 0 < self.heal_tokens < LEAST_HEAL_TOKENS:
            raise ValueError(f"heal_tokens must be 0 or at least {LEAST_HEAL_TOKENS}, got {self.heal_tokens}.")
        if not isinstance(self.rank_normalize, bool):
            raise ValueError(f"rank_normalize must be true or false, got {self.rank_normalize!r:.80}.")

        if self.refit == "projections" and self.merge != "select":
            raise ValueError(
                f"refit='projections' chooses heads and channels of whole layers, which merge={self.merge!r} has mixed "
                "or dropped by then; set merge='select' or refit='down_proj'."
            )
        if self.alignment != "none" and self.merge != "average":
            raise ValueError(
                f"alignment={self.alignment!r} has no effect with merge={self.merge!r}, which takes neurons as they "
                "are; set alignment='none' or merge='average'."
            )

    @property
    def needs_text(self) -> bool:
        """Whether any step runs calibration text through the layers: for influence, selection or refit."""
        return self.selection != "last" or self.fits or self.within_budget

    @property
    def within_budget(self) -> bool:
        """Whether a budget says how many layers are fused."""
        return self.num_fusions is None

    @property
    def fits(self) -> bool:
        """Whether fused layers are fitted to what they should compute: channels selected, or projections refitted."""
        return self.merge == "select" or self.refit != "none"

    @property
    def remakes(self) -> bool:
        """Whether the last pass makes fused layers again from the layers of the dense model."""
        return self.merge == "select" and self.refit != "none"

    @property
    def needs_similarity(self) -> bool:
        """Whether any step uses the layer similarity matrix (stages 1 to 3)."""
        return self.merge == "average"

    def in_effect(self) -> dict[str, Any]:
        """The fields that this fusion depends on, JSON-ready."""
        without = {name for name in LEVELS if getattr(self, name) is None}
        if not self.needs_similarity:
            without |= _SIMILARITY_FIELDS
        if not self.needs_text:
            without |= _TEXT_FIELDS
        if not self.heal_tokens:
            without.add("heal_tokens")
        if not self.needs_similarity and not self.needs_text and not self.heal_tokens:
            without.add("seed")
        if not self.fits:
            without.add("ridge")
        return {name: value for name, value in self.to_dict().items() if name not in without}

    @property
    def samples_needed(self) -> int:
        """How many samples stages 2 and 3 need at least."""
        return max(self.entropy_neighbors, self.embedding_dim, self.mi_neighbors) + 1

    def most_fusions(self, num_hidden_layers: int) -> int:
        """How many fusions a model of `num_hidden_layers` layers allows; below 1 where it allows none."""
        left = 1 if self.selection == "last" else 3  # with the first and the last layer kept, three stay
        if self.selection == "groups":
            left = max(left, 2 + math.ceil((num_hidden_layers - 2) / LONGEST_GROUP))
        return num_hidden_layers - left

    def check_num_layers(self, num_hidden_layers: int) -> None:
        """Raise ValueError unless a model of `num_hidden_layers` layers allows `num_fusions`, or any at all."""
        most = self.most_fusions(num_hidden_layers)
        if most < 1:
            raise ValueError(
                f"The model has {num_hidden_layers} layers; fusing with selection={self.selection!r} needs at least "
                f"{num_hidden_layers - most + 1}."
            )
        if not self.within_budget and self.num_fusions > most:
            raise ValueError(
                f"num_fusions must be 1 to {most} for a model of {num_hidden_layers} layers and "
                f"selection={self.selection!r}, got {self.num_fusions}."
            )

    def check_num_samples(self, num_samples: int) -> None:
        """Raise ValueError unless `num_samples` calibration samples are enough for stages 2 and 3."""
        if self.needs_similarity and num_samples < self.samples_needed:
            raise ValueError(
                f"entropy_neighbors={self.entropy_neighbors}, mi_neighbors={self.mi_neighbors} and "
                f"embedding_dim={self.embedding_dim} need at least {self.samples_needed} calibration samples, got "
                f"{num_samples}; give more samples or lower the largest of the three."
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-ready."""
        return dataclasses.asdict(self)

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """Names of all fields, `num_fusions` first."""
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> FusionConfig:
        """Build from values that may be strings, as command lines and model args give them.

        Raises
        ------
        ValueError
            For an unknown name (the nearest known one is named) or a value that does not parse.
        """
        for name in kwargs:
            if name not in cls.field_names():
                raise ValueError(unknown_name("fusion setting", name, cls.field_names()))
        return cls(**{name: _parse(name, value) for name, value in kwargs.items()})


def fusion_settings(config: FusionConfig | None, kwargs: dict[str, Any]) -> FusionConfig:
    """A config with the FusionConfig fields among `kwargs`, which are taken out there, in place of its own.

    Raises
    ------
    ValueError
        For values that are not allowed, and for other names in `kwargs` that look like a misspelt field.
    """
    if not isinstance(config, FusionConfig | None):
        raise ValueError(f"config must be a FusionConfig, got {config!r:.80}; give its fields as keyword arguments.")
    settings = {name: kwargs.pop(name) for name in FusionConfig.field_names() if name in kwargs}
    for name in kwargs:
        if difflib.get_close_matches(name, FusionConfig.field_names(), n=1, cutoff=0.85):
            raise ValueError(unknown_name("argument", name, FusionConfig.field_names()))
    if config is None:
        return FusionConfig.from_kwargs(**settings)
    values = config.to_dict()
    if "method" in settings:  # what the old one stood for goes with it
        preset = METHODS[config.method]
        values = {name: value for name, value in values.items() if name not in preset or value != preset[name]}
    return FusionConfig.from_kwargs(**values | settings)


def unknown_name(kind: str, name: str, known: tuple[str, ...]) -> str:
    """One sentence that says that `name` is no known `kind`, with the nearest one if there is one."""
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(known)}."
    return f"Unknown {kind} {name!r:.80}; {hint}"


def _finite(value: object) -> float | None:
    """A finite number as a float, one of numpy's too; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer that no float comes near
        return None


def _check_choice(name: str, value: Any) -> None:
    if value not in CHOICES[name]:
        if isinstance(value, str):
            raise ValueError(unknown_name(name, value, CHOICES[name]))
        raise ValueError(f"{name} must be one of {', '.join(CHOICES[name])}, got {value!r:.80}.")


def _parse(name: str, value: Any) -> Any:
    """Read a string as the type of field `name`; any other value passes through."""
    if not isinstance(value, str) or name in CHOICES:
        return value
    try:
        if name in _INT_MINIMUM:
            return int(value)
        if name in _FLOAT_RANGE:
            return float(value)
    except ValueError:
        wanted = "an integer" if name in _INT_MINIMUM else "a number"
        raise ValueError(f"{name} must be {wanted}, got {value!r:.80}.") from None
    lowered = value.strip().lower()
    if lowered not in ("true", "false"):
        raise ValueError(f"{name} must be true or false, got {value!r:.80}.")
    return lowered == "true"
