"""Which models fuse, of text alone or of images too, why others do not, and what a config says of each layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lf_hf.families.table import FAMILIES, GEMMA4_MIXTURE, Family

CausalLM: TypeAlias = Any
"""A model of one of the families, with its head."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # keys of how many there are
_REFUSED = {
    "gemma3n": "its layers share keys and values and have own embeddings; fuse a Gemma 3",
    "granitemoehybrid": "its layers are Mamba's and attention's; fuse a Granite whose config.model_type is granite",
    "nemotron_h": "its layers are Mamba's, attention's, MLPs and experts; fuse a model whose layers all have attention",
    "lfm2": "its layers are convolutions and attention; take one of the smaller LFM2 models",
}
"""What to do instead, by how a `model_type` begins."""
WRAPPERS = ("gemma3", "gemma4", "gemma4_unified", "mistral3", "qwen3_vl")
"""Types of vision-language models whose decoder, of any of the families, is given features of images as tokens."""
MODEL_TYPES = (*(name for name in FAMILIES if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), *WRAPPERS)
"""Types of models that can be fused."""


def family_of(config: PretrainedConfig) -> Family:
    """The family of a model, or of the decoder in one of images and text, also of one that was fused, by its config.

    Raises ValueError for any other model, with what to do instead where that is known.
    """
    if is_wrapper(config):
        config = config.get_text_config()
    family = known_family(config)
    if family is None:
        raise ValueError(f"A model of type {config.model_type!r} cannot be fused: {why_refused(config)}.")
    return family


def known_family(config: PretrainedConfig) -> Family | None:
    """The same of a decoder's config, and None for any other model."""
    if _has_dense_layers(config) or _shares_keys(config):
        return None
    family = FAMILIES.get(config.model_type.removeprefix("fused_"))
    return GEMMA4_MIXTURE if family and getattr(config, "enable_moe_block", False) else family


def _has_dense_layers(config: PretrainedConfig) -> bool:
    """Whether some layers of a mixture of experts have none."""
    return bool(getattr(config, "mlp_only_layers", None)) or getattr(config, "decoder_sparse_step", 1) != 1


def _shares_keys(config: PretrainedConfig) -> bool:
    """Whether layers have keys and values of others, or embeddings of their own, as the small models of Gemma 4."""
    return any(getattr(config, key, 0) for key in ("num_kv_shared_layers", "hidden_size_per_layer_input"))


def why_refused(config: PretrainedConfig) -> str:
    """Why a model that is of no family is not fused, and what to do instead."""
    for begins, why in _REFUSED.items():
        if config.model_type.startswith(begins):
            return why
    text = config.get_text_config()
    if _shares_keys(text):
        return "its layers share keys and values and have own embeddings; fuse a larger Gemma 4, or a Gemma 3"
    if _has_dense_layers(text):
        return "some of its layers have experts and some have none"
    if any(getattr(text, key, None) for key in _EXPERTS):
        mixtures = (name for name in MODEL_TYPES if name in FAMILIES and FAMILIES[name].mlp.experts)
        return f"of mixtures of experts only those of these types fuse: {', '.join(mixtures)}"
    if text is not config and text.model_type in FAMILIES:
        return (
            f"save its decoder, a {text.model_type!r}, by itself and fuse that; {', '.join(WRAPPERS)} fuse as a whole"
        )
    return f"only models of these types fuse: {', '.join(MODEL_TYPES)}"


def is_wrapper(config: PretrainedConfig) -> bool:
    """Whether a model has a vision tower beside its decoder of text."""
    return config.model_type in WRAPPERS


def model_class(config: PretrainedConfig) -> Any:
    """transformers' own class of a model with its head."""
    return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)] if is_wrapper(config) else family_of(config).causal_lm


def auto_class(config: PretrainedConfig) -> str:
    """transformers' class that opens a model by its config."""
    return "AutoModelForImageTextToText" if is_wrapper(config) else "AutoModelForCausalLM"


def free_layers(config: PretrainedConfig, selection: str) -> tuple[range, str]:
    """Numbers of the layers that a selection may put into groups, and why others may not, where something is special.

    Only selection="last" may take the first and the last layer. Features of images are added to what the lowest layers
    give. A hybrid keeps a layer with attention: transformers' caches count tokens by it.
    """
    text = config.get_text_config()
    first = len(getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", ()))
    why = f"of which features of images need the first {first} as they are" if first else ""
    is_last = selection == "last"
    free = range(first, text.num_hidden_layers) if is_last else range(max(1, first), text.num_hidden_layers - 1)
    family = family_of(text)
    attend = [n for n, kind in enumerate(family.config_kinds(text)) if family.mixer(kind) is family.attention]
    if family.delta_net is None or not all(number in free for number in attend):
        return free, why
    kept = min(attend, default=free.stop) if is_last else max(attend, default=free.start)
    why = f"of which layer {kept} and those {'below' if is_last else 'above'} stay, so that one has attention"
    return (range(kept + 1, free.stop) if is_last else range(free.start, kept)), why


def text_model(model: CausalLM) -> Any:
    """The part of a model that has embeddings, decoder layers and the final norm: all but head and vision tower."""
    return model.get_decoder()


def text_prefix(model: CausalLM) -> str:
    """What the names of the parameters of `text_model` begin with in the model."""
    decoder = text_model(model)
    return next(f"{name}." for name, module in model.named_modules() if module is decoder)


def num_parameters(config: PretrainedConfig) -> tuple[int, int]:
    """Parameters of one decoder layer, on average, and of the whole model, tied ones once; by the config alone."""
    with torch.device("meta"):
        model = model_class(config)(config)
    layers = text_model(model).layers
    in_layers = sum(parameter.numel() for parameter in layers.parameters())
    return in_layers // len(layers), model.num_parameters()


def set_config_layers(config: PretrainedConfig, numbers: Sequence[int]) -> None:
    """Let a config describe these of its layers, in this order; lists with one entry a layer follow."""
    with kept_for_kinds(config):
        for name, values in layer_lists(config).items():
            setattr(config, name, [values[number] for number in numbers])
        config.num_hidden_layers = len(numbers)


@contextmanager
def kept_for_kinds(config: PretrainedConfig) -> Iterator[None]:
    """Let what a config has for each layer by its number follow the layers' types, which change meanwhile."""
    by_number = config.to_dict().get("per_layer_config") or {}
    by_type = {config.layer_types[int(number)]: own for number, own in by_number.items()}
    if by_type:
        config.per_layer_config = None
    yield
    if by_type:
        of_layers = {number: by_type.get(kind) for number, kind in enumerate(config.layer_types)}
        config.per_layer_config = {number: own for number, own in of_layers.items() if own}


def layer_lists(config: PretrainedConfig) -> dict[str, list[Any]]:
    """All lists of a config that have an entry a layer, whether its family's entry names them or not."""
    named, lists = family_of(config).layer_lists, {}
    for name, value in vars(config).items():
        is_list = "layer" in name and isinstance(value, list) and len(value) == config.num_hidden_layers
        if name in named or is_list:
            lists[name] = value
    return lists
