"""FusionConfig: every setting of a fusion, validated, in one frozen object."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lf_hf.runtime.settings_base import Settings, documented, setting
from lf_hf.runtime.words import plural

ALGORITHM = 21
"""Number of what a fusion computes; raise it whenever results change, so that kept ones are not used again."""

HEAL_TOKENS = 131072
"""Default number of tokens of a healing."""

CALIBRATION_TOKENS = 49152
"""Default number of tokens that layers are fitted to where nothing is healed."""

LARGEST_SEED = 2**32 - 1
"""The largest seed that every library takes."""

LONGEST_GROUP = 6
"""Most layers that selection="groups" makes one; more only where so many are to go that they have to be."""

LEVELS = ("num_fusions", "target_layers", "max_divergence", "max_perplexity_ratio")
"""Fields of FusionConfig that say how many layers to fuse: one of them is given."""

_DEFAULTS = {"selection": "last", "alignment": "none", "calibration_tokens": CALIBRATION_TOKENS, "heal_tokens": 0}
METHODS: dict[str, dict[str, Any]] = {
    "neural_alignment": _DEFAULTS | {"alignment": "rows"},
    "mka": _DEFAULTS,
    "truncate": _DEFAULTS,
    "refit": _DEFAULTS | {"selection": "groups"},
    "healed": _DEFAULTS | {"selection": "groups", "calibration_tokens": HEAL_TOKENS, "heal_tokens": HEAL_TOKENS},
}
"""What each method sets; a field that the user gives overrides it."""

AVERAGING = ("neural_alignment", "mka")
"""Methods that average the weights of layers."""

FITTING = ("refit", "healed")
"""Methods that fit a layer to what a group of layers computes."""


def _hyper_parameter(default: Any, help: str, **bounds: Any) -> Any:
    heading = "Hyper-parameters of the published method"
    return setting(default, help, needs="averages", heading=heading, **bounds)


@documented
@dataclass(frozen=True)
class FusionConfig(Settings):
    """Settings of a fusion. Raises ValueError for a value that is not allowed, and for some that exclude each other."""

    one_of = LEVELS
    given_beside = ("calibration", "fused_dir", "tokenizer", "low_memory")

    num_fusions: int = setting(
        None,
        "How many times two layers become one: 1 to L - 1 for a model of L layers; to L - 3 unless "
        'selection="last". Give one of this, target_layers, max_divergence and max_perplexity_ratio.',
        at_least=1,
    )
    method: str = setting(
        "neural_alignment",
        'How layers are fused. "refit" and "healed" are for models that are to be used: one layer is fitted to what a '
        'group of layers computes, and "healed" trains the whole model afterwards. The others are for research, and '
        'ruin most models: "neural_alignment" (the published method) and "mka" average layers, "truncate" keeps the '
        "first one.",
        choices=tuple(METHODS),
    )
    selection: str = setting(
        None,
        'Which layers are fused. "last": the last ones of the model. "least_influence": those that change the '
        'residual stream least, each with the one before it. "groups", for "refit" and "healed": those groups of two '
        "layers or more whose fusion, tried as a set on several kinds of text, changes the model's predictions "
        "least. In the latter two the first and the last layer stay.",
        choices=("last", "least_influence", "groups"),
        unset="from method",
    )
    alignment: str = setting(
        None,
        "How layer j's neurons are matched to layer i's before both are averaged. \"rows\": an optimal assignment of "
        'the rows of each weight matrix on its own. "neurons": MLP neurons and attention heads move as wholes, so '
        "that the aligned layer j computes what it did.",
        choices=("none", "rows", "neurons"),
        unset="from method",
    )
    ridge: float = setting(
        0.1,
        "Strength of a fit's pull towards the weights as they were, in units of the mean diagonal of the activations' "
        "Gram matrix.",
        above=0,
        needs="fits",
    )
    calibration_tokens: int = setting(
        None,
        "Most tokens of calibration text that influence and fits use: "
        f'{CALIBRATION_TOKENS}, and {HEAL_TOKENS} for method="healed". The model writes a third of them itself and '
        "answered questions are a fifth, some ten thousand at most; of the bundled mixture it writes half.",
        at_least=1024,
        unset="from method",
        needs="needs_text",
    )
    calibration_length: int = setting(512, "Tokens of a sequence of calibration text.", at_least=16, needs="needs_text")
    heal_tokens: int = setting(
        None,
        "Tokens on which the fused model is trained to predict what its base predicts, see lf_hf.heal; 0 leaves it "
        f'out, {HEAL_TOKENS} for method="healed".',
        at_least=0,
        unset="from method",
        needs="heal_tokens",
    )
    target_layers: int | None = setting(None, "How many layers to leave, in place of num_fusions.", at_least=1)
    max_divergence: float | None = setting(
        None,
        "Fuse as many layers as keep the divergence of the fused model's predictions from the base's within this, "
        "in nats a token. It is measured on an eighth of the given calibration sequences, none of which the model "
        "wrote, and nothing is fitted to that eighth.",
        above=0,
    )
    max_perplexity_ratio: float | None = setting(
        None, "Like max_divergence, for perplexity: at most this many times the base's.", above=1
    )
    perplexity_tokens: int = setting(
        4000,
        "Tokens of each judging text, on which perplexity is measured before and after fusing, and how far "
        "predictions moved; 0 skips this and both models' sample texts.",
        at_least=0,
    )
    speed: bool = setting(
        True, "Measure how fast the fused model is beside its base, in some seconds; only in memory and in one process."
    )
    seed: int = setting(
        0,
        "Seed of the mutual information estimate, of the calibration text that the model writes, and of healing.",
        at_least=0,
        at_most=LARGEST_SEED,
        needs="is_random",
    )

    kernel_scale: float = _hyper_parameter(8.0, "sigma_K of the diffusion kernel.", above=0)
    kernel_alpha: float = _hyper_parameter(0.5, "alpha of the diffusion kernel's density normalisation.")
    embedding_dim: int = _hyper_parameter(2, "d, the number of manifold coordinates of each sample.", at_least=1)
    mi_neighbors: int = _hyper_parameter(5, "k of the mutual information estimate.", at_least=1)
    entropy_neighbors: int = _hyper_parameter(50, "k of the entropy estimate, of k + 1 samples or more.", at_least=1)
    rank_normalize: bool = _hyper_parameter(
        True, "Replace each embedding coordinate by its rank / N; without it entropies may differ in sign."
    )
    ratio_beta: float = _hyper_parameter(1.0, "beta, slope of the sigmoid that makes fusion ratios of similarities.")
    sample_length: int = _hyper_parameter(512, "T_max, the most tokens of a calibration sample.", at_least=1)
    samples_per_subject: int = _hyper_parameter(1, "Questions of each MMLU subject to calibrate on.", at_least=1)

    def _preset(self) -> dict[str, Any]:
        self._check("method")
        return METHODS[self.method]

    def _check_together(self) -> None:
        given = [name for name in LEVELS if getattr(self, name) is not None]
        if len(given) != 1:
            named = " and ".join(f"{name}={getattr(self, name)!r}" for name in given) or "none of them"
            raise ValueError(f"Give one of {', '.join(LEVELS)}, which say how many layers to fuse; got {named}.")
        if self.selection == "groups" and not self.fits:
            methods = " and ".join(FITTING)
            raise ValueError(
                f"selection='groups' is for the methods {methods}, got method={self.method!r}; give 'last'."
            )
        if self.alignment != "none" and not self.averages:
            problem = f"alignment={self.alignment!r} is for the methods {' and '.join(AVERAGING)}"
            raise ValueError(f"{problem}, got method={self.method!r}; give 'none'.")

    @property
    def averages(self) -> bool:
        """Whether the weights of layers are averaged, by their similarities (stages 1 to 3)."""
        return self.method in AVERAGING

    @property
    def fits(self) -> bool:
        """Whether fused layers are fitted to what their groups compute."""
        return self.method in FITTING

    @property
    def needs_text(self) -> bool:
        """Whether calibration text runs through the layers: for influence, fits or a budget."""
        return self.selection != "last" or self.fits or self.within_budget

    @property
    def within_budget(self) -> bool:
        """Whether a budget says how many layers are fused."""
        return self.max_divergence is not None or self.max_perplexity_ratio is not None

    def without_effect(self, calibration: object) -> list[str]:
        """Names of what was set to no use, with this calibration text or None."""
        set_by_method = METHODS[self.method]
        names = []
        for name, known in self.known.items():
            has_effect = known.needs in ("", name) or getattr(self, known.needs)  # heal_tokens=0 has one
            if not has_effect and getattr(self, name) != set_by_method.get(name, known.default):
                names.append(name)
        if calibration is not None and not (self.averages or self.needs_text or self.heal_tokens):
            names.append("calibration")
        return names

    @property
    def unhealed(self) -> FusionConfig:
        """The same fusion without the healing that follows it."""
        return replace(self, method="refit" if self.method == "healed" else self.method, heal_tokens=0)

    @property
    def is_random(self) -> bool:
        """Whether anything depends on the seed."""
        return self.averages or self.needs_text or self.heal_tokens > 0

    @property
    def samples_needed(self) -> int:
        """Fewest samples that stages 2 and 3 can use."""
        return max(self.entropy_neighbors, self.embedding_dim, self.mi_neighbors) + 1

    def most_fusions(self, num_hidden_layers: int, first_free: int) -> int:
        """Most fusions of a model whose layers below `first_free` stay as they are; below 1 where it allows none."""
        if self.selection == "last":
            return num_hidden_layers - first_free - 1
        return num_hidden_layers - max(1, first_free) - 2  # the first and the last layer stay

    def for_layers(self, num_hidden_layers: int, first_free: int) -> FusionConfig:
        """The settings with `num_fusions` in place of `target_layers`; ValueError if a model cannot have so many."""
        if self.target_layers is None:
            return self
        self.check_num_layers(num_hidden_layers, first_free)
        least = num_hidden_layers - self.most_fusions(num_hidden_layers, first_free)
        if not least <= self.target_layers < num_hidden_layers:
            raise ValueError(
                f"target_layers must be {least} to {num_hidden_layers - 1} for a base of {num_hidden_layers} layers, "
                f"got {self.target_layers}."
            )
        return replace(self, num_fusions=num_hidden_layers - self.target_layers, target_layers=None)

    def check_num_layers(self, num_hidden_layers: int, first_free: int) -> None:
        """Raise ValueError unless a model of `num_hidden_layers` layers allows `num_fusions`, or any at all."""
        most = self.most_fusions(num_hidden_layers, first_free)
        layers = f"{num_hidden_layers} {plural(num_hidden_layers, 'layer')}"
        if first_free:
            layers += f" (of which features of images need the first {first_free} as they are)"
        if most < 1:
            least = num_hidden_layers - most + 1
            raise ValueError(f"The model has {layers}; selection={self.selection!r} needs at least {least}.")
        if self.num_fusions is not None and self.num_fusions > most:
            raise ValueError(
                f"num_fusions must be 1 to {most} for a model of {layers} and selection={self.selection!r}, got "
                f"{self.num_fusions}."
            )

    def check_num_samples(self, num_samples: int) -> None:
        """Raise ValueError unless `num_samples` calibration samples are enough for stages 2 and 3."""
        if self.averages and num_samples < self.samples_needed:
            raise ValueError(
                f"entropy_neighbors={self.entropy_neighbors}, mi_neighbors={self.mi_neighbors} and "
                f"embedding_dim={self.embedding_dim} need at least {self.samples_needed} calibration samples, got "
                f"{num_samples}; give more samples or lower the largest of the three."
            )
