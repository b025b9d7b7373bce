"""Arguments of `lm_eval --model fused_llama` that pass; what is refused is in test_bad_input.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUICK, make_texts

from lf_hf.evaluate.lm_eval_model import FusedLlamaLM

PASSING = (
    "attn_implementation=eager,low_cpu_mem_usage=True,use_cache=False,weights_only=True,max_length=64,logits_cache=0"
)


@pytest.mark.parametrize("fusing", [True, False])
def test_arguments_of_transformers_and_lm_eval_pass(fusing: bool, base: str, fused: Path) -> None:
    given = f"pretrained={base},num_fusions=1,method=truncate,perplexity_tokens=0" if fusing else f"pretrained={fused}"
    options = {"device": "cpu", "batch_size": "auto:2", "max_batch_size": 2}
    lm = FusedLlamaLM.create_from_arg_string(f"{given},dtype=float,{PASSING}", options)
    assert lm.model.config._attn_implementation == "eager" and lm.model.config.use_cache is False
    assert lm.model.dtype == torch.float32 and lm.max_length == 64


def test_a_start_token_in_the_evaluation_changes_nothing_in_the_model(base: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(make_texts(100)))
    given: dict[str, Any] = {"calibration": str(tmp_path / "text.txt"), "device": "cpu", "calibration_tokens": 1024}
    given |= QUICK | {"method": "refit", "selection": "last", "refit": "down_proj"}
    plain = FusedLlamaLM(base, fused_dir=str(tmp_path / "plain"), **given)
    started = FusedLlamaLM(base, fused_dir=str(tmp_path / "started"), add_bos_token=True, **given)
    assert started.tokenizer.add_bos_token and not getattr(plain.tokenizer, "add_bos_token", False)
    for name in ("model.safetensors", "tokenizer_config.json", "tokenizer.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "started" / name).read_bytes()
