"""Tiny random models of every family, with all that sets a family apart in use."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from conftest import TINY, make_tokenizer, vary
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from lf_hf import FusionConfig, FusionReport
from lf_hf.decoder.decoder import Decoder
from lf_hf.families.models import MODEL_TYPES, WRAPPERS, family_of, model_class, text_model
from lf_hf.families.table import FAMILIES, DecoderLayer, Weights
from lf_hf.measure.dense import CalibrationText, Measurements, measure
from lf_hf.pipeline.fusion import for_model
from lf_hf.pipeline.run import fuse
from lf_hf.refit.fit import fit_group
from lf_hf.refit.layer_parts import build_layer
from lf_hf.refit.traces import Traces, run_group, trace
from lf_hf.report.data import CalibrationInfo, MadeLayer, RowMatch
from lf_hf.stages.alignment import align_layer
from lf_hf.stages.averaging import merge_weights
from lf_hf.text.calibration import CalibrationSamples, Corpus

WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3}
HEADS = {"sliding_window": 5, "head_dim": 12}
CAPPED = {"query_pre_attn_scalar": 10, "final_logit_softcapping": 3.0}
GEMMA4: dict[str, Any] = {"sliding_window": 5, "head_dim": 8, "global_head_dim": 12, "num_global_key_value_heads": 1}
GEMMA4 |= {"attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "final_logit_softcapping": 3.0}
GEMMA4 |= {
    "layer_types": [f"{kind}_attention" for kind in ("sliding", "sliding", "full", "sliding", "sliding", "full")]
}
FACTORS = {"embedding_multiplier": 3.0, "residual_multiplier": 0.6, "attention_multiplier": 0.3, "logits_scaling": 2.0}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 10}
MIXTURE = {"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FREQUENCIES = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **values}}


SETTINGS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 5, "head_dim": 8},
    "qwen2": WINDOWS,
    "qwen3": WINDOWS | {"head_dim": 12},
    "phi3": {"sliding_window": 7},
    "gemma2": HEADS | CAPPED,
    "gemma3_text": CAPPED | {"sliding_window": 5, "sliding_window_pattern": 3, "head_dim": 8},
    "gemma4_text": GEMMA4,
    "gemma4_unified_text": GEMMA4,
    "granite": FACTORS | {"attention_bias": True},
    "qwen3_5_text": LINEAR | {"full_attention_interval": 3, "head_dim": 8} | rope("default", partial_rotary_factor=0.5),
    "smollm3": {"use_sliding_window": True, "sliding_window": 5, "no_rope_layer_interval": 3},
    "cwm": HEADS | rope("llama3", factor=4.0, **FREQUENCIES),
    "ernie4_5": {"head_dim": 12, "use_bias": True},
    "exaone4": {"sliding_window": 5, "sliding_window_pattern": 3},
    "gemma": {"head_dim": 12},
    "glm4": {"head_dim": 12},
    "hunyuan_v1_dense": {"head_dim": 8} | rope("dynamic", alpha=50.0, factor=1.0),
    "ministral": HEADS | {"layer_types": ["sliding_attention", "full_attention"] * 3},
    "ministral3": {"sliding_window": 5, "head_dim": 8}
    | rope("yarn", factor=64.0, original_max_position_embeddings=4, llama_4_scaling_beta=0.5),
    "olmo3": {"sliding_window": 5},
    "seed_oss": {"head_dim": 12, "attention_out_bias": True, "mlp_bias": True},
    "arcee": {"mlp_bias": True},
    "qwen3_moe": MIXTURE | {"head_dim": 8, "norm_topk_prob": True, "use_sliding_window": True, "sliding_window": 5},
    "olmoe": MIXTURE | {"intermediate_size": 16},
    "mixtral": MIXTURE | {"intermediate_size": 16, "sliding_window": 5},
    "granitemoe": MIXTURE | FACTORS | {"intermediate_size": 16},
    "gpt_oss": MIXTURE | {"intermediate_size": 16, "head_dim": 8, "sliding_window": 5} | rope("default"),
    "qwen2_moe": MIXTURE | {"shared_expert_intermediate_size": 10},
    "qwen3_5_moe_text": MIXTURE
    | LINEAR
    | {"full_attention_interval": 3, "head_dim": 8}
    | {"shared_expert_intermediate_size": 10}
    | rope("default", partial_rotary_factor=0.5),
    "qwen3_vl_text": {"head_dim": 8} | rope("default", mrope_section=[2, 1, 1]),
}
MIXTURES = [model_type for model_type in MODEL_TYPES if model_type in FAMILIES and FAMILIES[model_type].mlp.experts]
SEES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "patch_size": 7, "image_size": 28}
TOWER = SEES | {"num_hidden_layers": 2, "num_attention_heads": 2}
SEES4 = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
SEES4 |= {"num_key_value_heads": 2, "patch_size": 4}
DEEP = SEES | {"depth": 3, "num_heads": 2, "out_hidden_size": 32, "num_position_embeddings": 16}
DEEP |= {"deepstack_visual_indexes": [0, 1]}
WRAPPED: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {"vision_config": TOWER, "mm_tokens_per_image": 4, "image_token_index": 5}),
    "gemma4": ("gemma4_text", {"vision_config": SEES4 | {"position_embedding_size": 16}, "image_token_id": 5}),
    "gemma4_unified": (
        "gemma4_unified_text",
        {
            "vision_config": {"patch_size": 4, "mm_embed_dim": 16, "mm_posemb_size": 8, "output_proj_dims": 16},
            "image_token_id": 5,
        },
    ),
    "mistral3": (
        "mistral",
        {"vision_config": TOWER | {"model_type": "pixtral"}, "image_token_index": 5, "tie_word_embeddings": False},
    ),
    "qwen3_vl": (
        "qwen3_vl_text",
        {"vision_config": DEEP, "tie_word_embeddings": True}
        | {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7},
    ),
}
"""For vision-language models the type of their decoder, and the rest of their tiny config."""

LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{model_type: (model_type, {}) for model_type in MODEL_TYPES},
    "one key-value head": ("llama", {"num_key_value_heads": 1}),
    "a key-value head a query head": ("llama", {"num_key_value_heads": 4}),
    "experts beside an MLP": (
        "gemma4_text",
        {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 16},
    ),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "wide heads": ("llama", {"head_dim": 24}),
    "eager attention": ("llama", {"attn_implementation": "eager"}),
}
"""What layers may be: for `tiny_model`, of every family, and of more shapes than the tiny models of families have."""


def tiny_config(model_type: str, **overrides: Any) -> Any:
    if model_type in WRAPPED:
        decoder, others = WRAPPED[model_type]
        own = {name: overrides.pop(name) for name in ("attn_implementation", "auto_map") if name in overrides}
        if "final_logit_softcapping" in SETTINGS[decoder]:  # which vision-language models leave out
            overrides = {"final_logit_softcapping": None} | overrides
        return AutoConfig.for_model(model_type, text_config=tiny_config(decoder, **overrides), **others, **own)
    values = TINY | {"num_hidden_layers": 6} | SETTINGS.get(model_type, {}) | overrides
    if "layer_types" in values:
        values["layer_types"] = values["layer_types"][: values["num_hidden_layers"]]
    return FAMILIES[model_type].config_class(**values)


def auto_class(model_type: str) -> Any:
    """What opens checkpoints of a type of models."""
    return AutoModelForImageTextToText if model_type in WRAPPERS else AutoModelForCausalLM


def tiny_model(model_type: str, *, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A random model of 6 layers, of several kinds where its family has them, with weights large enough to matter."""
    config = tiny_config(model_type, **overrides)
    torch.manual_seed(0)
    model = model_class(config)(config).eval()
    vary(model, family_of(config).gain_offset)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.uniform_(0.5, 1.0)
    return model.to(dtype)


