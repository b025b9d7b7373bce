"""Whoever changes what a fusion computes raises `ALGORITHM`, so that results that are kept are not used again."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import make_texts
from tiny_models import logits, measure_and_fuse, tiny_model

from lf_hf import FusionConfig
from lf_hf.decoder.decoder import Decoder
from lf_hf.settings import ALGORITHM
from lf_hf.text.calibration import CalibrationSamples, Corpus

KNOWN = Path(__file__).parent / "golden" / "algorithm.json"
FUSIONS = [("neural_alignment", "llama"), ("mka", "llama")]
FUSIONS += [("refit", "llama"), ("refit", "mixtral"), ("refit", "qwen3_5_text")]
ADVICE = "Fusions give other numbers now: raise ALGORITHM in lf_hf/settings.py, and run this test with WRITE_GOLDEN=1."


def predictions(method: str, model_type: str) -> list[float]:
    """Log-probabilities of some tokens by a tiny model, two of whose layers are fused away."""
    model = tiny_model(model_type)
    if method == "refit":
        corpus = Corpus({"texts": " ".join(make_texts(300))}, is_bundled=True)  # beside which no text of Python stands
        config = FusionConfig(2, method, calibration_tokens=2048, calibration_length=32, perplexity_tokens=0)
        measure_and_fuse(model, config, None, corpus)
    else:
        config = FusionConfig(2, method, sample_length=16, perplexity_tokens=0)
        measure_and_fuse(model, config, CalibrationSamples(make_texts(57), "texts"), None)
    ids = torch.arange(2, 10)[None]
    probable = logits(Decoder(model), ids).log_softmax(-1)[0, :-1]
    return probable.gather(-1, ids[0, 1:, None]).flatten().tolist()


def test_the_number_of_the_algorithm_rises_with_what_fusions_give() -> None:
    found = {f"{method} of {model_type}": predictions(method, model_type) for method, model_type in FUSIONS}
    known = json.loads(KNOWN.read_text()) if KNOWN.is_file() else {"algorithm": None}
    same = all(found[name] == pytest.approx(known.get(name), abs=0.01) for name in found)
    if os.environ.get("WRITE_GOLDEN") and known["algorithm"] != ALGORITHM:
        rounded = {name: [round(value, 3) for value in values] for name, values in found.items()}
        KNOWN.write_text(json.dumps({"algorithm": ALGORITHM, **rounded}) + "\n")
        return
    assert same and known["algorithm"] == ALGORITHM, ADVICE
