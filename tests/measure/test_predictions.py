"""Divergence, agreement and perplexity against their definitions."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import make_llama
from torch import Tensor

from lf_hf.decoder.decoder import Decoder
from lf_hf.measure.predictions import divergences, final_states, predictions, shard_batches
from lf_hf.report.data import TextFigures

SEQUENCES = [
    torch.randint(2, 320, (length,), generator=torch.Generator().manual_seed(length)) for length in (40, 40, 9)
]


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions of seven tokens at a time."""
    monkeypatch.setattr("lf_hf.measure.predictions.LOGITS", 7 * 320)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_predicts_what_it_predicts(dtype: torch.dtype) -> None:
    decoder = Decoder(make_llama(dtype=dtype))
    ids = shard_batches(decoder, {"text": SEQUENCES, "empty": []})
    states = final_states(decoder, ids, "")
    [(name, found)] = predictions(decoder, ids, states, copy.deepcopy(states)).items()
    assert name == "text" and found == TextFigures(found.perplexity, divergence=0.0, agreement=1.0)
    assert found == predictions(decoder, ids, states)["text"]


@torch.no_grad()
def test_figures_are_those_of_whole_forward_passes() -> None:
    model = make_llama()
    decoder = Decoder(model)
    ids = shard_batches(decoder, {"text": SEQUENCES})
    dense_states, before_removal = final_states(decoder, ids, ""), [*decoder.walk(ids["text"])][-1]
    dense = [model(sequence[None]).logits[0].double().log_softmax(-1) for sequence in SEQUENCES]
    decoder.remove(3)
    fused = [model(sequence[None]).logits[0].double().log_softmax(-1) for sequence in SEQUENCES]
    states = final_states(decoder, ids, "")

    def divergence(p: Tensor, q: Tensor) -> float:
        return float((p.exp() * (p - q)).sum(-1).mean())

    broken = [torch.full_like(state, math.nan) for state in states["text"]]
    before_norm = [list(walked) for walked in (before_removal, [*decoder.walk(ids["text"])][-1])]
    found_divergences = divergences(decoder, before_norm[0], [before_norm[1], broken, before_norm[0]])
    expected = divergence(torch.cat(dense), torch.cat(fused))
    assert found_divergences == [pytest.approx(expected, rel=1e-4), math.inf, pytest.approx(0, abs=1e-6)]

    found = predictions(decoder, ids, states, dense_states)["text"]
    p, q = (torch.cat([each[:-1] for each in log_probs]) for log_probs in (dense, fused))  # (tokens, vocab)
    assert 0.05 < found.agreement < 0.95 and found.divergence > 0.1
    assert found.divergence == pytest.approx(divergence(p, q), rel=1e-5)
    assert found.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    targets = torch.cat([sequence[1:] for sequence in SEQUENCES])
    assert math.log(found.perplexity) == pytest.approx(-float(q.gather(1, targets[:, None]).mean()), rel=1e-5)
    of_dense = predictions(decoder, ids, dense_states)["text"]
    assert math.log(of_dense.perplexity) == pytest.approx(-float(p.gather(1, targets[:, None]).mean()), rel=1e-5)
