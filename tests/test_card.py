"""What has to hold on a GPU, where there is one: `scripts/bench_gpu` runs these tests."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_texts

from lf_hf import FusionReport, from_pretrained_fused, fuse_checkpoint
from lf_hf.runtime.memory import free_memory

CARD = torch.device("cuda")
SETTINGS: dict[str, Any] = {"num_fusions": 1, "calibration": make_texts(150), "calibration_length": 64}
SETTINGS |= {"calibration_tokens": 2048, "perplexity_tokens": 256, "method": "refit"}


@pytest.fixture
def card() -> str:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    return str(CARD)


def figures(report: FusionReport) -> dict[str, Any]:
    """What was fused, and how well that went."""
    [layer] = report.fused_layers
    divergences = {judged.name: judged.figures["divergence"] for judged in report.perplexities}
    return {"first": layer.layers[0], "count": len(layer.layers), "held out": layer.held_out_error, **divergences}


@pytest.mark.card
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_a_refit_is_as_on_the_cpu(card: str, model_type: str, family_base: Callable[..., Path], tmp_path: Path) -> None:
    """Within a twentieth: rounding differs from device to device, and training makes more of it."""
    base = family_base(model_type)
    expected = pytest.approx(figures(fuse_checkpoint(base, tmp_path, **SETTINGS)), rel=0.05)
    on_disk = dict.fromkeys(("model.embed_tokens", "model.layers", "lm_head"), "disk")
    for place in (card, on_disk | dict.fromkeys(("model.norm", "model.rotary_emb"), card)):
        assert figures(fuse_checkpoint(base, tmp_path, device_map=place, **SETTINGS)) == expected, place


@pytest.mark.card
def test_memory_that_the_process_keeps_for_itself_is_free(card: str) -> None:
    before = free_memory(CARD)
    taken = torch.empty(1 << 28, dtype=torch.uint8, device=card)
    assert free_memory(CARD) <= before - taken.nbytes / 2
    del taken
    assert free_memory(CARD) > before - (1 << 27)


@pytest.mark.card
def test_a_model_is_healed_and_stays_on_the_card(card: str, base: str) -> None:
    settings = SETTINGS | {"method": "healed", "heal_tokens": 4096}
    model = from_pretrained_fused(base, device_map=card, **settings)
    assert model.device.type == CARD.type and model.fusion_report is not None
    healed = model.fusion_report.healed
    assert healed is not None and healed.steps > 0
    divergences = [value for point in healed.curve for value in point.divergences.values()]
    assert all(map(math.isfinite, divergences))
    prompt = torch.arange(1, 9, device=card)[None]
    assert model.generate(prompt, max_new_tokens=4, do_sample=False).shape == (1, 12)  # type: ignore[operator]
