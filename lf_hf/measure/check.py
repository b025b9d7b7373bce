"""Whether a model can be fused, found out before any long work."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.utils import logging

from lf_hf.decoder.decoder import Decoder
from lf_hf.families.models import (
    family_of,
    is_wrapper,
    layer_lists,
    model_class,
    set_config_layers,
    text_model,
)
from lf_hf.families.table import head_dim
from lf_hf.refit.fit import fit_group
from lf_hf.refit.layer_parts import build_layer
from lf_hf.refit.traces import run_group, trace
from lf_hf.runtime.numerics import is_finite

logger = logging.get_logger(__name__)
_TOKENS = 8
_TOLERANCE = 1e-4  # relative: a layer that differs is off by far more
_TINY: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 6, "vocab_size": 16}
_TINY |= {"linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 6, "linear_value_head_dim": 4}
_TINY |= {"moe_intermediate_size": 6, "shared_expert_intermediate_size": 6, "num_experts": 4, "num_local_experts": 4}
_TINY |= {
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "_experts_implementation": "eager",
}  # other kernels of experts have no float64
_TINY |= {"_attn_implementation": "eager", "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def check_model(decoder: Decoder) -> None:
    """Raise ValueError if the model cannot be fused."""
    check_family_entry(decoder.model_config)
    for name, parameter in decoder.named_parameters():
        if not is_finite(parameter):
            raise ValueError(f"{name} contains NaN or inf; repair the base checkpoint before fusing it.")


def check_family_entry(config: PretrainedConfig) -> None:
    """Compare a tiny model of the same config with what fusing takes its layers to compute; some milliseconds.

    Each layer is fitted to what it does itself, which has to give the same layer. The model is in float64, so that no
    setting of float32 products matters. Raises ValueError if anything differs, as with a config that changes layers in
    a way that the table does not know, or if there is no such family.
    """
    family = family_of(config)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(0)  # not those of GPUs, which are not put back
        model = _tiny_model(config).eval().double()
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.1 if name.endswith("bias") else parameter.shape[-1] ** -0.5)
            if "norm" in name:
                parameter.uniform_(0.5, 1.5).sub_(family.gain_offset)
        if family.scalar:
            for layer in text_model(model).layers:
                layer.get_buffer(family.scalar).uniform_(0.5, 1.5)
        for what, ours, theirs in _compared(Decoder(model)):
            if not (ours - theirs).norm() <= _TOLERANCE * theirs.norm():
                raise ValueError(
                    f"The config makes transformers {transformers.__version__} compute {what} of a {family.title} "
                    "model in another way than lf_hf's table of families says, so it would be fused wrongly; take "
                    f"another version of transformers or of the config ({family.decoder_layer.__module__} has the "
                    "layer)."
                )


def _tiny_model(config: PretrainedConfig) -> Any:
    """A model with a decoder of tiny widths, and a layer of each kind; a vision tower is without memory."""
    tiny = copy.deepcopy(config)
    text: Any = tiny.get_text_config()
    _shrink(text)
    if not is_wrapper(config):
        return model_class(tiny)(tiny)
    with torch.device("meta"):
        model = model_class(tiny)(tiny)
    model.set_decoder(type(text_model(model))(text))
    model.set_output_embeddings(nn.Linear(text.hidden_size, text.vocab_size, bias=False))
    return model


def _shrink(config: PretrainedConfig) -> None:
    """Give a config tiny widths, and a layer of each kind, also of kinds that the family's entry does not name."""
    lists = layer_lists(config).values()
    kinds = [[values[n] for values in lists] for n in range(config.num_hidden_layers)]
    widest = max(head_dim(config, kind) for kind in family_of(config).config_kinds(config))
    changes = _TINY | {"hidden_size": 2 * widest}
    if getattr(config, "sliding_window", None) is not None:
        changes["sliding_window"] = _TOKENS // 2
    set_config_layers(config, [n for n, kind in enumerate(kinds) if kind not in kinds[:n]])
    of_layers = config.to_dict().get("per_layer_config") or {}
    config.per_layer_config = None
    config.update(changes)
    own = {number: {key: changes.get(key, value) for key, value in of.items()} for number, of in of_layers.items()}
    config.per_layer_config = own or None


def _compared(decoder: Decoder) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What is compared, what we compute, and what the model does."""
    ids = torch.randint(decoder.config.vocab_size, (1, _TOKENS))
    states = torch.randn(1, _TOKENS, decoder.config.hidden_size, dtype=torch.float64)
    embedded = text_model(decoder.model).embed_tokens(ids)
    yield "the embeddings", decoder.embed([ids])[0], decoder.family.first_states(decoder.config, embedded)
    for layer in text_model(decoder.model).layers:
        if unknown := decoder.family.unpacked(layer).keys() - decoder.family.parameter_names:
            yield f"a layer with {min(unknown)}", torch.zeros(1), torch.ones(1)
        before = [states.clone()]
        traces = trace(decoder, [layer], run_group(decoder, [layer], [states]), before)
        fit = fit_group(decoder, [layer], traces, before, ridge=1.0)
        expected = decoder.run_layer(layer, states)
        yield "a layer", traces.output[0], expected
        yield "a layer's parts", decoder.run_layer(build_layer(decoder, fit.weights, fit.kind), states), expected
    *_, last = decoder.walk([ids])
    head = decoder.head()
    yield "the predictions", head(last[0]), decoder.model(ids).logits
