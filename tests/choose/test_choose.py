"""Which groups of layers become one, and how many a budget allows."""

import copy
import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from builders import SEED, examples
from conftest import make_llama, make_texts, make_tokenizer, same
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny_models import calibration_text, divergence, fitted, idle, measure_and_fuse, measured_text, tiny_model
from torch.nn.functional import cross_entropy

from lf_hf import FusionConfig, FusionReport
from lf_hf.choose.budget import search
from lf_hf.choose.choice import Choice, choose, least_influence_groups, try_sets
from lf_hf.choose.costs import GroupCosts, split_text
from lf_hf.choose.sets import cheapest_sets, propose_sets
from lf_hf.decoder.decoder import Decoder, Group, Groups
from lf_hf.measure.dense import Measurements, measure
from lf_hf.pipeline.run import fuse
from lf_hf.refit.fit import fit_group
from lf_hf.report.figures import FIGURES
from lf_hf.text.calibration import Corpus
from lf_hf.text.packing import split_held_out

[DIVERGENCE] = [figure for figure in FIGURES if figure.limit == "max_divergence"]
TEXT = [torch.randint(0, 64, (40,), generator=torch.Generator().manual_seed(n)) for n in range(12)]


def count_removed(groups: Groups) -> int:
    return sum(last - first for first, last in groups)


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
    model = make_llama(num_hidden_layers=8)
    idle(model, 3, 4, 6)
    dense = copy.deepcopy(model)
    fused(model, 3)
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=0, atol=0.05)


def test_a_layer_stands_in_place_of_a_fit_that_is_worse_than_it() -> None:
    """Without a layer that does nothing the one before it is exact, as no fit is."""
    model = make_llama()
    idle(model, 2)
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
    with pytest.raises(ValueError, match="No groups of layers that leave 4 fewer can be fitted"):
        choice(model, 4, measured)


@torch.no_grad()
def test_groups_whose_fits_are_not_stable_are_not_taken() -> None:
    model = make_llama(num_hidden_layers=7)
    mlp = model.model.layers[3].mlp  # all of its channels are alike
    mlp.gate_proj.weight[:], mlp.up_proj.weight[:], mlp.down_proj.weight[:] = 1, 1, 1
    found = choose(Decoder(model), FusionConfig(2, "refit", ridge=1e-30), measured_text(TEXT))
    assert all(math.isinf(cost) == (first <= 3 <= last) for (first, last), cost in found.costs.items())


@pytest.mark.parametrize("lengths", [[512] * 40, [*[128] * 5, 512] * 20, [2200, *[128] * 9] * 9, [64] * 3, [40]])
def test_groups_are_judged_on_all_of_the_text_and_on_none_that_they_are_fitted_to(lengths: list[int]) -> None:
    text = [torch.full((length,), number) for number, length in enumerate(lengths)]
    fitting, *judging = split_text(calibration_text(text), 4096)
    pieces = [piece for part in judging for piece in part]
    fitted = {int(sequence[0]) for sequence in fitting}
    assert fitted and sum(map(len, fitting)) <= 4096 and max(map(len, fitting)) == max(lengths)  # of all kinds
    judged = {int(piece[0]) for piece in pieces}
    assert judged and (not fitted & judged or len(text) == 1) and sum(map(len, pieces)) <= 16 * 128
    ends = [sum(lengths[: number + 1]) / sum(lengths) for number in sorted(judged)]
    assert (ends[-1] > 0.8 and ends[0] < 0.5) or len(text) < 4


def roughly_fused(model: Any, groups: Groups, text: Sequence[torch.Tensor]) -> Any:
    """A copy in which each group is one layer, fitted roughly, from the bottom up, to the dense model."""
    copied = Decoder(model).copy()
    ids, num_removed = torch.stack(list(text)), 0
    for first, last in groups:
        dense, states = (m.model(ids, output_hidden_states=True).hidden_states for m in (model, copied.model))
        inputs = None if num_removed == 0 else [states[first - num_removed]]
        _, layer, _ = fitted(Decoder(model), range(first, last + 1), [dense[first]], rough=True, streams=inputs)
        copied.join((first - num_removed, last - num_removed), copied.family.unpacked(layer))
        num_removed += last - first
    return copied.model


