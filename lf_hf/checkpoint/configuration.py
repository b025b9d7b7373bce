"""The config of a FusedLlamaForCausalLM, which remembers its fusion, and plain ones, which do not."""

from __future__ import annotations

import functools
from contextlib import suppress
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig

from lf_hf.families.models import model_class
from lf_hf.report.report import FusionReport

NOT_KEPT = ("model_type", "architectures", "fusion", "transformers_version", "auto_map")
"""What a config of another class does not take over. `auto_map` names code, for which transformers' own stands in."""


class FusedLlamaConfig(LlamaConfig):
    """A LlamaConfig with fewer layers, plus `fusion`.

    Attributes
    ----------
    fusion : dict or None
        `base` (name of the model that was fused), `config` (all FusionConfig fields), `pairs` (layers
        (i, j) of the base at each join), `ratios` (layer i's share at each join of an average), `versions`.
    """

    model_type = "fused_llama"

    fusion: dict[str, Any] | None = None

    def remember(self, report: FusionReport) -> None:
        """Take what a report says of a fusion."""
        self.fusion = {
            "base": report.base,
            "config": report.config,
            "pairs": [list(pair) for pair in report.pairs],
            "ratios": [ratio for layer in report.fused_layers for ratio in layer.ratios],
            "versions": report.versions,
        }

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As for any config; that of a plain checkpoint, too, is read without a warning."""
        values, unused = super().get_config_dict(*args, **kwargs)
        if values.get("model_type") == LlamaConfig.model_type:
            values = {**values, "model_type": cls.model_type, "architectures": ["FusedLlamaForCausalLM"]}
        return values, unused


def plain_config(config: PreTrainedConfig) -> Any:
    """The config of a model, fused or not, as one of transformers' own class."""
    values = config.to_dict()
    kept = {name: value for name, value in values.items() if name not in NOT_KEPT and not name.startswith("_")}
    converted: Any = model_class(config).config_class(**kept)
    converted._attn_implementation = config._attn_implementation
    converted._name_or_path = config._name_or_path
    return converted


@functools.cache
def register_peft() -> None:
    """Let PEFT put adapters where it does in a Llama.

    It is called when the first fused Llama is made, as PEFT may take long to import. AdaptionPrompt has tables of its
    own, with classes in them.
    """
    with suppress(Exception):  # of any kind: there may be no PEFT, or one that does not work
        from peft.utils import constants

        for name, table in vars(constants).items():
            if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict) and "llama" in table:
                table.setdefault(FusedLlamaConfig.model_type, table["llama"])
