"""A Llama as the pipeline sees it: embeddings, a list of decoder layers that can change, and a head.

The pipeline asks for one layer at a time, so that the layers may also lie on disk: see `on_disk.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.utils.generic import is_flash_attention_requested

from lf_hf.numerics import all_finite
from lf_hf.progress import progress


class Decoder(ABC):
    """A Llama whose layers are used one after another and may be changed.

    Attributes
    ----------
    config : LlamaConfig
        Follows when layers are removed.
    rotary_emb : LlamaRotaryEmbedding
    """

    config: LlamaConfig
    rotary_emb: LlamaRotaryEmbedding

    @property
    @abstractmethod
    def num_layers(self) -> int:
        """Decoder layers that are there now."""

    @property
    def bytes_read(self) -> int:
        """Bytes that running all layers once reads from a disk."""
        return 0

    @abstractmethod
    def layer(self, index: int) -> AbstractContextManager[LlamaDecoderLayer]:
        """A layer with its weights, to be used inside a `with` block. Not to be changed."""

    @abstractmethod
    def original(self, number: int) -> AbstractContextManager[LlamaDecoderLayer]:
        """A layer of the dense model, by its number there, whatever has been replaced or removed since."""

    def layers(self, indices: Iterable[int]) -> Iterator[LlamaDecoderLayer]:
        """Layers one after the other, each to be used until the next one is asked for."""
        for index in indices:
            with self.layer(index) as layer:
                yield layer

    def originals(self, numbers: Iterable[int]) -> Iterator[LlamaDecoderLayer]:
        """Layers of the dense model one after the other, by their numbers there."""
        for number in numbers:
            with self.original(number) as layer:
                yield layer

    @abstractmethod
    def replace(self, index: int, weights: Mapping[str, Tensor]) -> None:
        """Give a layer new values for the named parameters."""

    @abstractmethod
    def remove(self, index: int) -> None:
        """Take a layer out; later ones move up by one, and `config` follows."""

    @abstractmethod
    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters by their names in the checkpoint, tied ones once."""

    @abstractmethod
    def embed(self, samples: Sequence[Tensor]) -> list[Tensor]:
        """Token embeddings of each sample: ids of shape (tokens T_i,) -> (1, tokens T_i, hidden)."""

    @abstractmethod
    def head(self) -> AbstractContextManager[Callable[[Tensor], Tensor]]:
        """Final norm and head, inside a `with` block: (1, tokens T, hidden) -> logits (1, tokens T, vocab)."""

    @torch.no_grad()
    def generate(self, count: int, length: int, seed: int) -> list[Tensor]:
        """Text that the model writes by itself: `count` sequences of `length` token ids, sampled at temperature 1.

        All sequences take a step together, so that each layer is used once a step. None of them ends early.
        """
        random = torch.Generator().manual_seed(seed)
        # Half of them start as all texts do, half anywhere: both what a model writes most and what it seldom does.
        tokens = torch.randint(self.config.vocab_size, (count,), generator=random)
        if self.config.bos_token_id is not None:
            tokens[::2] = self.config.bos_token_id
        barred = _special_tokens(self.config)
        written, cache = [tokens], DynamicCache()
        with self.head() as head:
            for position in progress(range(length - 1), desc="Writing calibration text", unit="token"):
                # A view, as products in bfloat16 are a thousand times slower for the strides that transposing gives.
                hidden_states = self.embed([tokens])[0].view(count, 1, -1)  # (count, 1, hidden)
                position_ids = torch.full((count, 1), position, device=hidden_states.device)
                position_embeddings = self.rotary_emb(hidden_states, position_ids)
                for index in range(self.num_layers):
                    with self.layer(index) as layer:
                        # By position, as the name of the cache's parameter depends on the version of transformers.
                        hidden_states = layer(
                            hidden_states, None, position_ids, cache, position_embeddings=position_embeddings
                        )
                logits = head(hidden_states)[:, 0].float().cpu()  # (count, vocab)
                if not all_finite(logits):
                    raise ValueError(
                        "The dense model's predictions contain NaN or inf, so it can write no calibration text; use a "
                        "dtype of wider range."
                    )
                logits[:, barred] = -torch.inf
                tokens = torch.multinomial(logits.softmax(-1), 1, generator=random)[:, 0]
                written.append(tokens)
        return list(torch.stack(written, dim=1))

    def layer_inputs(self, hidden_states: Tensor) -> dict[str, Any]:
        """What a layer takes besides its hidden states, for one sequence without padding or cache.

        `hidden_states` is (1, tokens T, hidden); the result holds the causal mask and the rotary embeddings.
        """
        num_tokens, device = hidden_states.shape[1], hidden_states.device
        position_ids = torch.arange(num_tokens, device=device)[None]
        mask = None
        # These are causal by themselves.
        if not (self.config._attn_implementation == "sdpa" or is_flash_attention_requested(self.config)):
            lowest = torch.finfo(hidden_states.dtype).min
            mask = torch.full((num_tokens, num_tokens), lowest, dtype=hidden_states.dtype, device=device).triu(1)
            mask = mask[None, None]  # (1, 1, T, T)
        # In a model that is spread over devices the rotary embedding has one of its own.
        cos, sin = (table.to(device) for table in self.rotary_emb(hidden_states, position_ids))
        return {"attention_mask": mask, "position_ids": position_ids, "position_embeddings": (cos, sin)}

    def run_layer(self, layer: LlamaDecoderLayer, hidden_states: Tensor) -> Tensor:
        """A layer's output for one sequence: (1, tokens T, hidden) -> (1, tokens T, hidden)."""
        return layer(hidden_states, **self.layer_inputs(hidden_states))

    @torch.no_grad()
    def walk(self, samples: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Yield, for each layer in turn, the output states of all samples.

        All samples are at the same layer at any time, so memory is that of one layer boundary, and each sample
        passes each layer once.

        Parameters
        ----------
        samples : sequence of int64 tensors of shape (tokens T_i,)

        Yields
        ------
        list of tensors of shape (1, tokens T_i, hidden)
            Before the model's final norm. The list is overwritten by the next layer's: use it before advancing.
        """
        states = self.embed(samples)
        for layer in self.layers(range(self.num_layers)):
            for n, state in enumerate(states):
                states[n] = self.run_layer(layer, state)
            yield states


def _special_tokens(config: LlamaConfig) -> list[int]:
    """Token ids that begin, end or fill up texts, as far as the config names them."""
    named = [config.bos_token_id, config.pad_token_id]
    ends = config.eos_token_id
    named += ends if isinstance(ends, list) else [ends]
    return sorted({token for token in named if token is not None and 0 <= token < config.vocab_size})


def remove_config_layer(config: LlamaConfig, index: int) -> None:
    """Take one layer out of `num_hidden_layers` and of lists with one entry a layer, such as `layer_types`."""
    num_layers = config.num_hidden_layers
    for name, value in vars(config).items():
        if "layer" in name and isinstance(value, list) and len(value) == num_layers:
            setattr(config, name, value[:index] + value[index + 1 :])
    config.num_hidden_layers = num_layers - 1


def check_finite(states: Sequence[Tensor], layer: int) -> None:
    """Raise ValueError if the output states of a layer contain NaN or inf."""
    for n, state in enumerate(states):
        if not torch.isfinite(state).all():
            raise ValueError(f"The activations of layer {layer} contain NaN or inf on calibration sample {n}.")
