"""What goes into a checkpoint's folder beside its weights: tokenizer, report and model card."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME, logging

from lf_hf.checkpoint.card import CARD_NAME, model_card
from lf_hf.families.models import family_of, is_wrapper
from lf_hf.report.report import FusionReport

logger = logging.get_logger(__name__)
_SENTENCEPIECE = "tokenizer.model"
_ON_TEXT = (
    "Layers were fused, and healed if they were, on text, and all figures are of text; nothing was measured on images."
)
_FULL, _SLIDING = "full_attention", "sliding_attention"
_BY_PLACE = (
    "The kinds of this model's layers ({}) are in an order of their own, which its config says. Programs that know a "
    "layer's kind by its place, as llama.cpp does in some families, would compute something else."
)


def write_companions(
    folder: Path,
    config: PreTrainedConfig,
    report: FusionReport | None,
    tokenizer: PreTrainedTokenizerBase | None,
    processor_files: Mapping[str, bytes],
    *,
    plain: bool,
) -> None:
    """Write what goes beside weights into a checkpoint's folder, as far as it is known."""
    if tokenizer is not None:
        _write_tokenizer(folder, tokenizer)
    for name, content in processor_files.items():
        (folder / name).write_bytes(content)
    notes = [_ON_TEXT] if is_wrapper(config) else []
    if plain:
        _write_older_names(folder)
        if lists := _unusual_lists(config):
            notes.append(_BY_PLACE.format(", ".join(lists)))
            logger.warning(notes[-1])
    if report is not None:
        report.save(folder)
        shown = dataclasses.replace(report, notes=[*report.notes, *notes])
        (folder / CARD_NAME).write_text(model_card(shown, config, plain=plain), encoding="utf-8")


def _write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers library has no error of its own for a full disk
        raise OSError(f"tokenizer: {error}") from error
    # llama.cpp makes some families' tokenizers of this file alone; transformers 5 leaves it out.
    file = Path(getattr(tokenizer, "vocab_file", None) or "")
    if file.name == _SENTENCEPIECE and file.is_file():
        shutil.copyfile(file, folder / _SENTENCEPIECE)


def _unusual_lists(config: PreTrainedConfig) -> list[str]:
    """Keys of the kinds of layers, where they are in another order than a model of this size usually has them in."""
    config = config.get_text_config()
    lists, values = family_of(config).layer_lists, config.to_dict()
    if "max_window_layers" in values:
        values["max_window_layers"] = _full_attention_layers(values)
    for name in (*lists, "sliding_window_pattern"):
        values.pop(name, None)
    usual = type(config)(**values)
    return [name for name in lists if getattr(config, name) != getattr(usual, name)]


def _write_older_names(folder: Path) -> None:
    """Say what transformers 5 gave new names under the old ones too, in the config and the tokenizer's.

    transformers 4, and what builds on it (vLLM up to 0.23, llama.cpp's converter), takes a missing `rope_theta` for
    its own default without a word, and does not know the tokenizer class. transformers 5 reads both.
    """
    for file in filter(Path.is_file, (folder / CONFIG_NAME, folder / TOKENIZER_CONFIG_FILE)):
        values = json.loads(file.read_text(encoding="utf-8"))
        values |= _older_names(values)
        if text := values.get("text_config"):
            text |= _older_names(text)
        if values.get("tokenizer_class") == "TokenizersBackend":
            values["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(values.get("extra_special_tokens"), list):
            values["additional_special_tokens"] = values.pop("extra_special_tokens")
        file.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _older_names(config: dict[str, Any]) -> dict[str, Any]:
    """Entries of a config as transformers 4 wrote them, of what transformers 5 writes otherwise."""
    older: dict[str, Any] = {}
    rope = config.get("rope_parameters") or {}
    if str(config.get("model_type")).startswith("gemma4"):  # younger than transformers 5
        rope = {}
    if _FULL in rope:  # rotary embeddings by kinds of layers, as Gemma 3 has them
        older["rope_local_base_freq"] = rope[_SLIDING]["rope_theta"]
        older["sliding_window_pattern"] = _period(config["layer_types"])
        rope = rope[_FULL]
    if "rope_theta" in rope:
        older["rope_theta"] = rope["rope_theta"]
        older["rope_scaling"] = _rope_scaling(rope, config)
    if "partial_rotary_factor" in rope:
        older["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if "max_window_layers" in config:
        older["max_window_layers"] = _full_attention_layers(config)
    if "dtype" in config:
        older["torch_dtype"] = config["dtype"]
    return older


def _period(kinds: list[str]) -> int | None:
    """Every how many layers one attends to all tokens; None, with which old programs fail, where that is irregular."""
    period = kinds.index(_FULL) + 1 if _FULL in kinds else len(kinds) + 1
    regular = [_SLIDING if place % period else _FULL for place in range(1, len(kinds) + 1)]
    return period if kinds == regular else None


def _full_attention_layers(config: dict[str, Any]) -> int:
    """How many layers without a window come before those with one, in Qwen 2 and 3."""
    kinds = config.get("layer_types") or []
    return kinds.index(_SLIDING) if _SLIDING in kinds else len(kinds)


def _rope_scaling(rope: dict[str, Any], config: dict[str, Any]) -> dict[str, Any] | None:
    """How rotary embeddings are scaled, None for not at all."""
    if rope.get("rope_type") == "default":
        return None
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    if scaling.get("rope_type") != "longrope":
        return scaling
    # Phi 3 took these three entries and no more; what else there is has to be at the top of the config.
    factors = {name: scaling[name] for name in ("short_factor", "long_factor")}
    others = scaling.keys() - factors.keys() - {"type", "rope_type"}
    if all(config.get(name) == scaling[name] for name in others):
        return {"type": "longrope", **factors}
    return scaling
