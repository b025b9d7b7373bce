"""What a user made of a fused model, or put beside it, is never replaced or mixed up without a word."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lf_hf import FusedLlamaForCausalLM, fuse_checkpoint

SETTINGS: dict[str, Any] = {"method": "truncate", "perplexity_tokens": 0}
IDS = torch.arange(2, 9)[None]


def fused(base: str, num_fusions: int = 1, **others: Any) -> FusedLlamaForCausalLM:
    return FusedLlamaForCausalLM.from_pretrained_fused(base, num_fusions=num_fusions, **SETTINGS, **others)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def trained(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model


@pytest.fixture
def cut_off(base: str, tmp_path: Path) -> Path:
    """A fused model of 4 layers whose replacement by one of 3 was cut off when all was complete, but nothing moved."""
    folder, other = tmp_path / "model", tmp_path / "other"
    fused(base).save_pretrained(folder)
    fused(base, 2).save_pretrained(other)
    (folder / ".lf_hf-saving").mkdir()
    shutil.move(other, folder / ".lf_hf-saving" / "new")
    (folder / ".lf_hf-saving" / "complete").write_text("")
    return folder


@pytest.mark.parametrize("auto", [True, False])
def test_a_save_that_was_cut_off_is_never_read_half(cut_off: Path, base: str, auto: bool) -> None:
    loader: Any = AutoModelForCausalLM if auto else FusedLlamaForCausalLM
    model = loader.from_pretrained(cut_off)
    count = len(model.model.layers)
    assert count == model.config.num_hidden_layers
    assert torch.equal(logits(model), logits(fused(base, 5 - count)))


def test_a_folder_without_config_is_no_model(base: str, tmp_path: Path) -> None:
    fused(base).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json of a 'llama' model"):
        FusedLlamaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("as_llama", [True, False])
def test_fusing_does_not_replace_what_was_trained(base: str, tmp_path: Path, as_llama: bool) -> None:
    fuse_checkpoint(base, tmp_path, num_fusions=1, low_memory=False, as_llama=as_llama, **SETTINGS)
    fuse_checkpoint(base, tmp_path, num_fusions=2, low_memory=False, as_llama=as_llama, **SETTINGS)  # its own it may
    model = trained(AutoModelForCausalLM.from_pretrained(tmp_path))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="choose another folder"):
        fuse_checkpoint(base, tmp_path, num_fusions=1, **SETTINGS)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("stock", [True, False])
def test_a_fused_dir_with_other_weights_is_not_taken_for_the_fusion(base: str, tmp_path: Path, stock: bool) -> None:
    model = trained(fused(base, fused_dir=tmp_path))
    (model.to_llama() if stock else model).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="choose another folder"):
        fused(base, fused_dir=tmp_path)
    loader: Any = LlamaForCausalLM if stock else FusedLlamaForCausalLM
    assert torch.equal(logits(loader.from_pretrained(tmp_path)), logits(model))


def test_variants_lie_side_by_side(base: str, tmp_path: Path) -> None:
    model = fused(base)
    for variants in ((None, "fp16"), ("fp16", None)):
        folder = tmp_path / str(variants[0])
        for variant in variants:
            model.save_pretrained(folder, variant=variant)
        for variant in variants:
            again = FusedLlamaForCausalLM.from_pretrained(folder, variant=variant)
            assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("link", [True, False])
def test_a_users_chat_templates_stay(make_base: Callable[..., str], tmp_path: Path, link: bool) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": "base", "rag": "base"}
    folder, templates = tmp_path / "model", tmp_path / "templates"
    place = templates if link else folder / "additional_chat_templates"
    place.mkdir(parents=True)
    (place / "rag.jinja").write_text("mine")
    if link:
        folder.mkdir()
        (folder / "additional_chat_templates").symlink_to(templates)
    fused(make_base()).save_pretrained(folder, tokenizer=tokenizer)
    assert (place / "rag.jinja").read_text() == "mine"


def test_adapters_beside_a_model_stay(base: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = fused(base)
    model.save_pretrained(tmp_path)
    peft.get_peft_model(fused(base), peft.LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
