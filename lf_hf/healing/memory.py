"""Where the base is while its student trains: what both take of a device's memory, from the largest terms."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from transformers import PreTrainedConfig, TrainingArguments
from transformers.utils import logging

from lf_hf.checkpoint.saving import checked_folder
from lf_hf.families import family_of
from lf_hf.healing.loss import FLOAT_LOGITS, LOGITS
from lf_hf.healing.settings import HealSettings
from lf_hf.runtime.launch import Processes
from lf_hf.runtime.memory import free_memory, in_gib

logger = logging.get_logger(__name__)
_SPARE = 0.9  # of free memory: estimates leave something out


@dataclass(frozen=True)
class Placement:
    """Where the base is while the student trains.

    `description` is for people. `files` is the folder for its predictions, None where the base is in memory beside the
    student. `in_memory` says whether the base is loaded whole at all, and not read layer by layer. `memory` is about
    how many bytes of a device the base and the student take at their peak, and `disk` what the student's states take.
    """

    description: str
    files: Path | None
    in_memory: bool
    memory: int
    disk: int


def place_teacher(
    base: PreTrainedConfig,
    student: Any,
    settings: HealSettings,
    arguments: TrainingArguments,
    cache: str | os.PathLike[str] | None,
) -> Placement:
    """Place the base by free memory, and split the steps of `arguments` into batches that fit.

    The student may be on the meta device. Raises ValueError, with what would help, if nothing fits.
    """
    cache = None if cache is None else checked_folder(cache)
    # So that all processes choose alike.
    free = min(Processes.of_launch().all_gather_object(int(free_memory(arguments.device) * _SPARE)))
    loaded = sum(p.nbytes for p in student.parameters() if p.device.type == arguments.device.type)
    whole, one = training_memory(student, settings.length, arguments)
    fixed, of_base = whole // _num_shards(arguments) - loaded, model_bytes(base, 2 if arguments.bf16 else 4)
    if fixed + one > free:
        raise ValueError(
            f"{in_gib(free)} are free, but training takes {in_gib(fixed + one)} for train={settings.train!r}, even "
            "with the base's predictions on disk; take train='lora', a shorter length, the training argument "
            "gradient_checkpointing=True, a device with more, or several of them with FSDP."
        )
    beside, in_memory = cache is None and fixed + one + of_base <= free, of_base <= free
    if beside:
        description, free = "computed by the base, which is in memory beside the student", free - of_base
    else:
        how = "in memory" if in_memory else "read layer by layer"
        description = f"the {settings.top_k} most likely ones of each token, written to disk by the base, {how}"
    of_process = settings.batch // arguments.world_size
    most = max(1, min((free - fixed) // one, arguments.per_device_train_batch_size))
    size = max(n for n in range(1, of_process + 1) if of_process % n == 0 and n <= most)
    arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps = size, of_process // size
    training = fixed + loaded + size * one
    memory = training + of_base if beside else max(training, loaded + of_base if in_memory else 0)
    files = None if beside else cache or Path(arguments.output_dir or ".")
    trained = [p for p in student.parameters() if p.requires_grad]
    kept = trained if settings.train == "lora" else student.parameters()
    # The best state, the last one, and one that is being written, each with AdamW's two float32 numbers of a parameter.
    disk = 3 * (sum(p.nbytes for p in kept) + sum(8 * p.numel() for p in trained))
    return Placement(description, files, in_memory, memory, disk)


def _num_shards(arguments: TrainingArguments) -> int:
    """How many processes share the student's weights."""
    if arguments.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return arguments.world_size
    if not arguments.fsdp and not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return 1
    if arguments.device.type == "cpu":
        logger.warning("FSDP is ignored, as accelerate splits no model on a CPU: each process trains a whole copy.")
        return 1
    return arguments.world_size


def training_memory(student: Any, length: int, arguments: TrainingArguments) -> tuple[int, int]:
    """Bytes for weights, gradients and AdamW's state, and for each sequence of `length` tokens that is run at once."""
    size, config = 2 if arguments.bf16 or arguments.fp16 else 4, student.config
    parameters = [(p.numel(), p.element_size(), p.requires_grad) for p in student.parameters()]
    fixed = sum(count * (size + (12 if trained else 0)) for count, size, trained in parameters)
    fixed += 2 * sum(count for count, size, _ in parameters if size > 2)  # copies in what autocast computes in
    # Of each layer: its input, two norms, queries, keys, values, what attention and the MLP give, and the MLP's inside.
    values, layers = 10 * config.hidden_size + 4 * config.intermediate_size, config.num_hidden_layers
    values = values + layers * config.hidden_size if arguments.gradient_checkpointing else values * layers
    loss = 2 * size * LOGITS + 6 * 4 * FLOAT_LOGITS
    return fixed + loss, length * values * size


def model_bytes(config: PreTrainedConfig, bytes_per_value: int) -> int:
    """What a model's weights take."""
    with torch.device("meta"):
        model = family_of(config).causal_lm(config)
    return sum(parameter.numel() for parameter in model.parameters()) * bytes_per_value
