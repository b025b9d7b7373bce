"""How fast a device is at what fusing does, measured in about two seconds."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import AutoModel, PreTrainedConfig

from lf_hf.families.models import family_of, set_config_layers
from lf_hf.runtime.amounts import PERPLEXITY_LENGTH
from lf_hf.runtime.numerics import bfloat16_products

Rates = Mapping[str, float]
"""Operations a second, by the names of `Work`."""
_Run = Callable[[int], torch.Tensor]
"""Something of a size."""

_PROBED_SECONDS = 0.15  # of each rate, about: in all two seconds or a little more, with what is too short to count
_PART_OF_VOCAB = 1 << 15  # rows of a head: with all of them there would be few tokens, and to read them take longest
_OF_LAYER = 0.3  # so that a wide one has so many tokens that to read its weights takes little of it


def probe(device: torch.device, dtype: torch.dtype, config: PreTrainedConfig) -> Rates:
    """Operations a second on a device, by the names of `Work`, in about two seconds."""
    layer, run_layer = _one_layer(config, device, dtype)
    text = config.get_text_config()
    hidden, vocab = text.hidden_size, text.vocab_size
    part = min(vocab, _PART_OF_VOCAB)
    weight = torch.full((part, hidden), 0.01, dtype=dtype, device=device)

    def seconds(run: _Run, size: int) -> float:
        start = time.perf_counter()
        run(size).flatten()[:1].float().cpu()  # waits for the device
        return time.perf_counter() - start

    def rate(run: _Run, operations: float, power: int, size: int, most: int, probed: float = _PROBED_SECONDS) -> float:
        """Of what takes `operations` times the `power` of a size, which grows from `size` to `most` at most."""
        seconds(run, size)  # what a first run prepares
        while (taken := seconds(run, size)) < probed / 2 and size < most:
            size *= 2
        return operations * size**power / min(taken, seconds(run, size))

    def square(size: int, kind: torch.dtype) -> torch.Tensor:
        return torch.eye(size, dtype=kind, device=device).add_(1 / size)

    def multiply(size: int) -> torch.Tensor:
        with bfloat16_products(dtype == torch.bfloat16):
            return square(size, torch.float32) @ square(size, torch.float32)

    def solve(size: int) -> torch.Tensor:
        factor = torch.linalg.cholesky(square(size, torch.float64))
        return torch.linalg.solve_triangular(factor, factor, upper=False)

    def ones(rows: int, columns: int = 1, kind: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.ones(rows, columns, dtype=kind, device=device)

    # At most, as a plan is no reason to take memory: numbers at a time, and the side of a square.
    numbers, side = (1 << 23, 2048) if device.type == "cpu" else (1 << 28, 8192)
    return {
        "layer": rate(run_layer, 2 * layer, 1, 64, 4096, _OF_LAYER),
        "calls": 1 / min(seconds(run_layer, 1) for _ in range(3)),
        "head": rate(lambda rows: ones(rows, hidden, dtype) @ weight.T, 2 * weight.numel(), 1, 8, numbers // part),
        "product": rate(multiply, 2, 3, 256, side),
        "solve": rate(solve, 4 / 3, 3, 256, min(side, 4096)),
        "logits": rate(lambda rows: ones(rows, vocab).log_softmax(-1), vocab, 1, 1, numbers // vocab),
        "bytes": rate(lambda size: ones(size).clone(), 12, 1, 1 << 18, numbers),
    }


def _one_layer(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> tuple[int, _Run]:
    """Parameters of a layer, and what runs it on so many tokens."""
    small: Any = copy.deepcopy(config.get_text_config())
    family = family_of(small)
    set_config_layers(small, [0])
    small.vocab_size, small.pad_token_id = 16, None
    with torch.device("meta"):
        body = AutoModel.from_config(small)
    body = body.to(dtype).to_empty(device=device).eval()
    with torch.no_grad():
        for parameter in body.parameters():
            parameter.fill_(1 / small.hidden_size)
    body.rotary_emb = family.rotary_embedding(config=small).to(device)

    @torch.no_grad()
    def run(tokens: int) -> torch.Tensor:
        ids = torch.ones(max(1, tokens // PERPLEXITY_LENGTH), min(tokens, PERPLEXITY_LENGTH), dtype=torch.long)
        states: torch.Tensor = body(input_ids=ids.to(device), use_cache=False).last_hidden_state
        return states

    return sum(parameter.numel() for parameter in body.layers.parameters()), run
