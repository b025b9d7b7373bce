"""Any Llama, every way of fusing: finite weights or one error, the same result wherever and however it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import no_warnings
from conftest import make_llama, make_texts, make_tokenizer
from two_devices import OTHER, TwoDevices, spread

from lf_hf import FusionConfig, fuse_checkpoint, pipeline
from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.pipeline import fuse
from lf_hf.report.report import FusionReport
from lf_hf.text.calibration import CalibrationSamples, Corpus

SETTINGS: dict[str, dict[str, Any]] = {
    "neural_alignment": {},
    "mka": {},
    "truncate": {},
    "refit": {},
    "mka, neurons matched": {"method": "mka", "alignment": "neurons"},
    "mka, refitted": {"method": "mka", "refit": "down_proj"},
    "groups dropped": {"method": "truncate", "selection": "groups"},
    "groups averaged and refitted": {"method": "mka", "selection": "groups", "refit": "down_proj"},
    "least influential averaged": {"method": "neural_alignment", "selection": "least_influence"},
}

OF_EACH_PART = ("neural_alignment", "refit", "groups averaged and refitted")
"""Those that together run every part of a fusion."""


def run(model: Any, *, samples: list[str] | None = None, **overrides: Any) -> FusionReport:
    config: dict[str, Any] = {"num_fusions": 2, "perplexity_tokens": 0, "calibration_tokens": 1024}
    return fuse(
        ModelDecoder(model, keep_originals=True),
        make_tokenizer(),
        FusionConfig(**config | {"calibration_length": 64} | overrides),
        CalibrationSamples(samples or make_texts(), "random sentences"),
        Corpus([" ".join(make_texts(400))], "random text"),
        base="tiny",
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
        *((torch.float16, kind) for kind in OF_EACH_PART),
    ],
)
def test_weights_of_any_scale_fuse_to_finite_ones_or_give_one_error(dtype: torch.dtype, kind: str) -> None:
    for exponent in (-30, 30):
        model = scaled_model(dtype, exponent)
        with no_warnings():
            try:
                run(model, **{"method": kind} | SETTINGS[kind])
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
    model = make_llama()
    samples = make_texts(51)  # one more than neighbours
    if damage is None:
        samples = [samples[0]] * 51
    else:
        with torch.no_grad():
            damage(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = run(model, samples=samples, **{"method": kind} | SETTINGS[kind])
    messages = [str(warning.message) for warning in caught]
    assert all("have no similarity" in message or "mixed signs" in message for message in messages), messages
    assert len(messages) <= 3
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("kind", ["refit", "neural_alignment"])
def test_activations_that_overflow_are_named(kind: str) -> None:
    model = make_llama(dtype=torch.float16)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(6e4)
    with pytest.raises(ValueError, match="The activations of layer 2 contain NaN or inf"):
        run(model, **{"method": kind} | SETTINGS[kind])


# Determinism


def fuse_all(base: str, out: Path) -> None:
    for kind in ("neural_alignment", "refit"):
        write(base, out / kind, kind, low_memory=False, perplexity_tokens=200)


def write(base: str, out: Path, kind: str, **arguments: Any) -> FusionReport:
    config: dict[str, Any] = {"num_fusions": 2, "perplexity_tokens": 0, "speed": False, "calibration_length": 64}
    config |= {"calibration_tokens": 1024, "method": kind} | SETTINGS[kind] | arguments
    return fuse_checkpoint(base, out, calibration=make_texts(), **config)


def test_another_process_writes_the_same_bytes(base: str, tmp_path: Path) -> None:
    fuse_all(base, tmp_path / "here")
    code = f"import pathlib, test_any_model as t; t.fuse_all({base!r}, pathlib.Path({str(tmp_path / 'there')!r}))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)
    for here in (tmp_path / "here").iterdir():
        there = tmp_path / "there" / here.name
        differing = {path.name for path in here.iterdir() if path.read_bytes() != (there / path.name).read_bytes()}
        assert differing <= {"fusion_report.json", "README.md"}  # which say how many seconds it took
        one, other = (FusionReport.load(side).to_dict() | {"seconds": None} for side in (here, there))
        assert one == other


# Devices

OUTER = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
LAYERS = {f"model.layers.{n}": "cpu" for n in range(5)}


@pytest.mark.parametrize("on_disk", [{""}, {"model.layers.0"}, {"lm_head"}, {*LAYERS}])
def test_offloaded_models_are_refused_and_left_as_they_are(
    on_disk: set[str], make_base: Callable[..., str], tmp_path: Path
) -> None:
    base = make_base()
    before = {path.name: path.read_bytes() for path in Path(base).iterdir()}
    device_map = (OUTER | LAYERS if "" not in on_disk else {}) | dict.fromkeys(on_disk, "disk")
    loading: dict[str, Any] = {"device_map": device_map, "offload_folder": str(tmp_path / "offload")}
    with pytest.raises(ValueError, match=r"is offloaded, so it cannot be fused in place; .* or use fuse_checkpoint"):
        write(base, tmp_path / "out", "refit", low_memory=False, **loading)
    assert not (tmp_path / "out").exists()
    assert {path.name: path.read_bytes() for path in Path(base).iterdir()} == before


def test_a_device_map_that_fits_changes_nothing(base: str, tmp_path: Path) -> None:
    for name, device_map in (("plain", None), ("one", {"": "cpu"}), ("parts", OUTER | LAYERS), ("auto", "auto")):
        write(base, tmp_path / name, "refit", low_memory=False, device_map=device_map)
        for file in ("model.safetensors", "config.json"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


@pytest.mark.parametrize(
    ("kind", "first"),
    [("neural_alignment", 3), ("refit", 2)],
)
def test_a_model_on_two_devices_fuses_as_on_one(kind: str, first: int) -> None:
    whole, parts = make_llama(), make_llama()
    settings: dict[str, Any] = {"method": kind} | SETTINGS[kind]
    run(whole, **settings)
    with TwoDevices() as devices:
        spread(parts, first, devices)
        run(parts, **settings)
        ids = torch.arange(2, 9)[None]
        with torch.no_grad():
            logits = parts(ids).logits
    assert devices.moved > 0
    for (name, one), (_, two) in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        assert torch.equal(one, two), name
    with torch.no_grad():
        assert torch.equal(whole(ids).logits, logits)
