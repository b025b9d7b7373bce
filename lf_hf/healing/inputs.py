"""What a healing starts from: the fused checkpoint that becomes the student, its base as the teacher, and the text."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from lf_hf.checkpoint.base import HUB_ARGUMENTS, Base, checked_dtype, load_tokenizer, read_config
from lf_hf.checkpoint.classes import FusedForCausalLM, fused_class
from lf_hf.checkpoint.configuration import plain_config
from lf_hf.checkpoint.identity import identity, text_digest
from lf_hf.checkpoint.saving import check_replaceable, checked_folder
from lf_hf.decoder.decoder import Decoder
from lf_hf.healing.settings import HealSettings
from lf_hf.report.report import FusionReport
from lf_hf.runtime.numerics import weights_digest
from lf_hf.runtime.words import unknown_name
from lf_hf.text.calibration import Corpus, load_training_text
from lf_hf.text.sources import TextSource

# What is taken for loading the base, besides values of its config. Its dtype is that of the fusion, and the training
# arguments say where it is.
_LOADING = (*HUB_ARGUMENTS, "attn_implementation", "trust_remote_code", "use_safetensors", "variant")
WORK = ".lf_hf-healing"
"""In OUT: the state of a training that is not done."""
_JUDGING_TOKENS = 4096  # tokens of each judging text, where the report names none


@dataclass(frozen=True)
class HealingInputs:
    """A fused model in memory with its report, its base, the text, and the settings of a healing.

    `tokenizer` is the fused model's own, or its base's. `replaces` says whether there is a fused model in the result's
    folder.
    """

    model: FusedForCausalLM
    report: FusionReport
    tokenizer: PreTrainedTokenizerBase
    base: Base
    corpus: Corpus
    settings: HealSettings
    replaces: bool = False

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

    def identity(self, settings: Mapping[str, Any], **others: object) -> dict[str, str]:
        """Identity of what these settings make of the base and the text: a healing, or the base's predictions."""
        text = text_digest(self.corpus.parts.values(), self.tokenizer)
        others |= {"written_share": self.corpus.generated_share, "judging_tokens": self.judging_tokens}
        return identity(str(self.report.base_digest), settings, text, **others)

    def check_base(self, decoder: Decoder) -> None:
        """Raise ValueError if the base is not the one that was fused."""
        if weights_digest(decoder.named_parameters()) not in (None, self.report.base_digest):
            raise ValueError(
                f"{self.base.full_name!r} is not the base that this model was fused from, which was "
                f"{self.report.base!r}: its weights are others; give that one."
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
    config = plain_config(read_config(str(folder), {}))
    report = FusionReport.load(folder)
    opened = Base.open(base, hub) if isinstance(base, Base) else Base.open(*_base_name(base, report, hub))
    for name in hub:
        if name not in _LOADING and (name.endswith("dtype") or not hasattr(opened.config, name)):
            raise ValueError(unknown_name("setting", name, (*HealSettings.known, *_LOADING)))
    replaces = check_replaceable(out_folder, opened.name)
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(str(folder), {}) if has_tokenizer else opened.tokenizer()
    corpus = load_training_text(text, settings.tokens, tokenizer)
    if settings.written_share is not None:
        corpus = replace(corpus, generated_share=settings.written_share)
    model = _open_student(folder, config, report, opened, reads_weights=reads_weights)
    return HealingInputs(model, report, tokenizer, opened, corpus, settings, replaces), out_folder


def _open_student(
    folder: Path, config: PreTrainedConfig, report: FusionReport, base: Base, *, reads_weights: bool
) -> FusedForCausalLM:
    """The fused model. Raises ValueError if it is not one of that base, or not the one that its report describes."""
    text = config.get_text_config()
    if base.text_config.vocab_size != text.vocab_size:
        raise ValueError(
            f"{base.full_name!r} has {base.text_config.vocab_size} embeddings, and the fused model {text.vocab_size}; "
            "give the base that it was fused from."
        )
    if text.num_hidden_layers != report.layers_after:
        raise ValueError(
            f"{str(folder)!r} has {text.num_hidden_layers} layers, but its report says {report.layers_after}; give "
            "the folder of a fused checkpoint."
        )
    if reads_weights:
        return fused_class(config).from_pretrained(folder, config=config, dtype="auto")
    with torch.device("meta"):
        model: Any = fused_class(config)(config)
    return model.to(config.dtype)


def _base_name(
    base: str | os.PathLike[str] | None, report: FusionReport, hub: Mapping[str, Any]
) -> tuple[str | os.PathLike[str], dict[str, Any]]:
    """The base's folder or hub name, and the arguments to open it with: the report knows its GGUF file."""
    folder, file = report.base_and_gguf_file
    if base is None:
        base, hub = folder, {"revision": report.revision, **hub}
        if "/" not in base:
            raise ValueError(f"The report names the base {report.base!r} only; say where it is with base=FOLDER.")
    if file and not hub.get("gguf_file") and (os.fspath(base) == folder or Path(base, file).is_file()):
        return base, {**hub, "gguf_file": file}
    return base, dict(hub)
