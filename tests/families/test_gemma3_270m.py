"""Layers of a real Gemma that must not be fused; only where GEMMA3_270M names its folder, as it takes many minutes."""

from __future__ import annotations

import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lf_hf import FusionConfig
from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.measure.dense import measure
from lf_hf.pipeline import fuse
from lf_hf.text.calibration import load_corpus

FOLDER = os.environ.get("GEMMA3_270M", "")


@pytest.mark.skipif(not FOLDER, reason="GEMMA3_270M does not name the folder of Gemma 3 270M")
def test_the_preset_fuses_no_layers_that_work_together() -> None:
    """Layers 1 and 2, or 3 and 4, as one would cost one nat and more than two; influence takes 3 and 4 first."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    config = FusionConfig(4, "refit", calibration_tokens=16384)
    decoder = ModelDecoder(model)
    measured = measure(decoder, tokenizer, config, None, load_corpus("bundled"))
    report = fuse(decoder, tokenizer, config, measured, base="")
    costs = {(cost.first, cost.last): cost.divergence for cost in report.group_costs}
    assert costs[1, 2] > 0.6 and costs[3, 4] > 1.5 and max(costs[n, n + 1] for n in range(4, 10)) < 0.5
    assert not any({1, 2} <= set(group) or {3, 4} <= set(group) for group in report.groups)
    assert all(text.fused / text.dense < 1.7 for text in report.perplexities)
