"""What is fused on stand-in cards, and what comes of it: run_cases.py asks on a card, the tests ask on the CPU."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from conftest import make_texts, save_base
from tiny_models import auto_class, tiny_model

from lf_hf import FusionReport, from_pretrained_fused, fuse_checkpoint
from lf_hf.plan.machine import CONTEXT

SETTINGS: dict[str, Any] = {"num_fusions": 1, "perplexity_tokens": 0, "speed": False}
AVERAGED: dict[str, Any] = {"calibration": make_texts()}
FITTED: dict[str, Any] = {"calibration": make_texts(150), "calibration_tokens": 1024, "calibration_length": 32}
METHODS: dict[str, dict[str, Any]] = {
    "neural_alignment": AVERAGED,
    "refit": FITTED,
    "healed": FITTED | {"heal_tokens": 2048, "perplexity_tokens": 128},
}

SLIDING = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
LINEAR = ["full_attention", "full_attention", "linear_attention", "linear_attention"]
FAMILIES: dict[str, tuple[str, list[str]]] = {
    "Llama": ("llama", []),
    "Gemma 3": ("gemma3_text", SLIDING),
    "a hybrid": ("qwen3_5_text", LINEAR),
    "a wrapper": ("gemma3", SLIDING),
}
"""Types of tiny models, and of their four layers; averages take the last two, which are of one type."""

PLACEMENTS: dict[str, dict[str, Any]] = {
    "in memory": {"device_map": "cuda"},
    "on two cards": {
        "device_map": {
            **dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.layers.1"), 0),
            **dict.fromkeys(("model.layers.2", "model.layers.3", "model.norm", "model.rotary_emb", "lm_head"), 1),
        }
    },
    "from files": {
        "device_map": {
            **dict.fromkeys(("model.embed_tokens", "model.layers", "lm_head"), "disk"),
            **dict.fromkeys(("model.norm", "model.rotary_emb"), 0),
        }
    },
    "on a small card": {
        "device_map": "cuda",
        "max_memory": {0: CONTEXT, "cpu": 4 << 30},
    },  # too small to be planned for
}


class Case(NamedTuple):
    method: str
    family: str
    placement: str = "in memory"


CASES = [Case(method, "Llama") for method in METHODS]
# A healing begins with a fit, and the wrapper's decoder is a Gemma 3.
CASES += [Case("neural_alignment", "a wrapper"), Case("refit", "Gemma 3"), Case("healed", "a hybrid")]
CASES += [Case("healed", "Llama", "on two cards"), Case("refit", "Llama", "from files")]
CASES += [Case(method, "Llama", "on a small card") for method in ("refit", "healed")]


def make_base(family: str, folder: Path) -> str:
    model_type, types = FAMILIES[family]
    overrides: dict[str, Any] = {"layer_types": types} if types else {}
    return save_base(folder, tiny_model(model_type, num_hidden_layers=4, **overrides))


def outcome(case: Case, base: str, **placement: Any) -> dict[str, Any]:
    """Which layers were fused, what the report says of it, and what the model predicts where it then lies.

    What the report says is of the fused model before it was healed.
    """
    given = SETTINGS | METHODS[case.method] | {"method": case.method} | placement
    model: Any
    if case.placement == "from files":
        with TemporaryDirectory() as out:
            report: FusionReport | None = fuse_checkpoint(base, out, **given)
            model = auto_class(FAMILIES[case.family][0]).from_pretrained(out, device_map="cuda")
    else:
        model = from_pretrained_fused(base, **given)
        report = model.fusion_report
    assert report is not None
    judged = report.healed.judged if report.healed else report.perplexities
    device = next(weight.device for weight in model.parameters() if not weight.is_meta)  # where those elsewhere compute
    ids = torch.arange(8, 24, device=device)[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -1]
    return {
        "layers": [layer.layers for layer in report.fused_layers],
        "judged": [[figure.dense, figure.fused, figure.figures["divergence"]] for figure in judged],
        "logits": logits.tolist(),
        "device": device.type,
    }
