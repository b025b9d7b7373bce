"""A model as the pipeline sees it: embeddings, a list of decoder layers that can change, and a head.

The pipeline asks for one layer at a time, so that the layers may also lie on disk: see `on_disk.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.utils.generic import is_flash_attention_requested

from lf_hf.families import DecoderLayer, Family, Kind, family_of
from lf_hf.runtime.launch import ALONE, Processes
from lf_hf.runtime.memory import free_memory
from lf_hf.runtime.progress import progress
from lf_hf.text.chats import CHATS, Chat, ChatForm

_CPU_BATCH = 1 << 26
"""Bytes that a batch may take inside a layer on the CPU."""
_BATCH_SHARE = 8  # of what is free on any other device
_COPIES = 64  # bytes for each token and channel of an MLP: several copies, of several layers side by side
_BELOW_ONE = 1 - 2**-20  # so that rounding leaves a number that is drawn below the sum of all probabilities


class Decoder(ABC):
    """A model whose layers are used one after another and may be changed.

    Attributes
    ----------
    config : PretrainedConfig
        Follows when layers are removed, or become layers of another kind.
    rotary_emb : nn.Module
        The family's own rotary embeddings.
    device : torch.device
        Where hidden states begin.
    processes : Processes
        Those that hold the same model and share the work on it.
    states_in_memory : int or None
        Bytes of hidden states that may be in the machine's memory; None for as many as there is room for.
    """

    config: Any
    rotary_emb: Any
    device: torch.device
    processes: Processes = ALONE
    states_in_memory: int | None = None
    _inputs: tuple[Any, dict[Any, dict[str, Any]]] | None = None  # of layers, for the last kind of states

    @property
    def family(self) -> Family:
        return family_of(self.config)

    def only_kind(self) -> Kind:
        """The kind of all layers, where they are of one."""
        kinds = [self.family.config_kind(self.config, index) for index in range(self.config.num_hidden_layers)]
        assert all(kind == kinds[0] for kind in kinds), "the layers are of several kinds"
        return kinds[0]

    @property
    @abstractmethod
    def num_layers(self) -> int:
        """Decoder layers that are there now."""

    @property
    def bytes_read(self) -> int:
        """Bytes that running all layers again reads from a disk, inside `kept_at_hand`."""
        return 0

    @abstractmethod
    def layer(self, index: int) -> AbstractContextManager[DecoderLayer]:
        """A layer with its weights, to be used inside a `with` block. Not to be changed."""

    @abstractmethod
    def original(self, number: int) -> AbstractContextManager[DecoderLayer]:
        """A layer of the dense model, by its number there, whatever has been replaced or removed since."""

    def layers(self, indices: Iterable[int]) -> Iterator[DecoderLayer]:
        """Layers one after the other, each to be used until the next one is asked for."""
        for index in indices:
            with self.layer(index) as layer:
                yield layer

    def originals(self, numbers: Iterable[int]) -> Iterator[DecoderLayer]:
        """Layers of the dense model one after the other, by their numbers there."""
        for number in numbers:
            with self.original(number) as layer:
                yield layer

    @abstractmethod
    def copy(self) -> Decoder:
        """The model as it is now, to be changed apart from this one."""

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
    def head(self) -> AbstractContextManager[Callable[[Tensor], Tensor]]:
        """Final norm and head, inside a `with` block: (sequences B, tokens T, hidden) -> logits (B, T, vocab)."""

    @abstractmethod
    def norm_and_head(self) -> AbstractContextManager[tuple[Callable[[Tensor], Tensor], Tensor]]:
        """The parts of `head`, inside a `with` block: the final norm, and the head's weight (vocab, hidden)."""

    def batched(self, sequences: Sequence[Tensor]) -> list[list[int]]:
        """Numbers of sequences that go through the layers together: of one length, and no more than fit.

        Sequences of shape (tokens T,). On the CPU larger batches would gain nothing.
        """
        room = _CPU_BATCH if self.device.type == "cpu" else free_memory(self.device) // _BATCH_SHARE
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
        """The same as tensors of shape (sequences B, tokens T), which go to the device together."""
        groups = self.batched(sequences)
        if not groups:
            return []
        ids = torch.cat([sequences[number] for numbers in groups for number in numbers]).to(self.device)
        sizes = [len(numbers) * len(sequences[numbers[0]]) for numbers in groups]
        return [part.view(len(numbers), -1) for part, numbers in zip(ids.split(sizes), groups, strict=True)]

    @torch.no_grad()
    def generate(self, count: int, length: int, seed: int, chat: ChatForm | None = None) -> list[Tensor]:
        """Text that the model writes by itself: `count` sequences of `length` token ids, sampled at temperature 1.

        All sequences take a step together, so that each layer is used once a step, and each process writes a share of
        them. None of them ends early. What is written follows from the seed, whichever process writes it. With a form
        of chats those of `CHATS` are beginnings of some, in which the model writes both sides.
        """
        random = torch.Generator().manual_seed(seed)
        # Half of them start as all texts do, half anywhere: both what a model writes most and what it seldom does.
        starts = torch.randint(self.config.vocab_size, (count,), generator=random)
        if self.config.bos_token_id is not None:
            starts[::2] = self.config.bos_token_id
        drawn = torch.rand(count, length - 1, generator=random)
        mine = list(self.processes.shard(range(count)))
        are_chats = range(count)[CHATS]
        chats = {row: Chat(chat) for row, n in enumerate(mine) if chat and n in are_chats}
        written = list(self._written(starts[mine], drawn[mine], chats)) if mine else []
        shares = self.processes.all_gather_object(written)
        return [shares[n % len(shares)][n // len(shares)] for n in range(count)]

    def _written(self, tokens: Tensor, drawn: Tensor, chats: Mapping[int, Chat]) -> Tensor:
        """Sequences that begin with `tokens` (count,); each later one is where `drawn` (count, length - 1) falls.

        `drawn` is uniform from 0 to 1, and a token's part of that is its probability. Chats begin as they do.
        """
        count, steps = drawn.shape
        barred = _special_tokens(self.config)
        for row, chat in chats.items():
            tokens[row] = chat.next()
        written, cache, finite = [tokens], DynamicCache(), []
        with self.kept_at_hand(), self.head() as head:
            for position in progress(range(steps), desc="Writing text", unit="token"):
                # A view, as products in bfloat16 are a thousand times slower for the strides that transposing gives.
                hidden_states = self.embed([tokens])[0].view(count, 1, -1)  # (count, 1, hidden)
                position_ids = torch.full((count, 1), position, device=hidden_states.device)
                step = CachedStep(self, hidden_states, position_ids, cache)
                for layer in self.layers(range(self.num_layers)):
                    hidden_states = step.run(layer, hidden_states)
                logits = head(hidden_states)[:, 0].float()  # (count, vocab)
                finite.append(torch.isfinite(logits).all())
                places = list(chats), [chat.end for chat in chats.values()]
                empty = torch.tensor([not chat.may_end for chat in chats.values()], dtype=torch.bool)
                of_ends = logits[places].masked_fill(empty.to(logits.device), -torch.inf)
                logits[:, barred] = -torch.inf
                logits[places] = of_ends
                sums = logits.softmax(-1).cumsum(-1)
                drawn = drawn.to(sums.device)
                wanted = drawn[:, position : position + 1] * sums[:, -1:] * _BELOW_ONE
                found = torch.searchsorted(sums, wanted, right=True)[:, 0]
                tokens = found.clamp(max=sums.shape[1] - 1)  # of what is not finite, too
                for (row, chat), token in zip(chats.items(), tokens[list(chats)].tolist(), strict=True):
                    tokens[row] = chat.next(token)
                written.append(tokens)
        if not all(torch.stack(finite).tolist()):
            raise ValueError(
                "The dense model's predictions contain NaN or inf, so it can write no calibration text; use a dtype of "
                "wider range."
            )
        return torch.stack([tokens.to(written[-1].device) for tokens in written], dim=1).cpu()

    def kept_at_hand(self) -> AbstractContextManager[None]:
        """Inside a `with` block, layers that are asked for again and again stay where they are used, if they fit."""
        return nullcontext()

    def layer_inputs(self, hidden_states: Tensor, layer: DecoderLayer) -> dict[str, Any]:
        """What a layer takes besides its hidden states, for sequences without padding or cache.

        `hidden_states` is (sequences B, tokens T, hidden); the result holds the causal mask and the rotary embeddings.
        """
        num_tokens, device = hidden_states.shape[1], hidden_states.device
        of_states = num_tokens, device, hidden_states.dtype
        if self._inputs is None or self._inputs[0] != of_states:
            self._inputs = of_states, {}
        window, rotary = self.window(layer, num_tokens), self.rotary_kind(layer)
        if (window, rotary) in self._inputs[1]:
            return self._inputs[1][window, rotary]
        position_ids = torch.arange(num_tokens, device=device)[None]
        mask = None
        # These are causal by themselves; the first one does not know windows.
        by_itself = self.config._attn_implementation == "sdpa" and window is None
        if not (by_itself or is_flash_attention_requested(self.config)):
            lowest = torch.finfo(hidden_states.dtype).min
            mask = torch.full((num_tokens, num_tokens), lowest, dtype=hidden_states.dtype, device=device)
            mask = mask.triu(1) if window is None else mask.triu(1) + mask.tril(-window)
            mask = mask[None, None]  # (1, 1, T, T)
        cos, sin = self.rotary(hidden_states, position_ids, rotary)
        inputs = {"attention_mask": mask, "position_ids": position_ids, "position_embeddings": (cos, sin)}
        self._inputs[1][window, rotary] = inputs
        return inputs

    def window(self, layer: DecoderLayer, num_tokens: int) -> int | None:
        """How many tokens a layer's tokens attend to at most, with their own, where that leaves out any of some."""
        window = self.family.layer_window(self.config, layer)
        return window if window is not None and window < num_tokens else None

    def rotary_kind(self, layer: DecoderLayer) -> str | None:
        """Which rotary embeddings a layer has, where there is more than one kind."""
        return layer.self_attn.layer_type if self.family.rotary_of_type else None

    def rotary(self, hidden_states: Tensor, position_ids: Tensor, kind: str | None) -> tuple[Tensor, Tensor]:
        """Rotary embeddings where the states are: in a model that is spread over devices they have one of their own."""
        of_kind = () if kind is None else (kind,)
        cos, sin = self.rotary_emb(hidden_states, position_ids, *of_kind)
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


class CachedStep:
    """What layers take for tokens that follow those in a cache; one for each pass through the layers.

    Parameters
    ----------
    decoder : Decoder
    hidden_states : tensor of shape (sequences B, tokens T, hidden)
    position_ids : tensor of shape (B, T)
    cache : DynamicCache
    padding : tensor of shape (B,), optional
        How many tokens of each sequence come before its text.
    """

    def __init__(
        self,
        decoder: Decoder,
        hidden_states: Tensor,
        position_ids: Tensor,
        cache: DynamicCache,
        padding: Tensor | None = None,
    ) -> None:
        self._decoder, self._position_ids, self._cache, self._padding = decoder, position_ids, cache, padding
        self._first, self._cache_argument = hidden_states, decoder.family.cache_argument
        self._end = cache.get_seq_length() + hidden_states.shape[1]
        self._inputs: dict[Any, tuple[Tensor | None, tuple[Tensor, Tensor]]] = {}

    def run(self, layer: DecoderLayer, hidden_states: Tensor) -> Tensor:
        """A layer's output, (sequences B, tokens T, hidden) -> (B, T, hidden)."""
        window, rotary = self._decoder.window(layer, self._end), self._decoder.rotary_kind(layer)
        if (window, rotary) not in self._inputs:
            embeddings = self._decoder.rotary(self._first, self._position_ids, rotary)
            self._inputs[window, rotary] = self._mask(window), embeddings
        mask, embeddings = self._inputs[window, rotary]
        return layer(
            hidden_states,
            attention_mask=mask,
            position_ids=self._position_ids,
            position_embeddings=embeddings,
            **{self._cache_argument: self._cache},
        )

    def _mask(self, window: int | None) -> Tensor | None:
        states, padding = self._first, self._padding
        is_flash = is_flash_attention_requested(self._decoder.config)  # which is causal by itself, and knows windows
        if padding is None and (is_flash or (window is None and states.shape[1] == 1)):
            return None
        keys = torch.arange(self._end, device=states.device)
        queries = keys[-states.shape[1] :]
        is_text = keys >= (torch.zeros(1, device=states.device) if padding is None else padding)[:, None]  # (B, keys)
        if is_flash:
            return is_text
        seen = keys <= queries[:, None]
        if window is not None:
            seen &= keys > queries[:, None] - window
        mask = is_text[:, None, None] & seen  # (B, 1, T, keys)
        lowest = torch.finfo(states.dtype).min
        return torch.zeros_like(mask, dtype=states.dtype).masked_fill(~mask, lowest)


def _special_tokens(config: PretrainedConfig) -> list[int]:
    """Token ids that begin, end or fill up texts, as far as the config names them."""
    named = [config.bos_token_id, config.pad_token_id]
    ends = config.eos_token_id
    named += ends if isinstance(ends, list) else [ends]
    return sorted({token for token in named if token is not None and 0 <= token < config.vocab_size})


def remove_config_layer(config: PretrainedConfig, index: int) -> None:
    """Take one layer out of `num_hidden_layers` and of lists with one entry a layer, such as `layer_types`."""
    num_layers, lists = config.num_hidden_layers, family_of(config).layer_lists
    for name, value in vars(config).items():
        if name in lists or ("layer" in name and isinstance(value, list) and len(value) == num_layers):
            setattr(config, name, value[:index] + value[index + 1 :])
    config.num_hidden_layers = num_layers - 1


def set_config_kind(config: PretrainedConfig, index: int, kind: Kind) -> None:
    """Let one layer be of another kind."""
    for name, value in kind.items():
        values = getattr(config, name)
        setattr(config, name, [*values[:index], value, *values[index + 1 :]])


def check_finite(states: Sequence[Tensor], layer: int) -> None:
    """Raise ValueError if the output states of a layer contain NaN or inf."""
    finite = torch.stack([torch.isfinite(state).all() for state in states]) if states else torch.ones(0)
    if not bool(finite.all()):
        raise ValueError(f"The activations of layer {layer} contain NaN or inf on the calibration text.")
