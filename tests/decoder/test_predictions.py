"""Influence, divergence, perplexity and continuations against their definitions."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import scipy.stats
import torch
from conftest import make_llama, make_texts, make_tokenizer

from lf_hf.decoder.generating import continuations
from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.decoder.predictions import (
    Predictions,
    batched,
    divergences,
    final_states,
    kl_divergence,
    perplexity,
    predictions,
)
from lf_hf.stages.activations import influence
from lf_hf.text.packing import pack_tokens


def test_influence_is_the_mean_angle_without_the_first_token() -> None:
    x = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [0.0, 2.0]]])
    y = torch.tensor([[[-9.0, 9.0], [2.0, 0.0], [3.0, 0.0]]])
    assert influence([x], [y]) == pytest.approx(1 - (1 + 0) / 2)
    assert influence([x], [3 * x]) == pytest.approx(0)


def test_divergence_is_zero_for_what_is_equal() -> None:
    one, other = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    assert kl_divergence(one, one) == pytest.approx(0, abs=1e-6)
    expected = scipy.stats.entropy(*(x.double().exp().numpy() for x in (one, other)), axis=1)
    assert kl_divergence(one, other) == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_divergences_are_means_over_tokens_and_infinite_where_nothing_can_be_computed() -> None:
    model, generator = make_llama(), torch.Generator().manual_seed(0)
    # More tokens than are compared at a time, and sequences of two lengths.
    dense, fused = (
        [torch.randn(2, 70, 32, generator=generator), torch.randn(1, 9, 32, generator=generator)] for _ in "12"
    )
    pairs = [
        (model.lm_head(model.model.norm(x)).flatten(0, 1) for x in both) for both in zip(dense, fused, strict=True)
    ]
    of_tokens = [scipy.stats.entropy(*(x.double().softmax(-1).numpy() for x in pair), axis=1) for pair in pairs]
    broken = [torch.full_like(state, math.nan) for state in dense]
    found = divergences(ModelDecoder(model), dense, [fused, broken, dense])
    assert found == [pytest.approx(sum(map(sum, of_tokens)) / 149, rel=1e-4), math.inf, pytest.approx(0, abs=1e-6)]


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


SEQUENCES = [
    torch.randint(2, 320, (length,), generator=torch.Generator().manual_seed(length)) for length in (40, 40, 9)
]


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions of seven tokens at a time."""
    monkeypatch.setattr("lf_hf.decoder.predictions.LOGITS", 7 * 320)


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_predicts_what_it_predicts(dtype: torch.dtype) -> None:
    decoder = ModelDecoder(make_llama(dtype=dtype))
    ids = batched(decoder, {"text": SEQUENCES, "empty": []})
    states = final_states(decoder, ids, "")
    [(name, found)] = predictions(decoder, ids, states, copy.deepcopy(states)).items()
    assert name == "text" and found == Predictions(found.perplexity, found.perplexity, divergence=0.0, agreement=1.0)


@torch.no_grad()
@pytest.mark.usefixtures("few_rows")
def test_divergence_and_agreement_are_those_of_whole_forward_passes() -> None:
    model = make_llama()
    decoder = ModelDecoder(model)
    ids = batched(decoder, {"text": SEQUENCES})
    dense_states = final_states(decoder, ids, "")
    dense = [model(sequence[None]).logits[0, :-1].double().log_softmax(-1) for sequence in SEQUENCES]
    decoder.remove(3)
    fused = [model(sequence[None]).logits[0, :-1].double().log_softmax(-1) for sequence in SEQUENCES]

    found = predictions(decoder, ids, final_states(decoder, ids, ""), dense_states)["text"]
    p, q = torch.cat(dense), torch.cat(fused)  # (tokens, vocab)
    assert 0.05 < found.agreement < 0.95 and found.divergence > 0.1
    assert found.divergence == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    assert found.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    targets = torch.cat([sequence[1:] for sequence in SEQUENCES])
    assert math.log(found.perplexity) == pytest.approx(-float(q.gather(1, targets[:, None]).mean()), rel=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_prompts_of_different_lengths_are_continued_as_each_alone(attention: str) -> None:
    model: Any = make_llama()
    model.set_attn_implementation(attention)
    model.generation_config.eos_token_id = None
    added = continuations(ModelDecoder(model), SEQUENCES, 12)
    for prompt, tokens in zip(SEQUENCES, added, strict=True):
        assert torch.equal(model.generate(prompt[None], max_new_tokens=12, do_sample=False)[0, len(prompt) :], tokens)
