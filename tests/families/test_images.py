"""Fused vision-language models: pictures are read as before, by files that stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_texts, make_tokenizer, save_base, tensors
from tiny_models import idle, picture, tiny_model
from transformers import AutoModelForImageTextToText, AutoProcessor, Gemma3Processor, PreTrainedTokenizerFast

import lf_hf
from lf_hf.checkpoint.base import Base
from lf_hf.families.models import WRAPPERS

QUICK: dict[str, Any] = {"num_fusions": 1, "perplexity_tokens": 0, "calibration": ["\n".join(make_texts(200, seed=3))]}
QUICK |= {"calibration_tokens": 1024, "calibration_length": 32}
LAST = QUICK | {"method": "refit", "selection": "last"}


def logits(model: Any, model_type: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**picture(model_type)).logits


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("model_type", WRAPPERS)
def test_without_a_layer_that_did_nothing_a_picture_gives_the_same(
    model_type: str, low_memory: bool, tmp_path: Path
) -> None:
    """The layer that has no influence is the one that goes, and so features of images still come after the same ones.

    It is above layer 2, where it may be in a group with the layer below it in all of these models.
    """
    dense = tiny_model(model_type)
    idle(dense, 3)
    base = save_base(tmp_path / "base", dense)
    settings = QUICK | {"method": "truncate", "selection": "least_influence", "low_memory": low_memory}
    report = lf_hf.fuse_checkpoint(base, tmp_path / "fused", **settings)
    assert report.pairs == [(2, 3)]
    fused = AutoModelForImageTextToText.from_pretrained(tmp_path / "fused")
    torch.testing.assert_close(logits(fused, model_type), logits(dense, model_type))
    assert fused.config.get_text_config().num_hidden_layers == 5
    asked: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    said, expected = (model.generate(**picture(model_type), **asked) for model in (fused, dense))
    assert said.shape == (1, 16) and torch.equal(said, expected)


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("model_type", WRAPPERS)
def test_all_but_the_fused_layers_stays_bit_for_bit_under_the_names_of_the_base(
    model_type: str, released: bool, family_base: Callable[..., Path], tmp_path: Path
) -> None:
    """Checkpoints have other names than models in memory, and may have those of models in memory, too."""
    base: Any = family_base(model_type)
    if not released:
        base = tmp_path / "base"
        tiny_model(model_type).save_pretrained(base, save_original_format=False)
        make_tokenizer().save_pretrained(base)
    lf_hf.fuse_checkpoint(base, tmp_path / "fused", low_memory=True, **LAST)
    before, after = tensors(base), tensors(tmp_path / "fused")
    layers = next(name for name in before if name.endswith("layers.0.mlp.down_proj.weight")).partition("0.mlp")[0]
    gone = {name for name in before if name.startswith(f"{layers}5.")}
    assert after.keys() == before.keys() - gone
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        name for name in after if name.startswith(f"{layers}4.")
    }
    loaded: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "fused", output_loading_info=True)
    assert not any(map(len, loaded[1].values()))


def test_a_picture_and_a_question_go_through_the_processor_of_the_base(tmp_path: Path) -> None:
    image_processor = pytest.importorskip("transformers.models.gemma3.image_processing_pil_gemma3")
    tokenizer = make_tokenizer()
    named = dict(
        zip(("image_token", "boi_token", "eoi_token"), tokenizer.convert_ids_to_tokens([5, 6, 7]), strict=True)
    )
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token="</s>", extra_special_tokens=named
    )
    pixels = image_processor.Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    base = save_base(tmp_path / "base", tiny_model("gemma3"), words)
    Gemma3Processor(pixels, words, image_seq_length=4).save_pretrained(base)
    file = Path(base, "processor_config.json").read_bytes()
    words.save_pretrained(tmp_path / "low memory")  # a user's tokenizer keeps no processor away
    lf_hf.fuse_checkpoint(base, tmp_path / "low memory", low_memory=True, **LAST)
    lf_hf.from_pretrained_fused(base, fused_dir=tmp_path / "kept", **LAST)
    again = lf_hf.from_pretrained_fused(base, fused_dir=tmp_path / "kept", **LAST)
    again.save_pretrained(tmp_path / "saved")
    for name in ("low memory", "kept", "saved"):
        assert (tmp_path / name / "processor_config.json").read_bytes() == file
    processor = AutoProcessor.from_pretrained(tmp_path / "saved")
    drawn = torch.zeros(20, 30, 3, dtype=torch.uint8)
    drawn[5:15, 8:22] = 255
    asked = processor(images=[drawn.numpy()], text=f"layer {named['boi_token']} model", return_tensors="pt")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    assert model.generate(**asked, max_new_tokens=4, eos_token_id=None).shape[1] == asked["input_ids"].shape[1] + 4
    card = (tmp_path / "saved" / "README.md").read_text()
    assert (
        "AutoProcessor" in card and "AutoModelForImageTextToText" in card and "nothing was measured on images" in card
    )


@pytest.mark.parametrize("selection", ["groups", "least_influence"])
def test_layers_that_features_of_images_come_after_are_in_no_group(selection: str, tmp_path: Path) -> None:
    dense = tiny_model("qwen3_vl", num_hidden_layers=8)
    for index in (1, 2):
        idle(dense, index)
    base = save_base(tmp_path, dense)
    report = lf_hf.from_pretrained_fused(base, **QUICK | {"method": "refit", "selection": selection}).fusion_report
    assert report is not None and report.pairs[0][0] >= 2
    assert all(cost.first >= 2 for cost in report.group_costs)


@pytest.mark.parametrize(("selection", "most"), [("last", 3), ("groups", 2), ("least_influence", 2)])
def test_fusions_that_would_need_those_layers_are_refused_first(
    selection: str, most: int, family_base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Base, "load")
    said = rf"num_fusions must be 1 to {most} for a model of 6 layers \(of which features of images need the first 2"
    with pytest.raises(ValueError, match=said):
        lf_hf.from_pretrained_fused(
            family_base("qwen3_vl"), **QUICK | {"method": "refit", "selection": selection, "num_fusions": most + 1}
        )
