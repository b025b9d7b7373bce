"""The two models of a healing: the fused one that came in, and the base that it was fused from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from lf_hf.checkpoint.base import Base, checked_dtype, load_tokenizer
from lf_hf.checkpoint.classes import FusedForCausalLM, fused_class
from lf_hf.checkpoint.configuration import FUSED_CONFIGS, converted_config
from lf_hf.checkpoint.fused_cache import base_fingerprint
from lf_hf.checkpoint.saving import checked_folder, finish_save
from lf_hf.decoder.interface import Decoder
from lf_hf.report.report import FusionReport
from lf_hf.runtime.numerics import weights_digest

_JUDGING_TOKENS = 4096  # of each judging text, where the report names none


@dataclass(frozen=True)
class Fused:
    """What came in. `plain` says whether it is a plain checkpoint."""

    model: FusedForCausalLM
    report: FusionReport
    plain: bool
    tokenizer: PreTrainedTokenizerBase | None

    @property
    def judging_tokens(self) -> int:
        """Of each judging text: as many as the fusion was judged by."""
        return self.report.config.get("perplexity_tokens") or _JUDGING_TOKENS

    @property
    def base_dtype(self) -> torch.dtype:
        """What the base was in when it was fused, as far as the report says."""
        return checked_dtype(self.report.dtype) or self.model.dtype

    @property
    def fused_layers(self) -> list[int]:
        """Numbers of the layers that stand for several."""
        return [number for number, group in enumerate(self.report.groups) if len(group) > 1]


def open_fused(fused: str | os.PathLike[str], *, reads_weights: bool = True) -> Fused:
    """A fused checkpoint; without its weights the model is on the meta device."""
    folder = checked_folder(fused)
    finish_save(folder)
    report = FusionReport.load(folder)
    config = AutoConfig.from_pretrained(folder)
    plain = config.model_type in FUSED_CONFIGS
    if plain:
        config = converted_config(config, FUSED_CONFIGS[config.model_type])
    if reads_weights:
        model = fused_class(config).from_pretrained(folder, config=config, dtype="auto")
    else:
        with torch.device("meta"):
            model = fused_class(config)(config).to(config.dtype)
    if len(model.model.layers) != report.layers_after:
        raise ValueError(
            f"{str(fused)!r} has {len(model.model.layers)} layers, but its report says {report.layers_after}; give the "
            "folder of a fused checkpoint."
        )
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    return Fused(model, report, plain, load_tokenizer(str(folder), {}) if has_tokenizer else None)


def open_base(base: str | os.PathLike[str] | Base | None, came_in: Fused, kwargs: dict[str, Any]) -> Base:
    """The base, checked to have the fused model's vocabulary; its weights are not read."""
    if base is None:
        if "/" not in came_in.report.base:
            raise ValueError(
                f"The report names the base {came_in.report.base!r} only; say where it is with base= (--base)."
            )
        base = came_in.report.base
    opened = base if isinstance(base, Base) else Base.open(base, kwargs)
    sizes = opened.config.vocab_size, came_in.model.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{opened.full_name!r} has {sizes[0]} embeddings, and the fused model {sizes[1]}; give the base "
            "that it was fused from."
        )
    if came_in.tokenizer is not None and came_in.tokenizer.get_vocab() != _vocabulary(opened, came_in.tokenizer):
        raise ValueError(
            f"The tokenizer of {opened.full_name!r} has other tokens than the fused model's; give the base that it was "
            "fused from."
        )
    return opened


def _vocabulary(opened: Base, otherwise: PreTrainedTokenizerBase) -> dict[str, int]:
    """That of the base's own tokenizer; where it has none, another one's."""
    try:
        return opened.tokenizer().get_vocab()
    except ValueError:
        return otherwise.get_vocab()


def check_base(opened: Base, came_in: Fused, decoder: Decoder) -> None:
    """Raise ValueError if the base is not the one that was fused, as far as the report can tell."""
    report = came_in.report
    wrong = False
    if report.base_digest is not None:
        wrong = weights_digest(decoder.named_parameters()) not in (None, report.base_digest)
    elif report.fingerprints is not None:
        wrong = base_fingerprint(opened) != report.fingerprints["base"]
    if wrong:
        raise ValueError(
            f"{opened.full_name!r} is not the base that this model was fused from, which was {report.base!r}: its "
            "weights are others; give that one."
        )
