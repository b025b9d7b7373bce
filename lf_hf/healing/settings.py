"""HealSettings: every hyper-parameter of a healing, validated, in one frozen object."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from lf_hf.runtime.settings_base import RULES, Needs, OneOf, Settings, checked
from lf_hf.settings import HEAL_TOKENS, LARGEST_SEED

RELATIVE_RATES = {"layers": 5.5e-4, "all": 5.5e-4, "fused": 5.5e-4, "lora": 2.75e-3}
"""The default learning rate by what is trained, in units of the size of the model's weights."""


@checked
@dataclass(frozen=True, config=RULES)
class HealSettings(Settings):
    """Settings of a healing. Raises ValueError for a value that is not allowed."""

    tokens: Annotated[int, Field(ge=1024)] = HEAL_TOKENS
    """Tokens to train on, repeats counted."""

    train: Annotated[str, OneOf(RELATIVE_RATES)] = "layers"
    """What is trained. "layers": all layers and the last norm, but not the embeddings and the head. "all": these too.
    "fused": the fused layers and all norms. "lora": adapters on every projection, which are merged at the end."""

    learning_rate: Annotated[float | None, Field(gt=0, le=1)] = None
    """The highest learning rate, after the warm-up. By default it follows from the size of the weights: 1e-4 for
    SmolLM2-135M, 2e-5 for Gemma 3 270M, and five times that for "lora"."""

    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    """What both models' logits are divided by before they are compared."""

    next_token_share: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Share of the loss that is for the text's own next token; the rest is for the base's predictions."""

    written_share: Annotated[float | None, Field(ge=0, le=0.9)] = None
    """Share of the tokens that the base writes itself; a third by default."""

    length: Annotated[int, Field(ge=16)] = 512
    """Tokens of a sequence that is trained on."""

    batch_tokens: Annotated[int, Field(ge=16)] = 2048
    """Tokens of a training step, over all processes."""

    lora_rank: Annotated[int, Field(ge=1), Needs("with_adapters")] = 32
    """Rank of the adapters of train="lora"."""

    top_k: Annotated[int, Field(ge=1)] = 64
    """How many of the base's predictions for a token are written to disk; all others are counted as one."""

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
