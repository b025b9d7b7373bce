"""A model as the pipeline sees it: embeddings, a list of decoder layers that can change, and a head.

Its weights lie wherever accelerate put them: on a card, in memory or on disk. The pipeline asks for one layer at a
time, so that one that is offloaded need not be in memory longer than it is used.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from lf_hf.decoder.placement import bring_in, execution_device, is_offloaded, named_values, offload, sharing_copy, value
from lf_hf.families.models import (
    CausalLM,
    family_of,
    free_layers,
    kept_for_kinds,
    num_parameters,
    set_config_layers,
    text_model,
    text_prefix,
)
from lf_hf.families.table import DecoderLayer, Family, Kind
from lf_hf.runtime.amounts import CPU_BATCH, LONGEST_GROUP, batch_size
from lf_hf.runtime.numerics import to_device

Group = tuple[int, int]
"""The first and the last of some adjacent layers, by their numbers in the dense model."""
Groups = tuple[Group, ...]
"""Groups that share no layer, in ascending order."""
Head = Callable[[Tensor], Tensor]
"""Makes logits (sequences B, tokens T, vocab) of final states (B, T, hidden)."""


class Decoder:
    """A model whose layers are used one after another and may be changed.

    It is changed by giving layers new tensors; no tensor is written to.
    """

    config: Any  # of the layers; follows when some are removed, or become layers of another kind
    family: Family
    model_config: Any  # of the whole model, which is the same, or has that in it beside one of a vision tower
    rotary_emb: Any  # the family's own
    device: torch.device  # where hidden states begin, and where offloaded layers compute
    batch_bytes: int = CPU_BATCH  # that a batch may take inside a layer
    longest_group: int = LONGEST_GROUP  # layers that may become one; fewer where memory allows no more
    resting_place: Literal["device", "host", "disk"] = "device"  # of lists of hidden states
    scratch: Path | None = None  # folder for files; None: that for temporary ones, and no layer is written to a disk
    _inputs: dict[Any, dict[str, Any]]  # of layers of each kind, for states of the last shape
    _inputs_shape: Any = None

    def __init__(self, model: CausalLM) -> None:
        self._take(model)
        self.device = execution_device(self._text.embed_tokens)
        # A stream of their own, so that copies need not wait for what is computed.
        self._streams: Any = torch.get_device_module(self.device)
        has_streams = self.device.type != "cpu" and hasattr(self._streams, "Stream")
        self._copy_stream = self._streams.Stream(self.device) if has_streams else None

    def _take(self, model: CausalLM) -> None:
        self.model, self._text = model, text_model(model)
        self.model_config, self.config = model.config, self._text.config
        self.family, self.rotary_emb = family_of(self.config), self._text.rotary_emb

    @property
    def num_layers(self) -> int:
        """Decoder layers that are there now."""
        return len(self._text.layers)

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model as its config describes it, tied ones once."""
        return num_parameters(self.model_config)[1]

    @property
    def inner_layers(self) -> range:
        """Numbers of layers that may be in groups: not the first and the last one, nor any that must stay in place."""
        return free_layers(self.model_config, "groups")[0]

    @property
    def on_disk(self) -> bool:
        """Whether some weights lie on a disk, so that running all layers reads it."""
        return "disk" in getattr(self.model, "hf_device_map", {}).values()

    def layers(self, indices: Iterable[int]) -> Iterator[DecoderLayer]:
        """Layers with their weights, each read when it is asked for; the model may not change meanwhile.

        An offloaded layer is held by the caller alone, so that its memory can be freed. On other devices than the CPU
        the next one is read while one is used; on the CPU that would take scarce memory.
        """
        indices = list(indices)
        if self.device.type == "cpu" or not any(is_offloaded(self._text.layers[index]) for index in indices):
            yield from map(self.layer, indices)
            return
        with ThreadPoolExecutor(1) as reader:  # at the end of which a read that has begun is waited for
            reads = (reader.submit(self._read_ahead, index) for index in indices)
            ahead = next(reads, None)
            while ahead is not None:
                layer = [self._received(ahead.result())]
                ahead = next(reads, None)
                yield layer.pop()

    def layer(self, index: int) -> DecoderLayer:
        """A layer with its weights: as it is in the model or, where that is offloaded, made anew."""
        layer = self._text.layers[index]
        if not is_offloaded(layer):
            return layer
        new = self.family.new_layer(self.config, self.family.layer_kind(layer))
        self.family.mixer_module(new).layer_idx = index
        new.load_state_dict(dict(named_values(layer)), assign=True)
        return new.eval().requires_grad_(False)

    def _read_ahead(self, index: int) -> DecoderLayer:
        """A layer whose weights are complete when this returns. For any thread."""
        if self._copy_stream is None:
            return self.layer(index)
        with self._streams.stream(self._copy_stream):
            layer = self.layer(index)
        self._copy_stream.synchronize()
        return layer

    def _received(self, layer: DecoderLayer) -> DecoderLayer:
        """A layer for this thread: the memory of what was copied is not reused before all work on it is done."""
        if self._copy_stream is not None:
            for weight in layer.parameters():
                if weight.device == self.device:
                    weight.record_stream(self._streams.current_stream(self.device))
        return layer

    def copy(self) -> Decoder:
        """The model as it is now, with the same tensors: either may then change without the other."""
        other = copy.copy(self)
        other._take(sharing_copy(self.model))
        return other

    @torch.no_grad()
    def replace(self, index: int, weights: Mapping[str, Tensor], kind: Kind | None = None) -> None:
        """Give a layer new values for some parameters, by the names that all families share, and another kind.

        An offloaded layer is offloaded again: to a disk where it lay on one and there is a `scratch` folder, else to
        memory.
        """
        layer = self._text.layers[index]
        device = execution_device(layer)
        was_offloaded = is_offloaded(layer)
        if was_offloaded:
            bring_in(layer)
        if kind and kind != self.family.layer_kind(layer):
            with kept_for_kinds(self.config):
                for name, entry in kind.items():
                    entries = getattr(self.config, name)
                    setattr(self.config, name, [*entries[:index], entry, *entries[index + 1 :]])
            self._change_kind(layer, kind)
        own = layer.state_dict()
        for name, tensor in self.family.packed(weights).items():
            before = own[name]
            like = self.family.writer_weight(layer) if before.is_meta else before
            after = torch.empty_like(before, device=like.device, dtype=like.dtype).copy_(tensor)
            layer.load_state_dict({name: after}, strict=False, assign=True)
        scratch = self.scratch if self._lies_on_disk(index) else None
        if was_offloaded and (scratch or device.type != "cpu"):
            offload(layer, device, scratch, skip_keys=self.model._skip_keys_device_placement)

    @torch.no_grad()
    def assign(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Give parameters new values, by their names in the model; modules that were offloaded are in it then."""
        # A checkpoint may have a head of its own where the config says that it is the embeddings.
        is_tied = self.model.lm_head.weight is self._text.embed_tokens.weight
        for name, given in weights:
            place, _, own_name = name.rpartition(".")
            module = self.model.get_submodule(place)
            if is_offloaded(module):
                bring_in(module)
            before = module.get_parameter(own_name)
            after = torch.empty_like(before).copy_(given)
            module.load_state_dict({own_name: after}, strict=False, assign=True)
        if is_tied:
            self.model.tie_weights()

    def _lies_on_disk(self, index: int) -> bool:
        """Whether the device map puts a layer on a disk, by itself or with what it is in."""
        device_map = getattr(self.model, "hf_device_map", {})
        name = f"{text_prefix(self.model)}layers.{index}"
        while name and name not in device_map:
            name = name.rpartition(".")[0]
        return device_map.get(name) == "disk"

    def _change_kind(self, layer: DecoderLayer, kind: Kind) -> None:
        """Make a layer one of another kind, whose attention, or what is in its place, has no values yet."""
        family = self.family
        new, before = family.new_layer(self.config, kind), family.layer_mixer(layer).module
        mixer = family.mixer_module(new).train(layer.training)
        mixer.requires_grad_(family.writer_weight(layer).requires_grad)
        mixer.config, mixer.layer_idx = self.config, family.mixer_module(layer).layer_idx
        if family.delta_net:
            layer.block_type = new.block_type
        kept = {name: part for name, part in layer.named_children() if name != before}
        layer._modules = new._modules | kept  # in the order that a layer of this kind has

    def remove(self, index: int) -> None:
        """Take a layer out; later ones move up by one, and `config` follows."""
        set_config_layers(self.config, [n for n in range(self.num_layers) if n != index])
        del self._text.layers[index]
        for position, layer in enumerate(self._text.layers):
            self.family.mixer_module(layer).layer_idx = position  # where the cache keeps what is of this layer
        if device_map := getattr(self.model, "hf_device_map", None):
            self.model.hf_device_map = _without_layer(device_map, text_prefix(self.model) + "layers.", index)

    def join(self, group: Group, weights: Mapping[str, Tensor], kind: Kind | None = None) -> None:
        """Let the first of some adjacent layers stand for all: it gets new values, and the others are removed."""
        first, last = group
        if self.family.scalar:
            layers = self._text.layers[first : last + 1]
            scales = [layer.get_buffer(self.family.scalar).to(self.device) for layer in layers]
            weights = {**weights, self.family.scalar: torch.stack(scales).prod(0)}
        if weights:
            self.replace(first, weights, kind)
        for _ in range(first, last):
            self.remove(first + 1)

    def become(self, fused: Decoder, groups: Sequence[Group]) -> None:
        """Apply to this model what was fused in a copy of it: groups of layers, from the bottom up."""
        num_removed = 0
        for first, last in groups:
            index = first - num_removed
            layer = fused.layer(index)
            weights = self.family.unpacked(layer)
            self.join((index, last - num_removed), weights, self.family.layer_kind(layer))
            num_removed += last - first

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The values of all parameters by their names in the model, tied ones once; offloaded ones are read."""
        return named_values(self.model)

    def embed(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Token embeddings of each batch: ids of shape (sequences B, tokens T) -> (B, T, hidden)."""
        table = value(self._text.embed_tokens, "weight")
        read = (embedding(to_device(batch, table.device), table) for batch in batches)
        return [self.family.first_states(self.config, rows, rows=True) for rows in read]

    @property
    def head_weight(self) -> Tensor:
        """The weight of the head, (vocab, hidden)."""
        return value(self.model.lm_head, "weight")

    @property
    def final_norm(self) -> nn.Module:
        """The norm between the last layer and the head."""
        norm = self._text.norm
        if is_offloaded(norm):
            gain = value(norm, "weight")
            norm = type(norm)(self.config.hidden_size, eps=self.config.rms_norm_eps)
            norm.weight = nn.Parameter(gain, requires_grad=False)
        return norm

    def head(self) -> Head:
        """Final norm and head."""
        norm, weight = self.final_norm, self.head_weight
        return lambda states: self.family.logits(self.config, linear(norm(states).to(weight.device), weight))

    def batch_indices(self, sequences: Sequence[Tensor]) -> list[list[int]]:
        """Numbers of the sequences (tokens T,) of each batch: of one length, as many as `batch_size` says."""
        by_length: dict[int, list[int]] = {}
        for number, sequence in enumerate(sequences):
            by_length.setdefault(len(sequence), []).append(number)
        batches = []
        for length, numbers in by_length.items():
            size = batch_size(length, self.family.mlp_width(self.config), self.batch_bytes)
            batches += [numbers[first : first + size] for first in range(0, len(numbers), size)]
        return batches

    def make_batches(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        """The same batches as tensors of shape (sequences B, tokens T), on the device."""
        batches = (torch.stack([sequences[n] for n in numbers]) for numbers in self.batch_indices(sequences))
        return [to_device(batch, self.device) for batch in batches]

    def layer_inputs(self, hidden_states: Tensor, layer: DecoderLayer, past: int = 0) -> dict[str, Any]:
        """What a layer takes besides hidden states (sequences B, tokens T, hidden): mask, positions, rotary embeddings.

        The tokens come after `past` others, which are in a cache; there is one token then.
        """
        num_tokens, device = hidden_states.shape[1], hidden_states.device
        shape = num_tokens, past, device, hidden_states.dtype
        if shape != self._inputs_shape:
            self._inputs_shape, self._inputs = shape, {}
        layer_kind = self.family.layer_kind(layer)
        kind = tuple(layer_kind.values())
        if kind not in self._inputs:
            position_ids = torch.arange(past, past + num_tokens, device=device)[None]  # (1, T)
            layer_types = [layer_kind["layer_types"]] if self.family.rotary_of_type else []
            cos, sin = self.rotary_emb(hidden_states, position_ids, *layer_types)
            self._inputs[kind] = {
                "attention_mask": self._mask(hidden_states, layer),
                "position_ids": position_ids,
                # A model that is spread over devices makes them on one.
                "position_embeddings": (cos.to(device), sin.to(device)),
            }
        if self.family.takes_shared_keys:  # which layers write into, for others that have none of their own
            return self._inputs[kind] | {"shared_kv_states": {}}
        return self._inputs[kind]

    def _mask(self, states: Tensor, layer: DecoderLayer) -> Tensor | None:
        """A layer's mask of the kind that its attention takes; None where that needs none, as one token does not."""
        if states.shape[1] == 1 or self.family.layer_mixer(layer) is self.family.delta_net:
            return None
        has_window = self.family.has_window(self.config, layer)
        make_mask = create_sliding_window_causal_mask if has_window else create_causal_mask
        mask: Tensor | None = make_mask(self.config, states[:1], None, None)  # one for all sequences
        return mask

    def run_layer(self, layer: DecoderLayer, hidden_states: Tensor) -> Tensor:
        """A layer's output for sequences of one length: (B, tokens T, hidden) -> (B, tokens T, hidden)."""
        return layer(hidden_states, **self.layer_inputs(hidden_states, layer))

    @torch.no_grad()
    def walk(self, batches: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Yield, for each layer in turn, the output states of all batches.

        Token ids (sequences B, tokens T) give states (B, T, hidden) before the final norm. The list is overwritten by
        the next layer's states: use it before advancing. Memory is that of one layer's states.
        """
        states = self.embed(batches)
        for layer in self.layers(range(self.num_layers)):
            for n, state in enumerate(states):
                states[n] = self.run_layer(layer, state)
            yield states


def _without_layer(device_map: Mapping[str, Any], layers: str, index: int) -> dict[str, Any]:
    """A device map without one layer, in which later layers are renumbered; their names begin with `layers`."""
    renumbered = {}
    for name, device in device_map.items():
        number, dot, inside = name.removeprefix(layers).partition(".")
        if number.isdigit() and int(number) > index:
            name = f"{layers}{int(number) - 1}{dot}{inside}"
        if number != str(index):
            renumbered[name] = device
    return renumbered
