"""A fused model behaves as transformers and PEFT expect of a Llama, and says what it was made of."""

from __future__ import annotations

import copy
import json
import pickle
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import dispatch_model
from conftest import make_llama, make_texts, make_tokenizer, same, tensors
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments

from lf_hf import FusedLlamaForCausalLM, FusionConfig, FusionReport, fuse_checkpoint
from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.decoder.predictions import perplexity
from lf_hf.text.calibration import documentation_halves
from lf_hf.text.packing import pack_tokens

IDS = torch.tensor([[0, 5, 17, 200, 9, 31, 44], [0, 8, 150, 3, 3, 260, 12]])
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("base"))
    make_llama(tie_word_embeddings=request.param).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def fuse(base: str) -> FusedLlamaForCausalLM:
    config = FusionConfig(num_fusions=1, method="mka", perplexity_tokens=0)
    model = FusedLlamaForCausalLM.from_pretrained_fused(base, config, calibration=make_texts(), num_fusions=2)
    report = model.fusion_report
    assert report is not None and report.config["method"] == "mka" and report.layers_after == 3
    return model


@pytest.fixture(scope="module")
def model(base: str) -> FusedLlamaForCausalLM:
    return fuse(base)


@pytest.fixture(scope="module")
def saved(model: FusedLlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "out"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def fresh(saved: Path) -> FusedLlamaForCausalLM:
    """A model that a test may change."""
    return FusedLlamaForCausalLM.from_pretrained(saved)


def logits(model: torch.nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


# Saving and loading


@pytest.mark.parametrize("low_memory", [False, True])
def test_what_was_fused_is_said_in_the_numbers_of_the_original(low_memory: bool, tmp_path: Path) -> None:
    """Counted in the model as it is at that moment, the second pair would be 2 and 3."""
    kept, pairs, dense = [0, 1, 3, 5], [(1, 2), (3, 4)], make_llama(num_hidden_layers=6)
    with torch.no_grad():
        for number in (2, 4):  # which do next to nothing
            dense.model.layers[number].self_attn.o_proj.weight.mul_(1e-4 * number)
            dense.model.layers[number].mlp.down_proj.weight.mul_(1e-4 * number)
    dense.config.layer_types = ["full_attention"] * 6
    dense.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    settings: dict[str, Any] = {"method": "truncate", "selection": "least_influence", "calibration_tokens": 1024}
    settings |= {"num_fusions": 2, "perplexity_tokens": 300}
    text, out = [" ".join(make_texts(400))], tmp_path / "out"
    report = fuse_checkpoint(tmp_path / "base", out, calibration=text, low_memory=low_memory, **settings)
    assert [step.pair for step in report.steps] == pairs
    assert [list(group) for group in report.groups] == [[0], [1, 2], [3, 4], [5]]

    dense.model.layers = torch.nn.ModuleList(dense.model.layers[number] for number in kept)
    assert same(tensors(out), dense) and dense.num_parameters() == report.parameters_after
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == len(config["layer_types"]) == len(kept)

    said = [line.split(" <- ") for line in report.summary().splitlines() if "<-" in line]
    for pair, (layer, sources), step in zip(pairs, said, report.steps, strict=True):
        assert layer == f"  layer {pair[0]}" and re.findall(r"\b[1-5]\b(?!\.)", sources) == [*map(str, pair)]
        assert f"influence {step.influence:.4f}" in sources
    card = (out / "README.md").read_text().splitlines()
    assert [line for line in card if "became one" in line] == [f"- Layers {i}-{j} became one layer." for i, j in pairs]
    fusion = AutoConfig.from_pretrained(out).fusion
    assert fusion["pairs"] == [*map(list, pairs)] and FusionConfig(**fusion["config"]) == FusionConfig(**settings)
    assert AutoModelForCausalLM.from_pretrained(out).fusion_report == FusionReport.load(out) == report

    sequences = pack_tokens(make_tokenizer(), documentation_halves()[1], config["max_position_embeddings"], 300)
    stock = ModelDecoder(LlamaForCausalLM.from_pretrained(out))
    assert perplexity(stock, {"docs": sequences})["docs"] == report.perplexities[0].fused


def test_a_tied_head_stays_tied_and_an_untied_one_does_not(
    model: FusedLlamaForCausalLM, saved: Path, fresh: FusedLlamaForCausalLM
) -> None:
    tied = model.config.tie_word_embeddings
    assert ("lm_head.weight" not in tensors(saved)) == tied
    for twin in (model, fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh.to_llama()):
        assert (twin.lm_head.weight is twin.model.embed_tokens.weight) == tied
    with torch.no_grad():
        fresh.model.embed_tokens.weight.mul_(2)
    assert torch.equal(fresh.lm_head.weight, model.lm_head.weight) != tied


def test_copies_pickles_and_a_new_model_of_the_same_config(
    model: FusedLlamaForCausalLM, fresh: FusedLlamaForCausalLM, tmp_path: Path
) -> None:
    for original in (model, fresh):
        for twin in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
            assert torch.equal(logits(twin), logits(original))
            assert twin.fusion_report == model.fusion_report and twin.config == original.config
            twin.save_pretrained(tmp_path / "out")
            assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))
    new = AutoModelForCausalLM.from_config(model.config)
    assert type(new) is FusedLlamaForCausalLM and new.fusion_report is None


