"""Influence, divergence and perplexity against their definitions."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from builders import SEED, examples, normal
from conftest import make_llama, make_texts, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.decoder.influence import divergence, influence
from lf_hf.decoder.perplexity import perplexity
from lf_hf.text.packing import pack_tokens


def test_influence_is_the_mean_angle_without_the_first_token() -> None:
    x = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [0.0, 2.0]]])
    y = torch.tensor([[[-9.0, 9.0], [2.0, 0.0], [3.0, 0.0]]])
    assert influence([x], [y]) == pytest.approx(1 - (1 + 0) / 2)
    assert influence([x], [3 * x]) == pytest.approx(0)


@given(st.floats(-30, 30), SEED)
@examples(20)
def test_influence_does_not_depend_on_the_size_of_states(exponent: float, seed: int) -> None:
    x, y = normal(1, 9, 6, seed=seed), normal(1, 9, 6, seed=seed + 1)
    assert influence([x * 10.0**exponent], [y * 10.0**exponent]) == pytest.approx(influence([x], [y]), rel=1e-5)


def test_divergence_is_zero_for_what_is_equal_and_counts_tokens() -> None:
    one, other = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    expected = one.log_softmax(-1)
    assert divergence(expected, one + 3) == pytest.approx(0, abs=1e-5)
    wanted, found = (x.double().softmax(-1).numpy() for x in (one, other))
    assert divergence(expected, other) == pytest.approx(scipy.stats.entropy(wanted, found, axis=1).sum(), rel=1e-5)


def test_perplexity_is_the_exponential_of_the_mean_loss() -> None:
    model, tokenizer = make_llama(), make_tokenizer()
    sequences = pack_tokens(tokenizer, " ".join(make_texts(30)), 50, 240)
    assert [len(sequence) for sequence in sequences] == [50] * 4
    losses = []
    for ids in sequences:
        log_probabilities = model(ids[None]).logits[0].double().log_softmax(-1)
        losses += [-log_probabilities[t, ids[t + 1]].item() for t in range(len(ids) - 1)]
    found = perplexity(ModelDecoder(model), {"text": sequences, "empty": []})
    assert found == {"text": pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)}
