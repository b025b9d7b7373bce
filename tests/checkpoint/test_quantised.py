"""A base that is stored quantised is fused as the floats that transformers makes of it while it reads them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ON_DISK, QUICK, dry_run, make_llama, same, save_base, tensors
from safetensors.torch import save_file
from tiny_models import tiny_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    CompressedTensorsConfig,
    LlamaForCausalLM,
)

from lf_hf import FusionConfig, fuse_checkpoint
from lf_hf.checkpoint.base import Base
from lf_hf.families.models import text_model

WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "dtype": torch.bfloat16}  # groups of 128 weights


def in_fp8(folder: Path, block: int = 8) -> None:
    """Quantise a checkpoint's projections as DeepSeek and Qwen publish theirs: a scale for each block of a matrix."""
    held = tensors(folder)
    for name in [name for name in held if name.endswith("_proj.weight") and ".layers." in name]:
        blocks = held[name].float().unflatten(0, (-1, block)).unflatten(2, (-1, block))  # (rows, block, columns, block)
        scales = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
        stored = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        held |= {name: stored.flatten(2).flatten(0, 1), f"{name}_scale_inv": scales}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [block, block], "fmt": "e4m3"}
    (folder / "config.json").write_text(json.dumps(config))


def in_mxfp4(folder: Path) -> None:
    """Quantise a gpt-oss's experts as it is released: 4 bits a weight, and an exponent for 32 of them."""
    held = tensors(folder)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    for name in [name for name in held if name.endswith("_proj") and ".experts." in name]:
        groups = held.pop(name).float().mT.unflatten(2, (-1, 32))  # (experts, outputs, groups, 32)
        exponents = (groups.abs().amax(3) / 6).log2().ceil()
        nearest = ((groups * 2 ** -exponents[..., None])[..., None] - values).abs().argmin(-1).to(torch.uint8)
        held[f"{name}_blocks"] = nearest[..., ::2] + 16 * nearest[..., 1::2]
        held[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))


def by_hand(folder: Path, model: LlamaForCausalLM) -> None:
    save_base(folder, model)
    in_fp8(folder)


def by_bitsandbytes(folder: Path, model: LlamaForCausalLM) -> None:
    pytest.importorskip("bitsandbytes")
    save_base(folder, model)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).save_pretrained(folder)


def compressed(scheme: str) -> Callable[[Path, LlamaForCausalLM], None]:
    def write(folder: Path, model: LlamaForCausalLM) -> None:
        pytest.importorskip("compressed_tensors")
        if not hasattr(CompressedTensorsConfig, "get_loading_attributes"):
            pytest.skip("this transformers does not dequantise such weights")
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
        from compressed_tensors.quantization.utils import calculate_qparams

        groups = {"linear": preset_name_to_scheme(scheme, ["Linear"])}
        apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
        module: Any
        for module in model.modules():
            if quantised := getattr(module, "quantization_scheme", None):
                ranges = module.weight.unflatten(-1, (-1, quantised.weights.group_size or module.in_features))
                scale, _ = calculate_qparams(ranges.amin(-1), ranges.amax(-1), quantised.weights)
                module.weight_scale.data.copy_(scale)
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        save_base(folder, model)
        compressor.update_config(folder)

    return write


FORMATS: dict[str, tuple[Callable[[Path, LlamaForCausalLM], None], str, float]] = {
    "fp8": (by_hand, "fp8.* again with FineGrainedFP8Config of transformers", 0.03),
    "compressed fp8": (compressed("FP8_DYNAMIC"), "compressed-tensors.* again with llm-compressor", 0.03),
    "compressed int8": (compressed("W8A8"), "compressed-tensors.* again with llm-compressor", 0.01),
    "compressed 4 bits": (compressed("W4A16"), "compressed-tensors.* again with llm-compressor", 0.13),
    "bitsandbytes": (by_bitsandbytes, "bitsandbytes.* again with BitsAndBytesConfig of transformers", 0.13),
}


