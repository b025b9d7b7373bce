"""Stage 1: walk the calibration samples through the decoder, layer by layer.

All samples are at the same layer at any time, so memory is that of one layer boundary, and each sample
passes each layer once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.utils import logging

# Attention implementations that are causal by themselves when they get no mask.
_CAUSAL_WITHOUT_MASK = ("sdpa", "flash")


@torch.inference_mode()
def embed(model: LlamaForCausalLM, samples: Sequence[Tensor]) -> list[Tensor]:
    """Token embeddings of each sample: (tokens T_i,) -> (1, tokens T_i, hidden)."""
    table = model.model.embed_tokens
    return [table(sample.to(table.weight.device)[None]) for sample in samples]


def layer_inputs(model: LlamaForCausalLM, hidden_states: Tensor) -> dict[str, Tensor | None]:
    """What a decoder layer takes besides its hidden states, for one sample without padding or cache.

    `hidden_states` is (1, tokens T, hidden); the result holds the causal mask and the rotary embeddings.
    """
    num_tokens, device = hidden_states.shape[1], hidden_states.device
    position_ids = torch.arange(num_tokens, device=device)[None]
    mask = None
    if not (model.config._attn_implementation or "").startswith(_CAUSAL_WITHOUT_MASK):
        lowest = torch.finfo(hidden_states.dtype).min
        mask = torch.full((num_tokens, num_tokens), lowest, dtype=hidden_states.dtype, device=device).triu(1)
        mask = mask[None, None]  # (1, 1, T, T)
    return {
        "attention_mask": mask,
        "position_ids": position_ids,
        "position_embeddings": model.model.rotary_emb(hidden_states, position_ids),
    }


@torch.inference_mode()
def walk_layers(model: LlamaForCausalLM, samples: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield, for each decoder layer in turn, the output states of all samples.

    Each item is a list of (tokens T_i, hidden), before the model's final norm. The list is replaced by the
    next layer's: use it before advancing.

    Raises
    ------
    ValueError
        If a layer's output contains NaN or inf; the layer is named.
    """
    states = embed(model, samples)
    for index, layer in enumerate(model.model.layers):
        for n, state in enumerate(states):
            states[n] = _call(layer, state, **layer_inputs(model, state))
            if not torch.isfinite(states[n]).all():
                raise ValueError(f"The activations of layer {index} contain NaN or inf on calibration sample {n}.")
        yield [state[0] for state in states]


def _call(layer: nn.Module, hidden_states: Tensor, **inputs: Tensor | None) -> Tensor:
    output = layer(hidden_states, **inputs)
    return output[0] if isinstance(output, tuple) else output  # a tuple before transformers 5


def pairwise_distances(states: Sequence[Tensor]) -> NDArray[np.float64]:
    """Frobenius distances between samples, shorter ones taken as zero-padded at the end.

    Parameters
    ----------
    states : N tensors of shape (tokens T_i, hidden)

    Returns
    -------
    float64 array of shape (samples N, samples N)

    Squared distances come from a Gram matrix, accumulated over positions in float64. Each position is
    centred over the samples first: that leaves distances as they are and keeps the large component that all
    samples share from cancelling.
    """
    lengths = torch.tensor([len(state) for state in states])
    dtype = torch.float32 if states[0].device.type == "mps" else torch.float64  # mps has no float64
    gram = torch.zeros(len(states), len(states), dtype=torch.float64)
    block = max(1, (1 << 24) // (len(states) * states[0].shape[1]))  # positions at a time: at most 128 MB
    for start in range(0, int(lengths.max()), block):
        stop = min(start + block, int(lengths.max()))
        padded = torch.zeros(
            len(states), stop - start, states[0].shape[1], dtype=dtype, device=states[0].device
        )  # (N, block, hidden)
        for n, state in enumerate(states):
            part = state[start:stop]
            padded[n, : len(part)] = part
        padded -= padded.mean(dim=0)
        flat = padded.flatten(1)  # (N, block * hidden)
        gram += (flat @ flat.T).to("cpu", torch.float64)
    norms = gram.diagonal()
    squared = norms[:, None] + norms[None, :] - 2 * gram
    squared.fill_diagonal_(0)
    return squared.clamp_(min=0).sqrt_().numpy()


def sample_distances(model: LlamaForCausalLM, samples: Sequence[Tensor]) -> NDArray[np.float64]:
    """Distances between all samples at the output of every layer.

    Parameters
    ----------
    model : LlamaForCausalLM
    samples : N tensors of token ids of shape (tokens T_i,)

    Returns
    -------
    float64 array of shape (layers L, samples N, samples N)
    """
    layers = logging.tqdm(walk_layers(model, samples), total=len(model.model.layers), desc="Calibration", unit="layer")
    return np.stack([pairwise_distances(states) for states in layers])
