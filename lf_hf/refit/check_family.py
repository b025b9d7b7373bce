"""Whether layers compute what the table of families says, tried out before any long work."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig

from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.families import family_of, head_dim
from lf_hf.refit.group import fit_group
from lf_hf.refit.layer_parts import build_layer, layer_weights
from lf_hf.refit.states import StateStore, trace

_TOKENS = 8
_TOLERANCE = 1e-4  # relative: a layer that differs is off by far more
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_TINY: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 6, "vocab_size": 16}
_TINY |= {"_attn_implementation": "eager", **dict.fromkeys(_SPECIAL_TOKENS)}


def check_computes(config: PretrainedConfig) -> None:
    """Compare a tiny model of the same config with what fusing takes its layers to compute; some milliseconds.

    Each layer is fitted to what it does itself, which has to give the same layer. The model is in float64, so that no
    setting of float32 products matters.

    Raises
    ------
    ValueError
        If anything differs, as with a config that changes layers in a way that the table does not know, or if there
        is no such family.
    """
    family = family_of(config)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(0)  # not those of GPUs, which are not put back
        model = family.causal_lm(_tiny(config)).eval().double()
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.1 if name.endswith("bias") else parameter.shape[-1] ** -0.5)
            if "norm" in name:
                parameter.uniform_(0.5, 1.5).sub_(family.gain_offset)
        for what, ours, theirs in _compared(ModelDecoder(model)):
            if not (ours - theirs).norm() <= _TOLERANCE * theirs.norm():
                raise ValueError(
                    f"The config makes transformers {transformers.__version__} compute {what} of a {family.title} "
                    "model in another way than lf_hf's table of families says, so it would be fused wrongly; take "
                    f"another version of transformers or of the config ({family.decoder_layer.__module__} has the "
                    "layer)."
                )


def _tiny(config: PretrainedConfig) -> Any:
    """The config with tiny widths, and a layer of each kind."""
    tiny, family = copy.deepcopy(config), family_of(config)
    kinds = family.config_kinds(config)
    numbers = [n for n, kind in enumerate(kinds) if kind not in kinds[:n]]
    changes = _TINY | {name: [kinds[n][name] for n in numbers] for name in family.layer_lists}
    changes |= {"num_hidden_layers": len(numbers), "hidden_size": 2 * head_dim(config)}
    if getattr(config, "sliding_window", None) is not None:
        changes["sliding_window"] = _TOKENS // 2
    for name, value in changes.items():
        setattr(tiny, name, value)
    return tiny


def _compared(decoder: ModelDecoder) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What is compared, what we compute, and what the model does."""
    ids = torch.randint(decoder.config.vocab_size, (1, _TOKENS))
    states = torch.randn(1, _TOKENS, decoder.config.hidden_size, dtype=torch.float64)
    for layer in decoder.model.model.layers:
        if unknown := layer_weights(decoder, layer).keys() - decoder.family.parameters:
            yield f"a layer with {min(unknown)}", torch.zeros(1), torch.ones(1)
        with StateStore() as store:
            traces, before = trace(decoder, [layer], [states], store), [states.clone()]
            fit = fit_group(decoder, [layer], traces, before, store, refit="projections", ridge=1.0)
        expected = decoder.run_layer(layer, states)
        yield "a layer", traces.output[0], expected
        yield "a layer's parts", decoder.run_layer(build_layer(decoder, fit.weights, fit.kind), states), expected
    *_, last = decoder.walk([ids])
    with decoder.head() as head:
        yield "the predictions", head(last[0]), decoder.model(ids).logits
