"""Layers of every family, against transformers' own forward: through the decoder interface, changed and fused."""

import copy
import dataclasses
import itertools
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import dry_run, make_llama, make_texts, make_tokenizer, save_base
from tiny_models import LAYOUTS, MIXTURES, averaged, decoders, fitted, idle, logits, tiny_config, tiny_model
from transformers import AutoModelForCausalLM

import lf_hf
from lf_hf import FusionConfig
from lf_hf.decoder.decoder import Decoder
from lf_hf.families import models
from lf_hf.families.models import MODEL_TYPES, family_of, text_model
from lf_hf.families.table import FAMILIES, PROJECTIONS, Family, attention_half, head_dim, mlp_half, of_kind
from lf_hf.measure.check import check_family_entry
from lf_hf.measure.dense import measure
from lf_hf.measure.generating import continue_prompts, generate
from lf_hf.pipeline.fusion import for_model
from lf_hf.pipeline.run import fuse
from lf_hf.refit.layer_parts import build_layer
from lf_hf.settings import METHODS
from lf_hf.text.calibration import CalibrationSamples, Corpus

SAMPLES = CalibrationSamples(make_texts(), "made up")
TEXT = Corpus({"made up": "\n".join(make_texts(200, seed=3))}, 0.3)
IDS = torch.randint(2, 320, (3, 19), generator=torch.Generator().manual_seed(1))
SETTINGS: dict[str, Any] = {"perplexity_tokens": 0, "calibration_tokens": 1024, "calibration_length": 32}
LONGER = torch.randint(2, 320, (60, 24), generator=torch.Generator().manual_seed(2))
REPRESENTATIVE = ["llama", "gemma3_text", "qwen3_5_text", "mixtral"]
WITHOUT_EXPERTS = [
    layout for layout, (kind, given) in LAYOUTS.items() if not family_of(tiny_config(kind, **given)).mlp.experts
]


