"""Tiny random models of every family, with all that sets a family apart in use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from conftest import TINY

from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.decoder.interface import Decoder
from lf_hf.decoder.on_disk import CheckpointDecoder
from lf_hf.families import FAMILIES, DecoderLayer, Weights
from lf_hf.measure.dense import CalibrationText, Measurements
from lf_hf.refit.fit import GroupFit, fit_group
from lf_hf.refit.layer_parts import build_layer
from lf_hf.refit.states import StateStore, Traces, trace
from lf_hf.report.data import CalibrationInfo
from lf_hf.stages.alignment import MatchedRows, align_layer
from lf_hf.stages.fusion import merge_weights

WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3}
SETTINGS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 5, "head_dim": 8},
    "qwen2": WINDOWS,
    "qwen3": WINDOWS | {"head_dim": 12},
    "phi3": {"sliding_window": 7},
    "gemma2": {"sliding_window": 5, "head_dim": 12, "query_pre_attn_scalar": 10, "final_logit_softcapping": 3.0},
    "gemma3_text": {
        "sliding_window": 5,
        "sliding_window_pattern": 3,
        "head_dim": 8,
        "query_pre_attn_scalar": 10,
        "final_logit_softcapping": 3.0,
    },
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.3,
        "logits_scaling": 2.0,
        "attention_bias": True,
    },
    "smollm3": {"use_sliding_window": True, "sliding_window": 5, "no_rope_layer_interval": 3},
}


LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{model_type: (model_type, {}) for model_type in FAMILIES},
    "one key-value head": ("llama", {"num_key_value_heads": 1}),
    "a key-value head a query head": ("llama", {"num_key_value_heads": 4}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "wide heads": ("llama", {"head_dim": 24}),
    "eager attention": ("llama", {"attn_implementation": "eager"}),
}
"""What layers may be: for `tiny_model`, of every family, and of more shapes than the tiny models of families have."""


def tiny_config(model_type: str, **overrides: Any) -> Any:
    return FAMILIES[model_type].config_class(
        **TINY | {"num_hidden_layers": 6} | SETTINGS.get(model_type, {}) | overrides
    )


def tiny_model(model_type: str, *, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A random model of 6 layers, of several kinds where its family has them, with weights large enough to matter."""
    family, config = FAMILIES[model_type], tiny_config(model_type, **overrides)
    torch.manual_seed(0)
    model = family.causal_lm(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # initialised to zero, which would hide a bias that is not moved
                parameter.normal_(std=0.1)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
                parameter -= family.gain_offset
    return model.to(dtype)


def decoders(model: Any, folder: Path) -> list[Decoder]:
    """The same model in memory and on disk."""
    model.save_pretrained(folder / "base")
    (folder / "scratch").mkdir()
    attention = model.config._attn_implementation
    config = type(model.config).from_pretrained(folder / "base", attn_implementation=attention)
    return [ModelDecoder(model), CheckpointDecoder(folder / "base", config, folder / "scratch")]


@torch.no_grad()
def logits(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    """What a decoder predicts, (sequences B, tokens T) -> (B, T, vocab)."""
    *_, last = decoder.walk([ids])
    with decoder.head() as head:
        return head(last[0])


@torch.no_grad()
def fitted(
    decoder: ModelDecoder,
    numbers: Sequence[int],
    states: Sequence[torch.Tensor],
    ridge: float = 0.1,
    rough: bool = False,
    streams: Sequence[torch.Tensor] | None = None,
) -> tuple[GroupFit, DecoderLayer, Traces]:
    """The fit of a group of layers to what they do to some states, as a layer, and what it is fitted to.

    `streams` are those in front of the fused layer, where they are others.
    """
    layers = [decoder.model.model.layers[number] for number in numbers]
    traces = trace(decoder, layers, states, StateStore())
    fit = fit_group(decoder, layers, traces, streams, StateStore(), ridge=ridge, rough=rough)
    return fit, build_layer(decoder, fit.weights, fit.kind), traces


def averaged(
    decoder: Decoder, w_i: Weights, w_j: Weights, alignment: str, ratio: float = 0.61
) -> tuple[dict[str, torch.Tensor], dict[str, MatchedRows]]:
    """The average of two layers, and how their rows were matched."""
    aligned, matches = align_layer(decoder, w_i, w_j, alignment)
    return merge_weights(w_i, aligned, ratio), matches


def measured_text(given: Sequence[torch.Tensor], other: Sequence[torch.Tensor] = ()) -> Measurements:
    """Measurements of nothing but calibration text."""
    source = CalibrationInfo("", len(given), sum(map(len, given)))
    return Measurements([], {}, text=CalibrationText([*given], [], [*other], source, ""))


def divergence(dense: torch.Tensor, fused: torch.Tensor) -> float:
    """KL(dense || fused) in nats a token, of logits (..., vocab)."""
    p, q = (of_model.double().log_softmax(-1) for of_model in (dense, fused))
    return float((p.exp() * (p - q)).sum(-1).mean())