@torch.no_grad()
def test_of_a_few_sets_that_is_chosen_which_moves_predictions_least() -> None:
    """Costs are those of rough fits, on half of the tokens of the text that judges; of that groups take a part."""
    model = make_llama(num_hidden_layers=7)
    text = split_text(calibration_text(TEXT[:8], TEXT[8:]), 4096)
    costs = GroupCosts(Decoder(model), text, partial(fit_group, ridge=0.1))
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


def test_each_number_of_fusions_chooses_as_it_would_alone() -> None:
    """Costs of pairs and threes are measured once; what more fusions measure of longer groups says nothing to fewer."""
    model, measured = make_llama(num_hidden_layers=7), measured_text(TEXT[:8], TEXT[8:])
    for num_fusions in (2, 3, 1):
        found, alone = (choice(model, num_fusions, text) for text in (measured, measured_text(TEXT[:8], TEXT[8:])))
        assert found.groups == alone.groups and count_removed(found.groups) == num_fusions
        assert all(found.costs[group] == cost for group, cost in alone.costs.items())


def random_costs(layers: int, seed: int) -> dict[Group, float]:
    random = torch.Generator().manual_seed(seed)
    groups = [(i, j) for i in range(1, layers - 1) for j in range(i + 1, min(i + 6, layers - 1))]
    return dict(zip(groups, torch.rand(len(groups), generator=random).tolist(), strict=True))


def all_sets(costs: dict[Group, float], fewer: int) -> list[tuple[float, Groups]]:
    found = []
    for count in range(1, fewer + 1):
        for groups in itertools.combinations(sorted(costs), count):
            apart = all(a[1] < b[0] for a, b in itertools.pairwise(groups))
            if apart and count_removed(groups) == fewer:
                found.append((sum(costs[group] for group in groups), groups))
    return sorted(found)


@pytest.mark.parametrize("fewer", [1, 2, 3, 5])
def test_the_cheapest_sets_are_those_of_an_exhaustive_search(fewer: int) -> None:
    costs = random_costs(9, fewer)
    expected = all_sets(costs, fewer)
    assert cheapest_sets(costs, fewer, count=4) == [groups for _, groups in expected[:4]]


def test_trials_find_what_costs_of_groups_do_not_show() -> None:
    """Here four layers cost far more to join than the table says."""
    costs = {(i, j): (j - i) * (1 + 0.01 * i) for i, j in random_costs(12, 0)}

    def whole(groups: Groups) -> float:
        joined = [layer for first, last in groups for layer in range(first + 1, last + 1)]
        dear = sum(layer in (2, 3, 4, 5) for layer in joined)
        return sum(costs[group] for group in groups) + dear

    tried: dict[Groups, float] = {}
    for _ in range(8):
        groups, *others = propose_sets(costs, tried, 4, count=3)
        assert not {groups, *others} & tried.keys() and len({groups, *others}) == 3 and count_removed(groups) == 4
        tried[groups] = whole(groups)
    first, best = next(iter(tried)), min(tried, key=lambda groups: tried[groups])
    assert first == cheapest_sets(costs, 4, count=1)[0] and tried[first] == whole(first)
    assert tried[best] == min(whole(groups) for _, groups in all_sets(costs, 4)) < tried[first] - 2


TEXTS = make_texts(60)
SETTINGS: dict[str, Any] = {"calibration_length": 32, "calibration_tokens": 1024, "perplexity_tokens": 0}


@torch.no_grad()
def predicted(model: Any, text: list[torch.Tensor]) -> tuple[torch.Tensor, float]:
    """Logits of all next tokens, and the mean loss of those that come."""
    logits = torch.cat([model(sequence[None]).logits[0, :-1].double() for sequence in text])
    return logits, float(cross_entropy(logits, torch.cat([sequence[1:] for sequence in text])))


