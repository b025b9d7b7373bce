"""Configuration of a fused Llama: a LlamaConfig that remembers its fusion."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig


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
