from __future__ import annotations

import copy
import math
import platform

import numpy as np
import pytest
import torch
from conftest import make_llama, make_texts, make_tokenizer
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from lf_hf import FusionConfig, FusionReport
from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.families import PROJECTIONS
from lf_hf.measure import WRITTEN_LENGTH, calibration_sequences
from lf_hf.pipeline import fuse
from lf_hf.text.calibration import CalibrationSamples, Corpus, documentation_halves

CALIBRATION = CalibrationSamples(make_texts(), "random sentences")
TEXT = Corpus({"": " ".join(make_texts(200))})


def run(num_fusions: int = 3, **settings: object) -> FusionReport:
    config = FusionConfig(num_fusions=num_fusions, **{"perplexity_tokens": 300} | settings)  # type: ignore[arg-type]
    return fuse(ModelDecoder(make_llama()), make_tokenizer(), config, CALIBRATION, TEXT, base="tiny")


def test_fuses_from_the_end_in_ratios_of_the_original_similarity_and_reports_what_was_measured() -> None:
    report = run(3)
    assert [step.pair for step in report.steps] == [(3, 4), (2, 3), (1, 2)]
    assert [step.layers_j for step in report.steps] == [[4], [3, 4], [2, 3, 4]]
    assert (report.layers_before, report.layers_after) == (5, 2)
    assert report.layers_removed_fraction == pytest.approx(3 / 5)
    S = np.array(report.similarity)
    assert S.shape == (5, 5) and np.array(report.embeddings).shape == (5, 57, 2)
    for step in report.steps:
        i, j = step.pair
        raw = S[i].sum() / (S[i].sum() + S[j].sum())
        assert step.ratio_i == pytest.approx(math.exp(raw) / (1 + math.exp(raw)))
        assert step.ratio_i + step.ratio_j == 1
        assert set(step.matches) == set(PROJECTIONS)
        for match in step.matches.values():
            assert match.cosine_after > match.cosine_before and 0 < match.rows_moved <= 1
    stages = {"activations", "manifold", "similarity", "alignment and fusion"}
    assert set(report.seconds) == stages | {"perplexity", "continuations"}
    assert [(text.name, text.relation) for text in report.perplexities] == [("docs", "unseen"), ("reasoning", "unseen")]
    assert platform.python_version() in report.perplexities[0].text
    assert FusionReport.from_dict(report.to_dict()) == report
    for part in ("layers: 5 -> 2", "random sentences (57 samples", "perplexity, docs"):
        assert part in report.summary()


def test_nothing_is_measured_of_no_tokens() -> None:
    unmeasured = run(1, method="mka", perplexity_tokens=0)
    assert unmeasured.steps[0].matches == {}
    assert unmeasured.perplexities == [] and unmeasured.continuations == [] and unmeasured.notes == []


@pytest.mark.parametrize(("selection", "by_default"), [("least_influence", True), ("groups", False)])
def test_a_fusion_is_told_what_helps_and_what_it_was_fitted_to(selection: str, by_default: bool) -> None:
    config = FusionConfig(1, "refit", selection, calibration_tokens=1024, perplexity_tokens=100)
    note = "Text of your own domain is better" if by_default else ""
    text = Corpus({"mine": documentation_halves()[1]}, note=note)
    decoder = ModelDecoder(make_llama())
    report = fuse(decoder, make_tokenizer(), config, None, text, base="tiny")
    assert any("own domain" in note for note in report.notes) == by_default
    assert any("selection='groups' measures it" in note for note in report.notes) == (selection == "least_influence")
    assert [judged.relation for judged in report.perplexities] == ["seen", "unseen"]


@pytest.mark.parametrize("method", ["neural_alignment", "refit"])
def test_the_model_is_unchanged_when_calibration_fails(method: str) -> None:
    model = make_llama()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(1e38)
    before = copy.deepcopy(model)
    config = FusionConfig(1, method, perplexity_tokens=0, calibration_tokens=1024, calibration_length=64)
    with pytest.raises(ValueError, match="activations of layer 2"):
        fuse(ModelDecoder(model), make_tokenizer(), config, CALIBRATION, TEXT, base="tiny")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize("length", [200, 64])
def test_the_model_writes_its_share_of_calibration_text_in_short_pieces(length: int) -> None:
    model, tokenizer = make_llama(), make_tokenizer()
    config = FusionConfig(1, "refit", calibration_tokens=2048, calibration_length=length)
    short = min(WRITTEN_LENGTH, length)
    brief = "deep layer " * 75
    for text, given in ((TEXT.parts[""], 1024 // length * length), (brief, len(tokenizer(brief)["input_ids"]))):
        own, written = calibration_sequences(ModelDecoder(model), tokenizer, Corpus({"": text}, 0.5), config)
        known = " ".join(map(str, tokenizer(text)["input_ids"]))
        assert all(" ".join(map(str, sequence.tolist())) in known for sequence in own)
        assert {len(sequence) for sequence in written} == {short}
        assert sum(map(len, written)) == pytest.approx(given, abs=short)
        assert sum(map(len, own)) == given


def test_long_parts_show_how_far_they_are(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lf_hf.runtime.progress.EVERY", 0)
    parts = ("Calibration", "Layer similarity", "Fusing", "Assignment", "Perplexity before", "Perplexity after")
    run(1)
    shown = capsys.readouterr().err
    assert all(part in shown for part in parts) and "\r" not in shown
    disable_progress_bar()
    try:
        run(1)
    finally:
        enable_progress_bar()
    assert capsys.readouterr().err == ""
