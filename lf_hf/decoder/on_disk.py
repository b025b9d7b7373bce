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
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from lf_hf.checkpoint.weights import (
    check_complete,
    names_in_memory,
    read_onto,
    stored_dtype,
    tensor_files,
    tensor_shapes,
)
from lf_hf.decoder.interface import Decoder, set_config_kind, set_config_layers
from lf_hf.families import DecoderLayer, Kind
from lf_hf.models import is_wrapper, model_class, text_prefix
from lf_hf.runtime.memory import free_memory
from lf_hf.runtime.progress import progress

_HEAD = "lm_head.weight"
_CPU = torch.device("cpu")
_LEFT_FREE = 1 / 4  # of a device's free memory: stays free when layers are kept there
Place = tuple[Path, str]
"""A tensor's file, and its name there."""
Places = dict[str, Place]
"""By the tensors' names in a model in memory, which a checkpoint's own may differ from."""
STATES_IN_MEMORY = 1 << 27  # bytes of hidden states


class CheckpointDecoder(Decoder):
    """A model in safetensors files, read layer by layer; changed tensors go to a scratch folder.

    On other devices than the CPU the next layer is read while one is used. On the CPU that would take scarce memory.

    `folder` holds model.safetensors, or its shards and their index; `scratch` is on a disk with room for the fused
    layers. `dtype` is by default the config's, else that of the first tensor. All is computed on `device`.
    """

    scratch: Path

    def __init__(
        self,
        folder: Path,
        config: Any,
        scratch: Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device = _CPU,
    ) -> None:
        self.model_config, self.config = config, config.get_text_config()
        if self.config._attn_implementation is None:
            self.config._attn_implementation = "sdpa" if model_class(config)._supports_sdpa else "eager"
        if device.type == "cuda" and device.index is None:  # which another thread would take for the first one
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self.states_in_memory = STATES_IN_MEMORY if device.type == "cpu" else None
        # A stream of their own, so that copies need not wait for what is computed.
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.rotary_emb = self.family.rotary_embedding(self.config).to(device)
        files = tensor_files(folder)
        self._files = set(files.values())
        self.dtype: torch.dtype = dtype or config.dtype or stored_dtype(next(iter(files.values())))
        model = self._described()
        prefix = text_prefix(model)
        self._embedding, self._norm = f"{prefix}embed_tokens.weight", f"{prefix}norm.weight"
        self._layers_prefix = f"{prefix}layers."
        names = names_in_memory(files, model)
        self._base: Places = {names[stored]: (file, stored) for stored, file in files.items()}
        described = model.state_dict()
        self._check_complete(str(folder), described)
        outside = [name for name in described if name in names.values() and not name.startswith(self._layers_prefix)]
        self._outside: Places = {name: self._base[name] for name in outside}
        self._layers: list[Places] = [{} for _ in range(self.config.num_hidden_layers)]
        for name, place in self._base.items():
            if name.startswith(self._layers_prefix) and "rotary_emb" not in name:
                number, _, inner_name = name.removeprefix(self._layers_prefix).partition(".")
                self._layers[int(number)][inner_name] = place
        self.scratch, self._numbers = scratch, itertools.count()  # of the files there
        self._folders: list[TemporaryDirectory[str]] = []  # a copy's, and of those that it was made from
        self._own_head = self._has_own_head()
        if not self._own_head:
            self._outside.pop(_HEAD, None)
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
            self._table = self._read(self._base[self._embedding], self.device)
            if free_memory(self.device) < self._least_free:
                self._table = None
            yield
        finally:
            self._kept = self._table = None

    def copy(self) -> CheckpointDecoder:
        """A copy's changed tensors are deleted with it."""
        other = copy.copy(self)
        other.model_config = copy.deepcopy(self.model_config)
        other.config = other.model_config.get_text_config()
        other._layers = list(self._layers)
        other._folders = [*self._folders, TemporaryDirectory(dir=self.scratch)]
        other.scratch = Path(other._folders[-1].name)
        self.scratch = Path(mkdtemp(dir=self.scratch))  # files outside of it belong to both models now
        return other

    def replace(self, index: int, weights: Mapping[str, Tensor], kind: Kind | None = None) -> None:
        before = self._layers[index]
        file = self.scratch / f"{next(self._numbers)}.safetensors"
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.family.packed(weights).items()}
        save_file(tensors, file)
        after = before | {name: (file, name) for name in tensors}
        if kind:  # which may have other parameters
            set_config_kind(self.config, index, kind)
            names = {name for name, _ in self.family.new_layer(self.config, kind).named_parameters()}
            after = {name: place for name, place in after.items() if name in names}
        self._layers[index] = after
        self._delete_unused(before, self._layers[index])

    def remove(self, index: int) -> None:
        set_config_layers(self.config, [n for n in range(self.num_layers) if n != index])
        self._delete_unused(self._layers.pop(index), {})

    def _delete_unused(self, before: Places, after: Places) -> None:
        """Delete files of changed tensors that a layer no longer has."""
        used = {file for file, _ in after.values()}
        for file in {file for file, _ in before.values()} - used:
            if file.parent == self.scratch:
                file.unlink()

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, self._read(place)) for name, place in self._all_places().items())

    def _all_places(self) -> Places:
        """Places of all parameters."""
        places = dict(self._outside)
        for index, layer in enumerate(self._layers):
            places |= {f"{self._layers_prefix}{index}.{name}": place for name, place in layer.items()}
        return places

    def embed(self, batches: Sequence[Tensor]) -> list[Tensor]:
        table = self._read(self._base[self._embedding]) if self._table is None else self._table
        states = []
        for batch in batches:
            embedded = nn.functional.embedding(batch.to(table.device), table).to(self.device)
            states.append(self.family.first_states(self.config, embedded, rows=True))
        return states

    @contextmanager
    def norm_and_head(self) -> Iterator[tuple[nn.Module, Tensor]]:
        gain = self._read(self._base[self._norm], self.device)
        weight = self._read(self._base[_HEAD if self._own_head else self._embedding], self.device)
        norm = self.family.norm(self.config.hidden_size, eps=self.config.rms_norm_eps)
        norm.weight = nn.Parameter(gain, requires_grad=False)
        yield norm, weight

    def write(self, folder: Path, max_shard_bytes: int) -> None:
        """Write all tensors, by the names that the base has for them, as shards of about a size, and their index."""
        described, places = self._described().state_dict(), {}
        written = {}
        for name, place in self._all_places().items():
            stored = self._stored_name(name)
            places[stored], written[stored] = place, described[name]
        split = split_torch_state_dict_into_shards(written, max_shard_size=max_shard_bytes)
        for file, names in progress(split.filename_to_tensors.items(), desc="Writing", unit="file"):
            tensors = {name: self._read(places[name]) for name in names}
            save_file(tensors, folder / file, metadata={"format": "pt"})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
            (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _stored_name(self, name: str) -> str:
        """What a tensor is called in the base's files, or would be there; of a model of text what it is in memory."""
        if not is_wrapper(self.model_config):
            return name
        if not name.startswith(self._layers_prefix):
            return self._base[name][1]
        inside = next(name for name in self._base if name.startswith(self._layers_prefix))
        stored_prefix = self._base[inside][1].removesuffix(inside.removeprefix(self._layers_prefix))
        return stored_prefix + name.removeprefix(self._layers_prefix)

    def _described(self) -> Any:
        """The model that the config describes, without memory."""
        with torch.device("meta"):
            return model_class(self.model_config)(self.model_config).to(self.dtype)

    def _check_complete(self, name: str, described: Mapping[str, Tensor]) -> None:
        """Raise ValueError if the files do not hold the tensors that the config describes, a tied head among them."""
        shapes = {tensor: shape for file in self._files for tensor, shape in tensor_shapes(file).items()}
        unexpected, missing, mismatched = set(self._base), set[str](), {}
        for tensor, expected in described.items():
            if tensor not in self._base:
                missing.add(tensor)
            elif (stored := shapes[self._base[tensor][1]]) != (shape := tuple(expected.shape)):
                mismatched[tensor] = stored, shape
            unexpected.discard(tensor)
        if self.model_config.tie_word_embeddings:
            missing.discard(_HEAD)
        check_complete(name, missing, mismatched, unexpected, layers=self._layers_prefix)

    def _has_own_head(self) -> bool:
        """Whether there is a head that is not the embeddings; as in transformers, no config ties what differs."""
        if _HEAD not in self._base or not self.model_config.tie_word_embeddings:
            return _HEAD in self._base
        return not torch.equal(self._read(self._base[self._embedding]), self._read(self._base[_HEAD]))

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
        self.family.mixer_module(layer).layer_idx = index
        layer.load_state_dict(weights, assign=True)
        return layer.eval().requires_grad_(False)

    def _weights(self, index: int) -> dict[str, Tensor]:
        """All parameters of a layer on the device, by their names inside it."""
        return {name: self._read(place, self.device) for name, place in self._layers[index].items()}

    def _read(self, place: Place, device: torch.device = _CPU) -> Tensor:
        return read_onto(device, *place, self.dtype)
