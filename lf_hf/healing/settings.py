"""HealSettings: every hyper-parameter of a healing, validated, in one frozen object."""

from __future__ import annotations

import dataclasses
import math
import operator
from dataclasses import dataclass
from typing import Any, SupportsIndex

from lf_hf.settings import LARGEST_INTEGER, LEAST_HEAL_TOKENS, unknown_name

TRAIN = ("layers", "all", "fused", "lora")
LEARNING_RATES = {"layers": 1e-4, "all": 1e-4, "fused": 1e-4, "lora": 5e-4}
_INT_MINIMUM = {"tokens": LEAST_HEAL_TOKENS, "length": 16, "batch_tokens": 16, "lora_rank": 1, "top_k": 1, "seed": 0}
# Inclusive lower and upper bounds; zero is excluded where it would mean that nothing is learnt.
_FLOAT_RANGE = {"learning_rate": (0.0, 1.0), "temperature": (0.0, 100.0)}
_SHARES = ("next_token_share", "written_share")


@dataclass(frozen=True)
class HealSettings:
    """Settings of a healing.

    Parameters
    ----------
    tokens : int >= 1024, default=131072
        Tokens to train on, repeats counted.
    train : {"layers", "all", "fused", "lora"}, default="layers"
        What is trained. "layers": all layers and the last norm, but not the embeddings and the head. "all": these too.
        "fused": the fused layers and all norms. "lora": adapters on every projection, which are merged at the end.
    learning_rate : float > 0, default from `train`
        The highest one, after the warm-up: 5e-4 for "lora", else 1e-4.
    temperature : float > 0, default=1.0
        What both models' logits are divided by before they are compared.
    next_token_share : float in 0..1, default=0.2
        Share of the loss that is for the text's own next token; the rest is for the base's predictions.
    written_share : float in 0..0.9, default from the text
        Share of the tokens that the base writes itself.
    length : int >= 16, default=512
        Tokens of a sequence.
    batch_tokens : int >= 16, default=2048
        Tokens of a step, over all processes.
    lora_rank : int >= 1, default=32
        Rank of the adapters.
    top_k : int >= 1, default=64
        How many of the base's predictions of a token are kept where they are written to disk; all others are one.
    seed : int >= 0, default=0
        Seed of the text that the base writes and of the order of sequences.

    Raises
    ------
    ValueError
        If a value has the wrong type, is out of range, or is no known choice.
    """

    tokens: int = 131072
    train: str = "layers"
    learning_rate: float = None  # type: ignore[assignment]  # filled from `train` in __post_init__
    temperature: float = 1.0
    next_token_share: float = 0.2
    written_share: float | None = None
    length: int = 512
    batch_tokens: int = 2048
    lora_rank: int = 32
    top_k: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.train not in TRAIN:
            raise ValueError(unknown_name("train", str(self.train), TRAIN))
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", LEARNING_RATES[self.train])
        for name, minimum in _INT_MINIMUM.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, SupportsIndex) or operator.index(value) < minimum:
                raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r:.80}.")
            if operator.index(value) > LARGEST_INTEGER:
                raise ValueError(f"{name} must be at most {LARGEST_INTEGER}, got {value!r:.80}.")
            object.__setattr__(self, name, operator.index(value))  # of numpy's integers, too
        for name, (lower, upper) in _FLOAT_RANGE.items():
            if not _is_number(value := getattr(self, name)) or not lower < value <= upper:
                raise ValueError(f"{name} must be greater than {lower:g} and at most {upper:g}, got {value!r:.80}.")
        for name in _SHARES:
            value, most = getattr(self, name), 0.9 if name == "written_share" else 1.0
            if value is None and name == "written_share":
                continue
            if not _is_number(value) or not 0 <= value <= most:
                raise ValueError(f"{name} must be 0 to {most:g}, got {value!r:.80}.")
        if self.batch_tokens < self.length:
            raise ValueError(f"batch_tokens={self.batch_tokens} holds no sequence of length={self.length}; raise it.")

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

    def share_written(self, by_default: float) -> float:
        """Share of the tokens that the base writes, where a text asks for `by_default`."""
        return by_default if self.written_share is None else self.written_share

    def written_sequences(self, by_default: float) -> int:
        """Sequences that the base writes at most."""
        return int(self.sequences * self.share_written(by_default))

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """Names of all fields."""
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> HealSettings:
        """Build from values that may be strings, as command lines give them.

        Raises
        ------
        ValueError
            For an unknown name or a value that does not parse.
        """
        for name in kwargs:
            if name not in cls.field_names():
                raise ValueError(unknown_name("healing setting", name, cls.field_names()))
        return cls(**{name: _parse(name, value) for name, value in kwargs.items()})

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-ready."""
        return dataclasses.asdict(self)

    def in_effect(self, *, on_disk: bool, written_share: float) -> dict[str, Any]:
        """The fields that a healing depended on, JSON-ready: whether predictions were on disk, and what was written."""
        without = {"top_k"} if not on_disk else set()
        without |= {"lora_rank"} if self.train != "lora" else set()
        values = self.to_dict() | {"written_share": written_share}
        return {name: value for name, value in values.items() if name not in without}


def _parse(name: str, value: Any) -> Any:
    """Read a string as the type of field `name`; any other value passes through."""
    if not isinstance(value, str) or name == "train":
        return value
    try:
        return int(value) if name in _INT_MINIMUM else float(value)
    except ValueError:
        wanted = "an integer" if name in _INT_MINIMUM else "a number"
        raise ValueError(f"{name} must be {wanted}, got {value!r:.80}.") from None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
