"""What goes into a checkpoint's folder beside its weights: tokenizer, report and model card."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from lf_hf.files.model_card import CARD_NAME, model_card
from lf_hf.report.report import FusionReport


def is_plain(plain: bool | None, as_llama: bool | None) -> bool:
    """Whether a plain checkpoint is asked for, by either name of that. Raises ValueError if they differ."""
    if plain is not None and as_llama is not None and plain != as_llama:
        raise ValueError(f"plain={plain!r} and as_llama={as_llama!r} are two names of one choice; give one of them.")
    return bool(plain or as_llama)


def write_companions(
    folder: Path, report: FusionReport | None, tokenizer: PreTrainedTokenizerBase | None, *, plain: bool
) -> None:
    """Write the tokenizer, the report and the model card into a checkpoint's folder, as far as they are known."""
    if tokenizer is not None:
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # the tokenizers library has no error of its own for a full disk
            raise OSError(f"tokenizer: {error}") from error
    if plain:
        _write_older_names(folder)
    if report is not None:
        report.save(folder)
        (folder / CARD_NAME).write_text(model_card(report, plain=plain), encoding="utf-8")


def _write_older_names(folder: Path) -> None:
    """Say what transformers 5 gave new names under the old ones too, in the config and the tokenizer's.

    transformers 4, and what builds on it (vLLM up to 0.23, llama.cpp's converter), takes a missing `rope_theta` for
    10000 without a word, and does not know the tokenizer class. transformers 5 reads both.
    """
    if (file := folder / CONFIG_NAME).is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        rope = dict(config.get("rope_parameters") or {})
        if "rope_theta" in rope:
            config["rope_theta"] = rope.pop("rope_theta")
            config["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
        if "dtype" in config:
            config["torch_dtype"] = config["dtype"]
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if (file := folder / "tokenizer_config.json").is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        if config.get("tokenizer_class") == "TokenizersBackend":
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(config.get("extra_special_tokens"), list):
            config["additional_special_tokens"] = config.pop("extra_special_tokens")
        file.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