def test_embeddings_can_be_resized_and_saved(
    model: FusedLlamaForCausalLM, fresh: FusedLlamaForCausalLM, tmp_path: Path
) -> None:
    fresh.resize_token_embeddings(330, mean_resizing=False)
    assert fresh.get_input_embeddings().weight.shape == fresh.get_output_embeddings().weight.shape == (330, 32)
    assert torch.equal(logits(fresh)[..., :320], logits(model))
    fresh.save_pretrained(tmp_path / "out", plain=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same(loaded, fresh) and loaded.config.vocab_size == fresh.config.vocab_size == 330


# Computing


def test_a_plain_model_shares_the_weights_and_knows_its_fusion(fresh: FusedLlamaForCausalLM, tmp_path: Path) -> None:
    fresh.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}  # as after fusing
    plain = fresh.to_llama()
    assert type(plain) is LlamaForCausalLM and plain.config.model_type == "llama"
    assert plain.config.quantization_config == fresh.config.quantization_config
    theirs = dict(plain.named_parameters())
    assert all(theirs[name].data_ptr() == p.data_ptr() for name, p in fresh.named_parameters())
    assert torch.equal(logits(plain), logits(fresh))
    del fresh.config.quantization_config
    fresh.save_pretrained(tmp_path, plain=True)
    assert FusedLlamaForCausalLM.from_pretrained(tmp_path).config.fusion == fresh.config.fusion is not None


def test_a_trainer_smooths_labels_as_for_the_base(fresh: FusedLlamaForCausalLM, tmp_path: Path) -> None:
    """It shifts them for classes alone that it knows by name."""
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to=[])
    found, wanted = (
        Trainer(model, arguments).compute_loss(model, {"input_ids": IDS, "labels": IDS})
        for model in (fresh, fresh.to_plain())
    )
    assert found == wanted


def test_peft_puts_adapters_where_it_does_in_a_llama(fresh: FusedLlamaForCausalLM) -> None:
    configs = [kind() for kind in (peft.IA3Config, peft.LoraConfig, peft.VeraConfig)]
    for config in (*configs, peft.AdaLoraConfig(total_step=10), peft.OFTConfig(oft_block_size=4)):
        ours, theirs = (peft.get_peft_model(copy.deepcopy(one), config) for one in (fresh, fresh.to_llama()))
        assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]


def test_a_draft_changes_no_text_and_neither_does_the_cache(base: str, model: FusedLlamaForCausalLM) -> None:
    """A fused model is the natural drafter for the model that it was made of."""
    dense = LlamaForCausalLM.from_pretrained(base)
    settings = GREEDY | {"attention_mask": torch.ones_like(IDS[:1])}
    for target, assistant in ((dense, model), (model, dense)):
        alone = target.generate(IDS[:1], **settings)
        assert torch.equal(target.generate(IDS[:1], assistant_model=assistant, **settings), alone)
        assert torch.equal(target.generate(IDS[:1], use_cache=False, **settings), alone)


# Offloading


def device_map(layers: int, on_disk: set[int]) -> dict[str, str]:
    outside = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    return outside | {f"model.layers.{n}": "disk" if n in on_disk else "cpu" for n in range(layers)}


def check_works(loaded: FusedLlamaForCausalLM, model: FusedLlamaForCausalLM, folder: Path) -> None:
    """It computes, generates and saves what a whole model in memory does."""
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(loaded.generate(IDS, **GREEDY), model.generate(IDS, **GREEDY))
    for plain in (False, True):
        loaded.save_pretrained(folder, plain=plain)
        assert same(AutoModelForCausalLM.from_pretrained(folder), model)


def test_loads_with_layers_on_disk(model: FusedLlamaForCausalLM, saved: Path, tmp_path: Path) -> None:
    loaded = FusedLlamaForCausalLM.from_pretrained(
        saved, device_map=device_map(3, {1}), offload_folder=tmp_path / "disk"
    )
    assert loaded.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    check_works(loaded, model, tmp_path / "out")
    with pytest.raises(ValueError, match=r"model.layers.1.* is offloaded; use save_pretrained"):
        loaded.to_llama()


def test_fusing_over_several_devices_leaves_no_stale_hooks(
    base: str, model: FusedLlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With accelerate's hooks on every layer, as where layers lie on several GPUs."""
    load = LlamaForCausalLM.from_pretrained

    def load_dispatched(*args: Any, **kwargs: Any) -> Any:
        loaded: Any = load(*args, **kwargs)
        return dispatch_model(loaded[0], device_map(5, set()), force_hooks=True), loaded[1]

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "from_pretrained", load_dispatched)
        mapped = fuse(base)
    assert mapped.hf_device_map == device_map(3, set())
    assert all(hasattr(layer, "_hf_hook") for layer in mapped.model.layers)
    check_works(mapped, model, tmp_path)
