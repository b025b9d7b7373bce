"""What a fusion is made of: the base, the settings, the calibration text and the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from lf_hf.checkpoint.base import Base
from lf_hf.checkpoint.classes import checked_tokenizer
from lf_hf.checkpoint.identity import files_digest, identity, text_digest
from lf_hf.families.models import num_parameters
from lf_hf.inputs.planning import as_begun, check_text_to_heal, plan_run, training_on_launch
from lf_hf.measure.check import for_model
from lf_hf.plan.machine import LaunchOfTraining
from lf_hf.plan.plan import Plan
from lf_hf.runtime.errors import explained
from lf_hf.runtime.launch import Processes, compute_once
from lf_hf.settings import FusionConfig, HealSettings
from lf_hf.text.calibration import CalibrationSamples, Corpus, load_calibration, load_corpus, load_training_text
from lf_hf.text.packing import check_enough
from lf_hf.text.sources import TextSource

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class FusionInputs:
    """All that a fusion is made of; text is read when it is first needed.

    `calibration` is what the user gave, and `tokenizer` the base's unless the user gave one.
    """

    base: Base
    config: FusionConfig
    calibration: TextSource | None
    tokenizer: PreTrainedTokenizerBase
    low_memory: bool = False

    @classmethod
    def open(
        cls,
        base: Base,
        config: FusionConfig,
        calibration: TextSource | None,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        low_memory: bool = False,
    ) -> FusionInputs:
        """Check that the settings suit the base, and read its tokenizer."""
        config = for_model(config, base.config)
        if ignored := config.without_effect(calibration):
            logger.warning(f"Without effect on method={config.method!r}: {', '.join(ignored)}.")
        if config.needs_text and config.calibration_length > (longest := base.text_config.max_position_embeddings):
            logger.warning(f"calibration_length is cut to {longest}, which is all that the model takes.")
        base.generation_config()  # which is saved with the result
        return cls(base, config, calibration, checked_tokenizer(tokenizer) or base.tokenizer(), low_memory)

    @cached_property
    def samples_and_text(self) -> tuple[CalibrationSamples | None, Corpus | None]:
        """The samples that layers are compared on, and the text that they are fitted to."""
        return load_needed(self.config, self.calibration, self.tokenizer)

    @cached_property
    def to_heal(self) -> Corpus | None:
        """The text of the healing that follows, if one does."""
        tokens = self.config.heal_tokens
        return load_training_text(self.calibration, tokens, self.tokenizer) if tokens else None

    @property
    def training(self) -> HealSettings | None:
        """Settings of that healing on this launch. Raises ValueError if the defaults cannot be used."""
        return self._launch[0] if self._launch else None

    @cached_property
    def _launch(self) -> tuple[HealSettings, LaunchOfTraining] | None:
        if not self.config.heal_tokens:
            return None
        advice = "give method='refit' and heal_tokens=0, and heal the result with lf_hf.heal"
        with explained("Where a fusion heals, it does so by the defaults", advice, ValueError):
            return training_on_launch(self.config.healing, self.base, {})

    @cached_property
    def parameters(self) -> tuple[int, int]:
        """Of the base, and of what it is fused to; by one fusion where a budget says how many."""
        layer, model = num_parameters(self.base.config)
        return model, model - (self.config.num_fusions or 1) * layer

    def check(self, folder: Path | None = None) -> Plan:
        """The plan of this fusion.

        Raises ValueError, before weights are read, if there is too little text or memory, and OSError if the disk of
        `folder`, where the result goes, has too little room for it and for what lies there meanwhile. A fused model
        that is there keeps its room until the new one is whole.
        """
        _, text = self.samples_and_text
        if text is not None:
            length = min(self.config.calibration_length, self.base.text_config.max_position_embeddings)
            check_enough(self.tokenizer, text, length, self.base.text_config.vocab_size)
        if self.to_heal is not None and self.training is not None:
            check_text_to_heal(self.tokenizer, self.to_heal, self.training, self.base)
        training, launch = self._launch or (None, None)
        if training is not None and folder is not None:
            training = as_begun(training, folder, self.healing_identity)
        return plan_run(self.base, self.config, training, folder, low_memory=self.low_memory, launch=launch)

    def loading_fused(self) -> dict[str, Any]:
        """`from_pretrained`'s arguments for what was made of the base: it lies where the base would."""
        place = plan_run(self.base, FusionConfig(1, "truncate", perplexity_tokens=0), None, None, is_timed=False)
        return self.base.loading_fused(self.base.placed(place, None).loading["device_map"])

    def identity(self, *, by_content: bool = True) -> dict[str, str]:
        """Identity of this fusion and of the healing that may follow it.

        Of a base not `by_content` the sizes and times of its files are taken in place of all that they hold.
        """
        texts: list[str] | None = None
        used = [source for source in (*self.samples_and_text, self.to_heal) if source is not None]
        if self.calibration is not None and used:
            texts = [text for source in used for text in source.texts]
        read = text_digest(texts, self.tokenizer)
        dtype = self.base.dtype or self.base.config.dtype
        return identity(files_digest(self.base, by_content=by_content), self.config.in_effect(), read, dtype=dtype)

    @cached_property
    def healing_identity(self) -> dict[str, str]:
        """Identity of the healing that follows, for which the base is not read as a whole."""
        return self.identity(by_content=False) | {"processes": str(Processes.of_launch().world_size)}


def load_needed(
    config: FusionConfig, calibration: TextSource | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[CalibrationSamples | None, Corpus | None]:
    """Samples for layer similarity and running text, as far as a fusion with `config` needs them.

    The first process of a launch reads for all, so each has to call this. Raises ValueError if `calibration` cannot be
    used, or has too few samples.
    """

    def load() -> tuple[CalibrationSamples | None, Corpus | None]:
        samples, text = None, None
        if config.averages:
            count, length = config.samples_per_subject, config.sample_length
            samples = load_calibration(
                calibration, samples_per_subject=count, sample_length=length, tokenizer=tokenizer
            )
            config.check_num_samples(len(samples.texts))
        if config.needs_text:
            text = load_corpus(calibration, max_tokens=config.calibration_tokens, tokenizer=tokenizer)
        return samples, text

    return compute_once(load)
