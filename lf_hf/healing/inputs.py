"""What a healing starts from: the fused checkpoint that becomes the student, its base as the teacher, and the text."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from lf_hf.checkpoint.base import HUB_ARGUMENTS, Base, checked_dtype, load_tokenizer
from lf_hf.checkpoint.classes import FusedForCausalLM, fused_class
from lf_hf.checkpoint.configuration import FUSED_CONFIGS, converted_config
from lf_hf.checkpoint.fused_cache import base_fingerprint
from lf_hf.checkpoint.saving import check_replaceable, checked_folder, finish_save
from lf_hf.decoder.interface import Decoder
from lf_hf.healing.settings import HealSettings
from lf_hf.report.report import FusionReport
from lf_hf.runtime.fields import unknown_name
from lf_hf.runtime.numerics import weights_digest
from lf_hf.text.calibration import Corpus, load_training_text
from lf_hf.text.sources import TextSource

# What is taken for loading the base, besides values of its config.
_OF_BASE = (
    *HUB_ARGUMENTS,
    *("attn_implementation", "device_map", "dtype", "torch_dtype", "trust_remote_code", "use_safetensors", "variant"),
)
WORK = ".lf_hf-healing"
"""In OUT: the state of a training that is not done."""
_JUDGING_TOKENS = 4096  # of each judging text, where the report names none


@dataclass(frozen=True)
class HealingInputs:
    """A fused model in memory with its report, its base, the text, and the settings of a healing.

    `tokenizer` is the fused model's own, or its base's; `plain` says whether its folder is a plain checkpoint.
    """

    model: FusedForCausalLM
    report: FusionReport
    tokenizer: PreTrainedTokenizerBase
    base: Base
    corpus: Corpus
    settings: HealSettings
    plain: bool = False

    @property
    def fused_layers(self) -> list[int]:
        """Numbers of the layers that stand for several."""
        return [number for number, group in enumerate(self.report.groups) if len(group) > 1]

    @property
    def judging_tokens(self) -> int:
        """Tokens of each judging text: as many as the fusion was judged by."""
        return self.report.config.get("perplexity_tokens") or _JUDGING_TOKENS

    @property
    def base_dtype(self) -> torch.dtype:
        """The type of the base when it was fused, as far as the report says."""
        return checked_dtype(self.report.dtype) or self.model.dtype

    def content(self) -> dict[str, Any]:
        """What the text, and the teacher's predictions of it, depend on, JSON-ready; files by content."""
        text = json.dumps([list(self.corpus.parts.values()), self.corpus.generated_share])
        return {
            "base": self.report.base_digest or base_fingerprint(self.base),
            "text": hashlib.sha256(text.encode()).hexdigest(),
            "chat_template": str(self.tokenizer.chat_template),
            "judging_tokens": self.judging_tokens,
        }

    def check_base(self, decoder: Decoder) -> None:
        """Raise ValueError if the base is not the one that was fused, as far as the report can tell."""
        report, other = self.report, False
        if report.base_digest is not None:
            other = weights_digest(decoder.named_parameters()) not in (None, report.base_digest)
        elif report.fingerprints is not None:
            other = base_fingerprint(self.base) != report.fingerprints["base"]
        if other:
            raise ValueError(
                f"{self.base.full_name!r} is not the base that this model was fused from, which was "
                f"{report.base!r}: its weights are others; give that one."
            )


def open_inputs(
    fused: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: str | os.PathLike[str] | Base | None,
    text: TextSource | None,
    settings: HealSettings,
    hub: Mapping[str, Any],
    *,
    reads_weights: bool = True,
) -> tuple[HealingInputs, Path]:
    """Open and check what `heal` takes; returns the folder of the result, too.

    The base's weights are not read, and without `reads_weights` none; the model is then on the meta device.
    """
    if not isinstance(fused, str | os.PathLike):
        raise ValueError(f"fused must be the folder of a fused checkpoint, got {fused!r:.80}; save the model.")
    folder, out_folder = checked_folder(fused), checked_folder(out)
    if folder == out_folder:
        raise ValueError(f"{os.fspath(out)!r} is the fused model itself; choose another folder for the result.")
    finish_save(folder)
    report = FusionReport.load(folder)
    opened = base if isinstance(base, Base) else Base.open(*_base_name(base, report, hub))
    for name in hub:
        if name not in _OF_BASE and not hasattr(opened.config, name):
            raise ValueError(unknown_name(HealSettings.noun, name, (*HealSettings.known, *_OF_BASE)))
    check_replaceable(out_folder, opened.name)
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(str(folder), {}) if has_tokenizer else opened.tokenizer()
    corpus = load_training_text(text, settings.tokens, tokenizer)
    if settings.written_share is not None:
        corpus = dataclasses.replace(corpus, generated_share=settings.written_share)
    config = AutoConfig.from_pretrained(folder)
    if opened.config.vocab_size != config.vocab_size:
        raise ValueError(
            f"{opened.full_name!r} has {opened.config.vocab_size} embeddings, and the fused model {config.vocab_size}; "
            "give the base that it was fused from."
        )
    if config.num_hidden_layers != report.layers_after:
        raise ValueError(
            f"{str(fused)!r} has {config.num_hidden_layers} layers, but its report says {report.layers_after}; give "
            "the folder of a fused checkpoint."
        )
    plain = config.model_type in FUSED_CONFIGS
    if plain:
        config = converted_config(config, FUSED_CONFIGS[config.model_type])
    if reads_weights:
        model = fused_class(config).from_pretrained(folder, config=config, dtype="auto")
    else:
        with torch.device("meta"):
            model = fused_class(config)(config).to(config.dtype)
    return HealingInputs(model, report, tokenizer, opened, corpus, settings, plain), out_folder


def _base_name(
    base: str | os.PathLike[str] | None, report: FusionReport, hub: Mapping[str, Any]
) -> tuple[str | os.PathLike[str], dict[str, Any]]:
    """The base's folder or hub name, and the arguments to open it with: the report knows its GGUF file."""
    name, _, file = report.base.rpartition("/")
    is_gguf = file.lower().endswith(".gguf")
    if base is None:
        base = name if is_gguf else report.base
        if "/" not in base:
            raise ValueError(f"The report names the base {report.base!r} only; say where it is with base= (--base).")
    if is_gguf and not hub.get("gguf_file") and (os.fspath(base) == name or Path(base, file).is_file()):
        return base, {**hub, "gguf_file": file}
    return base, dict(hub)
