"""What a fusion is made of: the base, the settings, the calibration text and the tokenizer."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, cast

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from lf_hf.checkpoint.base import Base, optional_file
from lf_hf.checkpoint.card import CARD_NAME, base_license
from lf_hf.checkpoint.classes import checked_tokenizer
from lf_hf.checkpoint.identity import files_digest, identity, text_digest
from lf_hf.checkpoint.saving import check_room
from lf_hf.checkpoint.weights import stored_dtype
from lf_hf.decoder.decoder import Decoder
from lf_hf.measure.check import check_layers
from lf_hf.models import first_free_layer, num_parameters
from lf_hf.report.report import FusionReport
from lf_hf.runtime.launch import Processes
from lf_hf.settings import FusionConfig
from lf_hf.text.calibration import CalibrationSamples, Corpus, load_needed, load_training_text
from lf_hf.text.packing import check_enough
from lf_hf.text.sources import TextSource

if TYPE_CHECKING:
    from lf_hf.healing.teacher import Placement

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

    @classmethod
    def open(
        cls, base: Base, config: FusionConfig, calibration: TextSource | None, tokenizer: PreTrainedTokenizerBase | None
    ) -> FusionInputs:
        """Check that the settings suit the base, and read its tokenizer."""
        config = config.for_layers(base.text_config.num_hidden_layers, first_free_layer(base.config))
        check_layers(config, base.config)
        if ignored := config.without_effect(calibration):
            logger.warning(f"Without effect on method={config.method!r}: {', '.join(ignored)}.")
        base.generation_config()  # which is saved with the result
        return cls(base, config, calibration, checked_tokenizer(tokenizer) or base.tokenizer())

    @cached_property
    def samples_and_text(self) -> tuple[CalibrationSamples | None, Corpus | None]:
        """The samples that layers are compared on, and the text that they are fitted to."""
        return load_needed(self.config, self.calibration, self.tokenizer)

    @cached_property
    def to_heal(self) -> Corpus | None:
        """The text of the healing that follows, if one does."""
        tokens = self.config.heal_tokens
        return load_training_text(self.calibration, tokens, self.tokenizer) if tokens else None

    def of(self, base: Base) -> FusionInputs:
        """The same for a base that is loaded otherwise; text that was read is not read again."""
        moved = dataclasses.replace(self, base=base)
        vars(moved)["samples_and_text"] = self.samples_and_text
        return moved

    @cached_property
    def unhealed(self) -> FusionInputs:
        """The same without the healing; text that was read is not read again."""
        fusion = dataclasses.replace(self, config=self.config.unhealed)
        vars(fusion)["samples_and_text"] = self.samples_and_text
        return fusion

    @cached_property
    def parameters(self) -> tuple[int, int]:
        """Of the base, and of what it is fused to; by one fusion where a budget says how many."""
        layer, model = num_parameters(self.base.config)
        return model, model - (self.config.num_fusions or 1) * layer

    @property
    def dtype(self) -> torch.dtype:
        """What the base's weights are in when they are loaded."""
        files = [file for file in self.base.files() if file.suffix == ".safetensors"]
        stored = stored_dtype(files[0]) if files else torch.float32
        return self.base.dtype or cast("torch.dtype | None", self.base.config.dtype) or stored

    def check(self, folder: str | os.PathLike[str] | None = None, *, low_memory: bool = False) -> Placement | None:
        """Raise ValueError, before weights are read, if there is too little text, or too little memory to heal.

        Raises OSError if the disk of `folder`, where the result goes, has no room for it or for a healing's states. A
        fused model that is there keeps its room until the new one is whole. Returns what the healing will take, if one
        follows.
        """
        if folder is not None:
            before, after = self.parameters
            processes = Processes.of_launch().world_size if low_memory else 0  # each writes its new layers there first
            check_room(folder, (after + processes * (before - after)) * self.dtype.itemsize, "the fused model takes")
        _, text = self.samples_and_text
        if text is not None:
            length = min(self.config.calibration_length, self.base.text_config.max_position_embeddings)
            check_enough(self.tokenizer, text, length, self.base.text_config.vocab_size)
        if self.to_heal is None:
            return None
        from lf_hf.healing.heal import check_can_heal  # imports the Trainer, which takes seconds

        return check_can_heal(self.base, self.tokenizer, self.to_heal, self.config, folder=folder)

    def identity(self) -> dict[str, str]:
        """Identity of this fusion and of the healing that may follow it."""
        texts: list[str] | None = None
        if self.calibration is not None:
            texts = []
            for source in (*self.samples_and_text, self.to_heal):
                if source is not None:
                    texts += source.texts
        read = text_digest(texts, self.tokenizer)
        dtype = self.base.dtype or self.base.config.dtype
        return identity(files_digest(self.base), self.config.in_effect(), read, dtype=dtype)

    def fuse(self, decoder: Decoder) -> FusionReport:
        """Fuse the base's layers, in place."""
        from lf_hf import pipeline  # imports scipy and scikit-learn, which loading does not need
        from lf_hf.measure.dense import measure

        measured = measure(decoder, self.tokenizer, self.config, *self.samples_and_text)
        report = pipeline.fuse(decoder, self.tokenizer, self.config, measured, base=self.base.full_name)
        card = optional_file(self.base.name, CARD_NAME, self.base.hub)
        notes = [*report.notes, *self.base.notes()]
        revision = self.base.hub.get("revision")
        return dataclasses.replace(report, license=base_license(card), notes=notes, revision=revision)
