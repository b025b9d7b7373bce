"""What goes into a checkpoint's folder beside its weights: tokenizer, report and model card."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME, logging

from lf_hf.checkpoint.card import CARD_NAME, model_card
from lf_hf.families import family_of
from lf_hf.report.report import FusionReport

logger = logging.get_logger(__name__)
_SENTENCEPIECE = "tokenizer.model"
_FULL, _SLIDING = "full_attention", "sliding_attention"
_BY_PLACE = (
    "The kinds of this model's layers ({}) are in an order of their own, which its config says. llama.cpp, and other "
    "programs that know a layer's kind by its place, would compute something else."
)


def write_companions(
    folder: Path,
    config: PreTrainedConfig,
    report: FusionReport | None,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    plain: bool,
) -> None:
    """Write the tokenizer, the report and the model card into a checkpoint's folder, as far as they are known."""
    if tokenizer is not None:
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # the tokenizers library has no error of its own for a full disk
            raise OSError(f"tokenizer: {error}") from error
        file = Path(getattr(tokenizer, "vocab_file", None) or "")
        # Of which alone llama.cpp makes some families' tokenizers; transformers 5 leaves it out.
        if file.name == _SENTENCEPIECE and file.is_file():
            shutil.copyfile(file, folder / _SENTENCEPIECE)
    notes = []
    if plain:
        _write_older_names(folder)
        if lists := _unusual_lists(config):
            notes.append(_BY_PLACE.format(", ".join(lists)))
            logger.warning(notes[0])
    if report is not None:
        report.save(folder)
        shown = dataclasses.replace(report, notes=[*report.notes, *notes])
        (folder / CARD_NAME).write_text(model_card(shown, family_of(config), plain=plain), encoding="utf-8")


def _unusual_lists(config: PreTrainedConfig) -> list[str]:
    """Keys of the kinds of layers, where they are in another order than a model of this size usually has them in."""
    lists, values = family_of(config).layer_lists, config.to_dict()
    if "max_window_layers" in values:
        values["max_window_layers"] = _older_names(values)["max_window_layers"]
    usual = type(config)(**{k: v for k, v in values.items() if k not in (*lists, "sliding_window_pattern")})
    return [name for name in lists if getattr(config, name) != getattr(usual, name)]


def _write_older_names(folder: Path) -> None:
    """Say what transformers 5 gave new names under the old ones too, in the config and the tokenizer's.

    transformers 4, and what builds on it (vLLM up to 0.23, llama.cpp's converter), takes a missing `rope_theta` for
    its own default without a word, and does not know the tokenizer class. transformers 5 reads both.
    """
    for file in filter(Path.is_file, (folder / CONFIG_NAME, folder / TOKENIZER_CONFIG_FILE)):
        values = json.loads(file.read_text(encoding="utf-8"))
        values |= _older_names(values)
        if values.get("tokenizer_class") == "TokenizersBackend":
            values["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(values.get("extra_special_tokens"), list):
            values["additional_special_tokens"] = values.pop("extra_special_tokens")
        file.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _older_names(config: dict[str, Any]) -> dict[str, Any]:
    """Entries of a config as transformers 4 wrote them, of what transformers 5 writes otherwise."""
    older: dict[str, Any] = {}
    rope, kinds = config.get("rope_parameters") or {}, config.get("layer_types") or []
    if _FULL in rope:  # rotary embeddings by kinds of layers, as Gemma 3 has them
        older["rope_local_base_freq"] = rope[_SLIDING]["rope_theta"]
        rope = rope[_FULL]
        period = kinds.index(_FULL) + 1 if _FULL in kinds else len(kinds) + 1
        regular = all((kind == _FULL) == (place % period == 0) for place, kind in enumerate(kinds, 1))
        older["sliding_window_pattern"] = period if regular else None  # with which they fail, and do not go wrong
    if "rope_theta" in rope:
        scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
        if scaling.get("rope_type") == "longrope":
            # Phi 3 took these three entries and no more; what else there is has to be at the top of the config.
            most = {"type", "rope_type", "short_factor", "long_factor"}
            if all(config.get(name) == value for name, value in scaling.items() if name not in most):
                scaling = {"type": "longrope"} | {name: scaling[name] for name in ("short_factor", "long_factor")}
        older["rope_theta"] = rope["rope_theta"]
        older["rope_scaling"] = scaling if scaling.get("rope_type") != "default" else None
    if "partial_rotary_factor" in rope:
        older["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if "max_window_layers" in config:  # how many layers without a window come before those with one, in Qwen 2 and 3
        windowed = (place for place, kind in enumerate(kinds) if kind == _SLIDING)
        older["max_window_layers"] = next(windowed, len(kinds))
    if "dtype" in config:
        older["torch_dtype"] = config["dtype"]
    return older
