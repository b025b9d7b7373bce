"""Bases that are stored quantised: transformers dequantises their weights while it reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

from lf_hf.runtime.errors import explained

_OTHERWISE = "fuse the checkpoint that it was made from, in bfloat16"


@dataclass(frozen=True)
class Quantisation:
    """How a base's weights are stored: what its config says, and the class of transformers that knows it.

    `at_once`: each weight is dequantised when it is read; else all are when they have been loaded, on one device.
    """

    config: dict[str, Any]
    kind: str
    at_once: bool

    @classmethod
    def open(cls, name: str, found: Any) -> Quantisation:
        """Check what a config says. Raises ValueError for what transformers does not dequantise, at all or here."""
        problem = f"{name!r} is quantised, and cannot be dequantised here"
        advice = f"install what that takes, or {_OTHERWISE}"
        with explained(problem, advice):
            config = dict(found)
            known = AutoQuantizationConfig.from_dict(config)
        at_once = hasattr(known, "dequantize")
        if not at_once and not isinstance(known, BitsAndBytesConfig):
            method = config["quant_method"]
            raise ValueError(f"{name!r} is quantised by {method}, which transformers does not undo; {_OTHERWISE}.")
        if at_once:
            config["dequantize"] = True
        with explained(problem, advice):
            AutoHfQuantizer.from_config(config, pre_quantized=True).validate_environment(device_map=None)
        return cls(config, type(known).__name__, at_once)

    def check_place(self, name: str, device_map: Any) -> None:
        """Raise ValueError if weights that wait until all are loaded are to lie in several places, or on the disk."""
        places = {*map(str, device_map.values())} if isinstance(device_map, dict) else {str(device_map)}
        if not self.at_once and (len(places) > 1 or "disk" in places):
            raise ValueError(
                f"{name!r} is quantised by {self.config['quant_method']}, which is undone on one device, and here lies "
                f"on {' and '.join(sorted(places))}; name a device with room for all, such as cpu, or {_OTHERWISE}."
            )

    def undo(self, model: PreTrainedModel) -> None:
        """Dequantise what is still quantised in a model that was loaded, and leave no sign of it."""
        if not self.at_once:
            model.dequantize()
        for sign in ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
            vars(model).pop(sign, None)

    def note(self, dtype: torch.dtype) -> str:
        """What users should know of a model that is made of such a base."""
        by = f"{self.kind} of transformers" if self.kind != "CompressedTensorsConfig" else "llm-compressor"
        return (
            f"The base is stored quantised ({self.config['quant_method']}), and dequantised while it is read, so the "
            f"result is in {str(dtype)[6:]}: quantise it again with {by}."
        )


def take_quantisation(config: PreTrainedConfig) -> Any:
    """Take out of a checkpoint's config how its weights are quantised; None for plain floats."""
    parts = (config, config.get_text_config())
    found = [vars(part).pop("quantization_config", None) for part in parts]
    return found[0] or found[1]