def check_near(read: torch.nn.Module, original: torch.nn.Module, error: float) -> None:
    weights = dict(read.named_parameters())
    for name, weight in original.named_parameters():
        assert weights[name].dtype == torch.bfloat16 and (weight - weights[name]).norm() <= error * weight.norm()


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_fused_is_what_was_dequantised(name: str, tmp_path: Path) -> None:
    write, said, error = FORMATS[name]
    base, plain = tmp_path / "base", tmp_path / "plain"
    write(base, make_llama(**WIDE))
    dequantised = Base.open(base, {}).load()
    check_near(dequantised, make_llama(**WIDE), error)
    save_base(plain, dequantised)
    report = fuse_checkpoint(base, tmp_path / "out", **QUICK)
    fuse_checkpoint(plain, tmp_path / "same", **QUICK)
    assert same(tensors(tmp_path / "out"), tensors(tmp_path / "same"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config
    shown, of_floats = (dry_run(folder, FusionConfig(1, "truncate")) for folder in (base, plain))
    assert shown.plan.weights == of_floats.plan.weights
    card = (tmp_path / "out" / "README.md").read_text().replace("\\", "")
    for notes in (report.notes, shown.notes, [card]):
        assert any(re.search(rf"stored quantised \(.*{said}", note) for note in notes)
    if name == "bitsandbytes":
        with pytest.raises(ValueError, match="is undone on one device, and here lies on disk; name a device with room"):
            fuse_checkpoint(base, tmp_path / "disk", **QUICK, **ON_DISK)
    else:
        fuse_checkpoint(base, tmp_path / "disk", **QUICK, **ON_DISK)
        assert same(tensors(tmp_path / "disk"), tensors(tmp_path / "out"))


def test_a_released_gpt_oss_is_dequantised(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32}
    save_base(tmp_path / "base", tiny_model("gpt_oss", **sizes).bfloat16())
    in_mxfp4(tmp_path / "base")
    dequantised = Base.open(tmp_path / "base", {}).load()
    check_near(dequantised, tiny_model("gpt_oss", **sizes), 0.15)
    save_base(tmp_path / "plain", dequantised)
    for name in ("base", "plain"):
        report = fuse_checkpoint(tmp_path / name, tmp_path / "out" / name, **QUICK)
        assert any("(mxfp4)" in note for note in report.notes) == (name == "base")
    assert same(tensors(tmp_path / "out" / "base"), tensors(tmp_path / "out" / "plain"))


def test_a_quantised_base_is_fitted_and_teaches(text: Path, tmp_path: Path) -> None:
    by_hand(tmp_path / "base", make_llama(dtype=torch.bfloat16))
    settings: dict[str, Any] = {"calibration": text, "calibration_length": 32, "calibration_tokens": 1024}
    settings |= {"heal_tokens": 1024, "perplexity_tokens": 0, "speed": False}
    report = fuse_checkpoint(tmp_path / "base", tmp_path / "out", num_fusions=1, method="healed", **settings)
    assert report.healed is not None and report.dtype == "bfloat16"


@pytest.mark.parametrize("model_type", ["gemma3", "qwen3_5_text"])
def test_a_model_of_images_is_dequantised_whole_or_as_its_text(model_type: str, tmp_path: Path) -> None:
    """Whose names in the files are not those of its modules."""
    model = tiny_model(model_type)
    if model_type == "qwen3_5_text":
        images = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 32}
        config = AutoConfig.for_model("qwen3_5", text_config=model.config.to_dict(), vision_config=images)
        model = AutoModelForImageTextToText.from_config(config)
    save_base(tmp_path / "base", model.bfloat16())
    in_fp8(tmp_path / "base")
    dequantised = Base.open(tmp_path / "base", {}).load()
    check_near(text_model(dequantised).layers, text_model(model).layers, 0.04)
    save_base(tmp_path / "plain", dequantised)
    for name in ("base", "plain"):
        fuse_checkpoint(tmp_path / name, tmp_path / "out" / name, **QUICK)
    assert same(tensors(tmp_path / "out" / "base"), tensors(tmp_path / "out" / "plain"))
