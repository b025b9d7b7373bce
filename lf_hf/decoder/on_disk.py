"""A checkpoint on disk as the pipeline sees it: one layer is in memory at a time, or on a device, and the next one."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import cast

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from lf_hf.checkpoint.weights import (
    check_complete,
    read_onto,
    stored_dtype,
    tensor_files,
    tensor_shapes,
)
from lf_hf.decoder.interface import Decoder, set_config_kind, set_config_layers
from lf_hf.families import DecoderLayer, Kind
from lf_hf.runtime.memory import free_memory
from lf_hf.runtime.progress import progress

_EMBEDDING = "model.embed_tokens.weight"
_NORM = "model.norm.weight"
_HEAD = "lm_head.weight"
_LAYERS = "model.layers."
_CPU = torch.device("cpu")
_LEFT_FREE = 1 / 4  # of what is free on a device: stays free where layers are kept on it
Place = tuple[Path, str]
"""Of a tensor: its file, and its name there."""
Places = dict[str, Place]
STATES_IN_MEMORY = 1 << 27  # bytes, where the machine's memory is to be spared


class CheckpointDecoder(Decoder):
    """A model in safetensors files, read layer by layer; changed tensors go to a scratch folder.

    On another device than the CPU the next layer of a stream is read while the last one is used. On the CPU that would
    take memory where memory is short.

    Parameters
    ----------
    folder : Path
        Holds model.safetensors, or its shards and their index.
    config : PretrainedConfig
    scratch : Path
        A folder on a disk with room for the fused layers.
    dtype : torch.dtype, optional
        Default: the config's, else that of the first tensor.
    device : torch.device
        Where layers are read to, and all is computed.
    """

    def __init__(
        self,
        folder: Path,
        config: PretrainedConfig,
        scratch: Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device = _CPU,
    ) -> None:
        self.config = config
        if config._attn_implementation is None:
            config._attn_implementation = "sdpa" if self.family.causal_lm._supports_sdpa else "eager"
        if device.type == "cuda" and device.index is None:  # which another thread would take for the first one
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self.states_in_memory = STATES_IN_MEMORY if device.type == "cpu" else None
        # A stream of their own, so that copies need not wait for what is computed.
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.rotary_emb = self.family.rotary_embedding(config).to(device)
        files = tensor_files(folder)
        self.dtype: torch.dtype = (
            dtype or cast("torch.dtype | None", config.dtype) or stored_dtype(next(iter(files.values())))
        )
        self._base: Places = {name: (file, name) for name, file in files.items()}
        self._check_complete(str(folder))
        self._layers = [self._places_of(number) for number in range(config.num_hidden_layers)]
        self._scratch, self._numbers = scratch, itertools.count()  # of the files there
        self._folders: list[TemporaryDirectory[str]] = []  # a copy's, and of those that it was made from
        self._own_head = self._has_own_head()
        self._kept: dict[int, DecoderLayer] | None = None  # layers that stay on the device, where any may
        self._table: Tensor | None = None  # embeddings that do
        self._least_free = 0  # bytes of the device

    def _places_of(self, number: int) -> Places:
        prefix = f"{_LAYERS}{number}."
        names = [name for name in self._base if name.startswith(prefix) and "rotary_emb" not in name]
        return {name.removeprefix(prefix): self._base[name] for name in names}

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def bytes_read(self) -> int:
        size = sum(file.stat().st_size for file in {file for file, _ in self._base.values()})
        stay = self.device.type != "cpu" and size < free_memory(self.device) * (1 - _LEFT_FREE)
        return 0 if stay else size

    def layers(self, indices: Iterable[int]) -> Iterator[DecoderLayer]:
        """Each layer is its user's alone, so that its memory can be freed."""
        if self.device.type == "cpu":
            for index in indices:
                yield self._built(self._weights(index), index)
            return
        indices, kept = list(indices), {} if self._kept is None else self._kept
        with ThreadPoolExecutor(1) as reader:  # at the end of which a read that has begun is waited for
            reads = (reader.submit(self._copied, index) for index in indices if index not in kept)
            ahead = next(reads, None)
            for index in indices:
                if index in kept:
                    yield kept[index]
                    continue
                assert ahead is not None
                layer = [self._built(self._received(ahead.result()), index)]
                if self._kept is kept and free_memory(self.device) >= self._least_free:
                    kept[index] = layer[0]
                ahead = next(reads, None)
                yield layer.pop()

    @contextmanager
    def kept_at_hand(self) -> Iterator[None]:
        """On another device than the CPU, as many layers stay there as leave a quarter of what is free now."""
        if self.device.type == "cpu":
            yield
            return
        self._kept, self._least_free = {}, int(free_memory(self.device) * _LEFT_FREE)
        try:
            self._table = self._read(self._base[_EMBEDDING], self.device)
            if free_memory(self.device) < self._least_free:
                self._table = None
            yield
        finally:
            self._kept = self._table = None

    def copy(self) -> CheckpointDecoder:
        """As in general; the changed layers of a copy go when it does."""
        other = copy.copy(self)
        other.config, other._layers = copy.deepcopy(self.config), list(self._layers)
        other._folders = [*self._folders, TemporaryDirectory(dir=self._scratch)]
        other._scratch = Path(other._folders[-1].name)
        self._scratch = Path(mkdtemp(dir=self._scratch))  # what lies outside of it is both models' now, and stays
        return other

    def replace(self, index: int, weights: Mapping[str, Tensor], kind: Kind | None = None) -> None:
        set_config_kind(self.config, index, kind or {})
        file, before = self._scratch / f"{next(self._numbers)}.safetensors", self._layers[index]
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.family.packed(weights).items()}
        save_file(tensors, file)
        self._layers[index] = before | {name: (file, name) for name in tensors}
        self._forget(before, self._layers[index])

    def remove(self, index: int) -> None:
        set_config_layers(self.config, [n for n in range(self.num_layers) if n != index])
        self._forget(self._layers.pop(index), {})

    def _forget(self, before: Places, after: Places) -> None:
        """Delete files of changed tensors that a layer no longer has."""
        for file in {file for file, _ in before.values()} - {file for file, _ in after.values()}:
            if file.parent == self._scratch:
                file.unlink()

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, self._read(place)) for name, place in self._all_places().items())

    def _all_places(self) -> Places:
        """By the parameters' names in the checkpoint."""
        places = {name: self._base[name] for name in (_EMBEDDING, _NORM, *([_HEAD] if self._own_head else []))}
        for index, layer in enumerate(self._layers):
            places |= {f"{_LAYERS}{index}.{name}": place for name, place in layer.items()}
        return places

    def embed(self, batches: Sequence[Tensor]) -> list[Tensor]:
        table = self._read(self._base[_EMBEDDING]) if self._table is None else self._table
        embedded = (nn.functional.embedding(batch.to(table.device), table).to(self.device) for batch in batches)
        return [self.family.first_states(self.config, states, rows=True) for states in embedded]

    @contextmanager
    def norm_and_head(self) -> Iterator[tuple[Callable[[Tensor], Tensor], Tensor]]:
        names = _NORM, _HEAD if self._own_head else _EMBEDDING
        gain, weight = (self._read(self._base[name], self.device) for name in names)
        norm = self.family.norm(self.config.hidden_size, eps=self.config.rms_norm_eps)
        norm.weight = nn.Parameter(gain, requires_grad=False)
        yield norm, weight

    def write(self, folder: Path, max_shard_bytes: int) -> None:
        """Write all tensors as shards of about `max_shard_bytes`, and their index."""
        places, described = self._all_places(), self._described()
        split = split_torch_state_dict_into_shards({n: described[n] for n in places}, max_shard_size=max_shard_bytes)
        for file, names in progress(split.filename_to_tensors.items(), desc="Writing", unit="file"):
            save_file({name: self._read(places[name]) for name in names}, folder / file, metadata={"format": "pt"})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
            (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _described(self) -> dict[str, Tensor]:
        """The model's tensors by its config, without memory; a head that is tied is among them."""
        with torch.device("meta"):
            return self.family.causal_lm(self.config).to(self.dtype).state_dict()

    def _check_complete(self, name: str) -> None:
        """Raise ValueError if the files do not hold the tensors that the config describes."""
        files = {file for file, _ in self._base.values()}
        held = {tensor: shape for file in files for tensor, shape in tensor_shapes(file).items()}
        wanted = {tensor: tuple(value.shape) for tensor, value in self._described().items()}
        missing = wanted.keys() - held.keys() - ({_HEAD} if self.config.tie_word_embeddings else set())
        mismatched = {
            tensor: (held[tensor], shape) for tensor, shape in wanted.items() if held.get(tensor, shape) != shape
        }
        check_complete(name, missing, mismatched, held.keys() - wanted.keys())

    def _has_own_head(self) -> bool:
        """Whether there is a head that is not the embeddings; as with transformers, no config ties what differs."""
        if _HEAD not in self._base or not self.config.tie_word_embeddings:
            return _HEAD in self._base
        return not torch.equal(*(self._read(self._base[name]) for name in (_EMBEDDING, _HEAD)))

    def _copied(self, index: int) -> dict[str, Tensor]:
        """A layer's weights on the device, all there when this returns. For any thread."""
        if self._copies is None:
            return self._weights(index)
        with torch.cuda.stream(self._copies):
            weights = self._weights(index)
        self._copies.synchronize()
        return weights

    def _received(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """What was copied, for this thread: its memory is not given to later copies before all work on it is done."""
        if self._copies is not None:
            for weight in weights.values():
                weight.record_stream(torch.cuda.current_stream(self.device))
        return weights

    def _built(self, weights: Mapping[str, Tensor], index: int) -> DecoderLayer:
        layer = self.family.new_layer(self.config, self.family.config_kind(self.config, index))
        layer.self_attn.layer_idx = index
        layer.load_state_dict(weights, assign=True)
        return layer.eval().requires_grad_(False)

    def _weights(self, index: int) -> dict[str, Tensor]:
        """All parameters of a layer on the device, by their names inside it."""
        return {name: self._read(place, self.device) for name, place in self._layers[index].items()}

    def _read(self, place: Place, device: torch.device = _CPU) -> Tensor:
        return read_onto(device, *place, self.dtype)
