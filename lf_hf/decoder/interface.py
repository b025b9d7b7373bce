"""A model as the pipeline sees it: embeddings, a list of decoder layers that can change, and a head.

The pipeline asks for one layer at a time, so that the layers may also lie on disk: see `on_disk.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PretrainedConfig
from transformers.utils.generic import is_flash_attention_requested

from lf_hf.families import DecoderLayer, Family, Kind
from lf_hf.models import family_of, first_free_layer
from lf_hf.runtime.launch import ALONE, Processes
from lf_hf.runtime.memory import free_memory
from lf_hf.runtime.numerics import all_finite

_CPU_BATCH = 1 << 26
"""Bytes that a batch may take inside a layer on the CPU."""
_BATCH_SHARE = 1 / 8  # of any other device's free memory that a batch may take
_COPIES = 64  # bytes for each token and channel of an MLP: several copies, of several layers side by side


Group = tuple[int, int]
"""The first and the last of some adjacent layers, by their numbers in the dense model."""
Groups = tuple[Group, ...]
"""Groups that share no layer, in ascending order."""
Head = Callable[[Tensor], Tensor]
"""Makes logits (sequences B, tokens T, vocab) of final states (B, T, hidden)."""


class Decoder(ABC):
    """A model whose layers are used one after another and may be changed."""

    config: Any  # of the layers; follows when some are removed, or become layers of another kind
    model_config: Any  # of the whole model, which is the same, or has that in it beside one of a vision tower
    rotary_emb: Any  # the family's own
    device: torch.device  # where hidden states begin
    processes: Processes = ALONE  # those that hold the same model and share the work on it
    states_in_memory: int | None = None  # bytes of hidden states in the machine's memory; None: all that fit
    scratch: Path | None = None  # folder for files; None: that for temporary ones
    _inputs: dict[Any, dict[str, Any]]  # of layers of each kind, for states of the last shape
    _inputs_shape: Any = None

    @property
    def family(self) -> Family:
        return family_of(self.config)

    @property
    @abstractmethod
    def num_layers(self) -> int:
        """Decoder layers that are there now."""

    @property
    def inner_layers(self) -> range:
        """Numbers of layers that may be in groups: not the first and the last one, nor any that must stay in place."""
        return range(max(1, first_free_layer(self.model_config)), self.num_layers - 1)

    @property
    def bytes_read(self) -> int:
        """Bytes that running all layers again reads from a disk, inside `keep_layers`."""
        return 0

    @abstractmethod
    def layers(self, indices: Iterable[int]) -> Iterator[DecoderLayer]:
        """Layers with their weights, each read when it is asked for; the model may not change meanwhile."""

    def layer(self, index: int) -> DecoderLayer:
        """One layer with its weights."""
        return next(self.layers([index]))

    @abstractmethod
    def copy(self) -> Decoder:
        """The model as it is now, with the same tensors: either may then change without the other."""

    @abstractmethod
    def replace(self, index: int, weights: Mapping[str, Tensor], kind: Kind | None = None) -> None:
        """Give a layer new values for some parameters, by the names that all families share, and another kind."""

    @abstractmethod
    def remove(self, index: int) -> None:
        """Take a layer out; later ones move up by one, and `config` follows."""

    def join(self, group: Group, weights: Mapping[str, Tensor], kind: Kind | None = None) -> None:
        """Let the first of some adjacent layers stand for all: it gets new values, and the others are removed."""
        first, last = group
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
            weights = self.family.unpacked(layer.named_parameters())
            self.join((index, last - num_removed), weights, self.family.layer_kind(layer))
            num_removed += last - first

    @abstractmethod
    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters by their names in the checkpoint, tied ones once."""

    @abstractmethod
    def embed(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Token embeddings of each batch: ids of shape (sequences B, tokens T) -> (B, T, hidden)."""

    @abstractmethod
    def norm_and_head(self) -> AbstractContextManager[tuple[nn.Module, Tensor]]:
        """The final norm, and the head's weight (vocab, hidden), inside a `with` block."""

    @contextmanager
    def head(self) -> Iterator[Head]:
        """Final norm and head, inside a `with` block."""
        with self.norm_and_head() as (norm, weight):
            yield lambda states: self.family.logits(self.config, linear(norm(states).to(weight.device), weight))

    def batch_indices(self, sequences: Sequence[Tensor]) -> list[list[int]]:
        """Numbers of the sequences (tokens T,) of each batch: of one length, and no more than fit.

        On the CPU larger batches would gain nothing. On other devices the result depends on the memory that is free.
        """
        room = _CPU_BATCH
        if self.device.type != "cpu":
            room = int(free_memory(self.device) * _BATCH_SHARE)
        max_tokens = room // (_COPIES * self.config.intermediate_size)
        by_length: dict[int, list[int]] = {}
        for number, sequence in enumerate(sequences):
            by_length.setdefault(len(sequence), []).append(number)
        batches = []
        for length, numbers in by_length.items():
            size = max(1, max_tokens // length)
            batches += [numbers[first : first + size] for first in range(0, len(numbers), size)]
        return batches

    def make_batches(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        """The same batches as tensors of shape (sequences B, tokens T), on the device."""
        batches = []
        for numbers in self.batch_indices(sequences):
            batch = torch.stack([sequences[number] for number in numbers])
            batches.append(batch.to(self.device))
        return batches

    def keep_layers(self) -> AbstractContextManager[None]:
        """Inside a `with` block, layers that are read stay on their device if they fit; none may be changed there."""
        return nullcontext()

    def layer_inputs(
        self, hidden_states: Tensor, layer: DecoderLayer, past: int = 0, padding: tuple[int, ...] = ()
    ) -> dict[str, Any]:
        """What a layer takes besides hidden states (sequences B, tokens T, hidden): mask, positions, rotary embeddings.

        The tokens come after `past` others, which are in a cache. `padding` is how many tokens of each sequence come
        before its text.
        """
        num_tokens, device = hidden_states.shape[1], hidden_states.device
        shape = num_tokens, past, padding, device, hidden_states.dtype
        if shape != self._inputs_shape:
            self._inputs_shape, self._inputs = shape, {}
        layer_kind = self.family.layer_kind(layer)
        kind = tuple(layer_kind.values())
        if kind not in self._inputs:
            starts = torch.tensor(padding or (0,), device=device)[:, None]
            position_ids = (torch.arange(past, past + num_tokens, device=device) - starts).clamp(min=0)  # (1 or B, T)
            layer_types = [layer_kind["layer_types"]] if self.family.rotary_of_type else []
            cos, sin = self.rotary_emb(hidden_states, position_ids, *layer_types)
            self._inputs[kind] = {
                "attention_mask": self._mask(hidden_states, layer, past, starts if padding else None),
                "position_ids": position_ids,
                # A model that is spread over devices makes them on one.
                "position_embeddings": (cos.to(device), sin.to(device)),
            }
        return self._inputs[kind]

    def _mask(self, states: Tensor, layer: DecoderLayer, past: int, starts: Tensor | None) -> Tensor | None:
        """What attention adds to its scores, (B, 1, T, keys), or None; for flash attention, which keys are text.

        Where a layer has something else in the place of attention, which tokens are text, (B, T). `starts` (B, 1) are
        the places where the sequences' text begins, if there is padding.
        """
        num_tokens, end = states.shape[1], past + states.shape[1]
        window = self.family.layer_window(self.config, layer)
        if window is not None and window >= end:
            window = None
        # These are causal by themselves; the second one does not know windows.
        is_flash = is_flash_attention_requested(self.config)
        is_sdpa = self.config._attn_implementation == "sdpa"
        sees_all = num_tokens == 1 or (is_sdpa and past == 0)
        is_linear = self.family.layer_mixer(layer) is self.family.linear
        if starts is None and (is_linear or is_flash or (window is None and sees_all)):
            return None
        keys = torch.arange(end, device=states.device)
        is_text = keys[None] >= (0 if starts is None else starts)  # (1 or B, keys)
        if is_linear:
            return is_text[:, past:]
        if is_flash:
            return is_text
        queries = keys[past:, None]
        seen = keys <= queries
        if window is not None:
            seen &= keys > queries - window
        mask = is_text[:, None, None] & seen  # (1 or B, 1, T, keys)
        lowest = torch.finfo(states.dtype).min
        return torch.zeros_like(mask, dtype=states.dtype).masked_fill(~mask, lowest)

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


def check_finite(states: Sequence[Tensor], layer: int) -> None:
    """Raise ValueError if the output states of a layer contain NaN or inf."""
    if not all(map(all_finite, states)):
        raise ValueError(f"The activations of layer {layer} contain NaN or inf on the calibration text.")
