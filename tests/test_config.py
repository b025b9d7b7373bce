from __future__ import annotations

import json
from typing import Any

import pytest

from lf_hf import FusionConfig
from lf_hf.settings import CHOICES, METHODS, fusion_settings


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


def test_choices_cover_what_presets_use() -> None:
    for preset in METHODS.values():
        assert all(value in CHOICES[name] for name, value in preset.items())


def test_round_trips_through_json() -> None:
    config = FusionConfig(num_fusions=2, kernel_scale=4, rank_normalize=False)
    assert FusionConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_strings_are_read_as_the_fields_types() -> None:
    config = FusionConfig.from_kwargs(num_fusions="4", kernel_scale="2.5", rank_normalize="False", method="mka")
    assert config == FusionConfig(num_fusions=4, kernel_scale=2.5, rank_normalize=False, method="mka")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "Give one of num_fusions, max_divergence, max_perplexity_ratio, .* got none of them"),
        ({"num_fusions": 4, "max_divergence": 0.1}, "got num_fusions=4 and max_divergence=0.1"),
        ({"max_divergence": 0}, "max_divergence must be greater than 0, got 0"),
        ({"max_perplexity_ratio": "1"}, "max_perplexity_ratio must be greater than 1, got 1"),
        ({"num_fusions": 0}, "num_fusions must be an integer of at least 1, got 0"),
        ({"num_fusions": True}, "at least 1, got True"),
        ({"num_fusions": "four"}, "num_fusions must be an integer, got 'four'"),
        ({"num_fusions": 1, "num_fusion": 2}, "Unknown fusion setting 'num_fusion'; did you mean 'num_fusions'"),
        ({"num_fusions": 1, "method": "neural_aligment"}, "Unknown method 'neural_aligment'; did you mean"),
        ({"num_fusions": 1, "method": 3}, "method must be one of neural_alignment, mka"),
        ({"num_fusions": 1, "alignment": "columns"}, "Unknown alignment 'columns'; known are none, rows, neurons"),
        ({"num_fusions": 1, "merge": "keep_first"}, "alignment='rows' has no effect with merge='keep_first'"),
        (
            {"num_fusions": 1, "method": "refit", "alignment": "neurons"},
            "alignment='neurons' has no effect with merge='sel",
        ),
        ({"num_fusions": 1, "refit": "projections"}, "refit='projections' chooses heads and channels of whole layers"),
        ({"num_fusions": 1, "ridge": 0}, "ridge must be greater than 0, got 0"),
        ({"num_fusions": 1, "kernel_scale": 0}, "kernel_scale must be greater than 0, got 0"),
        ({"num_fusions": 1, "kernel_scale": "wide"}, "kernel_scale must be a number, got 'wide'"),
        ({"num_fusions": 1, "rank_normalize": "yes"}, "rank_normalize must be true or false, got 'yes'"),
        ({"num_fusions": 1, "rank_normalize": 1}, "rank_normalize must be true or false, got 1"),
        ({"num_fusions": 1, "sample_length": 0}, "sample_length must be an integer of at least 1"),
    ],
)
def test_bad_settings_get_one_sentence(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        FusionConfig.from_kwargs(**values)
    assert "\n" not in str(error.value)


def test_limits_that_depend_on_the_model_and_the_data() -> None:
    config = FusionConfig(num_fusions=32)
    with pytest.raises(ValueError, match="num_fusions must be 1 to 31 for a model of 32 layers"):
        config.check_num_layers(32)
    config.check_num_layers(33)
    with pytest.raises(ValueError, match="has 1 layers; fusing with selection='last' needs at least 2"):
        config.check_num_layers(1)
    with pytest.raises(ValueError, match=r"num_fusions must be 1 to 30 .* selection='least_influence', got 32"):
        FusionConfig(num_fusions=32, method="refit").check_num_layers(33)
    with pytest.raises(ValueError, match=r"entropy_neighbors=50.* need at least 51 calibration samples, got 50"):
        config.check_num_samples(50)
    config.check_num_samples(51)
    FusionConfig(num_fusions=1, method="truncate").check_num_samples(0)


def test_a_method_given_over_a_config_brings_its_preset() -> None:
    config = FusionConfig(num_fusions=1, ridge=0.2)
    assert fusion_settings(config, {"method": "refit"}) == FusionConfig(1, "refit", ridge=0.2)
    chosen = FusionConfig(num_fusions=1, selection="groups")
    assert fusion_settings(chosen, {"method": "refit", "ridge": "0.2"}).selection == "groups"
