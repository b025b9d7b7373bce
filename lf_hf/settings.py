"""FusionConfig: every hyper-parameter of a fusion, validated, in one frozen object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lf_hf.runtime.fields import Settings, documented, setting

ALGORITHM = 17
"""Number of what a fusion computes; raise it whenever results change, so that kept ones are not used again."""

LEAST_HEAL_TOKENS = 1024
"""Of a healing: fewer teach nothing."""

HEAL_TOKENS = 131072
"""Of a healing, by default."""

CALIBRATION_TOKENS = 49152
"""Of the text that layers are fitted to, by default, where nothing is healed."""

LARGEST_SEED = 2**32 - 1
"""What every library takes."""

METHODS: dict[str, dict[str, Any]] = {
    "neural_alignment": {"selection": "last", "alignment": "rows", "merge": "average", "refit": "none"},
    "mka": {"selection": "last", "alignment": "none", "merge": "average", "refit": "none"},
    "truncate": {"selection": "last", "alignment": "none", "merge": "keep_first", "refit": "none"},
    "refit": {"selection": "groups", "alignment": "none", "merge": "select", "refit": "projections"},
}
METHODS["healed"] = METHODS["refit"] | {"calibration_tokens": HEAL_TOKENS, "heal_tokens": HEAL_TOKENS}
"""What each preset sets; nothing is healed by the others. A field that the user gives overrides its preset."""

LONGEST_GROUP = 6
"""Layers that selection="groups" makes one, at most; more only where so many are to go that they have to be."""

_SIMILARITY = ("needs_similarity",)  # what stages 1 to 3 use has an effect only where they run
_TEXT = ("needs_text",)
LEVELS = ("num_fusions", "max_divergence", "max_perplexity_ratio")
"""Fields of FusionConfig that say how many layers to fuse: one of them is given."""


@documented
@dataclass(frozen=True)
class FusionConfig(Settings):
    """Settings of a fusion."""

    noun, one_of = "fusion setting", LEVELS

    num_fusions: int = setting(
        None,
        "How many times two layers become one: 1 to L - 1 for a model of L layers; to L - 3 unless "
        'selection="last". One of this, max_divergence and max_perplexity_ratio is given.',
        bounds=">= 1",
    )
    method: str = setting(
        "neural_alignment",
        'Preset of selection, alignment, merge and refit. "healed" is "refit", and heals the result.',
        choices=tuple(METHODS),
    )
    selection: str = setting(
        None,
        'Which pair each step fuses. "last": the last two layers of the model. "least_influence": the layer that '
        'changes the residual stream least, with the one before it. "groups": those groups of two layers or more that, '
        "each made one layer and tried on several kinds of text, move the model's predictions least together. In the "
        "latter two the first and the last layer stay.",
        choices=("last", "least_influence", "groups"),
        unset="from method",
    )
    alignment: str = setting(
        None,
        "How layer j's neurons are matched to layer i's before merging. \"rows\": an optimal assignment of the rows of "
        'each weight matrix on its own. "neurons": MLP neurons and attention heads move as wholes, so that the '
        "aligned layer j computes what it did.",
        choices=("none", "rows", "neurons"),
        unset="from method",
    )
    merge: str = setting(
        None,
        '"average": ratio-weighted sum of both layers\' weights. "keep_first": layer i as it is. "select": the MLP '
        "channels of both layers that the pair's output needs most; attention is layer i's, unless "
        'refit="projections".',
        choices=("average", "keep_first", "select"),
        unset="from method",
    )
    refit: str = setting(
        None,
        "\"down_proj\": fit the fused layers' down projections to the dense model's states, by ridge regression on "
        'calibration text. "projections", for merge="select": also choose the key-value groups of both layers that '
        "the output needs most, fit o_proj, let each layer's heads and channels read the stream through a fitted map, "
        "and train what comes out, layer by layer, to write what its group wrote.",
        choices=("none", "down_proj", "projections"),
        unset="from method",
    )
    ridge: float = setting(
        0.1,
        "Strength of the refit's pull towards the weights as they were, in units of the mean diagonal of the "
        "activations' Gram matrix.",
        bounds="> 0",
        needs=("fits",),
    )
    calibration_tokens: int = setting(
        None,
        "Tokens of calibration text that influence, channel selection and refit use at most: "
        f'{CALIBRATION_TOKENS}, and {HEAL_TOKENS} for method="healed". The model writes a third of them itself and '
        "answered questions are a fifth, some ten thousand at most; of the bundled mixture it writes half.",
        bounds=">= 1024",
        unset="from method",
        needs=_TEXT,
    )
    calibration_length: int = setting(512, "Tokens of a sequence of calibration text.", bounds=">= 16", needs=_TEXT)
    kernel_scale: float = setting(8.0, "sigma_K of the diffusion kernel.", bounds="> 0", needs=_SIMILARITY)
    kernel_alpha: float = setting(0.5, "alpha of the diffusion kernel's density normalisation.", needs=_SIMILARITY)
    embedding_dim: int = setting(
        2, "d, the number of manifold coordinates of each sample.", bounds=">= 1", needs=_SIMILARITY
    )
    mi_neighbors: int = setting(5, "k of the mutual information estimate.", bounds=">= 1", needs=_SIMILARITY)
    entropy_neighbors: int = setting(
        50, "k of the entropy estimate; needs at least k + 1 calibration samples.", bounds=">= 1", needs=_SIMILARITY
    )
    rank_normalize: bool = setting(
        True,
        "Replace each embedding coordinate by its rank / N before stage 3. Without it entropies may differ in sign "
        "between layers.",
        needs=_SIMILARITY,
    )
    ratio_beta: float = setting(
        1.0, "beta, the slope of the sigmoid that makes fusion ratios of similarities.", needs=_SIMILARITY
    )
    sample_length: int = setting(
        512, "T_max, tokens of a calibration sample; longer ones are cut.", bounds=">= 1", needs=_SIMILARITY
    )
    samples_per_subject: int = setting(
        1, "Questions of each of the 57 MMLU subjects in the default calibration set.", bounds=">= 1", needs=_SIMILARITY
    )
    perplexity_tokens: int = setting(
        4000,
        "Tokens of each judging text, on which perplexity is measured before and after fusing, and how far "
        "predictions moved; 0 leaves that out, and what both models write.",
        bounds=">= 0",
    )
    heal_tokens: int = setting(
        None,
        "Tokens on which the fused model is trained to predict what its base predicts, see lf_hf.heal; 0 leaves it "
        f'out, {HEAL_TOKENS} for method="healed".',
        bounds=f"0 or >= {LEAST_HEAL_TOKENS}",
        unset="from method",
        needs=("heal_tokens",),
    )
    seed: int = setting(
        0,
        "Seed of the mutual information estimate, of the calibration text that the model writes, and of healing.",
        bounds=f">= 0 and <= {LARGEST_SEED}",
        needs=("needs_similarity", "needs_text", "heal_tokens"),
    )
    speed: bool = setting(
        True,
        "Measure how fast the fused model is beside its base: tokens a second, in some seconds. Only in memory, and "
        "where one process fuses.",
    )
    max_divergence: float | None = setting(
        None,
        "Fuse as many layers as keep the divergence of the fused model's predictions from the dense one's within this, "
        "in nats a token. It is measured on an eighth of the sequences of the calibration text that is given (not of "
        "what the model writes), to which nothing is fitted then.",
        bounds="> 0",
    )
    max_perplexity_ratio: float | None = setting(
        None, "As max_divergence, but for perplexity: within this many times the dense model's.", bounds="> 1"
    )

    def _preset(self) -> dict[str, Any]:
        self._check("method")
        return {"calibration_tokens": CALIBRATION_TOKENS, "heal_tokens": 0} | METHODS[self.method]

    def _check_together(self) -> None:
        given = [name for name in LEVELS if getattr(self, name) is not None]
        if len(given) != 1:
            named = " and ".join(f"{name}={getattr(self, name)!r}" for name in given) or "none of them"
            raise ValueError(f"Give one of {', '.join(LEVELS)}, which say how many layers to fuse; got {named}.")
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
    def made_by_last_pass(self) -> bool:
        """Whether the last pass makes fused layers again from the layers of the dense model."""
        return self.merge == "select" and self.refit != "none"

    @property
    def needs_similarity(self) -> bool:
        """Whether any step uses the layer similarity matrix (stages 1 to 3)."""
        return self.merge == "average"

    @property
    def samples_needed(self) -> int:
        """How many samples stages 2 and 3 need at least."""
        return max(self.entropy_neighbors, self.embedding_dim, self.mi_neighbors) + 1

    def most_fusions(self, num_hidden_layers: int) -> int:
        """How many fusions a model of `num_hidden_layers` layers allows; below 1 where it allows none."""
        return num_hidden_layers - (1 if self.selection == "last" else 3)  # else the first and the last layer stay

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
