"""What the healing of a fused checkpoint is made of: that model, its base, the text and the settings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import logging

from lf_hf.checkpoint.base import Base, checked_dtype, load_tokenizer, read_config
from lf_hf.checkpoint.classes import FusedForCausalLM, fused_class
from lf_hf.checkpoint.configuration import plain_config
from lf_hf.checkpoint.saving import checked_folder, file_sha
from lf_hf.checkpoint.weights import weight_files
from lf_hf.families.models import num_parameters
from lf_hf.pipeline.identity import identity, text_digest
from lf_hf.plan.plan import Plan
from lf_hf.report.report import FusionReport
from lf_hf.runtime.launch import own_device
from lf_hf.settings import HealSettings, TextSource, default_heal_tokens
from lf_hf.text.calibration import Corpus, load_corpus

logger = logging.get_logger(__name__)
_JUDGING_TOKENS = 4096  # tokens of each judging text of a healing, where the report names none


@dataclass(frozen=True)
class HealInputs:
    """All that the healing of a fused checkpoint is made of; no weights yet.

    `tokenizer` is the fused model's own, or its base's.
    """

    folder: Path  # of the fused model
    config: PreTrainedConfig  # likewise
    report: FusionReport
    tokenizer: PreTrainedTokenizerBase
    base: Base
    corpus: Corpus
    settings: HealSettings
    training_args: Mapping[str, Any] | None  # None where a user cannot give any

    @classmethod
    def open(
        cls,
        fused: str | os.PathLike[str],
        base: str | os.PathLike[str] | Base | None,
        text: TextSource | None,
        settings: HealSettings | None,
        training_args: Mapping[str, Any] | None,
        hub: dict[str, Any],
    ) -> HealInputs:
        """Check what `lf_hf.heal` takes, and read the text.

        HealSettings fields are taken out of `hub`; what is left are arguments of loading the base. Raises ValueError if
        the base has no such fused model, or the report does not describe the one that is there.
        """
        settings = HealSettings.taken_from(hub, settings)
        if not isinstance(fused, str | os.PathLike):
            raise ValueError(f"fused must be the folder of a fused checkpoint, got {fused!r:.80}; save the model.")
        folder = checked_folder(fused)
        report = FusionReport.load(folder)
        opened = Base.open(*_base_name(base, report, hub))
        if settings.train not in (None, "lora") and settings.lora_rank != HealSettings().lora_rank:
            logger.warning(f"Without effect on train={settings.train!r}: lora_rank.")
        has_tokenizer = (folder / TOKENIZER_CONFIG_FILE).is_file()
        tokenizer = load_tokenizer(str(folder), {}) if has_tokenizer else opened.tokenizer()
        if settings.tokens is None:
            settings = replace(settings, tokens=default_heal_tokens(num_parameters(opened.config)[0]))
        corpus = load_corpus(text, max_tokens=settings.tokens, to_train=True, tokenizer=tokenizer)
        if settings.written_share is not None:
            corpus = replace(corpus, generated_share=settings.written_share)
        return cls.of(folder, opened, tokenizer, corpus, settings, training_args or {})

    @classmethod
    def of(
        cls,
        folder: Path,
        base: Base,
        tokenizer: PreTrainedTokenizerBase,
        corpus: Corpus,
        settings: HealSettings,
        training_args: Mapping[str, Any] | None = None,
    ) -> HealInputs:
        """Of a folder and what is read already. Raises ValueError if the base, or the report there, is of another."""
        config, report = plain_config(read_config(str(folder), {})), FusionReport.load(folder)
        layers, vocab_size = config.get_text_config().num_hidden_layers, config.get_text_config().vocab_size
        if base.text_config.vocab_size != vocab_size:
            raise ValueError(
                f"{base.name!r} has {base.text_config.vocab_size} embeddings, and the fused model {vocab_size}; give "
                "the base that it was fused from."
            )
        if layers != report.layers_after:
            raise ValueError(
                f"{str(folder)!r} has {layers} layers, but its report says {report.layers_after}; give the folder of a "
                "fused checkpoint."
            )
        dtype = base.dtype or checked_dtype(report.dtype) or "auto"
        base = replace(base, loading={**base.loading, "dtype": dtype})
        return cls(folder, config, report, tokenizer, base, corpus, settings, training_args)

    @property
    def judging_tokens(self) -> int:
        """Tokens of each judging text: as many as the fusion was judged by."""
        return self.report.config.get("perplexity_tokens") or _JUDGING_TOKENS

    @cached_property
    def identity(self) -> dict[str, str]:
        """Identity of the healing."""
        return identity(
            str(self.report.base_digest),
            self.settings.in_effect(),
            text_digest(self.corpus.parts.values(), self.tokenizer),
            fused=" ".join(map(file_sha, weight_files(self.folder))),
            training_args={name: str(value) for name, value in (self.training_args or {}).items()},
            judging_tokens=self.judging_tokens,
        )

    @property
    def sources(self) -> list[Path | None]:
        """Folders that the run reads."""
        return [self.folder, self.base.folder]

    def check_base(self, digest: str | None) -> None:
        """Raise ValueError if a base whose weights have this digest is not the one that was fused."""
        if digest not in (None, self.report.base_digest):
            raise ValueError(
                f"{self.base.name!r} is not the base that this model was fused from, which was "
                f"{self.report.base!r}: its weights are others; give that one."
            )

    def load_fused(self, plan: Plan) -> FusedForCausalLM:
        """The fused model, whole where this process trains: in memory, or on its card."""
        device = own_device(torch.device(plan.device).type) if plan.machine.has_card else None
        placing: dict[str, Any] = {"dtype": "auto", "device_map": device}
        model: Any = fused_class(self.config).from_pretrained(self.folder, config=self.config, **placing)
        model.tokenizer = self.tokenizer
        return model


def _base_name(
    base: str | os.PathLike[str] | Base | None, report: FusionReport, hub: Mapping[str, Any]
) -> tuple[str | os.PathLike[str] | Base, dict[str, Any]]:
    """The base's folder or hub name, and the arguments to open it with."""
    if base is not None:
        return base, dict(hub)
    if "/" not in report.base:
        raise ValueError(f"The report names the base {report.base!r} only; say where it is with base=FOLDER.")
    return report.base, {"revision": report.revision, **hub}
