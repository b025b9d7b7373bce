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
from conftest import files, make_llama, make_texts, make_tokenizer, same
from two_devices import TwoDevices, spread

from lf_hf import FusionConfig, fuse_checkpoint
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


def run(model: Any, kind: str, samples: list[str] | None = None) -> FusionReport:
    config: dict[str, Any] = {"num_fusions": 2, "perplexity_tokens": 0, "calibration_tokens": 1024, "method": kind}
    return fuse(
        ModelDecoder(model, keep_originals=True),
        make_tokenizer(),
        FusionConfig(**config | {"calibration_length": 64} | SETTINGS[kind]),
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
        # Those that together run every part of a fusion.
        *((torch.float16, kind) for kind in ("neural_alignment", "refit", "groups averaged and refitted")),
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


# Wherever and however it runs


def write(base: str, out: Path, kind: str, **arguments: Any) -> FusionReport:
    config: dict[str, Any] = {"num_fusions": 2, "perplexity_tokens": 0, "speed": False, "calibration_length": 64}
    config |= {"calibration_tokens": 1024, "low_memory": False, "method": kind} | arguments
    return fuse_checkpoint(base, out, calibration=make_texts(), **config)


def write_all(base: str, out: Path) -> None:
    for kind in ("neural_alignment", "refit"):
        write(base, out / kind, kind, perplexity_tokens=200)


def test_another_process_writes_the_same_bytes(base: str, tmp_path: Path) -> None:
    write_all(base, tmp_path / "here")
    code = f"import pathlib, test_any_model as t; t.write_all({base!r}, pathlib.Path({str(tmp_path / 'there')!r}))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)
    for here in (tmp_path / "here").iterdir():
        there = tmp_path / "there" / here.name
        one, other = files(here), files(there)
        # Which say how many seconds it took.
        assert {name for name in one if one[name] != other[name]} <= {"fusion_report.json", "README.md"}
        assert FusionReport.load(here).to_dict() | {"seconds": 0} == FusionReport.load(there).to_dict() | {"seconds": 0}


OUTER = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
LAYERS = {f"model.layers.{n}": "cpu" for n in range(5)}


@pytest.mark.parametrize("on_disk", [{""}, {"model.layers.0"}, {"lm_head"}, {*LAYERS}])
def test_offloaded_models_are_refused_and_left_as_they_are(
    on_disk: set[str], make_base: Callable[..., str], tmp_path: Path
) -> None:
    base = make_base()
    before = files(Path(base))
    device_map = (OUTER | LAYERS if "" not in on_disk else {}) | dict.fromkeys(on_disk, "disk")
    loading: dict[str, Any] = {"device_map": device_map, "offload_folder": str(tmp_path / "offload")}
    with pytest.raises(ValueError, match=r"is offloaded, so it cannot be fused in place; .* or use fuse_checkpoint"):
        write(base, tmp_path / "out", "refit", **loading)
    assert not (tmp_path / "out").exists() and files(Path(base)) == before


def test_a_device_map_that_fits_changes_nothing(base: str, tmp_path: Path) -> None:
    for name, device_map in (("plain", None), ("one", {"": "cpu"}), ("parts", OUTER | LAYERS), ("auto", "auto")):
        write(base, tmp_path / name, "refit", device_map=device_map)
        for file in ("model.safetensors", "config.json"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


@pytest.mark.parametrize(("kind", "first"), [("neural_alignment", 3), ("refit", 2)])
def test_a_model_on_two_devices_fuses_as_on_one(kind: str, first: int) -> None:
    whole, parts, ids = make_llama(), make_llama(), torch.arange(2, 9)[None]
    run(whole, kind)
    with TwoDevices() as devices, torch.no_grad():
        spread(parts, first, devices)
        run(parts, kind)
        logits = parts(ids).logits
    assert devices.moved > 0 and same(parts, whole)
    with torch.no_grad():
        assert torch.equal(whole(ids).logits, logits)
