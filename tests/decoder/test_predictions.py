"""Divergence, agreement and perplexity against their definitions."""

from __future__ import annotations

import copy
import math

import pytest
import scipy.stats
import torch
from conftest import make_llama

from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.decoder.predictions import Predictions, batched, divergences, final_states, predictions


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
def test_figures_are_those_of_whole_forward_passes() -> None:
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
    assert math.log(found.dense_perplexity) == pytest.approx(-float(p.gather(1, targets[:, None]).mean()), rel=1e-5)
