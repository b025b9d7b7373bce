"""Which groups of layers become one."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from conftest import make_llama, make_texts, make_tokenizer

from lf_hf import FusionConfig
from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.measure import Measurements
from lf_hf.pipeline import fuse, fuse_pairs, start
from lf_hf.refit.groups import cheapest_sets, promising, removed, text_for_groups
from lf_hf.text.calibration import Calibration, Corpus

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


def test_trials_find_what_costs_of_groups_do_not_show() -> None:
    """Here four layers cost far more to join than the table says."""
    costs = {(i, j): (j - i) * (1 + 0.01 * i) for i, j in random_costs(12, 0)}

    def whole(groups: tuple[tuple[int, int], ...]) -> float:
        joined = [layer for first, last in groups for layer in range(first + 1, last + 1)]
        dear = sum(layer in (2, 3, 4, 5) for layer in joined)
        return sum(costs[group] for group in groups) + dear

    tried: dict[tuple[tuple[int, int], ...], float] = {}
    for _ in range(8):
        groups = promising(costs, tried, 4)
        assert groups is not None and groups not in tried and removed(groups) == 4
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


@pytest.mark.parametrize("method", ["truncate", "refit"])
def test_layers_that_do_nothing_are_found(method: str) -> None:
    model = idle(make_llama(num_hidden_layers=8), 3, 4, 6)
    dense = copy.deepcopy(model)
    config = FusionConfig(
        3, method, selection="groups", calibration_length=64, calibration_tokens=4096, perplexity_tokens=0
    )
    texts = make_texts(100)
    decoder = ModelDecoder(model, keep_originals=True)
    report = fuse(decoder, make_tokenizer(), config, Calibration(texts, ""), Corpus(texts, ""), base="")
    if method == "truncate":  # a fit may join an idle layer to the one above it as well
        assert [sorted(group) for group in report.groups if len(group) > 1] == [[2, 3, 4], [5, 6]]
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=0, atol=0.05)


def test_groups_that_cannot_be_computed_with_are_said() -> None:
    measured = Measurements(settings={}, judged=[], seconds={}, text=TEXT)
    with start(ModelDecoder(make_llama()), FusionConfig(1, "truncate", selection="groups"), measured) as fusion:
        assert fusion.table is not None
        fusion.table.by_group = dict.fromkeys(fusion.table.by_group, math.inf)
        with pytest.raises(ValueError, match="No groups of layers that leave 1 fewer can be computed with"):
            fuse_pairs(fusion, 1)


def test_a_table_is_measured_once() -> None:
    model = make_llama(num_hidden_layers=7)
    measured = Measurements(settings={}, judged=[], seconds={}, text=TEXT)
    planned, tables = list[Any](), list[Any]()
    for fusions in (2, 2, 3):
        config = FusionConfig(fusions, "truncate", selection="groups")
        with start(ModelDecoder(model).copy(), config, measured) as fusion:
            fuse_pairs(fusion, fusions)
        planned.append(fusion.planned)
        tables += measured.group_costs.values()
    table = tables[0]
    assert len(tables) == 3 and all(other is table for other in tables)
    assert planned[0] == planned[1] and removed(planned[2]) == 3
    assert set(table) == {(i, j) for i in range(1, 6) for j in range(i + 1, 6)}


@pytest.mark.parametrize("lengths", [[512] * 40, [128] * 90 + [512] * 20, [2200, *[128] * 9] * 9, [64] * 3, [40]])
def test_groups_are_judged_on_all_of_the_text_and_on_none_that_they_are_fitted_to(lengths: list[int]) -> None:
    text = [torch.full((length,), number) for number, length in enumerate(lengths)]
    fitting, *judging, final = text_for_groups(text)
    fitted = {int(sequence[0]) for sequence in fitting}
    assert fitted and sum(map(len, fitting)) <= 4096
    assert max(map(len, [*fitting, *final])) == max(lengths)  # no kind of text judges alone
    assert not final or sum(map(len, fitting)) < sum(map(len, final)) <= 16384
    fitted |= {int(sequence[0]) for sequence in final}
    for sequences, most, last in zip(judging, (16 * 128, 8 * max(lengths)), (0.9, 0.8), strict=True):
        judged = {int(sequence[0]) for sequence in sequences}
        assert judged and (not fitted & judged or len(text) == 1) and sum(map(len, sequences)) <= most
        ends = [sum(lengths[: number + 1]) / sum(lengths) for number in sorted(judged)]
        assert (ends[-1] > last and ends[0] < 0.5) or len(text) < 4


def test_groups_are_judged_on_what_comes_twice_too() -> None:
    text = [torch.arange(512) + 1000 * number for number in range(40)]
    _, pieces, wholes, _ = text_for_groups(text)
    for judging, count, length in ((pieces, 16, 128), (wholes, 8, 512)):
        assert [len(sequence) for sequence in judging] == [length] * count
        twice = [len(set(sequence.tolist())) * 2 == length for sequence in judging]
        assert twice == [bool(number % 2) for number in range(count)]
