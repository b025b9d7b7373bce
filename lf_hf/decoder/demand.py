"""What it takes to run a model's layers and head, by arithmetic on its shape: what is counted of all other work, too.

Each room counts what it holds and computes beside the code that does so, and `plan` adds up.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from lf_hf.families.shape import Shape
from lf_hf.runtime.amounts import batch_size

TRAINED_BYTES = 18  # of a trained parameter: master, gradient, two moments in float32, and a copy to compute in
STEP_BYTES = 60  # of it that AdamW and the copy read and write in a step

Work = Counter[str]
"""Operations by the rate that bounds them. Flops: of whole layers, the `head`, each `product` in float32, and what is
`solve`d in float64. `logits` are numbers of a softmax, `calls` of a layer with a token each, and `bytes` what is moved.
"""


@dataclass(frozen=True)
class Need:
    """What a phase takes beside the model's weights: bytes where layers compute, bytes of lists of states, and work.

    `here`: bytes beside those of weights that lie where layers compute, and `away`: where none of them does.
    """

    inside: int
    lists: int
    work: Work
    here: int = 0
    away: int = 0


@dataclass(frozen=True)
class Setup:
    """A model, and how its layers run on a device.

    `longest`: layers that may become one. `on_disk`: whether weights lie there, so that models continue no prompts.
    """

    shape: Shape
    batch_bytes: int
    on_card: bool
    longest: int = 1
    on_disk: bool = False

    def batch(self, length: int, tokens: int) -> int:
        """How many of some tokens pass a layer together, in sequences of `length`."""
        return min(tokens, batch_size(length, self.shape.mlp, self.batch_bytes) * length)

    def running(self, length: int, tokens: int) -> int:
        """Bytes inside a layer: what an MLP reads, and what becomes of that; the stream, norms and all of attention.

        No kernel of a card takes grouped heads in float32 without all scores: these, softmaxes and which are masked.
        """
        shape = self.shape
        scores = 0  # of a token
        if self.on_card and shape.size == 4 and shape.keys < shape.queries:
            scores = 10 * shape.heads * min(length, shape.positions)
        numbers = 2 * shape.readers * shape.mlp + (10 + 3 * shape.chosen) * shape.hidden  # each expert has its own rows
        return self.batch(length, tokens) * (numbers * shape.size + scores)

    def states(self, tokens: int) -> int:
        """Bytes of a list of the states of so many tokens."""
        return tokens * self.shape.hidden * self.shape.size

    def forward(self, tokens: int, layers: int) -> Work:
        """Of tokens that pass some layers."""
        return Work(layer=2 * self.shape.active * tokens * layers)

    def head(self, tokens: int, models: int = 1) -> Work:
        """Of the predictions of some models."""
        logits = tokens * self.shape.vocab * models
        return Work(head=2 * self.shape.hidden * logits, logits=logits)

    @property
    def own_product(self) -> str:
        """The rate of products in the model's own numbers; float16 is multiplied in float32, slower."""
        return "layer" if self.shape.size == 2 else "product"


def times(work: Work, count: float) -> Work:
    """The same work so many times."""
    return Work({name: int(amount * count) for name, amount in work.items()})


def activation_bytes(shape: Shape) -> int:
    """Bytes that a layer keeps of a token for its gradient under autocast, by what torch saves.

    Each norm: what it reads and what it gives in float32, and a bfloat16 copy. Attention: queries, keys and values in
    front of rotary embeddings and behind them, keys for all queries, and their norms. The MLP: what its readers give,
    and as many numbers in between: gate, up, the activation and their product.
    """
    norms = 4 if shape.has_norm_after else 2
    of_heads = 8 * (shape.queries + shape.keys) * shape.has_head_norms
    mixer = max(8 * (shape.queries + 2 * shape.keys) + of_heads, shape.delta)
    return (10 * norms + 6 * shape.chosen) * shape.hidden + mixer + 4 * shape.readers * shape.mlp
