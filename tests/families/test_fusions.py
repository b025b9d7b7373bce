"""Fusing layers of every family: what stays, what is given back, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_texts, make_tokenizer, same, save_base
from tiny_models import LAYOUTS, averaged, fitted, idle, logits, tiny_config, tiny_model
from transformers import AutoModelForCausalLM

import lf_hf
from lf_hf import FusionConfig
from lf_hf.decoder.decoder import Decoder
from lf_hf.families import models
from lf_hf.families.table import FAMILIES, PROJECTIONS, attention_half, head_dim, mlp_half
from lf_hf.inputs.dry_run import plan_fusion
from lf_hf.measure.check import check_family_entry
from lf_hf.measure.dense import measure
from lf_hf.pipeline import fuse
from lf_hf.refit.bottom_up import fit_groups
from lf_hf.refit.layer_parts import build_layer, layer_weights
from lf_hf.settings import FITTING, METHODS
from lf_hf.text.calibration import CalibrationSamples, Corpus

SAMPLES = CalibrationSamples(make_texts(), "made up")
TEXT = Corpus({"made up": "\n".join(make_texts(200, seed=3))}, 0.3)
IDS = torch.randint(2, 320, (3, 19), generator=torch.Generator().manual_seed(1))
SETTINGS: dict[str, Any] = {"perplexity_tokens": 0, "calibration_tokens": 1024, "calibration_length": 32}
LONGER = torch.randint(2, 320, (60, 24), generator=torch.Generator().manual_seed(2))


def in_another_order(weights: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """A layer with its neurons, its heads and those that share a key-value head reordered, one parameter at a time."""
    neurons = torch.randperm(config.intermediate_size, generator=torch.Generator().manual_seed(5))
    kv_heads, channels = config.num_key_value_heads, head_dim(config)
    group = config.num_attention_heads // kv_heads
    key_values = [h * channels + c for h in reversed(range(kv_heads)) for c in range(channels)]
    queries = [h * channels + c for h in reversed(range(kv_heads * group)) for c in range(channels)]
    moved = dict(weights)
    for name, tensor in weights.items():
        if "gate_proj" in name or "up_proj" in name:
            moved[name] = tensor[neurons]
        elif name == "mlp.down_proj.weight":
            moved[name] = tensor[:, neurons]
        elif name == "self_attn.o_proj.weight":
            moved[name] = tensor[:, queries]
        elif "q_proj" in name or ("q_norm" in name and len(tensor) == len(queries)):
            moved[name] = tensor[queries]
        elif "k_proj" in name or "v_proj" in name or ("k_norm" in name and len(tensor) == len(key_values)):
            moved[name] = tensor[key_values]
    return moved


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_and_its_own_copy_in_another_order_average_to_the_layer(layout: str) -> None:
    model_type, overrides = LAYOUTS[layout]
    model = tiny_model(model_type, **overrides)
    decoder = Decoder(model)
    layer = decoder.layer(0)
    weights, kind = layer_weights(decoder, layer), decoder.family.layer_kind(layer)
    shuffled = in_another_order(weights, decoder.config)
    [state] = decoder.embed([IDS])
    with torch.no_grad():  # the copy computes the same, which is what makes it one
        expected = decoder.run_layer(layer, state)
        torch.testing.assert_close(decoder.run_layer(build_layer(decoder, shuffled, kind), state), expected)
        fused, matches = averaged(decoder, weights, shuffled, "neurons")
    built = build_layer(decoder, weights | fused, kind)
    torch.testing.assert_close(decoder.run_layer(built, state), expected, rtol=1e-5, atol=1e-5)
    symmetric = {axis.parameter for axis in decoder.family.symmetry}
    assert set(matches) == {name for name in PROJECTIONS if f"{name}.weight" in symmetric}
    assert all(match.cosine_after == pytest.approx(1) for match in matches.values())
    assert matches["mlp.down_proj"].rows_moved == matches["mlp.up_proj"].rows_moved > 0.5
    for name, tensor in fused.items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("active", "rough"), [(0, True), (1, False)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_and_an_idle_one_fuse_to_the_layer(layout: str, active: int, rough: bool) -> None:
    model_type, overrides = LAYOUTS[layout]
    model = tiny_model(model_type, **overrides)
    first = 2  # the pair is of two kinds where there are some
    idle(model, first + 1 - active)
    decoder = Decoder(model)
    kind, key_values = decoder.family.layer_kind(decoder.layer(first + active)), decoder.config.num_key_value_heads
    states = decoder.embed(decoder.make_batches(list(LONGER)))
    fit, fused, traces = fitted(decoder, (first, first + 1), states, ridge=1e-4, rough=rough)
    assert fit.entry.channels_kept == [48 * (active == 0), 48 * (active == 1)]
    assert fit.entry.heads_kept in (None, [key_values * (active == 0), key_values * (active == 1)])
    assert fit.kind == kind
    with torch.no_grad():
        found = decoder.run_layer(fused, states[0])
    assert float((found - traces.output[0]).norm() / traces.output[0].norm()) < 1e-3


@pytest.mark.parametrize("model_type", ["olmo2", "qwen3_5_text"])
def test_a_fit_leaves_the_dense_model_as_it_is(model_type: str) -> None:
    """Though a layer that is made has some of its tensors, and is trained."""
    model = tiny_model(model_type)
    before = copy.deepcopy(model)
    for _ in fit_groups(Decoder(model), [(3, 4)], list(LONGER), list(IDS), ridge=0.1):
        assert same(model, before)


OF_SEVERAL_KINDS = ["gemma3_text", "qwen3_5_text"]  # in the same order
WAYS = [
    {"method": method, "selection": selection}
    for method in METHODS
    for selection in ("last", "least_influence", "groups")
    if method != "healed" and (selection != "groups" or method in FITTING)
]


@pytest.mark.parametrize("model_type", OF_SEVERAL_KINDS)
def test_every_way_of_fusing_layers_of_several_kinds_runs_or_is_refused_first(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, refused = tiny_model(model_type), 0
    kinds = FAMILIES[model_type].config_kinds(dense.config)
    idle(dense, 2)  # so that it has the least influence; it has no neighbour of its kind
    measured = measure(Decoder(dense), make_tokenizer(), FusionConfig(1, **SETTINGS), SAMPLES, TEXT)
    for way in WAYS:
        model, config = copy.deepcopy(dense), FusionConfig(1, **SETTINGS | way)
        decoder = Decoder(model)
        pairs = itertools.pairwise(kinds[-2:] if config.selection == "last" else kinds[1:-1])
        alike = any(above == below for above, below in pairs)
        if config.averages and not alike:
            refused += 1
            with monkeypatch.context() as patch:
                patch.setattr(Decoder, "embed", lambda *_: pytest.fail("ran text"))
                with pytest.raises(ValueError, match="Only layers of one kind are averaged"):
                    fuse(decoder, make_tokenizer(), config, measured, base="tiny")
            continue
        report = fuse(decoder, make_tokenizer(), config, measured, base="tiny")
        assert report.parameters_after == model.num_parameters()
        assert report.layers_after == model.config.num_hidden_layers == len(model.model.layers) == 5
        assert torch.isfinite(logits(decoder, IDS)).all()
        if config.averages:
            assert all(kinds[i] == kinds[j] for i, j in report.pairs)
    assert 0 < refused < len(WAYS)


@pytest.mark.parametrize("model_type", OF_SEVERAL_KINDS)
def test_a_layer_that_takes_another_kind_is_of_that_kind_in_a_plain_checkpoint(model_type: str, tmp_path: Path) -> None:
    dense = tiny_model(model_type)
    idle(dense, 4)
    settings = SETTINGS | {"num_fusions": 1, "method": "refit", "selection": "last"}
    model = lf_hf.from_pretrained_fused(save_base(tmp_path / "base", dense), calibration=SAMPLES.texts, **settings)
    assert dense.config.layer_types[4] != model.config.layer_types[4]
    model.save_pretrained(tmp_path / "plain", plain=True)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(stock(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("method", "selection", "most"),
    [
        ("truncate", "last", 3),
        ("refit", "last", 3),
        ("truncate", "least_influence", 2),
        ("refit", "least_influence", 2),
        ("refit", "groups", 2),
    ],
)
def test_a_hybrid_keeps_a_layer_with_attention(method: str, selection: str, most: int, tmp_path: Path) -> None:
    """Caches of transformers count tokens by it. Where its first and its last layer have none, fewer layers fuse."""
    kinds = [f"{kind}_attention" for kind in ("linear", "linear", "full", "linear", "full", "linear", "linear")]
    settings = SETTINGS | {"num_fusions": most, "method": method, "selection": selection}
    dense = tiny_model("qwen3_5_text", num_hidden_layers=7, layer_types=kinds)
    base = save_base(tmp_path, dense)
    said = f"num_fusions must be 1 to {most} for a model of 7 layers .of which layer . and those .* has attention"
    with pytest.raises(ValueError, match=said):
        plan_fusion(base, FusionConfig(**settings | {"num_fusions": most + 1}), calibration=SAMPLES.texts)
    model = lf_hf.from_pretrained_fused(base, calibration=SAMPLES.texts, **settings)
    assert len(model.config.layer_types) == 7 - most and "full_attention" in model.config.layer_types


CHANGES: dict[str, tuple[str, str, Callable[[Any, Any], Any]]] = {
    "layer": ("decoder_layer", "forward", lambda _, states: states * 1.01),
    "logits": ("causal_lm", "forward", lambda _, found: type(found)(logits=found.logits * 1.01)),
    "parameter": ("decoder_layer", "__init__", lambda layer, _: layer.add_module("gate_proj", torch.nn.Linear(1, 1))),
}


@pytest.mark.parametrize("what", [*CHANGES, "mask"])
def test_a_family_that_computes_something_else_is_refused(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("gemma3_text", use_bidirectional_attention=True) if what == "mask" else tiny_config("llama")
    if what in CHANGES:
        owner, name, changed = CHANGES[what]
        of = getattr(FAMILIES["llama"], owner)
        method = getattr(of, name)
        monkeypatch.setattr(of, name, lambda self, *args, **kwargs: changed(self, method(self, *args, **kwargs)))
    with pytest.raises(ValueError, match=r"makes transformers \d+\.\d+\.\d+.* compute .* of a (Llama|Gemma3) model"):
        check_family_entry(config)


BEFORE = {"attention": attention_half(before="post_attention_layernorm"), "mlp": mlp_half(before="input_layernorm")}
AFTER = {
    "attention": attention_half(before=None, after="post_feedforward_layernorm"),
    "mlp": mlp_half(before=None, after="post_attention_layernorm"),
}
WRONG: list[tuple[str, dict[str, Any]]] = [
    ("cwm", {"layer_lists": ()}),
    ("ernie4_5", BEFORE),
    ("exaone4", AFTER),
    ("exaone4", {"layer_lists": ()}),
    ("gemma", {"gain_offset": 0.0}),
    ("gemma", {"scaled_embedding": False}),
    ("glm4", {"mlp": mlp_half(after="post_mlp_layernorm")}),
    ("glm4", {"attention": attention_half(after="post_mlp_layernorm")}),
    ("hunyuan_v1_dense", {"head_norms": None}),
    ("ministral", {"layer_lists": ()}),
    ("ministral3", {"window": ""}),
    ("olmo3", AFTER),
    ("olmo3", {"head_norms": None}),
    ("seed_oss", BEFORE),
]


@pytest.mark.parametrize(("model_type", "changes"), WRONG)
def test_a_family_with_a_wrong_entry_is_refused(
    model_type: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(model_type)
    check_family_entry(config)
    wrong = dataclasses.replace(FAMILIES[model_type], **changes)
    monkeypatch.setattr(models, "FAMILIES", {model_type: wrong})
    with pytest.raises(ValueError, match=f"of a {wrong.title} model in another way"):
        check_family_entry(config)