@torch.no_grad()
def idle(model: Any, *layers: int, share: float = 0.0) -> None:
    """Let some layers leave the stream as it is, or write a share of what they do, or through gains of that size."""
    family = family_of(model.config)
    for layer in (text_model(model).layers[index] for index in layers):
        for half in (family.layer_mixer(layer), family.mlp):
            writers = (half.writer, "mlp.shared_expert.down_proj")
            if half.after:
                layer.get_parameter(f"{half.after}.weight").fill_(share - family.gain_offset)
            else:
                for name, parameter in layer.named_parameters():
                    if name.startswith(writers):
                        parameter.mul_(share)


def decoders(model: Any, folder: Path) -> list[Decoder]:
    """The same model in memory and on disk."""
    model.save_pretrained(folder / "base")
    attention = text_model(model).config._attn_implementation
    loading = {"device_map": {"": "disk"}, "offload_folder": folder / "scratch", "attn_implementation": attention}
    on_disk = Decoder(type(model).from_pretrained(folder / "base", **loading).eval())
    on_disk.scratch = folder / "scratch"
    return [Decoder(model), on_disk]


def picture(model_type: str) -> dict[str, torch.Tensor]:
    """What a vision-language model takes: a picture of a square and a disc, and a question of ten tokens around it."""
    rows, columns = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    square = ((rows > 3) & (rows < 12) & (columns > 4) & (columns < 15)).float()
    disc = ((rows - 19).square() + (columns - 18).square() < 36).float()
    pixels = torch.stack([square, disc, square - disc])[None]  # (1, 3, 28, 28)
    ids = torch.tensor([[0, 7, 5, 5, 5, 5, 8, 40, 41, 42]])
    inputs = {"input_ids": ids, "pixel_values": pixels}
    if model_type == "gemma3":
        return inputs | {"token_type_ids": (ids == 5).long()}
    if model_type == "mistral3":
        return inputs | {"image_sizes": torch.tensor([[28, 28]])}
    patches = pixels.unfold(2, 7, 7).unfold(3, 7, 7).flatten(2, 3).movedim(2, 1)  # (1, 16, 3, 7, 7)
    twice = torch.stack([patches, patches], dim=3).reshape(16, -1)  # a picture is a film of two
    grid = torch.tensor([[1, 4, 4]])
    return inputs | {"pixel_values": twice, "image_grid_thw": grid, "mm_token_type_ids": (ids == 5).int()}


