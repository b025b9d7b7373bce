"""The families of models that can be fused, as a table: `docs/families.md` says how to add one."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from transformers import PretrainedConfig

HEADS = ("SequenceClassification", "TokenClassification", "QuestionAnswering")
"""Kinds of heads, besides the language model's, for `Family.head_class`."""


@dataclass(frozen=True)
class Family:
    """One family of decoder models.

    Parameters
    ----------
    model_type : str
        The `model_type` of its config.
    title : str
        Its name in prose and in the names of our classes, such as "Qwen3".
    module : str, optional
        Folder of transformers.models that has its classes, if it is not `model_type`.
    text : str, optional
        What the names of its config, its base model and its heads have after the title where there is a model of
        images as well: "Text".
    """

    model_type: str
    title: str
    module: str = ""
    text: str = ""

    @property
    def config_class(self) -> Any:
        return self._class(f"{self.title}{self.text}Config", "configuration")

    @property
    def model_class(self) -> Any:
        """The model without a head."""
        return self._class(f"{self.title}{self.text}Model")

    @property
    def causal_lm(self) -> Any:
        return self._class(f"{self.title}ForCausalLM")

    @property
    def pretrained_model(self) -> Any:
        """What all models of the family are made from."""
        return self._class(f"{self.title}PreTrainedModel")

    @property
    def decoder_layer(self) -> Any:
        return self._class(f"{self.title}DecoderLayer")

    @property
    def norm(self) -> Any:
        return self._class(f"{self.title}RMSNorm")

    @property
    def rotary_embedding(self) -> Any:
        return self._class(f"{self.title}RotaryEmbedding")

    def head_class(self, kind: str) -> Any | None:
        """The model with another head, one of `HEADS`; None where transformers has none for this family."""
        return getattr(self._module("modeling"), f"{self.title}{self.text}For{kind}", None)

    def _class(self, name: str, module: str = "modeling") -> Any:
        return getattr(self._module(module), name)

    def _module(self, kind: str) -> Any:
        folder = self.module or self.model_type
        return importlib.import_module(f"transformers.models.{folder}.{kind}_{folder}")


FAMILIES = MappingProxyType(
    {
        family.model_type: family
        for family in (
            Family("llama", "Llama"),
            Family("mistral", "Mistral"),
            Family("qwen2", "Qwen2"),
            Family("qwen3", "Qwen3"),
            Family("phi3", "Phi3"),
            Family("gemma2", "Gemma2"),
            Family("gemma3_text", "Gemma3", module="gemma3", text="Text"),
            Family("olmo2", "Olmo2"),
            Family("granite", "Granite"),
            Family("smollm3", "SmolLM3"),
        )
    }
)
"""All families by `model_type`."""


def family_of(config: PretrainedConfig) -> Family:
    """The family of a model, or of one that was fused, by its config.

    Raises
    ------
    ValueError
        For any other model: mixtures of experts, models of images, encoders.
    """
    model_type = config.model_type.removeprefix("fused_")
    if model_type not in FAMILIES:
        raise ValueError(
            f"A model of type {config.model_type!r} cannot be fused: only dense decoders can, with config.model_type "
            f"one of {', '.join(FAMILIES)}."
        )
    return FAMILIES[model_type]
