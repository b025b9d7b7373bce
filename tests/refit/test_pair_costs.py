"""What fusing each pair would cost: against dropping layers from a whole model, and predictions compared by scipy."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import scipy.stats
import torch
from conftest import make_llama, make_texts, make_tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM

from lf_hf import FusionConfig
from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.families import DecoderLayer
from lf_hf.pipeline import fuse
from lf_hf.refit.boundaries import Boundaries
from lf_hf.refit.pair_costs import PairCosts, Roles
from lf_hf.refit.states import Place, StateStore
from lf_hf.text.calibration import Calibration, Corpus

SEQUENCES = [torch.randint(0, 64, (300,), generator=torch.Generator().manual_seed(n)) for n in range(17)]
EACH = [sequence[None] for sequence in SEQUENCES]  # as batches
JUDGING = SEQUENCES[3::4]


@torch.no_grad()
def moved(dense: LlamaForCausalLM, model: LlamaForCausalLM) -> float:
    """Divergence per token, from the two models' own forward passes."""
    return sum(
        scipy.stats.entropy(
            *(m(ids[None]).logits[0].double().softmax(-1).numpy() for m in (dense, model)), axis=1
        ).sum()
        for ids in JUDGING
    ) / sum(map(len, JUDGING))


def without(model: LlamaForCausalLM, *layers: int) -> LlamaForCausalLM:
    """A copy of a model that lacks some layers, numbered as in the model."""
    model = copy.deepcopy(model)
    for layer in sorted(layers, reverse=True):
        ModelDecoder(model).remove(layer)
    return model


@pytest.mark.parametrize("place", ["device", "disk"])
def test_costs_are_those_of_the_whole_model_also_after_a_fusion(place: Place) -> None:
    dense = make_llama(num_hidden_layers=7)
    model = copy.deepcopy(dense)
    decoder = ModelDecoder(model)
    seen: list[int] = []

    def keep_first(i: int, states: Sequence[Tensor]) -> DecoderLayer:
        assert len(states) == len(SEQUENCES) - len(JUDGING) // 2
        seen.append(i)
        return model.model.layers[i]

    with StateStore(place) as store:
        boundaries = Boundaries(decoder, decoder.embed(EACH), store)
        costs = PairCosts(decoder, boundaries, Roles.of(len(EACH)), keep_first, store)
        expected = [moved(dense, without(dense, j)) for j in range(2, 6)]
        assert costs.by_layer[2:6] == pytest.approx(expected, rel=1e-3)
        assert costs.by_layer[:2] == [math.inf] * 2 and costs.by_layer[6] == math.inf

        seen.clear()
        decoder.remove(4)  # layers 3 and 4 have become layer 3
        boundaries.update(3)
        costs.update(3)
        current = moved(dense, without(dense, 4))
        around = [moved(dense, without(dense, 4, j)) - current for j in (3, 5)]
        assert costs.by_layer[2] == pytest.approx(expected[0], rel=1e-3)  # shares no layer with the fusion
        assert costs.by_layer[3:5] == pytest.approx(around, rel=1e-3)
        assert seen == [2, 3] and len(costs.by_layer) == 6


def test_predictions_that_overflow_are_no_candidates() -> None:
    decoder = ModelDecoder(make_llama())

    def broken(i: int, states: Sequence[Tensor]) -> DecoderLayer:
        layer = copy.deepcopy(decoder.model.model.layers[i])
        if i != 2:
            torch.nn.init.constant_(layer.mlp.down_proj.weight, math.nan)
        return layer

    with StateStore() as store:
        boundaries = Boundaries(decoder, decoder.embed(EACH), store)
        costs = PairCosts(decoder, boundaries, Roles.of(len(EACH)), broken, store)
    assert costs.by_layer.index(min(costs.by_layer)) == 3 and costs.by_layer.count(math.inf) == len(costs.by_layer) - 1


def test_one_sequence_judges_what_is_fitted_to_it() -> None:
    decoder = ModelDecoder(make_llama())
    with StateStore() as store:
        boundaries = Boundaries(decoder, decoder.embed([SEQUENCES[0][None]]), store)
        costs = PairCosts(decoder, boundaries, Roles.of(1), lambda i, _: decoder.model.model.layers[i], store)
    assert 0 < min(costs.by_layer) < math.inf


@pytest.mark.parametrize(
    "settings", [{"method": "truncate"}, {"method": "refit"}, {"method": "mka", "refit": "down_proj"}]
)
def test_layers_that_do_nothing_are_found_wherever_they_are(settings: dict[str, Any]) -> None:
    model = make_llama(num_hidden_layers=7)
    with torch.no_grad():
        for index in (3, 5):
            for projection in (model.model.layers[index].self_attn.o_proj, model.model.layers[index].mlp.down_proj):
                projection.weight.zero_()
    dense = copy.deepcopy(model)
    text = Corpus([" ".join(make_texts(400))], "random text")
    config = FusionConfig(
        2, **settings, selection="least_divergence", calibration_length=64, calibration_tokens=4096, perplexity_tokens=0
    )
    samples = Calibration(make_texts(), "random sentences")
    report = fuse(ModelDecoder(model, keep_originals=True), make_tokenizer(), config, samples, text, base="tiny")
    assert len(model.model.layers) == 5
    for step in report.steps:
        assert step.divergence is not None and {3, 5} & {*step.layers_i, *step.layers_j}
        assert f"divergence {step.divergence:.4f}" in report.summary()
    if settings["method"] == "truncate":
        assert max(step.divergence or 0 for step in report.steps) == pytest.approx(0, abs=1e-6)
        assert sorted(step.pair for step in report.steps) == [(2, 3), (4, 5)]
    if settings["method"] != "mka":
        assert moved(dense, model) < 1e-3 < moved(dense, without(dense, 2, 4))
