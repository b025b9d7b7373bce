"""The teacher: the base's predictions, computed beside the training or read from files.

All sequences of a healing lie in files, written once by the first process. With the base in memory beside the student
they hold the tokens alone, and its predictions are computed when they are needed; otherwise they hold its most likely
predictions. Of text that is looked at again and again the base's final states are there, if it is in memory; of text
that judges they always are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils import patch_environment
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.data import ConcatDataset, StackDataset
from transformers import TrainingArguments

from lf_hf.checkpoint.saving import only_writer
from lf_hf.decoder.generating import generate
from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.decoder.interface import Decoder
from lf_hf.decoder.on_disk import CheckpointDecoder
from lf_hf.decoder.predictions import final_states
from lf_hf.families import CausalLM, family_of
from lf_hf.healing.inputs import HealingInputs
from lf_hf.healing.loss import FullTargets, Targets, TopTargets, parts
from lf_hf.healing.memory import Placement
from lf_hf.healing.text import healing_text, judging_kinds
from lf_hf.runtime.launch import Processes
from lf_hf.runtime.numerics import all_finite
from lf_hf.text.chats import chat_form, first_token, special_tokens

STATES = "base_states"
"""In an item: the base's final states (tokens T, hidden), after the norm."""
_TOGETHER = 1 << 17  # tokens that pass the base's layers together when they are written to disk
_LOGITS = 1 << 24  # of the base that exist at a time then
_FORMAT = 8  # of the files: rises when they change
_INDEX, _HEAD = "text.json", "head.safetensors"

Item = Mapping[str, Tensor]
"""A sequence, `input_ids` (tokens T,), with what is known of the base's predictions of it."""


@dataclass
class Teacher:
    """The sequences of a healing by kind of text, and the base's predictions of them.

    `model` is the base where it is in memory beside the student; otherwise its head lies in `folder`.
    """

    folder: Path
    config: Any
    model: CausalLM | None
    training: dict[str, ConcatDataset[Item]] = field(default_factory=dict)
    held_out: dict[str, ConcatDataset[Item]] = field(default_factory=dict)
    judging: dict[str, ConcatDataset[Item]] = field(default_factory=dict)

    def targets(self, batch: Item) -> Targets:
        """The predictions of a batch of items, stacked, of text to train on or held out."""
        if "top_ids" in batch:
            return TopTargets(batch["top_ids"], batch["top_log_probs"], batch["norms"])
        assert self.model is not None
        states, device = batch.get(STATES), self.model.device
        if states is None:
            with torch.no_grad():
                states = self.model.model(input_ids=batch["input_ids"].to(device), use_cache=False).last_hidden_state
        return FullTargets(states.to(device), self.model.lm_head.weight, self._to_logits)

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """What makes logits of the final states that lie in the files, as `Decoder.head`."""
        weight = self.model.lm_head.weight if self.model else load_file(self.folder / _HEAD)["weight"]
        yield lambda states: self._to_logits(linear(states.to(weight.device, weight.dtype), weight))

    def _to_logits(self, outputs: Tensor) -> Tensor:
        return family_of(self.config).logits(self.config, outputs)


def open_teacher(inputs: HealingInputs, placement: Placement, arguments: TrainingArguments, work: Path) -> Teacher:
    """Have the first process write the text and the base's predictions of it, unless they are there; open them."""
    base = None if placement.files else _loaded_base(inputs, arguments)
    names = ("tokens", "length", "batch_tokens", "written_share", "temperature", "top_k", "seed")
    made_of = inputs.content() | {
        "format": _FORMAT,
        "settings": {name: getattr(inputs.settings, name) for name in names},
        "dtype": "bfloat16" if arguments.bf16 else str(inputs.base_dtype),
        "beside": base is not None,
    }
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]
    folder = (placement.files or work) / f"targets-{key}"
    Processes.of_launch().broadcast_object(lambda: _write(folder, inputs, placement, arguments, base))
    teacher = Teacher(folder, inputs.base.config, base)
    for kind, part, files in json.loads((folder / _INDEX).read_text(encoding="utf-8")):
        # Files are mapped into memory, so that sequences are read when they are used.
        tensors: list[Any] = [load_file(folder / name) for name in files]
        getattr(teacher, part)[kind] = ConcatDataset([StackDataset(**of_file) for of_file in tensors])
    return teacher


def _loaded_base(inputs: HealingInputs, arguments: TrainingArguments) -> CausalLM:
    loading = {**inputs.base.loading, "dtype": inputs.base_dtype, "device_map": None}
    # Where FSDP is to split the student, older transformers would give other processes than the first one zeros.
    with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"):
        model = dataclasses.replace(inputs.base, loading=loading).load().requires_grad_(False)
    inputs.check_base(ModelDecoder(model))
    # Where training is not in bfloat16, the machine is faster without it, or the user wants none.
    dtype = torch.bfloat16 if arguments.bf16 else torch.promote_types(model.dtype, torch.float32)
    for parameter in model.parameters():  # not the buffers: angles of positions need float32
        parameter.data = parameter.data.to(dtype)
    return model.to(arguments.device)  # type: ignore[arg-type]


