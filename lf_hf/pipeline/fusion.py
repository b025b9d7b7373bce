"""What a fusion is made of: the base, the settings, the calibration text and the tokenizer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from lf_hf.checkpoint.base import BASE_ONLY_ARGUMENTS, Base
from lf_hf.checkpoint.classes import FusedForCausalLM, checked_tokenizer, fused_class
from lf_hf.families.models import family_of, free_layers, num_parameters
from lf_hf.families.models import model_class as stock_class
from lf_hf.pipeline.healing import HealInputs
from lf_hf.pipeline.identity import files_digest, identity, text_digest
from lf_hf.settings import FusionConfig, TextSource
from lf_hf.text.calibration import CalibrationSamples, Corpus, load_calibration, load_corpus

logger = logging.get_logger(__name__)


class Texts(NamedTuple):
    """Samples to compare layers on, text to fit them to, and text to heal on, as far as fusions need them."""

    samples: CalibrationSamples | None
    text: Corpus | None
    to_heal: Corpus | None

    @classmethod
    def load(
        cls, configs: Sequence[FusionConfig], calibration: TextSource | None, tokenizer: PreTrainedTokenizerBase
    ) -> Texts:
        """What some fusions of one base need of what the user gave or, with None, of the bundled text.

        Raises ValueError if `calibration` cannot be used, or has too few samples.
        """
        samples, text, to_heal = None, None, None
        for config in configs:
            if config.averages and samples is None:
                count, length = config.samples_per_subject, config.sample_length
                samples = load_calibration(
                    calibration, samples_per_subject=count, sample_length=length, tokenizer=tokenizer
                )
                config.check_num_samples(len(samples.texts))
            if config.needs_text and text is None:
                text = load_corpus(calibration, max_tokens=config.calibration_tokens, tokenizer=tokenizer)
            if config.heal_tokens and to_heal is None:
                to_heal = load_corpus(calibration, max_tokens=config.heal_tokens, to_train=True, tokenizer=tokenizer)
        return cls(samples, text, to_heal)

    def used_by(self, *configs: FusionConfig) -> Texts:
        """Those that any of some fusions uses."""
        return Texts(
            self.samples if any(config.averages for config in configs) else None,
            self.text if any(config.needs_text for config in configs) else None,
            self.to_heal if any(config.heal_tokens for config in configs) else None,
        )

    def digest(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """SHA-256 of all text, as a tokenizer reads it."""
        return text_digest((text for used in self if used for text in used.texts), tokenizer)


@dataclass(frozen=True)
class FusionInputs:
    """All that a fusion is made of; text is read when it is first needed.

    `calibration` is what the user gave, `tokenizer` the base's unless the user gave one, and `model_class` that of the
    result.
    """

    base: Base
    config: FusionConfig
    calibration: TextSource | None
    tokenizer: PreTrainedTokenizerBase
    model_class: type[FusedForCausalLM]

    @classmethod
    def open(
        cls,
        base: str | os.PathLike[str] | Base,
        config: FusionConfig | None,
        calibration: TextSource | None,
        tokenizer: PreTrainedTokenizerBase | None,
        loading: dict[str, Any],
        *,
        model_class: type[FusedForCausalLM] | None = None,
    ) -> FusionInputs:
        """Open the base, check that the settings suit it, and read its tokenizer.

        FusionConfig fields are taken out of `loading`; what is left are `from_pretrained`'s arguments.
        """
        config = FusionConfig.taken_from(loading, config)
        base = Base.open(base, loading)
        if model_class is not None and not issubclass(model_class, stock_class(base.config)):
            kind = base.config.model_type
            raise ValueError(f"{base.name!r} is a {kind!r} model; fuse it with lf_hf.from_pretrained_fused.")
        config = for_model(config, base.config)
        if ignored := config.without_effect(calibration):
            logger.warning(f"Without effect on method={config.method!r}: {', '.join(ignored)}.")
        if config.needs_text and config.calibration_length > (longest := base.text_config.max_position_embeddings):
            logger.warning(f"calibration_length is cut to {longest}, which is all that the model takes.")
        base.check_generation_config()
        tokenizer = checked_tokenizer(tokenizer) or base.tokenizer()
        return cls(base, config, calibration, tokenizer, model_class or fused_class(base.config))

    @cached_property
    def texts(self) -> Texts:
        """What this fusion is made of."""
        return Texts.load([self.config], self.calibration, self.tokenizer)

    def to_heal(self, folder: Path) -> HealInputs:
        """What the healing of the fused model in a folder is made of."""
        assert self.texts.to_heal is not None and self.config.healing is not None
        return HealInputs.of(folder, self.base, self.tokenizer, self.texts.to_heal, self.config.healing)

    def load_made(self, folder: Path, device_map: Any) -> FusedForCausalLM:
        """What was made of the base and kept in a folder."""
        loading = {name: value for name, value in self.base.loading.items() if name not in BASE_ONLY_ARGUMENTS}
        model: FusedForCausalLM = self.model_class.from_pretrained(folder, **loading | {"device_map": device_map})
        model.tokenizer = self.tokenizer
        return model

    @cached_property
    def identity(self) -> dict[str, str]:
        """Identity of this fusion and of the healing that may follow it."""
        dtype, text = self.base.dtype or self.base.config.dtype, self.texts.digest(self.tokenizer)
        return identity(files_digest(self.base), self.config.in_effect(), text, dtype=dtype)

    @property
    def sources(self) -> list[Path | None]:
        """Folders that the run reads."""
        return [self.base.folder]


def for_model(config: FusionConfig, model_config: PretrainedConfig) -> FusionConfig:
    """The settings with what follows from a model; ValueError if it has too few layers for them."""
    text = model_config.get_text_config()
    free, why = free_layers(model_config, config.selection)
    width, (of_layer, _) = family_of(text).mlp_width(text), num_parameters(model_config)
    config = config.for_layers(text.num_hidden_layers, free, why).for_width(width, of_layer)
    _check_kinds(config, text, free)
    return config


def _check_kinds(config: FusionConfig, text: PretrainedConfig, free: range) -> None:
    """Raise ValueError unless averages are of layers of one kind, as weights of others mean different things."""
    if config.averages and family_of(text).mlp.experts:
        raise ValueError(
            f"method={config.method!r} averages layers, and experts of two layers have nothing in common that an "
            "average keeps; give method='refit', which keeps one layer's experts and fits what they write."
        )
    if config.selection == "last" and family_of(text).scalar:
        raise ValueError(
            "selection='last' may take away the full attention that the last layer of a Gemma 4 must have; give "
            "another one, or method='refit'."
        )
    kinds = family_of(text).config_kinds(text)[free.start : free.stop]
    alike = [above == below for below, above in pairwise(kinds)]
    if not config.averages or all(alike):
        return
    if config.selection == "last":
        alike = list(takewhile(bool, reversed(alike)))
    most = sum(alike)
    if config.within_budget or config.num_fusions > most:
        limit = f"num_fusions can be {most} at most" if most > 0 else "no two of them can be averaged"
        raise ValueError(
            f"Only layers of one kind are averaged, and this model's differ in {' and '.join(kinds[0])}: with "
            f"selection={config.selection!r} {limit}; or give method='refit', which takes attention from one layer "
            "where kinds differ."
        )
