"""A model in memory as the pipeline sees it."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lf_hf.decoder.interface import Decoder, set_config_kind, set_config_layers
from lf_hf.families import CausalLM, DecoderLayer, Kind

M = TypeVar("M", bound=nn.Module)


class ModelDecoder(Decoder):
    """A model in memory. It is changed by giving layers new tensors; no tensor is written to."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.device = model.model.embed_tokens.weight.device
        self.config = model.config
        self.rotary_emb = model.model.rotary_emb

    @property
    def num_layers(self) -> int:
        return len(self.model.model.layers)

    def layers(self, indices: Iterable[int]) -> Iterator[DecoderLayer]:
        return (self.model.model.layers[index] for index in indices)

    def copy(self) -> ModelDecoder:
        other = copy.copy(self)
        other.model = sharing_copy(self.model)
        other.config, other.rotary_emb = other.model.config, other.model.model.rotary_emb
        return other

    @torch.no_grad()
    def replace(self, index: int, weights: Mapping[str, Tensor], kind: Kind | None = None) -> None:
        layer = self.model.model.layers[index]
        for name, tensor in self.family.packed(weights).items():
            module, _, parameter = name.rpartition(".")
            before = layer.get_parameter(name)
            after = torch.empty_like(before).copy_(tensor)
            setattr(layer.get_submodule(module), parameter, nn.Parameter(after, requires_grad=before.requires_grad))
        if kind and kind != self.family.layer_kind(layer):
            set_config_kind(self.config, index, kind)
            attention = self.family.new_layer(self.config, kind).self_attn
            for name in ("layer_type", "is_sliding", "sliding_window", "use_rope"):
                if hasattr(attention, name):
                    setattr(layer.self_attn, name, getattr(attention, name))

    def remove(self, index: int) -> None:
        set_config_layers(self.config, [n for n in range(self.num_layers) if n != index])
        del self.model.model.layers[index]
        for position, layer in enumerate(self.model.model.layers):
            layer.self_attn.layer_idx = position  # where the KV cache keeps this layer's keys and values
        if device_map := getattr(self.model, "hf_device_map", None):
            self.model.hf_device_map = _without_layer(device_map, index)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return self.model.named_parameters()

    def embed(self, batches: Sequence[Tensor]) -> list[Tensor]:
        table = self.model.model.embed_tokens
        states = []
        for batch in batches:
            embedded = table(batch.to(table.weight.device))
            states.append(self.family.first_states(self.config, embedded))
        return states

    def norm_and_head(self) -> AbstractContextManager[tuple[nn.Module, Tensor]]:
        return nullcontext((self.model.model.norm, self.model.lm_head.weight))


def sharing_copy(module: M) -> M:
    """A copy of a module, with its hooks, that has the same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)


def _without_layer(device_map: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A device map without one layer, in which later layers are renumbered."""
    renumbered = {}
    for name, device in device_map.items():
        found = re.match(r"model\.layers\.(\d+)", name)
        number = int(found[1]) if found else -1
        if number > index:
            name = name.replace(f".{number}", f".{number - 1}", 1)
        if number != index:
            renumbered[name] = device
    return renumbered
