"""Training a fused layer by itself, after its fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import fitted, tiny_model

from lf_hf.decoder.decoder import Decoder
from lf_hf.refit.states import StateStore, trace
from lf_hf.refit.tuning import training_steps, tune

SEQUENCES = [torch.randint(0, 320, (48 + n % 3,), generator=torch.Generator().manual_seed(n)) for n in range(320)]


@torch.no_grad()
@pytest.mark.parametrize(
    ("model_type", "dtype"), [("llama", torch.float32), ("llama", torch.float16), ("gemma3_text", torch.bfloat16)]
)
def test_it_brings_the_layer_nearer_to_its_group_on_unseen_text(model_type: str, dtype: torch.dtype) -> None:
    model: Any = tiny_model(model_type).to(dtype)
    decoder = Decoder(model)
    text, unseen_text = SEQUENCES[:300], SEQUENCES[300:]
    states, unseen = (decoder.embed(decoder.make_batches(sequences)) for sequences in (text, unseen_text))
    wanted = trace(decoder, model.model.layers[1:3], unseen, StateStore()).output
    _, fused, traces = fitted(decoder, (1, 2), states)

    def missed() -> float:
        found = [decoder.run_layer(fused, state) for state in unseen]
        return sum(float((a.float() - b.float()).square().sum()) for a, b in zip(found, wanted, strict=True))

    untrained = missed()
    tuned = tune(decoder, fused, states, traces.output, training_steps(decoder, text, decoder.batch_indices(text)))
    fused.load_state_dict(tuned)
    assert missed() < 0.98 * untrained
    assert {weight.dtype for weight in tuned.values()} == {dtype}
