from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_texts
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lf_hf
from lf_hf import FusedLlamaForCausalLM, FusionConfig
from lf_hf.checkpoint.configuration import converted_config, fused_config

IDS = torch.tensor([[0, 5, 17, 200, 9, 31, 44]])


def fuse(base: str, num_fusions: int = 2, **kwargs: Any) -> FusedLlamaForCausalLM:
    settings: dict[str, Any] = {"calibration": make_texts(), "perplexity_tokens": 100} | kwargs
    return FusedLlamaForCausalLM.from_pretrained_fused(base, num_fusions=num_fusions, **settings)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_weights_did_change_where_they_should(base: str) -> None:
    before, after = LlamaForCausalLM.from_pretrained(base).state_dict(), fuse(base, 1).state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {
        f"model.layers.3.{projection}_proj.weight"
        for projection in [*(f"self_attn.{p}" for p in "qkvo"), "mlp.gate", "mlp.up", "mlp.down"]
    }


def test_config_and_report_say_what_was_fused(base: str, tmp_path: Path) -> None:
    model = fuse(base)
    model.save_pretrained(tmp_path / "out")
    fusion = json.loads((tmp_path / "out" / "config.json").read_text())["fusion"]
    assert fusion["base"] == Path(base).name
    assert FusionConfig(**fusion["config"]) == FusionConfig(num_fusions=2, perplexity_tokens=100)
    assert fusion["pairs"] == [[3, 4], [2, 3]]
    assert all(0.5 < ratio < 0.74 for ratio in fusion["ratios"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.fusion_report == model.fusion_report
    assert lf_hf.FusionReport.load(tmp_path / "out") == model.fusion_report


def test_parameter_counts_are_those_of_the_saved_tensors(make_base: Callable[..., str], tmp_path: Path) -> None:
    for tied in (False, True):
        model = fuse(make_base(tie_word_embeddings=tied))
        model.save_pretrained(tmp_path / str(tied))
        count = sum(tensor.numel() for tensor in load_file(tmp_path / str(tied) / "model.safetensors").values())
        assert model.fusion_report is not None
        assert model.fusion_report.parameters_after == count


@pytest.mark.parametrize("tied", [False, True])
def test_to_llama_shares_the_weights(make_base: Callable[..., str], tied: bool) -> None:
    model = fuse(make_base(tie_word_embeddings=tied))
    llama = model.to_llama()
    assert type(llama) is LlamaForCausalLM and llama.config.model_type == "llama"
    theirs = dict(llama.named_parameters())
    assert all(theirs[name].data_ptr() == p.data_ptr() for name, p in model.named_parameters())
    assert (llama.lm_head.weight is llama.model.embed_tokens.weight) == tied
    assert torch.equal(logits(llama), logits(model))


def test_what_was_quantised_after_fusing_is_saved_as_such(base: str) -> None:
    model = fuse(base, 1)
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    plain = converted_config(model.config, LlamaConfig)
    assert plain.quantization_config == model.config.quantization_config
    # A base has it from a GGUF file alone, whose numbers are plain floats once they are loaded.
    assert model.fusion_report is not None
    assert not hasattr(fused_config(plain, model.fusion_report), "quantization_config")


def test_settings_may_come_as_a_config_with_overrides(base: str) -> None:
    config = FusionConfig(num_fusions=1, method="mka", perplexity_tokens=0)
    model = FusedLlamaForCausalLM.from_pretrained_fused(base, config, calibration=make_texts(), num_fusions=2)
    assert model.fusion_report is not None
    assert model.fusion_report.config["method"] == "mka" and model.fusion_report.layers_after == 3


def test_gguf_without_its_package_is_named(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(ValueError, match="needs the gguf package"):
        fuse(base, gguf_file="x.gguf")
