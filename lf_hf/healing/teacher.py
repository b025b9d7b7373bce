"""What the base predicts: computed beside the training, or read from files that it was written to once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig

from lf_hf.decoder.interface import Decoder
from lf_hf.families import CausalLM, family_of
from lf_hf.healing.loss import LOGITS, FullTargets, TopTargets
from lf_hf.healing.text import Kind
from lf_hf.runtime.numerics import all_finite
from lf_hf.runtime.progress import progress

_TOGETHER = 1 << 17  # tokens that pass the base's layers together when they are written to disk
_INDEX = "text.json"
_HEAD = "head.safetensors"
_STATES = "base_states"  # (tokens T, hidden) of an item: the base's final ones, after the norm

Item = Mapping[str, Tensor]
"""A sequence, `input_ids` (tokens T,), with what is known of the base's predictions."""


def stacked(items: Sequence[Item]) -> dict[str, Tensor]:
    """A batch of items."""
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


class Teacher(Protocol):
    """Where a training gets the base's predictions from."""

    def targets(self, batch: Item) -> FullTargets | TopTargets:
        """Of a batch of items, stacked."""


class MemoryTeacher:
    """The base in memory."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model.requires_grad_(False)
        self._to_logits = partial(family_of(model.config).logits, model.config)

    def targets(self, batch: Item) -> FullTargets:
        states = batch.get(_STATES)
        if states is None:
            states = self._states(batch["input_ids"])
        return FullTargets(states.to(self.model.device), self.model.lm_head.weight, self._to_logits)

    def read(self, ids: Tensor) -> Item:
        """The item of a sequence, (tokens T,), that is used again and again: the base reads it now, and never later."""
        return {"input_ids": ids, _STATES: self._states(ids[None])[0].cpu()}

    @torch.no_grad()
    def _states(self, ids: Tensor) -> Tensor:
        states: Tensor = self.model.model(input_ids=ids.to(self.model.device), use_cache=False).last_hidden_state
        return states


class FileTeacher:
    """What `write_targets` has written into a folder, which comes with the items; the head of the base lies there."""

    def __init__(self, folder: Path, config: PreTrainedConfig) -> None:
        self.folder = folder
        self._to_logits = partial(family_of(config).logits, config)

    def targets(self, batch: Item) -> FullTargets | TopTargets:
        if _STATES in batch:
            weight = load_file(self.folder / _HEAD)["weight"]
            return FullTargets(batch[_STATES], weight.to(batch[_STATES].device), self._to_logits)
        return TopTargets(batch["top_ids"], batch["top_log_probs"], batch["own_log_probs"], batch["norms"])


class WrittenItems(Sequence[Item]):
    """Items in files of `write_targets`; they are read when they are used."""

    def __init__(self, files: Sequence[Path], counts: Sequence[int]) -> None:
        self.files = files
        self._places = [(file, row) for file, count in zip(files, counts, strict=True) for row in range(count)]
        self._opened: dict[Path, Any] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: Any) -> Any:
        file, row = self._places[place]
        if file not in self._opened:
            self._opened[file] = safe_open(file, "pt")
        opened = self._opened[file]
        item = {name: opened.get_slice(name)[row : row + 1][0] for name in opened.keys()}  # noqa: SIM118
        return item | {"input_ids": item["input_ids"].long()}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_opened": {}}  # for the processes of a data loader


@torch.no_grad()
def write_targets(
    decoder: Decoder,
    kinds: Sequence[Kind],
    folder: Path,
    *,
    top_k: int,
    temperature: float,
    judges: Callable[[Kind], bool],
) -> None:
    """Write sequences, and the most likely of the base's predictions of their tokens, into a folder.

    Of a kind of text that `judges` they are all there, as the base's final states and its head: its figures are
    compared with others. All layers of the base are used once for each 131,072 tokens, so it may lie on disk. The index
    comes last: without it, what is there is what a killed process left, and is written again.
    """
    sequences = [(judges(kind), sequence) for kind in kinds for sequence in (*kind.training, *kind.held_out)]
    counts: list[int] = []
    try:
        with decoder.norm_and_head() as (_, weight):
            save_file({"weight": weight.detach().cpu().contiguous()}, folder / _HEAD)
        for (whole, length), alike in groupby(sequences, lambda pair: (pair[0], len(pair[1]))):
            left = [sequence for _, sequence in alike]
            while left:
                part, left = left[: max(1, _TOGETHER // length)], left[max(1, _TOGETHER // length) :]
                found = _final_states(decoder, part) if whole else _targets(decoder, part, top_k, temperature)
                save_file(found, folder / _file_name(len(counts)))
                counts.append(len(part))
    except SafetensorError as error:  # the disk is full
        raise OSError(f"{str(folder)!r} was not written ({error}).") from error
    of_kinds = [[kind.name, len(kind.training), len(kind.held_out)] for kind in kinds]
    new = folder / f"{_INDEX}.new"
    new.write_text(json.dumps({"kinds": of_kinds, "counts": counts}), encoding="utf-8")
    new.replace(folder / _INDEX)


def are_written(folder: Path) -> bool:
    """Whether `write_targets` has written all of a folder, and it is whole."""
    try:
        for file in (folder / _HEAD, *read_targets(folder)[0].files):
            with safe_open(file, "pt"):
                pass
    except (OSError, ValueError, KeyError, SafetensorError):
        return False
    return True


def read_targets(folder: Path) -> tuple[WrittenItems, list[tuple[str, int, int]]]:
    """The items that `write_targets` wrote, and of each kind of text its name and numbers of items.

    Those of a kind are together, first those to train on, then those kept aside.
    """
    index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    files = [folder / _file_name(number) for number in range(len(index["counts"]))]
    return WrittenItems(files, index["counts"]), [(name, train, aside) for name, train, aside in index["kinds"]]


def targets_folder(cache: Path, **made_of: Any) -> Path:
    """Where in a cache the predictions of a base on a text are, by all that they depend on."""
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]
    return cache / f"targets-{key}"


def _file_name(number: int) -> str:
    return f"targets-{number:05}.safetensors"


def _walked(decoder: Decoder, sequences: Sequence[Tensor]) -> tuple[list[Tensor], Sequence[Tensor]]:
    """Sequences in batches, and their states after the last layer, (sequences B, tokens T, hidden)."""
    batches = decoder.batches(sequences)
    walk = progress(decoder.walk(batches), total=decoder.num_layers, desc="The base's predictions", unit="layer")
    for states in walk:
        last = states
    return batches, last


def _final_states(decoder: Decoder, sequences: Sequence[Tensor]) -> dict[str, Tensor]:
    batches, last = _walked(decoder, sequences)
    with decoder.norm_and_head() as (norm, _):
        states = torch.cat([norm(state).cpu() for state in last])
    return {"input_ids": torch.cat([batch.cpu() for batch in batches]).int(), _STATES: states.contiguous()}


def _targets(decoder: Decoder, sequences: Sequence[Tensor], top_k: int, temperature: float) -> dict[str, Tensor]:
    """Tensors of shape (sequences, tokens T, ...). All sequences are of one length."""
    batches, last = _walked(decoder, sequences)
    rows = max(1, LOGITS // decoder.config.vocab_size)
    ids, log_probs, own, norms = [], [], [], []
    with decoder.head() as head:
        for batch, state in zip(batches, last, strict=True):
            following = batch.roll(-1, dims=1).flatten()  # that of a sequence's last token is not used
            parts = state.flatten(0, 1).split(rows)
            for part, wanted in zip(parts, following.split(rows), strict=True):
                logits = head(part[None])[0].float()  # (rows, vocab)
                if not all_finite(logits):
                    raise ValueError(
                        "The base's predictions contain NaN or inf; use a dtype of wider range, such as bfloat16."
                    )
                found = logits.log_softmax(-1)
                top = found.topk(min(top_k, found.shape[-1]))
                ids.append(top.indices.int().cpu())
                log_probs.append(top.values.half().cpu())
                own.append(found.gather(1, wanted.to(found.device)[:, None])[:, 0].cpu())
                norms.append((found / temperature).logsumexp(-1).cpu())
    shape = (len(sequences), len(sequences[0]))
    return {
        "input_ids": torch.cat([batch.cpu() for batch in batches]).int(),
        "top_ids": torch.cat(ids).view(*shape, -1),
        "top_log_probs": torch.cat(log_probs).view(*shape, -1),
        "own_log_probs": torch.cat(own).view(shape),
        "norms": torch.cat(norms).view(shape),
    }