@torch.no_grad()
def logits(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    """What a decoder predicts, (sequences B, tokens T) -> (B, T, vocab)."""
    *_, last = decoder.walk([ids])
    head = decoder.head()
    return head(last[0])


@torch.no_grad()
def fitted(
    decoder: Decoder,
    numbers: Sequence[int],
    states: Sequence[torch.Tensor],
    ridge: float = 0.1,
    rough: bool = False,
    streams: Sequence[torch.Tensor] | None = None,
) -> tuple[MadeLayer, DecoderLayer, Traces]:
    """The fit of a group of layers to what they do to some states, as a layer, and what it is fitted to.

    `streams` are those in front of the fused layer, where they are others.
    """
    layers = list(decoder.layers(numbers))
    tokens = sum(state.shape[:2].numel() for state in states) if rough else None
    traces = trace(decoder, layers, run_group(decoder, layers, states), streams, rough_tokens=tokens)
    fit = fit_group(decoder, layers, traces, streams or states, ridge=ridge, first=numbers[0])
    return fit, build_layer(decoder, fit.weights, fit.kind), traces


def averaged(
    decoder: Decoder, w_i: Weights, w_j: Weights, alignment: str, ratio: float = 0.61
) -> tuple[dict[str, torch.Tensor], dict[str, RowMatch]]:
    """The average of two layers, and how their rows were matched."""
    aligned, matches = align_layer(decoder, w_i, dict(w_j), alignment)
    return merge_weights(dict(w_i), aligned, ratio), matches


def measure_and_fuse(
    model: Any, config: FusionConfig, samples: CalibrationSamples | None, corpus: Corpus | None
) -> FusionReport:
    """Fuse a model in place."""
    decoder, tokenizer = Decoder(model), make_tokenizer()
    config = for_model(config, model.config)
    return fuse(decoder, tokenizer, config, measure(decoder, tokenizer, config, samples, corpus), base="tiny")


def calibration_text(given: Sequence[torch.Tensor], other: Sequence[torch.Tensor] = ()) -> CalibrationText:
    source = CalibrationInfo("", len(given), sum(map(len, given)))
    return CalibrationText([*given], [], [*other], source, [])


def measured_text(given: Sequence[torch.Tensor], other: Sequence[torch.Tensor] = ()) -> Measurements:
    """Measurements of nothing but calibration text."""
    return Measurements(0, [], {}, text=calibration_text(given, other))


def divergence(dense: torch.Tensor, fused: torch.Tensor) -> float:
    """KL(dense || fused) in nats a token, of logits (..., vocab)."""
    p, q = (of_model.double().log_softmax(-1) for of_model in (dense, fused))
    return float((p.exp() * (p - q)).sum(-1).mean())
