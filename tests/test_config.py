"""FusionConfig: defaults, presets, and reading from strings. What it refuses is in test_bad_input.py."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lf_hf import FusionConfig, HealSettings
from lf_hf.settings import METHODS


def test_defaults_are_the_published_hyper_parameters() -> None:
    config = FusionConfig(num_fusions=4)
    assert config.method == "neural_alignment"
    assert (config.kernel_scale, config.kernel_alpha, config.embedding_dim, config.ratio_beta) == (8, 0.5, 2, 1)
    assert (config.mi_neighbors, config.entropy_neighbors) == (5, 50)
    assert (config.sample_length, config.samples_per_subject) == (512, 1)


@pytest.mark.parametrize("method", METHODS)
def test_presets_fill_the_stage_fields_and_can_be_overridden(method: str) -> None:
    config = FusionConfig(num_fusions=1, method=method)
    assert {name: getattr(config, name) for name in METHODS[method]} == METHODS[method]
    overridden = FusionConfig(num_fusions=1, method=method, merge="average", refit="none", alignment="neurons")
    assert (overridden.merge, overridden.alignment) == ("average", "neurons")
    assert config.heal_tokens == (HealSettings().tokens if method == "healed" else 0)
    assert FusionConfig(1, method, heal_tokens=0).heal_tokens == 0
    assert FusionConfig.taken_from({"method": "refit"}, config).heal_tokens == 0


def test_strings_are_read_as_the_fields_types_and_json_gives_the_same() -> None:
    config = FusionConfig(num_fusions=4, kernel_scale=2.5, rank_normalize=False, method="mka")
    strings = {name: str(value) for name, value in config.to_dict().items() if value is not None}
    assert FusionConfig.from_kwargs(**strings) == config
    assert FusionConfig(**json.loads(json.dumps(config.to_dict()))) == config
    numbers = {"num_fusions": np.int64(4), "kernel_scale": np.float32(2.5), "rank_normalize": np.False_}
    given = FusionConfig.from_kwargs(**numbers, method="mka").to_dict()
    assert given == config.to_dict() and json.dumps(given)  # of numpy's numbers there are none left
    assert HealSettings.from_kwargs(train="lora", tokens="2048") == HealSettings(train="lora", tokens=2048)


def test_a_field_given_over_settings_brings_its_preset() -> None:
    config = FusionConfig(num_fusions=1, ridge=0.2)
    assert FusionConfig.taken_from({"method": "refit"}, config) == FusionConfig(1, "refit", ridge=0.2)
    chosen = FusionConfig(num_fusions=1, selection="groups")
    assert FusionConfig.taken_from({"method": "refit", "ridge": "0.2"}, chosen).selection == "groups"
    assert FusionConfig.taken_from({"max_divergence": 0.1}, config) == FusionConfig(max_divergence=0.1, ridge=0.2)
    assert HealSettings.taken_from({"train": "lora"}, HealSettings(learning_rate=0.1)).learning_rate == 0.1
