"""A checkpoint on disk as the pipeline sees it: one layer is in memory at a time, or on a device, and the next one."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from lf_hf.checkpoint.weights import (
    check_complete,
    read_onto,
    stored_dtype,
    tensor_files,
    tensor_shapes,
)
from lf_hf.decoder.interface import Decoder, remove_config_layer, set_config_kind
from lf_hf.families import DecoderLayer, Kind
from lf_hf.runtime.memory import free_memory
from lf_hf.runtime.progress import progress

_EMBEDDING = "model.embed_tokens.weight"
_NORM = "model.norm.weight"
_HEAD = "lm_head.weight"
_LAYERS = "model.layers."
_CPU = torch.device("cpu")
_LEFT_FREE = 4  # a quarter of what is free on a device is left so where layers stay on it
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
        self._files = tensor_files(folder)
        self._check_complete(str(folder))
        self._scratch = scratch
        self._own_scratch: TemporaryDirectory[str] | None = None  # a copy's
        self._sources: list[int] = list(range(config.num_hidden_layers))  # of each layer, its number in the files
        self._kinds = self.family.config_kinds(config)  # of the layers in the files
        self.dtype: torch.dtype = (
            dtype or cast("torch.dtype | None", config.dtype) or stored_dtype(next(iter(self._files.values())))
        )
        self._own_head = self._has_own_head()
        self._kept: dict[int, DecoderLayer] | None = None  # layers that stay on the device, where any may
        self._table: Tensor | None = None  # embeddings that do
        self._least_free = 0  # bytes of the device

    @property
    def num_layers(self) -> int:
        return len(self._sources)

    @property
    def bytes_read(self) -> int:
        size = sum(file.stat().st_size for file in set(self._files.values()))
        stay = self.device.type != "cpu" and size < free_memory(self.device) * (1 - 1 / _LEFT_FREE)
        return 0 if stay else size

    def layers(self, indices: Iterable[int]) -> Iterator[DecoderLayer]:
        return self._stream(indices, original=False)

    def originals(self, numbers: Iterable[int]) -> Iterator[DecoderLayer]:
        return self._stream(numbers, original=True)

    @contextmanager
    def kept_at_hand(self) -> Iterator[None]:
        """On another device than the CPU, as many layers stay there as leave a quarter of what is free now."""
        if self.device.type == "cpu":
            yield
            return
        self._kept, self._least_free = {}, free_memory(self.device) // _LEFT_FREE
        try:
            [self._table] = self._read([_EMBEDDING], self.device)
            if free_memory(self.device) < self._least_free:
                self._table = None
            yield
        finally:
            self._kept = self._table = None

    def copy(self) -> CheckpointDecoder:
        """The model as it is now, to be changed apart from this one; its changed layers go when it does."""
        other = copy.copy(self)
        other.config, other._sources = copy.deepcopy(self.config), list(self._sources)
        other._own_scratch = TemporaryDirectory(dir=self._scratch)
        other._scratch = Path(other._own_scratch.name)
        for file in self._scratch.glob("layer-*.safetensors"):
            shutil.copyfile(file, other._scratch / file.name)
        return other

    def replace(self, index: int, weights: Mapping[str, Tensor], kind: Kind | None = None) -> None:
        weights = self.family.packed(weights)
        set_config_kind(self.config, index, kind or {})
        file = self._changed(index)
        tensors = load_file(file) if file.is_file() else {}
        save_file(tensors | {name: tensor.cpu().contiguous() for name, tensor in weights.items()}, file)

    def remove(self, index: int) -> None:
        self._changed(index).unlink(missing_ok=True)
        del self._sources[index]
        remove_config_layer(self.config, index)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name in (_EMBEDDING, _NORM, *([_HEAD] if self._own_head else [])):
            yield name, self._read([name])[0]
        for index in range(self.num_layers):
            for name, tensor in self._weights(index, original=False, device=_CPU).items():
                yield f"{_LAYERS}{index}.{name}", tensor

    def embed(self, batches: Sequence[Tensor]) -> list[Tensor]:
        table = self._read([_EMBEDDING])[0] if self._table is None else self._table
        embedded = (nn.functional.embedding(batch.to(table.device), table).to(self.device) for batch in batches)
        return [self.family.first_states(self.config, states, rows=True) for states in embedded]

    @contextmanager
    def norm_and_head(self) -> Iterator[tuple[Callable[[Tensor], Tensor], Tensor]]:
        gain, weight = self._read([_NORM, _HEAD if self._own_head else _EMBEDDING], self.device)
        norm = self.family.norm(self.config.hidden_size, eps=self.config.rms_norm_eps)
        norm.weight = nn.Parameter(gain, requires_grad=False)
        yield norm, weight

    def write(self, folder: Path, max_shard_bytes: int) -> None:
        """Write all tensors as shards of about `max_shard_bytes`, and their index."""
        shards, total = list[list[str]](), 0
        for shard in self._shards(max_shard_bytes):
            save_file(shard, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
            shards.append(list(shard))
            total += sum(tensor.nbytes for tensor in shard.values())
        if len(shards) == 1:
            (folder / "shard-0").rename(folder / SAFE_WEIGHTS_NAME)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards):
            file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
            (folder / f"shard-{number}").rename(folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _shards(self, max_bytes: int) -> Iterator[dict[str, Tensor]]:
        shard, size = dict[str, Tensor](), 0
        for name, tensor in progress(self.named_parameters(), desc="Writing", unit="tensor"):
            if shard and size + tensor.nbytes > max_bytes:
                yield shard
                shard.clear()
                size = 0
            shard[name] = tensor.contiguous()
            size += tensor.nbytes
        yield shard

    def _check_complete(self, name: str) -> None:
        """Raise ValueError if the files do not hold the tensors that the config describes."""
        held = {tensor: shape for file in set(self._files.values()) for tensor, shape in tensor_shapes(file).items()}
        with torch.device("meta"):
            wanted = {
                tensor: tuple(value.shape) for tensor, value in self.family.causal_lm(self.config).state_dict().items()
            }
        missing = wanted.keys() - held.keys() - ({_HEAD} if self.config.tie_word_embeddings else set())
        mismatched = {
            tensor: (held[tensor], shape) for tensor, shape in wanted.items() if held.get(tensor, shape) != shape
        }
        check_complete(name, missing, mismatched, held.keys() - wanted.keys())

    def _has_own_head(self) -> bool:
        """Whether there is a head that is not the embeddings; as with transformers, no config ties what differs."""
        if _HEAD not in self._files or not self.config.tie_word_embeddings:
            return _HEAD in self._files
        return not torch.equal(*self._read([_EMBEDDING, _HEAD]))

    def _stream(self, numbers: Iterable[int], *, original: bool) -> Iterator[DecoderLayer]:
        """Layers of the model as it is, or of the base; each is its user's alone, so that its memory can be freed."""
        if self.device.type == "cpu":
            for number in numbers:
                yield self._built(self._weights(number, original), number, original)
            return
        numbers, kept = list(numbers), {} if original or self._kept is None else self._kept
        with ThreadPoolExecutor(1) as reader:  # at the end of which a read that has begun is waited for
            reads = (reader.submit(self._copied, number, original) for number in numbers if number not in kept)
            ahead = next(reads, None)
            for number in numbers:
                if number in kept:
                    yield kept[number]
                    continue
                assert ahead is not None
                layer = [self._built(self._received(ahead.result()), number, original)]
                if self._kept is kept and free_memory(self.device) >= self._least_free:
                    kept[number] = layer[0]
                ahead = next(reads, None)
                yield layer.pop()

    def _copied(self, number: int, original: bool) -> dict[str, Tensor]:
        """A layer's weights on the device, all there when this returns. For any thread."""
        if self._copies is None:
            return self._weights(number, original)
        with torch.cuda.stream(self._copies):
            weights = self._weights(number, original)
        self._copies.synchronize()
        return weights

    def _received(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """What was copied, for this thread: its memory is not given to later copies before all work on it is done."""
        if self._copies is not None:
            for weight in weights.values():
                weight.record_stream(torch.cuda.current_stream(self.device))
        return weights

    def _built(self, weights: Mapping[str, Tensor], number: int, original: bool) -> DecoderLayer:
        kind = self._kinds[number] if original else self.family.config_kind(self.config, number)
        layer = self.family.new_layer(self.config, kind)
        layer.self_attn.layer_idx = number
        layer.load_state_dict(weights, assign=True)
        return layer.eval().requires_grad_(False)

    def _weights(self, number: int, original: bool, device: torch.device | None = None) -> dict[str, Tensor]:
        """All parameters of a layer of the base, or of the model as it is now, by their names inside it."""
        device, changed = device or self.device, dict[str, Tensor]()
        if not original:
            changed = load_file(self._changed(number)) if self._changed(number).is_file() else {}
            number = self._sources[number]
        prefix = f"{_LAYERS}{number}."
        names = [name for name in self._files if name.startswith(prefix) and "rotary_emb" not in name]
        names = [name for name in names if name.removeprefix(prefix) not in changed]
        stored = {name.removeprefix(prefix): t for name, t in zip(names, self._read(names, device), strict=True)}
        return stored | {name: tensor.to(device) for name, tensor in changed.items()}

    def _changed(self, index: int) -> Path:
        return self._scratch / f"layer-{self._sources[index]}.safetensors"

    def _read(self, names: Sequence[str], device: torch.device = _CPU) -> list[Tensor]:
        return [read_onto(device, self._files[name], name, self.dtype) for name in names]
