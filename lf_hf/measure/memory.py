"""What a fusion or a healing takes, without reading anything: parameters, and one figure of memory at the peak."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from lf_hf.decoder.on_disk import STATES_IN_MEMORY
from lf_hf.measure.predictions import LOGITS as JUDGING_LOGITS
from lf_hf.models import model_class, text_model
from lf_hf.refit.fit import num_candidates
from lf_hf.runtime.memory import PROCESS
from lf_hf.settings import LONGEST_GROUP, FusionConfig
from lf_hf.text.judging import PERPLEXITY_LENGTH

_TUNING_BYTES = 18  # of a parameter: itself, its gradient and two moments in float32, and a copy to compute in


def num_parameters(config: PreTrainedConfig) -> tuple[int, int]:
    """Parameters of one decoder layer, on average, and of the whole model, tied ones once."""
    with torch.device("meta"):
        model = model_class(config)(config)
    layers = text_model(model).layers
    return _count(layers) // len(layers), _count(model)


def peak_memory(device: torch.device, weights: int, *phases: int) -> int:
    """Bytes that a process takes at its peak: `weights` throughout, and beside them each of `phases` by turns."""
    process = 0 if device.type == "cuda" else PROCESS
    return process + weights + max(phases)


def fusion_memory(
    config: FusionConfig, base: PreTrainedConfig, size: int, device: torch.device, *, low_memory: bool
) -> int:
    """Bytes at the peak of a fusion in numbers of `size` bytes, from its few largest terms."""
    layer, weights = num_parameters(base)
    text = base.get_text_config()
    hidden, mlp = text.hidden_size, text.intermediate_size
    longest = (config.num_fusions or 1) + 1  # layers that may become one
    if config.selection == "groups":
        longest = min(longest, LONGEST_GROUP)
    if low_memory:
        layers = longest + 2 if config.fits else 3  # and one that is read meanwhile
        weights = layers * layer + text.vocab_size * hidden
    elif config.fits:  # the new layers, beside those that they are fitted to
        weights += (config.num_fusions or 1) * layer
    judging = alignment = fit = 0
    if config.perplexity_tokens:
        judging = 6 * 4 * min(JUDGING_LOGITS, PERPLEXITY_LENGTH * text.vocab_size)  # logits of two models
    if config.alignment != "none" and device.type == "cpu":
        alignment = 12 * mlp**2 + 8 * hidden * mlp  # cost matrices, and the rows that they compare
    if config.fits:
        # Gram matrices of all candidates for a group's channels, in float32, twice, and their weights.
        candidates = num_candidates(2 * mlp, mlp)
        regression = 8 * candidates**2 + 2 * layer * size + (3 * size + 8) * candidates * hidden
        # Lists of all text's states: before and inside each layer of a group, and around it in both models.
        states = (2 * longest + 5) * config.calibration_tokens * hidden * size
        if low_memory and device.type == "cpu":
            states = min(states, STATES_IN_MEMORY)
        fit = max(regression, _TUNING_BYTES * layer) + states
    return peak_memory(device, weights * size, judging, alignment, fit)


def training_memory(student: nn.Module, length: int, size: int, *, checkpoints: bool) -> tuple[int, int]:
    """Bytes of a training for weights, gradients and AdamW, and for each sequence of `length` tokens at a time.

    It computes in numbers of `size` bytes. With `checkpoints` activations are computed again for the gradient.
    """
    config: Any = student.config.get_text_config()  # type: ignore[union-attr, operator]
    fixed = 0
    for parameter in student.parameters():
        fixed += parameter.nbytes
        if parameter.requires_grad:
            fixed += 12 * parameter.numel()
        if parameter.element_size() > size:  # a copy in what autocast computes in
            fixed += size * parameter.numel()
    # Of each layer: its input, two norms, queries, keys, values, what attention and the MLP give, and the MLP's inside.
    layers = config.num_hidden_layers
    values = 10 * config.hidden_size + 4 * config.intermediate_size
    if checkpoints:
        values += layers * config.hidden_size
    else:
        values *= layers
    return fixed, length * values * size


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