def in_another_order(weights: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """A layer with its neurons, its heads and those that share a key-value head reordered, one parameter at a time."""
    neurons = torch.randperm(config.intermediate_size, generator=torch.Generator().manual_seed(5))
    kv_heads, channels = config.num_key_value_heads, head_dim(config, {})
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


@pytest.mark.parametrize("layout", WITHOUT_EXPERTS)
def test_a_layer_and_its_own_copy_in_another_order_average_to_the_layer(layout: str) -> None:
    model_type, overrides = LAYOUTS[layout]
    model = tiny_model(model_type, **overrides)
    decoder = Decoder(model)
    layer = decoder.layer(0)
    weights, kind = decoder.family.unpacked(layer), decoder.family.layer_kind(layer)
    shuffled = in_another_order(weights, of_kind(decoder.config, kind))
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
    torch.testing.assert_close(fused, {name: weights[name] for name in fused}, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("layout", "active", "rough"),
    [*product(LAYOUTS, [1], [False]), *product(REPRESENTATIVE, [0], [True])],
)
def test_a_layer_and_an_idle_one_fuse_to_the_layer(layout: str, active: int, rough: bool) -> None:
    model_type, overrides = LAYOUTS[layout]
    model = tiny_model(model_type, **overrides)
    first = 2  # the pair is of two kinds where there are some
    idle(model, first + 1 - active)
    decoder = Decoder(model)
    kind = decoder.family.layer_kind(decoder.layer(first + active))
    key_values = decoder.family.num_key_heads(decoder.config, kind)
    states = decoder.embed(decoder.make_batches(list(LONGER)))
    fit, fused, traces = fitted(decoder, (first, first + 1), states, ridge=1e-4, rough=rough)
    width = 8 * 16 + 10 * bool(decoder.family.shared_width(decoder.config)) if model_type in MIXTURES else 48
    width += 8 * 16 * (layout == "experts beside an MLP")
    assert fit.entry.channels_kept == [width * (active == 0), width * (active == 1)]
    assert fit.entry.heads_kept in (None, [key_values * (active == 0), key_values * (active == 1)])
    assert fit.kind == kind
    with torch.no_grad():
        found = decoder.run_layer(fused, states[0])
    assert float((found - traces.output[0]).norm() / traces.output[0].norm()) < 1e-3


@pytest.mark.parametrize(
    ("model_type", "pair"), [("llama", (2, 3)), ("gemma2", (1, 3)), ("gpt_oss", (1, 3)), ("qwen3_5_text", (0, 1))]
)
def test_heads_of_two_layers_stand_side_by_side(model_type: str, pair: tuple[int, int]) -> None:
    """Of two key heads that each layer has the first one writes only in the first layer, and the second in the other.

    They write so little that both layers read the same stream.
    """
    model = tiny_model(model_type)
    idle(model, *pair, share=1e-4)
    decoder = Decoder(model)
    for idle_head, number in zip((1, 0), pair, strict=True):
        layer = decoder.layer(number)
        writer = layer.get_parameter(f"{decoder.family.layer_mixer(layer).writer}.weight").detach()
        writer.chunk(2, dim=1)[idle_head].zero_()
    states = decoder.embed(decoder.make_batches(list(LONGER)))
    fit, _, _ = fitted(decoder, pair, states, ridge=1e-4)
    assert fit.entry.heads_kept == [1, 1]
    assert fit.entry.attention_error is not None
    assert fit.entry.attention_error < (0.05 if decoder.family.mlp.after else 1e-4)  # a norm has a size for each token


WAYS = [
    {"method": method, "selection": selection}
    for method in METHODS
    for selection in ("last", "least_influence", "groups")
    if method != "healed" and selection in METHODS[method].selections
]


def test_every_way_of_fusing_layers_of_several_kinds_runs_or_is_refused_first() -> None:
    dense, refused = tiny_model("gemma3_text"), 0
    kinds = FAMILIES["gemma3_text"].config_kinds(dense.config)
    idle(dense, 2)  # so that it has the least influence; it has no neighbour of its kind
    measured = measure(Decoder(dense), make_tokenizer(), FusionConfig(1, **SETTINGS), SAMPLES, TEXT)
    for way in WAYS:
        model, config = copy.deepcopy(dense), FusionConfig(1, **SETTINGS | way)
        decoder = Decoder(model)
        pairs = itertools.pairwise(kinds[-2:] if config.selection == "last" else kinds[1:-1])
        alike = any(above == below for above, below in pairs)
        if config.averages and not alike:
            refused += 1
            with pytest.raises(ValueError, match="Only layers of one kind are averaged"):
                for_model(config, dense.config)
            continue
        report = fuse(decoder, make_tokenizer(), config, measured, base="tiny")
        assert report.parameters_after == model.num_parameters()
        assert report.layers_after == model.config.num_hidden_layers == len(model.model.layers) == 5
        assert torch.isfinite(logits(decoder, IDS)).all()
        if config.averages:
            assert all(kinds[i] == kinds[j] for i, j in report.pairs)
    assert 0 < refused < len(WAYS)


def test_a_layer_that_takes_another_kind_is_of_that_kind_in_a_plain_checkpoint(tmp_path: Path) -> None:
    dense = tiny_model("qwen3_5_text")
    idle(dense, 4)
    settings = SETTINGS | {"num_fusions": 1, "method": "refit", "selection": "last"}
    model = lf_hf.from_pretrained_fused(save_base(tmp_path / "base", dense), calibration=SAMPLES.texts, **settings)
    assert dense.config.layer_types[4] != model.config.layer_types[4]
    model.save_pretrained(tmp_path / "plain", plain=True)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(stock(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(("selection", "most"), [("last", 3), ("least_influence", 2)])
def test_a_hybrid_keeps_a_layer_with_attention(selection: str, most: int, tmp_path: Path) -> None:
    """Caches of transformers count tokens by it. Where its first and its last layer have none, fewer layers fuse."""
    kinds = [f"{kind}_attention" for kind in ("linear", "linear", "full", "linear", "full", "linear", "linear")]
    settings = SETTINGS | {"num_fusions": most, "method": "truncate", "selection": selection}
    dense = tiny_model("qwen3_5_text", num_hidden_layers=7, layer_types=kinds)
    base = save_base(tmp_path, dense)
    said = f"num_fusions must be 1 to {most} for a model of 7 layers .of which layer . and those .* has attention"
    with pytest.raises(ValueError, match=said):
        dry_run(base, FusionConfig(**settings | {"num_fusions": most + 1}), calibration=SAMPLES.texts)
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


def with_norms_swapped(family: Family) -> dict[str, Any]:
    """A wrong entry for any family: attention has the norms of the MLP, and the MLP those of attention."""
    attention, mlp = family.attention, family.mlp
    return {
        "attention": dataclasses.replace(attention, before=mlp.before, after=mlp.after),
        "mlp": dataclasses.replace(mlp, before=attention.before, after=attention.after),
    }


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("cwm", {"layer_lists": ()}),
    ("exaone4", {"layer_lists": ()}),
    ("gemma", {"gain_offset": 0.0}),
    ("gemma", {"scaled_embedding": False}),
    ("glm4", {"mlp": mlp_half(after="post_mlp_layernorm")}),
    ("glm4", {"attention": attention_half(after="post_mlp_layernorm")}),
    ("hunyuan_v1_dense", {"head_norms": None}),
    ("ministral", {"layer_lists": ()}),
    ("ministral3", {"window": ""}),
    ("olmo3", {"head_norms": None}),
    *((name, with_norms_swapped(family)) for name, family in FAMILIES.items() if name in MODEL_TYPES),
]


@pytest.mark.parametrize(("model_type", "changes"), WRONG)
def test_a_wrong_entry_is_refused(model_type: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(model_type)
    check_family_entry(config)
    wrong = dataclasses.replace(FAMILIES[model_type], **changes)
    monkeypatch.setattr(models, "FAMILIES", {model_type: wrong})
    with pytest.raises(ValueError, match=f"of a {wrong.title} model in another way"):
        check_family_entry(config)


@pytest.mark.parametrize(
    ("model_type", "attention"), [*product(MODEL_TYPES, ["eager"]), *product(REPRESENTATIVE, ["sdpa"])]
)
def test_the_decoder_gives_the_models_own_states_and_logits(model_type: str, attention: str, tmp_path: Path) -> None:
    model = tiny_model(model_type, attn_implementation=attention)
    with torch.no_grad():
        expected = model(IDS, output_hidden_states=True)
    for decoder in decoders(model, tmp_path):
        assert decoder.config._attn_implementation == attention
        *states, _ = (state for [state] in decoder.walk([IDS]))
        for found, after in zip(states, expected.hidden_states[1:-1], strict=True):  # the last is after the final norm
            torch.testing.assert_close(found, after, rtol=0, atol=1e-5)
        torch.testing.assert_close(logits(decoder, IDS), expected.logits, rtol=0, atol=1e-5)


# A window in some layers, rotary embeddings of two kinds and of none, queries that grow with position, and images.
# And experts whose config asks for what balances them in training.
CONTINUED = [LAYOUTS[layout] for layout in ("gemma3_text", "smollm3", "ministral3", "qwen3_vl", "eager attention")]


@pytest.mark.parametrize(("model_type", "overrides"), [*CONTINUED, ("mixtral", {"output_router_logits": True})])
def test_text_is_continued_as_by_the_models_own_generation(
    model_type: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_model(model_type, **overrides)
    prompts = [IDS[0], IDS[1, :4], IDS[2, :11]]
    expected = []
    for prompt in prompts:
        ids = prompt[None]
        for _ in range(8):  # without a cache, and by itself
            with torch.no_grad():
                ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        expected.append(ids[0, len(prompt) :].tolist())
    for decoder in decoders(model, tmp_path):
        assert [added.tolist() for added in continue_prompts(decoder, prompts, 8)] == expected


@pytest.mark.parametrize(("model_type", "first"), [("llama", [5]), ("gemma3_text", [])])
def test_a_model_writes_text_that_it_finds_likely(model_type: str, first: list[int], tmp_path: Path) -> None:
    """The same in memory and on disk; each token is the one at which its draw falls in the model's own predictions.

    Every other text goes on with any token after what begins a text, and none has a special token further on.
    """
    model = tiny_model(model_type, eos_token_id=[1, 7], pad_token_id=None)
    written, other = (
        torch.stack(generate(decoder, 4, 14, 3, prefix=first, special=[9])) for decoder in decoders(model, tmp_path)
    )
    assert torch.equal(written, other)
    random = torch.Generator().manual_seed(3)
    starts = torch.randint(320, (4,), generator=random)
    drawn, is_drawn = torch.rand(4, 13, generator=random), torch.ones(4, 13, dtype=torch.bool)
    assert (written[::2, 0] == (5 if first else model.config.bos_token_id)).all()
    assert torch.equal(written[1::2, len(first)], starts[1::2])
    if first:
        assert (written[:, 0] == 5).all()
        is_drawn[1::2, 0] = False
    with torch.no_grad():
        found = model(written).logits[:, :-1]
    found[..., [0, 1, 7, 9]] = -torch.inf
    ends = found.softmax(-1).cumsum(-1)  # (4, 13, vocab)
    token = written[:, 1:, None]
    above, below = ends.gather(-1, token)[..., 0], ends.gather(-1, (token - 1).clamp(min=0))[..., 0]
    assert bool(((drawn <= above + 1e-4) & (drawn >= below - 1e-4))[is_drawn].all())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_layers_that_are_removed_leave_the_config_of_those_that_stay(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    config = text_model(model).config
    lists = {name: getattr(config, name) for name in family_of(config).layer_lists}
    ids = IDS[:1]
    shorter = copy.deepcopy(model)
    for index in (3, 1):
        del text_model(shorter).layers[index]
    for decoder in decoders(model, tmp_path):
        for index in (3, 1):
            decoder.remove(index)
        assert decoder.config.num_hidden_layers == 4
        for name, values in lists.items():
            assert getattr(decoder.config, name) == [values[n] for n in (0, 2, 4, 5)]
        # transformers makes the same model of that config.
        fresh = type(model)(copy.deepcopy(decoder.model_config)).eval()
        fresh.load_state_dict(shorter.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(logits(decoder, ids), fresh(ids).logits, rtol=0, atol=1e-5)


THREE, UP = torch.tensor([[9, 31, 5]]), "mlp.up_proj.weight"


def test_predictions_that_overflow_are_named() -> None:
    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight[5] = torch.inf
    with pytest.raises(ValueError, match=r"predictions contain NaN or inf.*use a dtype of wider range"):
        generate(Decoder(model), 2, 3, seed=0)
