"""Training a fused layer by itself, after its fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_model

from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.refit.group import fit_group
from lf_hf.refit.layer_parts import build_layer
from lf_hf.refit.states import StateStore, trace
from lf_hf.refit.tuning import steps_of, tune

SEQUENCES = [torch.randint(0, 320, (48 + n % 3,), generator=torch.Generator().manual_seed(n)) for n in range(320)]


@torch.no_grad()
@pytest.mark.parametrize(
    ("model_type", "dtype"), [("llama", torch.float32), ("llama", torch.float16), ("gemma3_text", torch.bfloat16)]
)
def test_it_brings_the_layer_nearer_to_its_group_on_unseen_text(model_type: str, dtype: torch.dtype) -> None:
    model: Any = tiny_model(model_type).to(dtype)
    decoder = ModelDecoder(model)
    layers, text = [model.model.layers[n] for n in (1, 2)], SEQUENCES[:300]
    states, unseen = (decoder.embed(decoder.batches(some)) for some in (text, SEQUENCES[300:]))
    traces, wanted = (trace(decoder, layers, some, StateStore()) for some in (states, unseen))
    fit = fit_group(decoder, [*layers], traces, states, StateStore(), refit="projections", ridge=0.1)
    fused = build_layer(decoder, fit.weights, fit.kind)

    def missed() -> float:
        found = [decoder.run_layer(fused, state) for state in unseen]
        return sum(float((a.float() - b.float()).square().sum()) for a, b in zip(found, wanted.output, strict=True))

    fitted = missed()
    tuned = tune(decoder, fused, states, traces.output, steps_of(decoder, text))
    fused.load_state_dict(tuned)
    assert missed() < 0.98 * fitted
    assert {weight.dtype for weight in tuned.values()} == {dtype}
    more = [torch.zeros(512, dtype=torch.int64)] * 400
    assert sum(map(len, steps_of(decoder, more).rows)) == 2 * len(more)  # passes: it takes as long for any more text
