"""What a training takes of a device's memory, about, from its largest terms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

from lf_hf.families import family_of
from lf_hf.healing.loss import FLOAT_LOGITS, LOGITS


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes: `fixed` for weights, gradients and the optimizer's state, and `sequence` for each that is run at once."""

    fixed: int
    sequence: int


def training_memory(
    config: PreTrainedConfig, student: nn.Module, length: int, bytes_per_value: int, *, checkpointing: bool = False
) -> TrainingMemory:
    """What training a student takes, that is not on the device yet, with AdamW; `checkpointing` is of gradients."""
    parameters = [(p.numel(), p.element_size(), p.requires_grad) for p in student.parameters()]
    fixed = sum(count * (size + (12 if trained else 0)) for count, size, trained in parameters)
    fixed += 2 * sum(count for count, size, _ in parameters if size > 2)  # copies in what autocast computes in
    # Of each layer: its input, two norms, queries, keys, values, what attention and the MLP give, and the MLP's inside.
    values, layers = 10 * config.hidden_size + 4 * config.intermediate_size, config.num_hidden_layers
    values = values + layers * config.hidden_size if checkpointing else values * layers
    loss = 2 * bytes_per_value * LOGITS + 6 * 4 * FLOAT_LOGITS
    return TrainingMemory(fixed + loss, length * values * bytes_per_value)


def model_bytes(config: PreTrainedConfig, bytes_per_value: int) -> int:
    """What a model's weights take."""
    with torch.device("meta"):
        model = family_of(config).causal_lm(config)
    return sum(parameter.numel() for parameter in model.parameters()) * bytes_per_value
