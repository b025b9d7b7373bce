"""Configuration of a fused Llama: a LlamaConfig that remembers its fusion."""

from __future__ import annotations

from typing import Any, TypeVar

from transformers import LlamaConfig

from lf_hf.report.report import FusionReport

Config = TypeVar("Config", bound=LlamaConfig)


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


def fused_config(config: LlamaConfig, report: FusionReport) -> FusedLlamaConfig:
    """The config of a fused model from that of its layers and from what was fused.

    The model is another one than its base now, and in plain floats: the base's name and the GGUF file's type go.
    """
    converted = converted_config(
        config,
        FusedLlamaConfig,
        fusion={
            "base": report.base,
            "config": report.config,
            "pairs": [list(step.pair) for step in report.steps],
            "ratios": [step.ratio_i for step in report.steps],
            "versions": report.versions,
        },
    )
    converted._name_or_path = ""
    vars(converted).pop("quantization_config", None)
    return converted


def converted_config(config: LlamaConfig, to: type[Config], **extra: Any) -> Config:
    """The same architecture as a config of another class."""
    left_out = {"model_type", "architectures", "fusion", "transformers_version"}
    values = {k: v for k, v in config.to_dict().items() if k not in left_out and not k.startswith("_")}
    converted = to(**values, **extra)
    converted._attn_implementation = config._attn_implementation
    converted._name_or_path = config._name_or_path
    return converted
