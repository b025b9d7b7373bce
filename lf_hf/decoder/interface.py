"""A model as the pipeline sees it: embeddings, a list of decoder layers that can change, and a head.

The pipeline asks for one layer at a time, so that the layers may also lie on disk: see `on_disk.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import PretrainedConfig
from transformers.utils.generic import is_flash_attention_requested

from lf_hf.families import DecoderLayer, Family, Kind, family_of
from lf_hf.runtime.launch import ALONE, Processes
from lf_hf.runtime.memory import free_memory
from lf_hf.runtime.numerics import all_finite

_CPU_BATCH = 1 << 26
"""Bytes that a batch may take inside a layer on the CPU."""
_BATCH_SHARE = 1 / 8  # of what is free on any other device
_COPIES = 64  # bytes for each token and channel of an MLP: several copies, of several layers side by side


class Decoder(ABC):
    """A model whose layers are used one after another and may be changed."""

    config: Any  # follows when layers are removed, or become layers of another kind
    rotary_emb: Any  # the family's own
    device: torch.device  # where hidden states begin
    processes: Processes = ALONE  # those that hold the same model and share the work on it
    states_in_memory: int | None = None  # bytes of hidden states in the machine's memory; None: all that fit
    _inputs: tuple[Any, dict[Any, dict[str, Any]]] | None = None  # of layers, for the last kind of states

    @property
    def family(self) -> Family:
        return family_of(self.config)

    @property
    @abstractmethod
    def num_layers(self) -> int:
        """Decoder layers that are there now."""

    @property
    def bytes_read(self) -> int:
        """Bytes that running all layers again reads from a disk, inside `kept_at_hand`."""
        return 0

    @abstractmethod
    def layers(self, indices: Iterable[int]) -> Iterator[DecoderLayer]:
        """Layers with their weights, one after the other, each to be used until the next one is asked for.

        Neither they nor the model are to be changed meanwhile.
        """

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

    @abstractmethod
    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters by their names in the checkpoint, tied ones once."""

    @abstractmethod
    def embed(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Token embeddings of each batch: ids of shape (sequences B, tokens T) -> (B, T, hidden)."""

    @abstractmethod
    def norm_and_head(self) -> AbstractContextManager[tuple[Callable[[Tensor], Tensor], Tensor]]:
        """The final norm, and the head's weight (vocab, hidden), inside a `with` block."""

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Final norm and head, inside a `with` block: (sequences B, tokens T, hidden) -> logits (B, T, vocab)."""
        with self.norm_and_head() as (norm, weight):
            yield lambda states: self.family.logits(self.config, linear(norm(states).to(weight.device), weight))

    def batched(self, sequences: Sequence[Tensor]) -> list[list[int]]:
        """Numbers of sequences that go through the layers together: of one length, and no more than fit.

        Sequences of shape (tokens T,). On the CPU larger batches would gain nothing.
        """
        room = _CPU_BATCH if self.device.type == "cpu" else int(free_memory(self.device) * _BATCH_SHARE)
        most = room // (_COPIES * self.config.intermediate_size)  # tokens
        by_length: dict[int, list[int]] = {}
        for number, sequence in enumerate(sequences):
            by_length.setdefault(len(sequence), []).append(number)
        return [
            numbers[first : first + max(1, most // length)]
            for length, numbers in by_length.items()
            for first in range(0, len(numbers), max(1, most // length))
        ]

    def batches(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        """The same as tensors of shape (sequences B, tokens T), on the device."""
        groups = self.batched(sequences)
        return [torch.stack([sequences[number] for number in numbers]).to(self.device) for numbers in groups]

    def kept_at_hand(self) -> AbstractContextManager[None]:
        """Inside a `with` block, layers that are asked for again and again stay where they are used, if they fit.

        The model is not to be changed there.
        """
        return nullcontext()

    def layer_inputs(self, hidden_states: Tensor, layer: DecoderLayer) -> dict[str, Any]:
        """What a layer takes besides its hidden states, for sequences without padding or cache.

        `hidden_states` is (sequences B, tokens T, hidden); the result holds the causal mask and the rotary embeddings.
        """
        num_tokens, device = hidden_states.shape[1], hidden_states.device
        of_states, of_layer = (num_tokens, device, hidden_states.dtype), tuple(self.family.layer_kind(layer).values())
        if self._inputs is None or self._inputs[0] != of_states:
            self._inputs = of_states, {}
        if of_layer in self._inputs[1]:
            return self._inputs[1][of_layer]
        position_ids = torch.arange(num_tokens, device=device)[None]
        mask = self.mask(hidden_states, layer, num_tokens)
        embeddings = self.rotary(hidden_states, position_ids, layer)
        inputs = {"attention_mask": mask, "position_ids": position_ids, "position_embeddings": embeddings}
        self._inputs[1][of_layer] = inputs
        return inputs

    def mask(self, states: Tensor, layer: DecoderLayer, end: int, padding: Tensor | None = None) -> Tensor | None:
        """What a layer's attention adds to its scores, or for flash attention which tokens are text; None if nothing.

        Of shape (sequences B, 1, tokens T, `end`), or (B, `end`), for `states` (B, T, hidden) of the last T of `end`
        tokens. `padding`, of shape (B,), says how many tokens of each sequence come before its text.
        """
        device, num_tokens, window = states.device, states.shape[1], self.family.layer_window(self.config, layer)
        window = window if window is not None and window < end else None
        # These are causal by themselves; the second one does not know windows.
        is_flash, is_sdpa = is_flash_attention_requested(self.config), self.config._attn_implementation == "sdpa"
        sees_all = num_tokens == 1 or (is_sdpa and num_tokens == end)
        if padding is None and (is_flash or (window is None and sees_all)):
            return None
        keys = torch.arange(end, device=device)
        queries = keys[-num_tokens:]
        is_text = keys >= (torch.zeros(1, device=device) if padding is None else padding)[:, None]  # (B, keys)
        if is_flash:
            return is_text
        seen = keys <= queries[:, None]
        if window is not None:
            seen &= keys > queries[:, None] - window
        mask = is_text[:, None, None] & seen  # (B, 1, T, keys)
        lowest = torch.finfo(states.dtype).min
        return torch.zeros_like(mask, dtype=states.dtype).masked_fill(~mask, lowest)

    def rotary(self, hidden_states: Tensor, position_ids: Tensor, layer: DecoderLayer) -> tuple[Tensor, Tensor]:
        """A layer's rotary embeddings, brought to the states: a model that is spread over devices has them on one."""
        of_type = [layer.self_attn.layer_type] if self.family.rotary_of_type else []
        cos, sin = self.rotary_emb(hidden_states, position_ids, *of_type)
        return cos.to(hidden_states.device), sin.to(hidden_states.device)

    def run_layer(self, layer: DecoderLayer, hidden_states: Tensor) -> Tensor:
        """A layer's output for sequences of one length: (B, tokens T, hidden) -> (B, tokens T, hidden)."""
        return layer(hidden_states, **self.layer_inputs(hidden_states, layer))

    @torch.no_grad()
    def walk(self, batches: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Yield, for each layer in turn, the output states of all batches.

        All are at the same layer at any time, so memory is that of one layer boundary, and each passes each layer once.

        Parameters
        ----------
        batches : sequence of int64 tensors of shape (sequences B, tokens T)

        Yields
        ------
        list of tensors of shape (sequences B, tokens T, hidden)
            Before the model's final norm. The list is overwritten by the next layer's: use it before advancing.
        """
        states = self.embed(batches)
        for layer in self.layers(range(self.num_layers)):
            for n, state in enumerate(states):
                states[n] = self.run_layer(layer, state)
            yield states


def set_config_layers(config: PretrainedConfig, numbers: Sequence[int]) -> None:
    """Let a config describe these of its layers, in this order; lists with one entry a layer follow."""
    num_layers, lists = config.num_hidden_layers, family_of(config).layer_lists
    for name, value in vars(config).items():
        if name in lists or ("layer" in name and isinstance(value, list) and len(value) == num_layers):
            setattr(config, name, [value[number] for number in numbers])
    config.num_hidden_layers = len(numbers)


def set_config_kind(config: PretrainedConfig, index: int, kind: Kind) -> None:
    """Let one layer be of another kind."""
    for name, value in kind.items():
        values = getattr(config, name)
        setattr(config, name, [*values[:index], value, *values[index + 1 :]])


def check_finite(states: Sequence[Tensor], layer: int) -> None:
    """Raise ValueError if the output states of a layer contain NaN or inf."""
    if not all(map(all_finite, states)):
        raise ValueError(f"The activations of layer {layer} contain NaN or inf on the calibration text.")