@pytest.mark.parametrize(
    ("model_type", "level", "settings"),
    [
        ("llama", "max_divergence", {"method": "truncate"}),
        ("llama", "max_perplexity_ratio", {"method": "truncate"}),
        ("gemma3_text", "max_divergence", {"method": "refit", "selection": "least_influence"}),
        ("smollm3", "max_divergence", {"method": "refit", "selection": "groups"}),
    ],
)
def test_a_budget_is_kept_by_the_result_and_used_up(model_type: str, level: str, settings: dict[str, Any]) -> None:
    tokenizer, corpus = make_tokenizer(), Corpus({text: text for text in TEXTS})
    dense = tiny_model(model_type, num_hidden_layers=6)
    given: dict[str, Any] = {**SETTINGS, **settings, level: 1e9}
    config = FusionConfig(**given)
    measured = measure(Decoder(dense), tokenizer, config, None, corpus)

    def fused(config: FusionConfig) -> tuple[Any, Any]:
        decoder = Decoder(dense).copy()
        return decoder.model, fuse(decoder, tokenizer, config, measured, base="tiny")

    smallest, everything = fused(config)
    most = 5 if config.selection == "last" else 3
    assert everything.layers_after == len(smallest.model.layers) == 6 - most
    allowed = 1.1 if "ratio" in level else everything.budget.tried[most] / 2
    model, report = fused(FusionConfig(**given | {level: allowed}))
    text: Any = measured.text
    aside, _ = split_held_out(text.given, max(1, len(text.given) // 8))
    (expected, before), (found, after) = predicted(dense, aside), predicted(model, aside)
    number = report.layers_before - report.layers_after
    assert report.budget.tokens == sum(map(len, aside))
    assert report.calibration[-1].tokens + report.budget.tokens == text.source.tokens  # nothing is fitted to the latter
    cost = math.exp(after - before) if "ratio" in level else divergence(expected, found)
    assert report.budget.tried[number] == pytest.approx(cost, rel=1e-3)
    assert report.budget.tried[number] <= allowed < report.budget.tried[number + 1]
    assert report.config[level] == allowed and report.config["num_fusions"] is None
    assert f"{level}={allowed:g} before any healing, on" in report.summary()
    assert FusionReport.from_dict(report.to_dict()) == report


def test_a_budget_that_nothing_meets_is_said_and_leaves_the_model_as_it_was() -> None:
    model, tokenizer = make_llama(), make_tokenizer()
    before = copy.deepcopy(model)
    config = FusionConfig(method="truncate", max_divergence=1e-30, **SETTINGS | {"calibration_length": 64})
    uneven = str(tokenizer.decode(tokenizer(TEXTS[0])["input_ids"][:80]))
    assert not split_held_out([torch.ones(64), torch.ones(16)], 1)[0]  # of which the first one has more than half
    found = r"max_divergence=1e-30 allows no fusion: with 1 it is \S+; raise it\."
    for texts, message in ((TEXTS, found), ([uneven], "A budget needs two sequences of calibration text")):
        corpus = Corpus({text: text for text in texts})
        with pytest.raises(ValueError, match=message):
            measure_and_fuse(model, config, None, corpus)
    assert same(model, before) and model.config.num_hidden_layers == 5


@pytest.mark.parametrize(("sequences", "tokens"), [(24, 192), (256, 2048)])
def test_a_budget_that_few_tokens_decide_says_so(sequences: int, tokens: int, caplog: pytest.LogCaptureFixture) -> None:
    config = FusionConfig(method="truncate", max_divergence=1e9, perplexity_tokens=0)
    measured = measured_text(list(torch.arange(64).repeat(sequences, 1)))
    report: Any = fuse(Decoder(make_llama()), make_tokenizer(), config, measured, base="tiny")
    assert report.budget.tokens == tokens
    notes = [note for note in report.notes if "judged on only 192 tokens" in note and "give 16,000 tokens" in note]
    assert len(notes) == (tokens < 2000) and [text for text in caplog.messages if "judged on" in text] == notes


@given(st.lists(st.floats(1e-6, 2.0) | st.just(math.inf), min_size=1, max_size=60), st.floats(1e-4, 10.0))
def test_a_few_trials_find_the_last_number_that_is_allowed(growth: list[float], allowed: float) -> None:
    costs = list(itertools.accumulate(growth))  # of 1, 2, ... fusions
    assume(costs[0] <= allowed)

    def attempt(count: int) -> tuple[float, int]:
        if costs[count - 1] == math.inf:
            raise ValueError("So many cannot be made.")
        return costs[count - 1], count

    found, tried = search(DIVERGENCE, allowed, len(costs), attempt)
    assert found == sum(cost <= allowed for cost in costs)
    assert len(tried) <= 4 + math.ceil(math.log2(len(costs) + 1))


def test_why_more_layers_cannot_be_fused_is_said(caplog: pytest.LogCaptureFixture) -> None:
    def attempt(count: int) -> tuple[float, str]:
        if count > 1:
            raise ValueError("The fit is not stable.")
        return 0.1, "fused"

    assert search(DIVERGENCE, 1.0, 4, attempt)[0] == "fused"
    assert "fusions cannot be made (The fit is not stable); fewer are tried." in caplog.text
