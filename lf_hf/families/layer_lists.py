"""What a config says of each of its layers by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

from lf_hf.families.models import family_of
from lf_hf.families.table import Kind


def set_config_layers(config: PretrainedConfig, numbers: Sequence[int]) -> None:
    """Let a config describe these of its layers, in this order; lists with one entry a layer follow."""
    for name, values in layer_lists(config).items():
        setattr(config, name, [values[number] for number in numbers])
    config.num_hidden_layers = len(numbers)


def layer_lists(config: PretrainedConfig) -> dict[str, list[Any]]:
    """All lists of a config that have an entry a layer, whether its family's entry names them or not."""
    named, lists = family_of(config).layer_lists, {}
    for name, value in vars(config).items():
        is_list = "layer" in name and isinstance(value, list) and len(value) == config.num_hidden_layers
        if name in named or is_list:
            lists[name] = value
    return lists


def set_config_kind(config: PretrainedConfig, index: int, kind: Kind) -> None:
    """Let one layer be of another kind."""
    for name, value in kind.items():
        values = getattr(config, name)
        setattr(config, name, [*values[:index], value, *values[index + 1 :]])
