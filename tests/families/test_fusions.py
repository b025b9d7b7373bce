"""Fusing layers of every family: what stays, what is given back, and what is refused."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_texts, make_tokenizer
from tiny_models import decoders, logits, tiny_config, tiny_model

from lf_hf import FusionConfig, pipeline
from lf_hf.decoder.generating import continuations
from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.families import FAMILIES, head_dim
from lf_hf.measure import measure
from lf_hf.pipeline import fuse
from lf_hf.refit.check_family import check_computes
from lf_hf.refit.group import fit_group
from lf_hf.refit.layer_parts import build_layer, layer_weights
from lf_hf.refit.states import StateStore
from lf_hf.refit.traces import trace
from lf_hf.settings import METHODS
from lf_hf.stages.fusion import average_layers
from lf_hf.text.calibration import CalibrationSamples, Corpus

SAMPLES = CalibrationSamples(make_texts(), "made up")
TEXT = Corpus(["\n".join(make_texts(200, seed=3))], "made up", 0.3)
IDS = torch.randint(2, 320, (3, 19), generator=torch.Generator().manual_seed(1))
LONGER = torch.randint(2, 320, (60, 24), generator=torch.Generator().manual_seed(2))


def settings(**values: Any) -> FusionConfig:
    return FusionConfig(
        **{"num_fusions": 2, "perplexity_tokens": 0, "calibration_tokens": 1024, "calibration_length": 32} | values
    )


def shuffle(model: Any, source: int, target: int) -> None:
    """Make a layer one of another place with its neurons, heads and those that share a key-value head reordered.

    Written out by hand for each parameter that a layer of any family has.
    """
    config, state = model.config, model.model.layers[source].state_dict()
    random = torch.Generator().manual_seed(5)
    neurons = torch.randperm(config.intermediate_size, generator=random)
    heads, kv_heads, channels = config.num_attention_heads, config.num_key_value_heads, head_dim(config)
    group = heads // kv_heads
    kv = list(reversed(range(kv_heads)))
    query = [b * group + n for b in kv for n in reversed(range(group))]
    rows = {
        name: [h * channels + c for h in which for c in range(channels)] for name, which in (("q", query), ("k", kv))
    }
    for name, tensor in state.items():
        if "gate_up" in name:
            state[name] = torch.cat([part[neurons] for part in tensor.chunk(2)])
        elif "gate_proj" in name or "up_proj" in name:
            state[name] = tensor[neurons]
        elif name == "mlp.down_proj.weight":
            state[name] = tensor[:, neurons]
        elif name == "self_attn.o_proj.weight":
            state[name] = tensor[:, rows["q"]]
        elif "qkv" in name:
            q, k, v = tensor.split([heads * channels, kv_heads * channels, kv_heads * channels])
            state[name] = torch.cat([q[rows["q"]], k[rows["k"]], v[rows["k"]]])
        elif "q_proj" in name or ("q_norm" in name and len(tensor) == heads * channels):
            state[name] = tensor[rows["q"]]
        elif "k_proj" in name or "v_proj" in name or ("k_norm" in name and len(tensor) == kv_heads * channels):
            state[name] = tensor[rows["k"]]
    model.model.layers[target].load_state_dict(state)


def idle(model: Any, index: int) -> None:
    """Let a layer leave the stream as it is."""
    layer, family = model.model.layers[index], FAMILIES[model.config.model_type]
    with torch.no_grad():
        for half in (family.attention, family.mlp):
            if half.after:
                layer.get_parameter(f"{half.after}.weight").fill_(-family.gain_offset)
            for kind in ("weight", "bias"):
                parameter = layer.get_submodule(half.writer)._parameters.get(kind)
                if parameter is not None and not half.after:
                    parameter.zero_()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_layer_and_its_own_copy_in_another_order_average_to_the_layer(model_type: str) -> None:
    model = tiny_model(model_type)
    decoder = ModelDecoder(model)
    layer, other = model.model.layers[0], model.model.layers[1]
    shuffle(model, 0, 1)
    weights, shuffled = layer_weights(decoder, layer), layer_weights(decoder, other)
    kind = decoder.family.layer_kind(layer)
    [state] = decoder.embed([IDS])
    with torch.no_grad():  # the copy computes the same, which is what makes it one
        expected = decoder.run_layer(layer, state)
        torch.testing.assert_close(decoder.run_layer(build_layer(decoder, shuffled, kind), state), expected)
        fused, _ = average_layers(
            weights,
            shuffled,
            ratio=0.61,
            alignment="neurons",
            head_dim=head_dim(model.config),
            symmetry=decoder.family.symmetry,
        )
    built = build_layer(decoder, weights | fused, kind)
    torch.testing.assert_close(decoder.run_layer(built, state), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("active", "refit"), [(0, "down_proj"), (1, "projections")])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_layer_and_an_idle_one_fuse_to_the_layer(model_type: str, active: int, refit: str) -> None:
    model = tiny_model(model_type)
    first = 2  # the pair is of two kinds where there are some
    idle(model, first + 1 - active)
    decoder = ModelDecoder(model)
    layers = [model.model.layers[n] for n in (first, first + 1)]
    states = decoder.embed(decoder.batches(list(LONGER)))
    traces = trace(decoder, layers, states, StateStore())
    fit = fit_group(decoder, [*layers], traces, states, StateStore(), refit=refit, ridge=1e-4)
    assert fit.channels_kept == [48 * (active == 0), 48 * (active == 1)]
    assert fit.heads_kept in (None, [2 * (active == 0), 2 * (active == 1)])
    assert fit.kind == decoder.family.layer_kind(layers[active])
    with torch.no_grad():
        found = decoder.run_layer(build_layer(decoder, fit.weights, fit.kind), states[0])
    assert float((found - traces.output[0]).norm() / traces.output[0].norm()) < 1e-3


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])  # of the others, files are compared
def test_low_memory_gives_the_model_of_the_usual_way_and_its_config_makes_it_again(
    model_type: str, tmp_path: Path
) -> None:
    """Bit for bit; and what is written is what transformers itself computes, with a cache and without."""
    model = tiny_model(model_type)
    found = []
    for decoder in decoders(model, tmp_path):
        if isinstance(decoder, ModelDecoder):
            decoder = ModelDecoder(model, keep_originals=True)
        fuse(decoder, make_tokenizer(), settings(method="refit"), None, TEXT, base="tiny")
        found.append(decoder)
    in_memory, on_disk = found
    tensors = dict(in_memory.named_parameters())
    for name, tensor in on_disk.named_parameters():
        assert torch.equal(tensor, tensors[name]), name
    for name in FAMILIES[model_type].layer_lists:
        assert getattr(in_memory.config, name) == getattr(on_disk.config, name)
    fresh = type(model)(copy.deepcopy(in_memory.config)).eval()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = fresh(IDS).logits
        with_cache = fresh.generate(IDS[:1], max_new_tokens=6, min_new_tokens=6, do_sample=False)
        without = fresh.generate(IDS[:1], max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(with_cache, without)
    for decoder in found:
        torch.testing.assert_close(logits(decoder, IDS), expected, rtol=0, atol=1e-5)
    written = [continuations(decoder, [IDS[0], IDS[1, :5]], 6) for decoder in found]
    for ours, of_disk in zip(*written, strict=True):
        assert torch.equal(ours, of_disk)


WAYS = [
    *(
        {"method": method, "selection": selection}
        for method in METHODS
        if method != "healed"
        for selection in FusionConfig.known["selection"].choices
    ),
    {"alignment": "neurons", "refit": "down_proj"},
    {"method": "refit", "refit": "none"},
    {"method": "refit", "refit": "down_proj", "selection": "last"},
]


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_every_way_of_fusing_runs_or_is_refused_before_any_work(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, refused = tiny_model(model_type), []
    kinds = [FAMILIES[model_type].config_kind(dense.config, n) for n in range(6)]
    apart = any(kind != kinds[0] for kind in kinds)
    measured = measure(ModelDecoder(dense), make_tokenizer(), settings(), SAMPLES, TEXT)
    for way in WAYS if apart else WAYS[::3]:  # where layers are alike, pairs do not depend on the family
        model, config = copy.deepcopy(dense), settings(**way)
        decoder = ModelDecoder(model, keep_originals=True)
        pairs = itertools.pairwise(kinds[-3:] if config.selection == "last" else kinds[1:-1])
        alike = sum(above == below for above, below in pairs)
        if config.merge == "average" and (alike < 2 or (apart and config.selection == "groups")):
            refused.append(way)
            with monkeypatch.context() as patch:
                patch.setattr(pipeline, "measure", lambda *_: pytest.fail("ran text"))
                with pytest.raises(ValueError, match="Only layers of one kind are averaged"):
                    fuse(decoder, make_tokenizer(), config, SAMPLES, TEXT, base="tiny")
            continue
        report = fuse(decoder, make_tokenizer(), config, None, None, base="tiny", measurements=measured)
        assert report.layers_after == model.config.num_hidden_layers == len(model.model.layers) == 4
        assert torch.isfinite(logits(decoder, IDS)).all()
        if config.merge == "average":
            assert all(kinds[step.layers_i[0]] == kinds[step.layers_j[0]] for step in report.steps)
    assert bool(refused) == apart


@pytest.mark.parametrize("model_type", FAMILIES)
def test_each_family_computes_what_the_table_says(model_type: str) -> None:
    check_computes(tiny_config(model_type))


@pytest.mark.parametrize("what", ["layer", "mask", "logits", "parameter"])
def test_a_family_that_computes_something_else_is_refused(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a later version of transformers may, for a new key of the config."""
    config, family = tiny_config("llama"), FAMILIES["llama"]
    layer, lm = family.decoder_layer, family.causal_lm
    forward, init = layer.forward, layer.__init__
    if what == "layer":
        monkeypatch.setattr(layer, "forward", lambda self, states, **kwargs: forward(self, states, **kwargs) * 1.01)
    elif what == "logits":
        of_lm = lm.forward

        def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
            found = of_lm(self, *args, **kwargs)
            found.logits = found.logits * 1.01
            return found

        monkeypatch.setattr(lm, "forward", scaled)
    elif what == "parameter":

        def gated(self: Any, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            self.self_attn.gate_proj = torch.nn.Linear(1, 1)

        monkeypatch.setattr(layer, "__init__", gated)
    else:
        config = tiny_config("gemma3_text", use_bidirectional_attention=True)
    with pytest.raises(ValueError, match=r"makes transformers \d+\.\d+\.\d+.* compute .* of a (Llama|Gemma3) model"):
        check_computes(config)
