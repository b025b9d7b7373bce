"""Fused models under the names that transformers and PEFT look for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    GenerationMixin,
)

import lf_hf
from lf_hf import FusedLlamaForCausalLM


@pytest.fixture(scope="module")
def fused(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fused") / "model"
    settings: dict[str, Any] = {"num_fusions": 1, "method": "truncate", "perplexity_tokens": 0}
    FusedLlamaForCausalLM.from_pretrained_fused(base, **settings).save_pretrained(folder)
    return folder


def test_the_class_says_itself_that_it_generates() -> None:
    assert GenerationMixin in FusedLlamaForCausalLM.__bases__ and FusedLlamaForCausalLM.can_generate()


@pytest.mark.parametrize("method", ["AdaLora", "IA3", "Lora", "OFT", "Vera"])
def test_peft_knows_where_its_adapters_go(method: str, fused: Path) -> None:
    """In the places that it takes in a Llama of the same layers."""
    peft = pytest.importorskip("peft")
    kind = getattr(peft, f"{method}Config")
    small: dict[str, Any] = {"AdaLora": {"total_step": 10}, "OFT": {"oft_block_size": 4}}
    model = FusedLlamaForCausalLM.from_pretrained(fused)
    names = [
        [name for name, _ in peft.get_peft_model(one, kind(**small.get(method, {}))).named_parameters()]
        for one in (model, model.to_llama())
    ]
    assert names[0] == names[1]


def test_peft_is_not_imported_until_there_is_a_fused_model(fused: Path) -> None:
    pytest.importorskip("peft")
    code = """if True:
        import sys
        import lf_hf
        assert "peft" not in sys.modules
        lf_hf.FusedLlamaForCausalLM.from_pretrained(sys.argv[1])
        from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as table
        assert all(table[f"fused_{name}"] == table[name] for name in ("llama", "mistral", "qwen2", "gemma2"))
        """
    done = subprocess.run([sys.executable, "-c", code, str(fused)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_the_package_offers() -> None:
    names = dir(lf_hf)
    assert {*lf_hf.__all__, "__version__", "FusedQwen3ForCausalLM", "FusedLlamaForSequenceClassification"} <= {*names}
    assert not {"Any", "Path", "transformers"} & {*names}
    assert all(getattr(lf_hf, name) is not None for name in names)
