"""lm-eval, the command line, sweeps and healing, with models of every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUICK, make_texts, tensors
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from tiny_models import auto_class
from transformers import AutoConfig

import lf_hf
from lf_hf.cli import main
from lf_hf.evaluate.lm_eval_model import FusedLM
from lf_hf.families.models import model_class

QUICK = QUICK | {"num_fusions": 2}
PAIRS = [("layer model neuron", " weight"), ("fuse match row", " column"), ("token state", " train small")]


@pytest.mark.parametrize("model_type", ["gemma3_text", "mistral3"])
def test_lm_eval_fuses_and_opens_models(model_type: str, family_base: Callable[..., Path], tmp_path: Path) -> None:
    settings = ",".join(f"{name}={value}" for name, value in QUICK.items())
    arguments: dict[str, Any] = {"device": "cpu", "batch_size": 2}
    model_args = f"pretrained={family_base(model_type)},fused_dir={tmp_path},{settings}"
    while_loading = get_model("fused").create_from_arg_string(model_args, arguments)
    opened = get_model("fused_llama").create_from_arg_string(f"pretrained={tmp_path}", arguments)
    assert isinstance(opened, FusedLM)
    stock = HFLM(auto_class(model_type).from_pretrained(tmp_path), tokenizer=str(tmp_path), **arguments)
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(PAIRS)]
    found, *others = (lm.loglikelihood(requests, disable_tqdm=True) for lm in (while_loading, opened, stock))
    assert others == [found, found]
    assert [lm.get_model_info()["fusion"]["layers"] for lm in (while_loading, opened)] == [[6, 4], [6, 4]]


@pytest.mark.parametrize("model_type", ["gemma3_text", "qwen3_vl"])
def test_the_command_line_plans_and_fuses(
    model_type: str, family_base: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(family_base(model_type))
    command = ["fuse", base, str(tmp_path / "out"), "--target-layers", "4", "--method", "truncate"]
    assert main([*command, "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert "layers: 6 -> 4 (-33.3%)" in planned and not any(tmp_path.iterdir())
    assert main([*command, "--low-memory", "--perplexity-tokens", "0"]) == 0
    done = capsys.readouterr().out
    model = auto_class(model_type).from_pretrained(tmp_path / "out")
    assert f"{model.num_parameters():,}" in planned and f"{model.num_parameters():,}" in done
    assert type(model) is model_class(model.config)


@pytest.mark.parametrize(
    ("model_type", "train", "tokens"),
    [
        ("gemma3_text", "all", 8192),
        ("phi3", "lora", 8192),
        ("gemma3", "all", 8192),
        ("qwen3_vl", "lora", 8192),
        ("qwen3_5_text", "lora", 2048),
    ],
)
def test_healing_comes_nearer(
    model_type: str, train: str, tokens: int, family_base: Callable[..., Path], tmp_path: Path, caplog: Any
) -> None:
    """By the state that was the best, whose weights are loaded by the names that they were saved with."""
    if train == "lora":
        pytest.importorskip("peft")
    settings = QUICK | {"perplexity_tokens": 512}
    lf_hf.fuse_checkpoint(family_base(model_type), tmp_path / "fused", **settings)
    report = lf_hf.heal(
        tmp_path / "fused",
        tmp_path / "healed",
        base=family_base(model_type),
        text=make_texts(2000),
        tokens=tokens,
        length=32,
        batch_tokens=128,
        train=train,
        learning_rate=2e-4,
    )
    assert report.healed is not None and " keys in the checkpoint" not in caplog.text
    for before, after in zip(report.healed.judged, report.perplexities, strict=True):
        assert after.divergence < before.divergence
    fused, healed = tensors(tmp_path / "fused"), tensors(tmp_path / "healed")
    changed = {name for name, tensor in fused.items() if not torch.equal(tensor, healed[name])}
    assert changed and not any("vision" in name or "visual" in name or "projector" in name for name in changed)
    assert type(AutoConfig.from_pretrained(tmp_path / "healed")) is type(AutoConfig.from_pretrained(tmp_path / "fused"))
