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
from lf_hf.families import DecoderLayer, Kind
from lf_hf.models import CausalLM, text_model, text_prefix

M = TypeVar("M", bound=nn.Module)


class ModelDecoder(Decoder):
    """A model in memory. It is changed by giving layers new tensors; no tensor is written to."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.device = self._text.embed_tokens.weight.device
        self._take_config()

    @property
    def _text(self) -> Any:
        return text_model(self.model)

    def _take_config(self) -> None:
        self.model_config, self.config = self.model.config, self._text.config
        self.rotary_emb = self._text.rotary_emb

    @property
    def num_layers(self) -> int:
        return len(self._text.layers)

    def layers(self, indices: Iterable[int]) -> Iterator[DecoderLayer]:
        return (self._text.layers[index] for index in indices)

    def copy(self) -> ModelDecoder:
        other = copy.copy(self)
        other.model = sharing_copy(self.model)
        other._take_config()
        return other

    @torch.no_grad()
    def replace(self, index: int, weights: Mapping[str, Tensor], kind: Kind | None = None) -> None:
        layer = self._text.layers[index]
        if kind and kind != self.family.layer_kind(layer):
            set_config_kind(self.config, index, kind)
            self._change_kind(layer, kind)
        for name, tensor in self.family.packed(weights).items():
            module, _, parameter = name.rpartition(".")
            before = layer.get_parameter(name)
            like = layer.mlp.down_proj.weight if before.is_meta else before
            after = torch.empty_like(before, device=like.device, dtype=like.dtype).copy_(tensor)
            setattr(layer.get_submodule(module), parameter, nn.Parameter(after, requires_grad=like.requires_grad))

    def _change_kind(self, layer: DecoderLayer, kind: Kind) -> None:
        """Make a layer one of another kind; where that has other parameters, they have no values yet."""
        family = self.family
        new, before = family.new_layer(self.config, kind), family.mixer_module(layer)
        after = family.mixer_module(new)
        if type(after) is type(before):
            for name in ("layer_type", "attention_type", "is_sliding", "sliding_window", "use_rope"):
                if hasattr(after, name):
                    setattr(before, name, getattr(after, name))
            return
        layer.block_type = new.block_type
        delattr(layer, family.layer_mixer(layer).module)
        after.config, after.layer_idx = self.config, before.layer_idx
        layer.add_module(family.layer_mixer(new).module, after.train(layer.training))

    def remove(self, index: int) -> None:
        set_config_layers(self.config, [n for n in range(self.num_layers) if n != index])
        del self._text.layers[index]
        for position, layer in enumerate(self._text.layers):
            self.family.mixer_module(layer).layer_idx = position  # where the cache keeps what is of this layer
        if device_map := getattr(self.model, "hf_device_map", None):
            self.model.hf_device_map = _without_layer(device_map, text_prefix(self.model) + "layers.", index)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return self.model.named_parameters()

    def embed(self, batches: Sequence[Tensor]) -> list[Tensor]:
        table = self._text.embed_tokens
        states = []
        for batch in batches:
            embedded = table(batch.to(table.weight.device))
            states.append(self.family.first_states(self.config, embedded))
        return states

    def norm_and_head(self) -> AbstractContextManager[tuple[nn.Module, Tensor]]:
        return nullcontext((self._text.norm, self.model.lm_head.weight))


def sharing_copy(module: M) -> M:
    """A copy of a module, with its hooks, that has the same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)


def _without_layer(device_map: Mapping[str, Any], layers: str, index: int) -> dict[str, Any]:
    """A device map without one layer, in which later layers are renumbered; their names begin with `layers`."""
    renumbered = {}
    for name, device in device_map.items():
        found = re.match(rf"{re.escape(layers)}(\d+)", name)
        number = int(found[1]) if found else -1
        if number > index:
            name = name.replace(f"{layers}{number}", f"{layers}{number - 1}", 1)
        if number != index:
            renumbered[name] = device
    return renumbered
