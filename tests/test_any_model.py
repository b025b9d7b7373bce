"""Any Llama, every way of fusing: finite weights or one error, on one device or on two."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import no_warnings
from conftest import make_llama, make_texts
from tiny_models import measure_and_fuse

from lf_hf import FusionConfig
from lf_hf.report.report import FusionReport
from lf_hf.text.calibration import CalibrationSamples, Corpus

SETTINGS: dict[str, dict[str, Any]] = {
    **{method: {"method": method} for method in ("neural_alignment", "mka", "truncate", "refit")},
    "mka, neurons matched": {"method": "mka", "alignment": "neurons"},
    "least influential averaged": {"method": "neural_alignment", "selection": "least_influence"},
}


def run(model: Any, kind: str, samples: list[str] | None = None) -> FusionReport:
    config: dict[str, Any] = {"num_fusions": 2, "perplexity_tokens": 0, "calibration_tokens": 1024}
    return measure_and_fuse(
        model,
        FusionConfig(**config | {"calibration_length": 64} | SETTINGS[kind]),
        CalibrationSamples(samples or make_texts(), "random sentences"),
        Corpus({"random text": " ".join(make_texts(400))}),
    )


def scaled_model(dtype: torch.dtype, exponent: int) -> Any:
    model, largest = make_llama(dtype=dtype), torch.finfo(dtype).max / 2
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.copy_((parameter.double() * 10.0**exponent).clamp(-largest, largest))
    return model


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        *((torch.bfloat16, kind) for kind in SETTINGS),
        # Those that together run every part of a fusion.
        *((torch.float16, kind) for kind in ("neural_alignment", "refit")),
    ],
)
def test_weights_of_any_scale_fuse_to_finite_ones_or_give_one_error(dtype: torch.dtype, kind: str) -> None:
    for exponent in (-30, 30):
        model = scaled_model(dtype, exponent)
        with no_warnings():
            try:
                run(model, kind)
            except ValueError:
                assert exponent > 0
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def equal_layers(model: Any) -> None:
    for layer in model.model.layers[1:]:
        layer.load_state_dict(model.model.layers[0].state_dict())


def zero_rows(model: Any) -> None:
    for layer in model.model.layers:
        for name, parameter in layer.named_parameters():
            if "proj" in name:
                parameter[::2] = 0


def idle_layers(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()


def equal_embeddings(model: Any) -> None:
    model.model.embed_tokens.weight[:] = model.model.embed_tokens.weight[0]


@pytest.mark.parametrize("kind", ["neural_alignment", "refit"])
@pytest.mark.parametrize("damage", [None, equal_layers, zero_rows, idle_layers, equal_embeddings])
def test_degenerate_models_and_samples_fuse_to_finite_weights(damage: Callable[[Any], None] | None, kind: str) -> None:
    model, samples = make_llama(), make_texts(51)  # one more than neighbours
    if damage is None:
        samples = [samples[0]] * 51
    else:
        with torch.no_grad():
            damage(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = run(model, kind, samples)
    messages = [str(warning.message) for warning in caught]
    assert all("have no similarity" in message or "mixed signs" in message for message in messages), messages
    assert len(messages) <= 3
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    json.dumps(report.to_dict(), allow_nan=False)
