"""HealSettings: every hyper-parameter of a healing, validated, in one frozen object."""

from __future__ import annotations

from dataclasses import dataclass

from lf_hf.runtime.settings_base import Settings, documented, setting
from lf_hf.settings import HEAL_TOKENS, LARGEST_SEED

RELATIVE_RATES = {"layers": 5.5e-4, "all": 5.5e-4, "fused": 5.5e-4, "lora": 2.75e-3}
"""The default learning rate by what is trained, in units of the size of the model's weights."""


@documented
@dataclass(frozen=True)
class HealSettings(Settings):
    """Settings of a healing. Raises ValueError for a value that is not allowed."""

    tokens: int = setting(HEAL_TOKENS, "Tokens to train on, repeats counted.", at_least=1024)
    train: str = setting(
        "layers",
        'What is trained. "layers": all layers and the last norm, but not the embeddings and the head. "all": these '
        'too. "fused": the fused layers and all norms. "lora": adapters on every projection, which are merged at the '
        "end.",
        choices=tuple(RELATIVE_RATES),
    )
    learning_rate: float | None = setting(
        None,
        "The highest learning rate, after the warm-up. It follows from the size of the weights: 1e-4 for SmolLM2-135M, "
        '2e-5 for Gemma 3 270M, and five times that for "lora".',
        above=0,
        at_most=1,
        unset="from the model's weights",
    )
    temperature: float = setting(
        1.0, "What both models' logits are divided by before they are compared.", above=0, at_most=100
    )
    next_token_share: float = setting(
        0.2,
        "Share of the loss that is for the text's own next token; the rest is for the base's predictions.",
        at_least=0,
        at_most=1,
    )
    written_share: float | None = setting(
        None, "Share of the tokens that the base writes itself.", at_least=0, at_most=0.9, unset="a third"
    )
    length: int = setting(512, "Tokens of a sequence that is trained on.", at_least=16)
    batch_tokens: int = setting(2048, "Tokens of a training step, over all processes.", at_least=16)
    lora_rank: int = setting(32, 'Rank of the adapters of train="lora".', at_least=1, needs="with_adapters")
    top_k: int = setting(
        64,
        "How many of the base's predictions for a token are written to disk; all others are counted as one.",
        at_least=1,
    )
    seed: int = setting(
        0, "Seed of the text that the base writes and of the order of sequences.", at_least=0, at_most=LARGEST_SEED
    )

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
