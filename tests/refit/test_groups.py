"""Which groups of layers become one."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import make_llama, make_texts, make_tokenizer

from lf_hf import FusionConfig, FusionReport
from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.measure import Measurements
from lf_hf.pipeline import fuse, fuse_pairs, last_pass
from lf_hf.refit.groups import cheapest_sets, estimated, promising, removed, text_for_groups
from lf_hf.settings import METHODS
from lf_hf.steps import start
from lf_hf.text.calibration import CalibrationSamples, Corpus
from lf_hf.text.packing import held_out

TEXT = [torch.randint(0, 64, (40,), generator=torch.Generator().manual_seed(n)) for n in range(12)]


def random_costs(layers: int, seed: int) -> dict[tuple[int, int], float]:
    random = torch.Generator().manual_seed(seed)
    groups = [(i, j) for i in range(1, layers - 1) for j in range(i + 1, min(i + 6, layers - 1))]
    return dict(zip(groups, torch.rand(len(groups), generator=random).tolist(), strict=True))


def all_sets(costs: dict[tuple[int, int], float], fewer: int) -> list[tuple[float, tuple[tuple[int, int], ...]]]:
    found = []
    for count in range(1, fewer + 1):
        for groups in itertools.combinations(sorted(costs), count):
            apart = all(a[1] < b[0] for a, b in itertools.pairwise(groups))
            if apart and removed(groups) == fewer:
                found.append((sum(costs[group] for group in groups), groups))
    return sorted(found)


@pytest.mark.parametrize("fewer", [1, 2, 3, 5])
def test_the_cheapest_sets_are_those_of_an_exhaustive_search(fewer: int) -> None:
    costs = random_costs(9, fewer)
    expected = all_sets(costs, fewer)
    found = cheapest_sets(costs, fewer, count=4)
    assert found == [groups for _, groups in expected[:4]]


def test_a_long_group_is_expected_to_cost_what_threes_show_of_neighbours() -> None:
    """Here what each layer and each two neighbours cost adds up. Nothing is expected of what cannot be computed."""
    layer, two = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)).tolist()
    costs = {(i, j): sum(layer[i + 1 : j + 1]) + sum(two[i + 1 : j]) for i in range(1, 8) for j in range(i + 1, 9)}
    short = {(i, j): c for (i, j), c in costs.items() if j - i < 3}
    assert estimated(short, longest=8) == pytest.approx(costs)
    assert math.isinf(estimated(short | {(4, 5): math.inf}, longest=8)[2, 8])


def test_trials_find_what_costs_of_groups_do_not_show() -> None:
    """Here four layers cost far more to join than the table says."""
    costs = {(i, j): (j - i) * (1 + 0.01 * i) for i, j in random_costs(12, 0)}

    def whole(groups: tuple[tuple[int, int], ...]) -> float:
        joined = [layer for first, last in groups for layer in range(first + 1, last + 1)]
        dear = sum(layer in (2, 3, 4, 5) for layer in joined)
        return sum(costs[group] for group in groups) + dear

    tried: dict[tuple[tuple[int, int], ...], float] = {}
    for _ in range(8):
        groups, *others = promising(costs, tried, 4, count=3)
        assert not {groups, *others} & tried.keys() and len({groups, *others}) == 3 and removed(groups) == 4
        tried[groups] = whole(groups)
    first, best = next(iter(tried)), min(tried, key=lambda groups: tried[groups])
    assert first == cheapest_sets(costs, 4, count=1)[0] and tried[first] == whole(first)
    assert tried[best] == min(whole(groups) for _, groups in all_sets(costs, 4)) < tried[first] - 2


def idle(model: Any, *layers: int) -> Any:
    with torch.no_grad():
        for index in layers:
            for projection in (model.model.layers[index].self_attn.o_proj, model.model.layers[index].mlp.down_proj):
                projection.weight.zero_()
    return model


def fused(model: Any, num_fusions: int, method: str) -> FusionReport:
    texts, decoder = make_texts(100), ModelDecoder(model)
    settings: dict[str, Any] = {"calibration_length": 64, "calibration_tokens": 4096, "perplexity_tokens": 0}
    config = FusionConfig(num_fusions, method, selection="groups", **settings)
    corpus = Corpus({text: text for text in texts})
    return fuse(decoder, make_tokenizer(), config, CalibrationSamples(texts, ""), corpus, base="")


@pytest.mark.parametrize("method", ["truncate", "refit"])
def test_layers_that_do_nothing_are_found(method: str) -> None:
    model = idle(make_llama(num_hidden_layers=8), 3, 4, 6)
    dense = copy.deepcopy(model)
    report = fused(model, 3, method)
    if method == "truncate":  # a fit may join an idle layer to the one above it as well
        assert [sorted(group) for group in report.groups if len(group) > 1] == [[2, 3, 4], [5, 6]]
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=0, atol=0.05)


def test_a_layer_stands_in_place_of_a_fit_that_is_worse_than_it() -> None:
    """Without a layer that does nothing the one before it is exact, as no fit is."""
    model = idle(make_llama(), 2)
    dense = copy.deepcopy(model)
    report = fused(model, 1, "refit")
    [fitted] = report.fitted_layers
    [other] = set(fitted.layers) - {2}
    assert fitted.layer_instead == other
    assert fitted.held_out_error is not None and fitted.held_out_error > 0
    assert any(f"Layer {other} stands for layers {fitted.layers[0]} to" in note for note in report.notes)
    for name, weight in model.model.layers[fitted.layers[0]].named_parameters():
        assert torch.equal(weight, dense.model.layers[other].get_parameter(name))


@torch.no_grad()
def test_groups_whose_fits_overflow_are_not_taken() -> None:
    model = make_llama(num_hidden_layers=7, dtype=torch.float16)
    for layer in model.model.layers:  # nothing is in channel 0
        model.model.embed_tokens.weight[:, 0] = layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0
    layer = model.model.layers[3]  # folded into each other they overflow
    layer.post_attention_layernorm.weight[0] = layer.mlp.up_proj.weight[:, 0] = 500
    measured = Measurements([], {}, given=TEXT)
    with start(ModelDecoder(model), FusionConfig(2, "refit"), measured) as fusion:
        fuse_pairs(fusion, 2)
    assert all(math.isinf(cost) == (first <= 3 <= last) for (first, last), cost in fusion.costs.items())
    assert all(math.isfinite(fusion.costs[group]) for group in fusion.plans[0])
    said = pytest.raises(ValueError, match="No groups of layers that leave 4 fewer can be computed with")
    with start(ModelDecoder(model), FusionConfig(4, "refit"), measured) as fusion, said:
        fuse_pairs(fusion, 4)


@pytest.mark.parametrize("lengths", [[512] * 40, [*[128] * 5, 512] * 20, [2200, *[128] * 9] * 9, [64] * 3, [40]])
def test_groups_are_judged_on_all_of_the_text_and_on_none_that_they_are_fitted_to(lengths: list[int]) -> None:
    text = [torch.full((length,), number) for number, length in enumerate(lengths)]
    fitting, pieces = text_for_groups(text, [], [])
    fitted = {int(sequence[0]) for sequence in fitting}
    assert fitted and sum(map(len, fitting)) <= 4096 and max(map(len, fitting)) == max(lengths)  # of all kinds
    judged = {int(piece[0]) for piece in pieces}
    assert judged and (not fitted & judged or len(text) == 1) and sum(map(len, pieces)) <= 16 * 128
    ends = [sum(lengths[: number + 1]) / sum(lengths) for number in sorted(judged)]
    assert (ends[-1] > 0.8 and ends[0] < 0.5) or len(text) < 4


def test_groups_are_judged_on_other_text_and_on_what_comes_twice_too() -> None:
    text, others = ([torch.arange(512) + 1000 * number for number in numbers] for numbers in (range(40), range(40, 46)))
    _, pieces = text_for_groups(text, [], others)
    assert len(pieces) > 18 and {len(piece) for piece in pieces} == {128}
    assert {int(piece[0]) // 1000 for piece in pieces[-6:]} == set(range(40, 46))
    assert [len(set(piece.tolist())) for piece in pieces] == ([128, 64] * 11)[: len(pieces)]


@torch.no_grad()
def test_a_group_costs_what_predictions_of_the_model_without_its_layers_move() -> None:
    """Costs are measured once, those of pairs always, and of threes where they may be taken.

    What more fusions measure of longer groups says nothing to fewer: each number chooses as it would alone.
    """
    model = make_llama(num_hidden_layers=7)
    measured, alone = (Measurements([], {}, given=TEXT[:8], other_text=TEXT[8:]) for _ in range(2))
    planned, tables = list[Any](), list[Any]()
    for fusions, known in ((1, measured), (2, measured), (2, measured), (3, measured), (3, alone), (2, measured)):
        config = FusionConfig(fusions, "truncate", selection="groups")
        with start(ModelDecoder(model).copy(), config, known) as fusion:
            fuse_pairs(fusion, fusions)
        planned.append(fusion.plans[0])
        tables.append(fusion.costs)
    assert (planned[4], tables[4]) == (planned[3], tables[3]) and (planned[5], tables[5]) == (planned[2], tables[2])
    assert tables[0].keys() == {(n, n + 1) for n in range(1, 5)} and planned[0] == (min(tables[0], key=tables[0].get),)
    assert tables[1].keys() == tables[0].keys() | {(n, n + 2) for n in range(1, 4)}
    assert tables[1] == tables[2] and planned[1] == planned[2] and removed(planned[3]) == 3
    assert tables[0].items() <= tables[1].items() <= tables[3].items() and tables[3].keys() >= {*planned[3]}
    _, pieces = text_for_groups(TEXT[:8], [], TEXT[8:])
    for (first, last), cost in tables[3].items():
        shallow = copy.deepcopy(model)
        del shallow.model.layers[first + 1 : last + 1]
        apart = []
        for ids in pieces:
            p, q = (m(ids[None], use_cache=False).logits[0, 1::2].log_softmax(-1) for m in (model, shallow))
            apart.append((p.exp() * (p - q)).sum(-1))
        assert cost == pytest.approx(torch.cat(apart).mean().item(), rel=1e-3)


def test_a_set_costs_the_same_after_one_that_begins_alike() -> None:
    model = idle(make_llama(num_hidden_layers=7), 2, 5)
    costs = dict.fromkeys(itertools.combinations(range(1, 6), 2), 1.0) | {(1, 2): 0.1, (3, 4): 0.1, (4, 5): 0.2}
    measured = Measurements(judged=[], seconds={}, given=TEXT)
    with start(ModelDecoder(model), FusionConfig(2, "truncate", selection="groups"), measured) as fusion:
        assert fusion.group_costs is not None
        fusion.group_costs.by_group |= costs  # so that 1-2 and 3-4 are tried first
        assert fusion.group_costs.best(2) == [((1, 2), (4, 5))]


@torch.no_grad()
def test_of_several_sets_the_one_nearer_after_fits_to_some_text_is_made_whole() -> None:
    """Of two that are then alike the one that is nearer as a whole."""
    model, text = make_llama(num_hidden_layers=7), TEXT * 6
    measured, (held, _) = Measurements(judged=[], seconds={}, given=text), held_out(text, 4)
    decoder, costs = ModelDecoder(model), list[float]()
    with start(decoder.copy(), FusionConfig(2, "refit"), measured) as fusion:
        fuse_pairs(fusion, 2)
    far: Any = ((1, 2), (4, 5))
    alike: Any = ((3, 5),)
    best: Any = ((2, 3), (4, 5))
    for plans in ([far], [alike], [best], [far, alike], [alike, best, far]):
        made = last_pass(replace(fusion, plans=plans, decoder=(copied := decoder.copy())))
        apart = []
        for ids in held:
            p, q = (m(ids[None], use_cache=False).logits[0].log_softmax(-1) for m in (model, copied.model))
            apart.append((p.exp() * (p - q)).sum(-1))
        costs.append(float(torch.cat(apart).mean()))
    assert made.compared.keys() == {far, alike, best} and made.plans == [best]
    assert all(full < made.compared[plan] < 2 * full for plan, full in zip((far, alike, best), costs, strict=False))
    assert made.compared[alike] == pytest.approx(made.compared[best], rel=0.03)
    assert costs[3:] == costs[1:3] and costs[2] < costs[1] < costs[0]


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
    measured, ids = Measurements(judged=[], seconds={}, given=list(text[:64])), text[64:]
    expected, costs, chosen = model(ids).logits.log_softmax(-1), dict[str, float](), dict[str, Any]()
    for selection in ("least_influence", METHODS["refit"]["selection"]):
        decoder = ModelDecoder(copy.deepcopy(model))
        with start(decoder, FusionConfig(1, "refit", selection), measured) as fusion:
            fuse_pairs(fusion, 1)
        fusion = last_pass(fusion)
        [chosen[selection]] = [group for group in fusion.groups if len(group) > 1]
        found = decoder.model(ids, use_cache=False).logits.log_softmax(-1)
        costs[selection] = (expected.exp() * (expected - found)).sum(-1).mean().item()
    assert chosen["least_influence"] == [3, 4] and not {3, 4} <= set(chosen["groups"])
    assert costs["groups"] < 0.1 < 0.5 < costs["least_influence"]
