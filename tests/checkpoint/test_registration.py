"""Fused models under the names that transformers and PEFT look for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationMixin

import lf_hf
from lf_hf import FusedLlamaForCausalLM


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


def test_what_the_package_offers() -> None:
    names = dir(lf_hf)
    assert {*lf_hf.__all__, "__version__", "FusedQwen3ForCausalLM", "FusedLlamaForSequenceClassification"} <= {*names}
    assert not {"Any", "Path", "transformers"} & {*names}
    assert all(getattr(lf_hf, name) is not None for name in names)
