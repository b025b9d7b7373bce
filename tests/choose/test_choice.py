"""Which groups of layers become one."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import SEED, examples
from conftest import make_llama, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import count_removed, divergence, fitted, measured_text

from lf_hf import FusionConfig, FusionReport
from lf_hf.choose.choice import Choice, choose, least_influence_groups, try_sets
from lf_hf.choose.costs import GroupCosts, costs_on, split_text
from lf_hf.decoder.decoder import Decoder, Groups
from lf_hf.measure.dense import Measurements
from lf_hf.pipeline import fuse, fuse_layers
from lf_hf.runtime.clock import Clock

TEXT = [torch.randint(0, 64, (40,), generator=torch.Generator().manual_seed(n)) for n in range(12)]


def idle(model: Any, *layers: int) -> Any:
    with torch.no_grad():
        for index in layers:
            for projection in (model.model.layers[index].self_attn.o_proj, model.model.layers[index].mlp.down_proj):
                projection.weight.zero_()
    return model


def fused(model: Any, num_fusions: int) -> FusionReport:
    config = FusionConfig(num_fusions, "refit", perplexity_tokens=0)
    text = [torch.randint(0, 320, (64,), generator=torch.Generator().manual_seed(n)) for n in range(32)]
    measured = measured_text(text)
    return fuse(Decoder(model), make_tokenizer(), config, measured, base="")


@given(SEED, st.integers(1, 7), st.sampled_from([1, 2, 3]))
@examples(40)
def test_the_layers_of_least_influence_join_the_layer_below(seed: int, num_fusions: int, period: int) -> None:
    """But for the first and the last layer, and for those of another kind than the layer below."""
    influences = torch.rand(10, generator=torch.Generator().manual_seed(seed)).tolist()
    kinds = [{"window": number // period} for number in range(10)]
    able = [number for number in range(2, 9) if kinds[number] == kinds[number - 1]]
    for given_kinds, candidates in ((None, range(2, 9)), (kinds, able)):
        least = sorted(candidates, key=lambda number: influences[number])[:num_fusions]
        groups = least_influence_groups(influences, num_fusions, range(1, 9), given_kinds)
        joined = [number for first, last in groups for number in range(first + 1, last + 1)]
        assert joined == sorted(least)
        assert all(below[1] < above[0] for below, above in itertools.pairwise(groups))


def test_layers_that_do_nothing_are_found() -> None:
    model = idle(make_llama(num_hidden_layers=8), 3, 4, 6)
    dense = copy.deepcopy(model)
    fused(model, 3)
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=0, atol=0.05)


def test_a_layer_stands_in_place_of_a_fit_that_is_worse_than_it() -> None:
    """Without a layer that does nothing the one before it is exact, as no fit is."""
    model = idle(make_llama(), 2)
    dense = copy.deepcopy(model)
    report = fused(model, 1)
    [fitted] = report.fused_layers
    [other] = set(fitted.layers) - {2}
    assert fitted.layer_instead == other and fitted.shares[fitted.layers.index(other)] == 1
    assert fitted.held_out_error == pytest.approx(0, abs=1e-9) and fitted.error_after is None  # its own, not the fit's
    assert any(f"Layer {other} stands for layers {fitted.layers[0]} to" in note for note in report.notes)
    for name, weight in model.model.layers[fitted.layers[0]].named_parameters():
        assert torch.equal(weight, dense.model.layers[other].get_parameter(name))


def choice(model: Any, num_fusions: int, measured: Measurements) -> Choice:
    return choose(Decoder(model), FusionConfig(num_fusions, "refit"), measured)


@torch.no_grad()
def test_groups_whose_fits_overflow_are_not_taken() -> None:
    model = make_llama(num_hidden_layers=7, dtype=torch.float16)
    for layer in model.model.layers:  # nothing is in channel 0
        model.model.embed_tokens.weight[:, 0] = layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0
    layer = model.model.layers[3]  # folded into each other they overflow
    layer.post_attention_layernorm.weight[0] = layer.mlp.up_proj.weight[:, 0] = 500
    measured = measured_text(TEXT)
    found = choice(model, 2, measured)
    assert all(math.isinf(cost) == (first <= 3 <= last) for (first, last), cost in found.costs.items())
    assert all(math.isfinite(found.costs[group]) for group in found.groups)
    with pytest.raises(ValueError, match="No groups of layers that leave 4 fewer can be computed with"):
        choice(model, 4, measured)


@pytest.mark.parametrize("lengths", [[512] * 40, [*[128] * 5, 512] * 20, [2200, *[128] * 9] * 9, [64] * 3, [40]])
def test_groups_are_judged_on_all_of_the_text_and_on_none_that_they_are_fitted_to(lengths: list[int]) -> None:
    text = [torch.full((length,), number) for number, length in enumerate(lengths)]
    fitting, *judging = split_text(text, [], [])
    pieces = [piece for part in judging for piece in part]
    fitted = {int(sequence[0]) for sequence in fitting}
    assert fitted and sum(map(len, fitting)) <= 4096 and max(map(len, fitting)) == max(lengths)  # of all kinds
    judged = {int(piece[0]) for piece in pieces}
    assert judged and (not fitted & judged or len(text) == 1) and sum(map(len, pieces)) <= 16 * 128
    ends = [sum(lengths[: number + 1]) / sum(lengths) for number in sorted(judged)]
    assert (ends[-1] > 0.8 and ends[0] < 0.5) or len(text) < 4


def test_groups_are_judged_on_other_text_and_on_what_comes_twice_too() -> None:
    text, others = ([torch.arange(512) + 1000 * number for number in numbers] for numbers in (range(40), range(40, 48)))
    _, of_groups, of_sets = split_text(text, [], others)
    assert len(of_groups) == 6 and len(of_sets) == 18 and {len(piece) for piece in of_groups + of_sets} == {128}
    for pieces in (of_groups, of_sets):
        sources = {int(piece[0]) // 1000 for piece in pieces}
        assert sources & set(range(40)) and sources & set(range(40, 48))
        assert [len(set(piece.tolist())) for piece in pieces] == [128, 64] * (len(pieces) // 2)


def roughly_fused(model: Any, groups: Groups, text: Sequence[torch.Tensor]) -> Any:
    """A copy in which each group is one layer, fitted roughly, from the bottom up, to the dense model."""
    copied = Decoder(model).copy()
    ids, num_removed = torch.stack(list(text)), 0
    for first, last in groups:
        dense, states = (m.model(ids, output_hidden_states=True).hidden_states for m in (model, copied.model))
        inputs = None if num_removed == 0 else [states[first - num_removed]]
        _, layer, _ = fitted(Decoder(model), range(first, last + 1), [dense[first]], rough=True, streams=inputs)
        weights = copied.family.unpacked(layer.named_parameters())
        copied.join((first - num_removed, last - num_removed), weights)
        num_removed += last - first
    return copied.model


@torch.no_grad()
def test_of_a_few_sets_that_is_chosen_which_moves_predictions_least() -> None:
    """Costs are those of rough fits, on half of the tokens of the text that judges; of that groups take a part."""
    model = make_llama(num_hidden_layers=7)
    text = split_text(TEXT[:8], [], TEXT[8:])
    with costs_on(Decoder(model), text, 0.1) as costs:
        tried = try_sets(costs, 2, count=16)
    pairs, threes = [(n, n + 1) for n in range(1, 5)], [(n, n + 2) for n in range(1, 4)]
    assert costs.by_group.keys() == {*pairs, *threes} and len(tried) == 6
    judged = [(groups, cost, text.judging_groups + text.judging_sets) for groups, cost in tried.items()]
    judged += [((group,), cost, text.judging_groups) for group, cost in costs.by_group.items()]
    for groups, cost, pieces in judged:
        shallow = roughly_fused(model, groups, text.fitting)
        logits = [[m(ids[None], use_cache=False).logits[0, 1::2] for ids in pieces] for m in (model, shallow)]
        assert cost == pytest.approx(divergence(*map(torch.cat, logits)), rel=1e-3)
    chosen = choice(model, 2, measured_text(TEXT[:8], TEXT[8:]))
    assert chosen.groups == min(tried, key=lambda groups: tried[groups])


@pytest.mark.parametrize(("tokens", "sets"), [(480, 6), (16384, 8), (131072, 16)])
def test_more_text_takes_more_trials(tokens: int, sets: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Groups] = []

    def measure_set(_: GroupCosts, groups: Groups) -> float:
        tried.append(groups)
        return float(len(tried))

    monkeypatch.setattr(GroupCosts, "measure_set", measure_set)
    measured = measured_text(TEXT)
    assert measured.text is not None
    text = measured.text._replace(source=replace(measured.text.source, tokens=tokens))
    found = choice(make_llama(num_hidden_layers=9), 3, replace(measured, text=text))
    assert len(set(tried)) == sets and found.groups == tried[0]


def test_each_number_of_fusions_chooses_as_it_would_alone() -> None:
    """Costs of pairs and threes are measured once; what more fusions measure of longer groups says nothing to fewer."""
    model, measured = make_llama(num_hidden_layers=7), measured_text(TEXT[:8], TEXT[8:])
    for num_fusions in (1, 2, 3, 2, 1):
        found, alone = (choice(model, num_fusions, text) for text in (measured, measured_text(TEXT[:8], TEXT[8:])))
        assert found.groups == alone.groups and count_removed(found.groups) == num_fusions
        assert all(found.costs[group] == cost for group, cost in alone.costs.items())


OUT, A, B, HUGE = 28, 29, 30, 31  # channels of the stream


@torch.no_grad()
def with_a_pair_that_works_together() -> Any:
    """Eight layers, of which 3 writes a huge number for the first token, and 4 carries its sign to all others.

    The number is the product of two channels of that token, so it is there only after the MLP of layer 3: one layer
    cannot do both. Layer 4 changes the stream less than any other, and predictions depend on what it writes.
    """
    model = make_llama(num_hidden_layers=8, initializer_range=0.1)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
    table = model.model.embed_tokens.weight.normal_()
    table[:, OUT:] = 0
    table[2:6] = 0  # tokens that begin a text
    table[2:6, A], table[2:6, B] = torch.tensor([3.0, 3.0, -3.0, -3.0]), torch.tensor([3.0, -3.0, 3.0, -3.0])
    model.lm_head.weight.normal_(std=0.5)
    model.lm_head.weight[:, OUT] *= 20
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[OUT:] = 0
        layer.mlp.down_proj.weight[OUT:] = 0
    mlp, carrier = model.model.layers[3].mlp, model.model.layers[4]
    for neuron, sign in ((0, 1.0), (1, -1.0)):
        mlp.gate_proj.weight[neuron] = mlp.up_proj.weight[neuron] = 0
        mlp.gate_proj.weight[neuron, A] = mlp.up_proj.weight[neuron, B] = 5 * sign
        mlp.down_proj.weight[:, neuron] = 0
        mlp.down_proj.weight[HUGE, neuron] = 0.3
    attention = carrier.self_attn  # to all tokens alike
    for projection in (attention.q_proj, attention.v_proj, attention.o_proj, carrier.mlp.down_proj):
        projection.weight.zero_()
    attention.v_proj.weight[0, HUGE] = 1
    attention.o_proj.weight[OUT, 0] = 0.5
    return model


@torch.no_grad()
def test_layers_that_work_together_are_not_fused_by_the_preset() -> None:
    model, random = with_a_pair_that_works_together(), torch.Generator().manual_seed(0)
    begun = torch.randint(2, 6, (80, 1), generator=random)
    text = torch.cat([begun, torch.randint(6, 320, (80, 63), generator=random)], dim=1)
    measured, ids = measured_text(list(text[:64])), text[64:]
    costs, chosen = {}, {}
    for selection in ("least_influence", None):
        decoder, config = Decoder(model).copy(), FusionConfig(1, "refit", selection)  # type: ignore[arg-type]
        choice, _ = fuse_layers(decoder, config, measured, clock=Clock())
        [chosen[config.selection]] = choice.groups
        costs[config.selection] = divergence(model(ids).logits, decoder.model(ids, use_cache=False).logits)
    assert chosen["least_influence"] == (3, 4) != chosen["groups"]
    assert costs["groups"] < 0.1 < 0.5 < costs["least_influence"]
