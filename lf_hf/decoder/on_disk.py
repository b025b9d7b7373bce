"""A checkpoint on disk as the pipeline sees it: one layer is in memory at a time, or two are on a device."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from lf_hf.checkpoint.weights import check_complete, read_onto, stored_dtype, tensor_files, tensor_shapes
from lf_hf.decoder.interface import Decoder, set_config_kind, set_config_layers
from lf_hf.families import DecoderLayer, Kind
from lf_hf.runtime.memory import free_memory
from lf_hf.runtime.progress import progress

_EMBEDDING = "model.embed_tokens.weight"
_NORM = "model.norm.weight"
_HEAD = "lm_head.weight"
_LAYERS = "model.layers."
_CPU = torch.device("cpu")
_LEFT_FREE = 1 / 4  # of a device's free memory: stays free when layers are kept there
Place = tuple[Path, str]
"""A tensor's file, and its name there."""
Places = dict[str, Place]
STATES_IN_MEMORY = 1 << 27  # bytes of hidden states


class CheckpointDecoder(Decoder):
    """A model in safetensors files, read layer by layer; changed tensors go to a scratch folder.

    On other devices than the CPU the next layer is read while one is used. On the CPU that would take scarce memory.

    `folder` holds model.safetensors, or its shards and their index; `scratch` is on a disk with room for the fused
    layers. `dtype` is by default the config's, else that of the first tensor. All is computed on `device`.
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
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.rotary_emb = self.family.rotary_embedding(config).to(device)
        files = tensor_files(folder)
        self._files = set(files.values())
        self.dtype: torch.dtype = dtype or self.config.dtype or stored_dtype(next(iter(files.values())))
        self._base: Places = {name: (file, name) for name, file in files.items()}
        self._check_complete(str(folder))
        self._layers: list[Places] = [{} for _ in range(config.num_hidden_layers)]
        for name, place in self._base.items():
            if name.startswith(_LAYERS) and "rotary_emb" not in name:
                number, _, inner_name = name.removeprefix(_LAYERS).partition(".")
                self._layers[int(number)][inner_name] = place
        self._scratch, self._numbers = scratch, itertools.count()  # of the files there
        self._folders: list[TemporaryDirectory[str]] = []  # a copy's, and of those that it was made from
        self._own_head = self._has_own_head()
        self._kept: dict[int, DecoderLayer] | None = None  # layers that stay on the device, where any may
        self._table: Tensor | None = None  # embeddings that do
        self._least_free = 0  # bytes of the device

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def bytes_read(self) -> int:
        size = sum(file.stat().st_size for file in self._files)
        if self.device.type == "cpu" or size >= free_memory(self.device) * (1 - _LEFT_FREE):
            return size
        return 0

    def layers(self, indices: Iterable[int]) -> Iterator[DecoderLayer]:
        """Only the caller holds a layer, so that its memory can be freed."""
        if self.device.type == "cpu":
            for index in indices:
                yield self._build(self._weights(index), index)
            return
        indices = list(indices)
        kept = {} if self._kept is None else self._kept
        with ThreadPoolExecutor(1) as reader:  # at the end of which a read that has begun is waited for
            reads = (reader.submit(self._copy_layer, index) for index in indices if index not in kept)
            ahead = next(reads, None)
            for index in indices:
                if index in kept:
                    yield kept[index]
                    continue
                assert ahead is not None
                layer = [self._build(self._receive(ahead.result()), index)]
                if self._kept is kept and free_memory(self.device) >= self._least_free:
                    kept[index] = layer[0]
                ahead = next(reads, None)
                yield layer.pop()

    @contextmanager
    def keep_layers(self) -> Iterator[None]:
        """On other devices than the CPU as many layers stay there as leave a quarter of the free memory."""
        if self.device.type == "cpu":
            yield
            return
        self._kept = {}
        self._least_free = int(free_memory(self.device) * _LEFT_FREE)
        try:
            self._table = self._read(self._base[_EMBEDDING], self.device)
            if free_memory(self.device) < self._least_free:
                self._table = None
            yield
        finally:
            self._kept = self._table = None

    def copy(self) -> CheckpointDecoder:
        """A copy's changed tensors are deleted with it."""
        other = copy.copy(self)
        other.config = copy.deepcopy(self.config)
        other._layers = list(self._layers)
        other._folders = [*self._folders, TemporaryDirectory(dir=self._scratch)]
        other._scratch = Path(other._folders[-1].name)
        self._scratch = Path(mkdtemp(dir=self._scratch))  # files outside of it belong to both models now
        return other

    def replace(self, index: int, weights: Mapping[str, Tensor], kind: Kind | None = None) -> None:
        set_config_kind(self.config, index, kind or {})
        before = self._layers[index]
        file = self._scratch / f"{next(self._numbers)}.safetensors"
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.family.packed(weights).items()}
        save_file(tensors, file)
        self._layers[index] = before | {name: (file, name) for name in tensors}
        self._delete_unused(before, self._layers[index])

    def remove(self, index: int) -> None:
        set_config_layers(self.config, [n for n in range(self.num_layers) if n != index])
        self._delete_unused(self._layers.pop(index), {})

    def _delete_unused(self, before: Places, after: Places) -> None:
        """Delete files of changed tensors that a layer no longer has."""
        used = {file for file, _ in after.values()}
        for file in {file for file, _ in before.values()} - used:
            if file.parent == self._scratch:
                file.unlink()

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, self._read(place)) for name, place in self._all_places().items())

    def _all_places(self) -> Places:
        """Places of all parameters by their names in the checkpoint."""
        places = {name: self._base[name] for name in (_EMBEDDING, _NORM)}
        if self._own_head:
            places[_HEAD] = self._base[_HEAD]
        for index, layer in enumerate(self._layers):
            places |= {f"{_LAYERS}{index}.{name}": place for name, place in layer.items()}
        return places

    def embed(self, batches: Sequence[Tensor]) -> list[Tensor]:
        table = self._read(self._base[_EMBEDDING]) if self._table is None else self._table
        states = []
        for batch in batches:
            embedded = nn.functional.embedding(batch.to(table.device), table).to(self.device)
            states.append(self.family.first_states(self.config, embedded, rows=True))
        return states

    @contextmanager
    def norm_and_head(self) -> Iterator[tuple[nn.Module, Tensor]]:
        gain = self._read(self._base[_NORM], self.device)
        weight = self._read(self._base[_HEAD if self._own_head else _EMBEDDING], self.device)
        norm = self.family.norm(self.config.hidden_size, eps=self.config.rms_norm_eps)
        norm.weight = nn.Parameter(gain, requires_grad=False)
        yield norm, weight

    def write(self, folder: Path, max_shard_bytes: int) -> None:
        """Write all tensors as shards of about `max_shard_bytes`, and their index."""
        places, described = self._all_places(), self._described_tensors()
        written = {name: described[name] for name in places}
        split = split_torch_state_dict_into_shards(written, max_shard_size=max_shard_bytes)
        for file, names in progress(split.filename_to_tensors.items(), desc="Writing", unit="file"):
            tensors = {name: self._read(places[name]) for name in names}
            save_file(tensors, folder / file, metadata={"format": "pt"})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
            (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _described_tensors(self) -> dict[str, Tensor]:
        """The tensors that the config describes, without memory; a tied head is among them."""
        with torch.device("meta"):
            return self.family.causal_lm(self.config).to(self.dtype).state_dict()

    def _check_complete(self, name: str) -> None:
        """Raise ValueError if the files do not hold the tensors that the config describes."""
        stored = {tensor: shape for file in self._files for tensor, shape in tensor_shapes(file).items()}
        unexpected, missing, mismatched = set(stored), set[str](), {}
        for tensor, described in self._described_tensors().items():
            shape = tuple(described.shape)
            if tensor not in stored:
                missing.add(tensor)
            elif stored[tensor] != shape:
                mismatched[tensor] = stored[tensor], shape
            unexpected.discard(tensor)
        if self.config.tie_word_embeddings:
            missing.discard(_HEAD)
        check_complete(name, missing, mismatched, unexpected)

    def _has_own_head(self) -> bool:
        """Whether there is a head that is not the embeddings; as in transformers, no config ties what differs."""
        if _HEAD not in self._base or not self.config.tie_word_embeddings:
            return _HEAD in self._base
        return not torch.equal(self._read(self._base[_EMBEDDING]), self._read(self._base[_HEAD]))

    def _copy_layer(self, index: int) -> dict[str, Tensor]:
        """A layer's weights on the device, complete when this returns. For any thread."""
        if self._copy_stream is None:
            return self._weights(index)
        with torch.cuda.stream(self._copy_stream):
            weights = self._weights(index)
        self._copy_stream.synchronize()
        return weights

    def _receive(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copied weights for this thread: their memory is not reused before all work on them is done."""
        if self._copy_stream is not None:
            for weight in weights.values():
                weight.record_stream(torch.cuda.current_stream(self.device))
        return weights

    def _build(self, weights: Mapping[str, Tensor], index: int) -> DecoderLayer:
        layer = self.family.new_layer(self.config, self.family.config_kinds(self.config)[index])
        layer.self_attn.layer_idx = index
        layer.load_state_dict(weights, assign=True)
        return layer.eval().requires_grad_(False)

    def _weights(self, index: int) -> dict[str, Tensor]:
        """All parameters of a layer on the device, by their names inside it."""
        return {name: self._read(place, self.device) for name, place in self._layers[index].items()}

    def _read(self, place: Place, device: torch.device = _CPU) -> Tensor:
        return read_onto(device, *place, self.dtype)
