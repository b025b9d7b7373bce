"""Configurations of fused models: the base's config class, which remembers the fusion."""

from __future__ import annotations

import functools
from contextlib import suppress
from types import MappingProxyType
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig

from lf_hf.families import FAMILIES, Family, family_of
from lf_hf.report.report import FusionReport

FUSED = "fused_"
"""What the `model_type` of a fused model starts with; the base's follows."""


class FusedLlamaConfig(LlamaConfig):
    """A LlamaConfig with fewer layers, plus `fusion`.

    Attributes
    ----------
    fusion : dict or None
        `base` (name of the model that was fused), `config` (all FusionConfig fields), `pairs` (original layer
        indices (i, j) of each step), `ratios` (layer i's share at each step), `versions`.
    """

    model_type = "fused_llama"

    fusion: dict[str, Any] | None = None


def _config_class(family: Family) -> Any:
    """A class as FusedLlamaConfig is, for another family."""
    stock = family.config_class
    contents = {
        "__doc__": f"A {stock.__name__} with fewer layers, plus `fusion`, as FusedLlamaConfig has it.",
        "__module__": __name__,
        "__annotations__": {"fusion": dict[str, Any] | None},
        "model_type": FUSED + family.model_type,
        "fusion": None,
    }
    return type(f"Fused{stock.__name__}", (stock,), contents)


FUSED_CONFIGS = MappingProxyType(
    {name: FusedLlamaConfig if name == "llama" else _config_class(family) for name, family in FAMILIES.items()}
)
"""Config classes of fused models by the base's `model_type`; by their names they are in this module, too."""
globals().update({config.__name__: config for config in FUSED_CONFIGS.values()})


def fused_config(config: PreTrainedConfig, report: FusionReport) -> Any:
    """The config of a fused model, which is another one than its base and in plain floats: name and GGUF type go."""
    converted = converted_config(config, FUSED_CONFIGS[family_of(config).model_type], fusion=fusion_entry(report))
    converted._name_or_path = ""
    vars(converted).pop("quantization_config", None)
    return converted


def fusion_entry(report: FusionReport) -> dict[str, Any]:
    """What the config of a fused model says of the fusion."""
    return {
        "base": report.base,
        "config": report.config,
        "pairs": [list(step.pair) for step in report.steps],
        "ratios": [step.ratio_i for step in report.steps],
        "versions": report.versions,
    }


def plain_config(config: PreTrainedConfig) -> Any:
    """The config of a fused model as one of the base's own class."""
    return converted_config(config, family_of(config).config_class)


def converted_config(config: PreTrainedConfig, to: Any, **extra: Any) -> Any:
    """The same architecture as a config of another class."""
    # `auto_map` is of code that came with the base, in whose place transformers' own is used.
    left_out = {"model_type", "architectures", "fusion", "transformers_version", "auto_map"}
    values = {k: v for k, v in config.to_dict().items() if k not in left_out and not k.startswith("_")}
    converted = to(**values, **extra)
    converted._attn_implementation = config._attn_implementation
    converted._name_or_path = config._name_or_path
    return converted


@functools.cache
def register_peft() -> None:
    """Let PEFT methods that know where adapters go in a model of some type know the same of the fused one.

    That is all but AdaptionPrompt, which has tables of its own, with classes in them. It happens when the first fused
    model is made, and not when lf_hf is imported, as PEFT may take long to import.
    """
    with suppress(Exception):  # of any kind: there may be no PEFT, or one that does not work
        from peft.utils import constants

        for name, table in vars(constants).items():
            if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict):
                table |= {FUSED + base: table[base] for base in FAMILIES if base in table and FUSED + base not in table}
