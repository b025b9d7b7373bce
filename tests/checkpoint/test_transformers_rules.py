"""A fused model behaves as transformers expects of a Llama: the behaviours that its common model tests check."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from conftest import make_llama, make_texts, make_tokenizer
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments

from lf_hf import FusedLlamaForCausalLM, FusionConfig

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


def logits(model: torch.nn.Module, ids: Tensor = IDS, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **kwargs).logits


def is_tied(model: LlamaForCausalLM) -> bool:
    return model.lm_head.weight is model.model.embed_tokens.weight


# Saving and loading


def test_a_tied_head_stays_tied_and_an_untied_one_does_not(
    model: FusedLlamaForCausalLM, saved: Path, fresh: FusedLlamaForCausalLM
) -> None:
    tied = model.config.tie_word_embeddings
    assert ("lm_head.weight" not in load_file(saved / "model.safetensors")) == tied
    for twin in (model, fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh.to_llama()):
        assert is_tied(twin) == tied
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
    new.load_state_dict(model.state_dict())
    assert torch.equal(logits(new.eval()), logits(model))


def test_embeddings_can_be_resized_and_saved(
    model: FusedLlamaForCausalLM, fresh: FusedLlamaForCausalLM, tmp_path: Path
) -> None:
    fresh.resize_token_embeddings(330, mean_resizing=False)
    assert fresh.config.vocab_size == 330 and is_tied(fresh) == model.config.tie_word_embeddings
    assert fresh.get_input_embeddings().weight.shape == fresh.get_output_embeddings().weight.shape == (330, 32)
    assert torch.equal(logits(fresh)[..., :320], logits(model))
    fresh.save_pretrained(tmp_path / "out", plain=True)
    opener: Any = AutoModelForCausalLM
    loaded, info = opener.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(map(len, info.values())) and loaded.config.vocab_size == 330
    new_token = torch.tensor([[0, 329]])
    assert torch.equal(logits(loaded, new_token), logits(fresh, new_token))


# Computing


def test_a_plain_model_shares_the_weights(fresh: FusedLlamaForCausalLM) -> None:
    fresh.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}  # as after fusing
    plain = fresh.to_llama()
    assert type(plain) is LlamaForCausalLM and plain.config.model_type == "llama"
    assert plain.config.quantization_config == fresh.config.quantization_config
    theirs = dict(plain.named_parameters())
    assert all(theirs[name].data_ptr() == p.data_ptr() for name, p in fresh.named_parameters())
    assert torch.equal(logits(plain), logits(fresh))


def test_a_trainer_smooths_labels_as_for_the_base(fresh: FusedLlamaForCausalLM, tmp_path: Path) -> None:
    """It shifts them for classes alone that it knows by name."""
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to=[])
    found, wanted = (
        Trainer(model, arguments).compute_loss(model, {"input_ids": IDS, "labels": IDS})
        for model in (fresh, fresh.to_plain())
    )
    assert found == wanted


# Generating


def test_assisted_generation_in_both_directions(base: str, model: FusedLlamaForCausalLM) -> None:
    """A fused model is the natural drafter for the model that it was made of."""
    dense = LlamaForCausalLM.from_pretrained(base)
    settings = GREEDY | {"attention_mask": torch.ones_like(IDS[:1])}
    for target, assistant in ((dense, model), (model, dense)):
        alone = target.generate(IDS[:1], **settings)
        assert torch.equal(target.generate(IDS[:1], assistant_model=assistant, **settings), alone)


# Offloading


def device_map(layers: int, on_disk: set[int]) -> dict[str, str]:
    outside = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    return outside | {f"model.layers.{n}": "disk" if n in on_disk else "cpu" for n in range(layers)}


def test_loads_with_layers_on_disk(model: FusedLlamaForCausalLM, saved: Path, tmp_path: Path) -> None:
    loaded = FusedLlamaForCausalLM.from_pretrained(
        saved, device_map=device_map(3, {1}), offload_folder=tmp_path / "disk"
    )
    assert loaded.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(loaded.generate(IDS, **GREEDY), model.generate(IDS, **GREEDY))
    with pytest.raises(ValueError, match=r"model.layers.1.* is offloaded; use save_pretrained"):
        loaded.to_llama()
    for as_llama in (False, True):
        loaded.save_pretrained(tmp_path / "out", as_llama=as_llama)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(logits(again), logits(model))


def test_fusing_over_several_devices_leaves_no_stale_hooks(
    base: str, model: FusedLlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With accelerate's hooks on every layer, as where layers lie on several GPUs."""
    load = LlamaForCausalLM.from_pretrained

    def load_dispatched(*args: Any, **kwargs: Any) -> Any:
        loaded: Any = load(*args, **kwargs)
        return dispatch_model(loaded[0], device_map(5, set()), force_hooks=True), loaded[1]

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", load_dispatched)
    mapped = fuse(base)
    monkeypatch.undo()
    tensors = mapped.state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert mapped.hf_device_map == device_map(3, set())
    assert all(hasattr(layer, "_hf_hook") for layer in mapped.model.layers)
    assert torch.equal(logits(mapped), logits(model))
    assert torch.equal(mapped.generate(IDS, **GREEDY), model.generate(IDS, **GREEDY))
    mapped.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))
