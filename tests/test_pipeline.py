"""The pipeline on models in memory: what it reports, and finite weights or one error for any Llama."""

import copy
import json
import math
import platform
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from builders import no_warnings
from conftest import make_llama, make_texts, make_tokenizer, same
from tiny_models import idle, measure_and_fuse, measured_text
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from lf_hf import FusionConfig, FusionReport
from lf_hf.decoder.decoder import Decoder
from lf_hf.families.table import PROJECTIONS
from lf_hf.measure.dense import tokenize_corpus
from lf_hf.pipeline.run import fuse
from lf_hf.runtime.amounts import WRITTEN_LENGTH
from lf_hf.text.calibration import CalibrationSamples, Corpus, documentation_halves

TEXT = Corpus({"random text": " ".join(make_texts(400))})
QUICK: dict[str, Any] = {"perplexity_tokens": 0, "calibration_tokens": 1024, "calibration_length": 32}


def run(num_fusions: int, model: Any = None, samples: list[str] | None = None, **settings: Any) -> FusionReport:
    config = FusionConfig(num_fusions=num_fusions, **QUICK | settings)
    given = CalibrationSamples(samples or make_texts(), "random sentences")
    return measure_and_fuse(model or make_llama(), config, given, TEXT if config.needs_text else None)


def test_fuses_from_the_end_in_ratios_of_the_original_similarity_and_reports_what_was_measured() -> None:
    report = run(3, perplexity_tokens=300)
    [fused] = report.fused_layers
    assert fused.layers == [1, 2, 3, 4] and report.pairs == [(3, 4), (2, 3), (1, 2)]
    assert (report.layers_before, report.layers_after) == (5, 2)
    assert report.layers_removed_fraction == pytest.approx(3 / 5)
    S = np.array(report.similarity)
    assert S.shape == (5, 5) and np.array(report.embeddings).shape == (5, 57, 2)
    shares = [1.0]
    for (i, j), ratio, matches in zip(report.pairs, fused.ratios, fused.matches, strict=True):
        raw = S[i].sum() / (S[i].sum() + S[j].sum())
        assert ratio == pytest.approx(math.exp(raw) / (1 + math.exp(raw)))
        shares = [ratio, *((1 - ratio) * share for share in shares)]
        assert set(matches) == set(PROJECTIONS)
        for match in matches.values():
            assert match.cosine_after > match.cosine_before and 0 < match.rows_moved <= 1
    assert fused.shares == pytest.approx(shares) and sum(shares) == pytest.approx(1)
    stages = {"activations", "manifold", "similarity", "choosing", "making"}
    assert set(report.seconds) == stages | {"perplexity", "continuations"}
    assert [text.name for text in report.perplexities] == ["docs", "reasoning"]
    assert platform.python_version() in report.perplexities[0].text
    assert FusionReport.from_dict(report.to_dict()) == report
    for part in ("layers: 5 -> 2", "random sentences (57 samples", "perplexity, docs"):
        assert part in report.summary()


@pytest.mark.parametrize("sequences", [1, 2])
def test_a_layer_that_no_text_is_held_out_for_is_not_trained_and_that_is_said(sequences: int) -> None:
    measured = measured_text([*torch.randint(320, (sequences, 64), generator=torch.Generator().manual_seed(0))])
    report = fuse(Decoder(make_llama()), make_tokenizer(), FusionConfig(1, "refit"), measured, base="tiny")
    assert any("were not trained by themselves" in note for note in report.notes) == (sequences == 1)


@pytest.mark.parametrize(("selection", "by_default"), [("least_influence", True), ("groups", False)])
def test_a_fusion_is_told_what_helps(selection: str, by_default: bool) -> None:
    config = FusionConfig(1, "refit", selection, calibration_tokens=1024, perplexity_tokens=100)
    note = "Text of your own domain is better" if by_default else ""
    text = Corpus({"mine": documentation_halves()[1]}, note=note)
    report = measure_and_fuse(make_llama(), config, None, text)
    assert any("own domain" in note for note in report.notes) == by_default
    assert any("selection='groups' measures it" in note for note in report.notes) == (selection == "least_influence")


@pytest.mark.parametrize("method", ["neural_alignment", "refit"])
def test_the_model_is_unchanged_when_calibration_fails(method: str) -> None:
    model = make_llama()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(1e38)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="activations of layer 2"):
        run(1, model, method=method)
    assert same(model, before)


@pytest.mark.parametrize("length", [200, 64])
def test_the_model_writes_its_share_of_calibration_text_in_short_pieces(length: int) -> None:
    model, tokenizer = make_llama(), make_tokenizer()
    config = FusionConfig(1, "refit", calibration_tokens=2048, calibration_length=length)
    short = min(WRITTEN_LENGTH, length)
    brief = "deep layer " * 75
    [whole] = TEXT.parts.values()
    for text, size in ((whole, 1024 // length * length), (brief, len(tokenizer(brief)["input_ids"]))):
        made = tokenize_corpus(Decoder(model), tokenizer, Corpus({"": text}, 0.5), config)
        known = " ".join(map(str, tokenizer(text)["input_ids"]))
        assert all(" ".join(map(str, sequence.tolist())) in known for sequence in made.given)
        assert {len(sequence) for sequence in made.written} == {short}
        assert sum(map(len, made.written)) == pytest.approx(size, abs=short)
        assert sum(map(len, made.given)) == size


def test_long_parts_show_how_far_they_are(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lf_hf.runtime.progress.EVERY", 0)
    parts = ("Calibration", "Layer similarity", "Fusing", "Assignment", "Perplexity before", "Judging")
    run(1, perplexity_tokens=300)
    shown = capsys.readouterr().err
    assert all(part in shown for part in parts) and "\r" not in shown
    disable_progress_bar()
    try:
        run(1, perplexity_tokens=300)
    finally:
        enable_progress_bar()
    assert capsys.readouterr().err == ""


SETTINGS: dict[str, dict[str, Any]] = {
    **{method: {"method": method} for method in ("neural_alignment", "mka", "truncate", "refit")},
    "mka, neurons matched": {"method": "mka", "alignment": "neurons"},
    "least influential averaged": {"method": "neural_alignment", "selection": "least_influence"},
}


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
        *((torch.float16, kind) for kind in ("neural_alignment", "refit")),  # which together run every part of a fusion
    ],
)
def test_weights_of_any_scale_fuse_to_finite_ones_or_give_one_error(dtype: torch.dtype, kind: str) -> None:
    for exponent in (-30, 30):
        model = scaled_model(dtype, exponent)
        with no_warnings():
            try:
                run(2, model, **SETTINGS[kind])
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


def equal_embeddings(model: Any) -> None:
    model.model.embed_tokens.weight[:] = model.model.embed_tokens.weight[0]


@pytest.mark.parametrize("method", ["neural_alignment", "refit"])
@pytest.mark.parametrize(
    "damage", [None, equal_layers, zero_rows, lambda model: idle(model, *range(5)), equal_embeddings]
)
def test_degenerate_models_and_samples_fuse_to_finite_weights(damage: Any, method: str) -> None:
    model, samples = make_llama(), make_texts(51)  # one more than neighbours
    if damage is None:
        samples = [samples[0]] * 51
    else:
        with torch.no_grad():
            damage(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = run(2, model, samples, method=method)
    messages = [str(warning.message) for warning in caught]
    assert all("have no similarity" in message or "mixed signs" in message for message in messages), messages
    assert len(messages) <= 3
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    json.dumps(report.to_dict(), allow_nan=False)
