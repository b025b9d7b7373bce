"""Settings: defaults, methods, and reading from strings. What they refuse is in test_bad_input.py."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lf_hf import FusionConfig, HealSettings
from lf_hf.settings import METHODS

TAKEN = FusionConfig.taken_from


def test_defaults_are_the_published_hyper_parameters() -> None:
    config = FusionConfig(num_fusions=4)
    assert config.method == "neural_alignment"
    assert (config.kernel_scale, config.kernel_alpha, config.embedding_dim, config.ratio_beta) == (8, 0.5, 2, 1)
    assert (config.mi_neighbors, config.entropy_neighbors) == (5, 50)
    assert (config.sample_length, config.samples_per_subject) == (512, 1)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_sets_fields_and_what_is_given_overrides_it(method: str) -> None:
    config = FusionConfig(1, method)
    assert METHODS[method].items() <= config.to_dict().items()
    assert (config.averages, config.fits) == (method in ("neural_alignment", "mka"), method in ("refit", "healed"))
    given = FusionConfig(1, method, heal_tokens=0, selection="least_influence")
    assert (given.heal_tokens, given.selection) == (0, "least_influence")


@pytest.mark.parametrize(
    ("channels", "layer_parameters", "fitted", "healed"),
    [
        (1536, 3_540_096, [49152, 131072], 131072),  # SmolLM2-135M
        (2048, 5_574_912, [65536, 131072], 131072),  # Gemma 3 270M
        (14336, 218_112_000, [262144, 262144], 2097152),  # Llama-3-8B
        (8192, 60_821_504, [262144, 262144], 608215),  # Llama-3.2-1B
    ],
)
def test_tokens_follow_from_the_models_width(
    channels: int, layer_parameters: int, fitted: list[int], healed: int
) -> None:
    configs = [FusionConfig(1, method).for_width(channels, layer_parameters) for method in ("refit", "healed")]
    assert [config.calibration_tokens for config in configs] == fitted
    assert [config.heal_tokens for config in configs] == [0, healed]
    given = FusionConfig(1, "healed", calibration_tokens=2048, heal_tokens=0)
    assert given.for_width(channels, layer_parameters) == given
    assert FusionConfig(1).for_width(channels, layer_parameters) == FusionConfig(1)  # which needs no text


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("neural_alignment", {"seed", "kernel_scale"}),
        ("truncate", set()),
        ("refit", {"seed", "ridge", "calibration_tokens"}),
        ("healed", {"seed", "ridge", "calibration_tokens", "heal_tokens"}),
    ],
)
def test_settings_without_effect_are_left_out(method: str, names: set[str]) -> None:
    depends = {"seed", "kernel_scale", "ridge", "calibration_tokens", "heal_tokens"}
    assert FusionConfig(1, method).for_width(1536, 1).in_effect().keys() & depends == names
    assert FusionConfig(1, method).without_effect("a file") == (["calibration"] if method == "truncate" else [])
    given = FusionConfig(1, method, seed=5, ridge=0.2, heal_tokens=0)
    assert {*given.without_effect(None)} == {"seed", "ridge"} - FusionConfig(1, method).in_effect().keys()


def test_layers_that_are_to_be_left_become_fusions() -> None:
    assert FusionConfig(target_layers=5, method="refit").for_layers(8, range(1, 7)) == FusionConfig(3, "refit")
    for layers in (1, 8):
        with pytest.raises(ValueError, match=f"target_layers must be 3 to 7 for a base of 8 layers, got {layers}"):
            FusionConfig(target_layers=layers, method="refit").for_layers(8, range(1, 7))


def test_strings_are_read_as_the_fields_types_and_json_gives_the_same() -> None:
    config = FusionConfig(num_fusions=4, kernel_scale=2.5, rank_normalize=False, method="mka")
    strings = {name: str(value) for name, value in config.to_dict().items() if value is not None}
    assert FusionConfig.from_kwargs(**strings) == config
    assert FusionConfig(**json.loads(json.dumps(config.to_dict()))) == config
    numbers = {"num_fusions": np.int64(4), "kernel_scale": np.float32(2.5), "rank_normalize": np.False_}
    given = FusionConfig.from_kwargs(**numbers, method="mka").to_dict()
    assert given == config.to_dict() and json.dumps(given)  # of numpy's numbers there are none left
    assert HealSettings.from_kwargs(train="lora", tokens="2048") == HealSettings(train="lora", tokens=2048)


def test_a_field_given_over_settings_brings_its_method_and_level() -> None:
    config = FusionConfig(num_fusions=1, ridge=0.2)
    assert TAKEN({"method": "refit"}, config) == FusionConfig(1, "refit", ridge=0.2)
    assert TAKEN({"max_divergence": 0.1}, config) == FusionConfig(max_divergence=0.1, ridge=0.2)
    chosen = FusionConfig(num_fusions=1, selection="least_influence")
    assert TAKEN({"method": "refit", "ridge": "0.2"}, chosen).selection == "least_influence"
    assert HealSettings.taken_from({"train": "lora"}, HealSettings(learning_rate=0.1)).learning_rate == 0.1