@torch.no_grad()
def _write(
    folder: Path, inputs: HealingInputs, placement: Placement, arguments: TrainingArguments, base: CausalLM | None
) -> None:
    """Write all sequences, with what is to be known of the base's predictions, unless they are there.

    The index comes last: without it, what is there is what a killed process left, and is written again.
    """
    if (folder / _INDEX).is_file():  # also where nothing can be written
        return
    with only_writer(folder, wait=True), TemporaryDirectory() as scratch:
        if (folder / _INDEX).is_file():
            return
        decoder: Decoder
        if placement.in_memory:
            decoder = ModelDecoder(base or _loaded_base(inputs, arguments))
        else:
            weights, config = inputs.base.weights_folder(), inputs.base.new_config()
            dtype, device = inputs.base_dtype, arguments.device
            decoder = CheckpointDecoder(weights, config, Path(scratch), dtype=dtype, device=device)
            inputs.check_base(decoder)
        settings, index = inputs.settings, list[tuple[str, str, list[str]]]()
        top = partial(_top_predictions, top_k=settings.top_k, temperature=settings.temperature)
        # For each part of the text what is to be known of it.
        known: dict[str, Any] = {"training": top, "held_out": top, "judging": _states}
        if base:
            known |= {"training": lambda *_: {}, "held_out": _states}
        try:
            if not base:
                with decoder.norm_and_head() as (_, weight):
                    save_file({"weight": weight.detach().cpu().contiguous()}, folder / _HEAD)
            for kind in _kinds(inputs, placement, decoder):
                for part, predict in known.items():
                    sequences, files = getattr(kind, part), list[str]()
                    together = max(1, _TOGETHER // len(sequences[0])) if sequences else 1
                    for start in range(0, len(sequences), together):
                        some = torch.stack(sequences[start : start + together])
                        files.append(f"items-{len(index):02}-{len(files):05}.safetensors")
                        save_file({"input_ids": some, **predict(decoder, some)}, folder / files[-1])
                    if files:
                        index.append((kind.name, part, files))
        except SafetensorError as error:  # the disk is full
            raise OSError(f"{str(folder)!r} was not written ({error}).") from error
        new = folder / f"{_INDEX}.new"
        new.write_text(json.dumps(index), encoding="utf-8")
        new.replace(folder / _INDEX)


def _kinds(inputs: HealingInputs, placement: Placement, decoder: Decoder) -> list[Any]:
    """All kinds of text, those that judge among them.

    A base that reads all of its weights for each token writes none, unless the settings say so.
    """
    tokenizer, config, settings, corpus = inputs.tokenizer, decoder.config, inputs.settings, inputs.corpus
    if not placement.in_memory and settings.written_share is None:
        corpus = dataclasses.replace(corpus, generated_share=0.0)
    form = chat_form(tokenizer, config.vocab_size)
    write = partial(generate, decoder, chat=form, first=first_token(tokenizer), special=special_tokens(tokenizer))
    kinds = healing_text(tokenizer, corpus, settings, config.vocab_size, write, chats=form is not None)
    return kinds + judging_kinds(tokenizer, config.max_position_embeddings, inputs.judging_tokens)


def _states(decoder: Decoder, ids: Tensor) -> dict[str, Tensor]:
    """The base's final states of sequences (B, tokens T), after the norm."""
    with decoder.norm_and_head() as (norm, _):
        return {STATES: torch.cat([norm(state).cpu() for state in _final_states(decoder, ids)])}


def _final_states(decoder: Decoder, ids: Tensor) -> list[Tensor]:
    return final_states(decoder, {"": decoder.batches(list(ids))}, "The base's predictions")[""]


def _top_predictions(decoder: Decoder, ids: Tensor, *, top_k: int, temperature: float) -> dict[str, Tensor]:
    """What `TopTargets` has of sequences (B, tokens T)."""
    top_ids, log_probs, norms = list[Tensor](), list[Tensor](), list[Tensor]()
    states = torch.cat([state.flatten(0, 1).cpu() for state in _final_states(decoder, ids)])
    with decoder.head() as head:
        for rows in parts(len(states), decoder.config.vocab_size, _LOGITS):
            logits = head(states[rows].to(decoder.device)[None])[0].float()  # (rows, vocab)
            if not all_finite(logits):
                raise ValueError(
                    "The base's predictions contain NaN or inf; use a dtype of wider range, such as bfloat16."
                )
            every = logits.log_softmax(-1)
            top = every.topk(min(top_k, every.shape[-1]))
            top_ids.append(top.indices.int().cpu())
            log_probs.append(top.values.half().cpu())
            norms.append((every / temperature).logsumexp(-1).cpu())
    return {
        "top_ids": torch.cat(top_ids).view(*ids.shape, -1),
        "top_log_probs": torch.cat(log_probs).view(*ids.shape, -1),
        "norms": torch.cat(norms).view(ids.shape),
    }
