"""What users of tools that cut layers complain about, each with a test; in memory and layer by layer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import make_llama, make_texts, make_tokenizer
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from lf_hf import FusedLlamaForCausalLM, FusionConfig, FusionReport, fuse_checkpoint
from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.decoder.predictions import perplexity
from lf_hf.text.calibration import documentation_halves
from lf_hf.text.packing import pack_tokens

IDS = torch.tensor([[0, 5, 17, 200, 9, 31, 44]])
LAYERS = 6
KEPT = [0, 1, 3, 5]  # layers 2 and 4 do next to nothing
PAIRS = [(1, 2), (3, 4)]
SETTINGS: dict[str, Any] = {
    "num_fusions": 2,
    "method": "truncate",
    "selection": "least_influence",
    "calibration_tokens": 1024,
    "perplexity_tokens": 300,
}
CALIBRATION = [" ".join(make_texts(400))]


class Fused(NamedTuple):
    folder: Path
    report: FusionReport


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint with a list of one entry a layer in its config, and layers 2 and 4 that change little."""
    folder = tmp_path_factory.mktemp("dense")
    model = make_llama(num_hidden_layers=LAYERS)
    with torch.no_grad():
        for number, scale in ((2, 1e-4), (4, 1e-3)):
            model.model.layers[number].self_attn.o_proj.weight.mul_(scale)
            model.model.layers[number].mlp.down_proj.weight.mul_(scale)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"layer_types": ["full_attention"] * LAYERS}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module", params=["in memory", "low memory, plain"])
def fused(request: pytest.FixtureRequest, dense: str, tmp_path_factory: pytest.TempPathFactory) -> Fused:
    folder, plain = tmp_path_factory.mktemp("fused") / "out", "plain" in request.param
    if "low" in request.param:
        fuse_checkpoint(dense, folder, calibration=CALIBRATION, as_llama=plain, **SETTINGS)
    else:
        model = FusedLlamaForCausalLM.from_pretrained_fused(dense, calibration=CALIBRATION, **SETTINGS)
        model.save_pretrained(folder, plain=plain)
    return Fused(folder, FusionReport.load(folder))


@pytest.fixture(scope="module")
def model(dense: str) -> FusedLlamaForCausalLM:
    return FusedLlamaForCausalLM.from_pretrained_fused(dense, calibration=CALIBRATION, **SETTINGS)


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_the_config_counts_the_layers_that_are_there(fused: Fused) -> None:
    config = json.loads((fused.folder / "config.json").read_text())
    [file] = fused.folder.glob("*.safetensors")
    numbers = {int(name.split(".")[2]) for name in load_file(file) if name.startswith("model.layers.")}
    assert numbers == set(range(len(KEPT)))
    assert sum(tensor.numel() for tensor in load_file(file).values()) == fused.report.parameters_after
    assert config["num_hidden_layers"] == len(config["layer_types"]) == len(KEPT)
    assert AutoConfig.from_pretrained(fused.folder).num_hidden_layers == len(KEPT)


def test_every_layer_has_its_own_place_in_the_cache(fused: Fused, model: FusedLlamaForCausalLM) -> None:
    for fresh in (model, AutoModelForCausalLM.from_pretrained(fused.folder)):
        assert [layer.self_attn.layer_idx for layer in fresh.model.layers] == list(range(len(KEPT)))
        cached, uncached = (
            fresh.generate(IDS, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=use_cache)
            for use_cache in (True, False)
        )
        assert torch.equal(cached, uncached)
        cache = fresh(IDS, use_cache=True).past_key_values
        lengths = [cache.get_seq_length(number) for number in range(len(cache.layers))]
        assert lengths == [IDS.shape[1]] * len(KEPT)


@pytest.mark.parametrize("opener", [AutoModelForCausalLM, LlamaForCausalLM, FusedLlamaForCausalLM])
def test_no_weight_is_made_up_while_loading(fused: Fused, model: FusedLlamaForCausalLM, opener: Any) -> None:
    loaded, info = opener.from_pretrained(fused.folder, output_loading_info=True)
    assert {name: list(found) for name, found in info.items() if found} == {}
    tensors = loaded.state_dict()
    assert tensors.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


def test_what_was_saved_scores_what_was_measured(fused: Fused, model: FusedLlamaForCausalLM) -> None:
    loaded = LlamaForCausalLM.from_pretrained(fused.folder)
    assert torch.equal(logits(loaded), logits(model))
    text = documentation_halves()[1]
    sequences = pack_tokens(make_tokenizer(), text, model.config.max_position_embeddings, SETTINGS["perplexity_tokens"])
    measured = [perplexity(ModelDecoder(either), {"docs": sequences})["docs"] for either in [model, loaded]]
    assert measured[0] == measured[1]
    assert measured[1] == fused.report.perplexities[0].fused


def test_which_layers_were_merged_is_said_in_the_numbers_of_the_original(fused: Fused, dense: str) -> None:
    """Counted in the model as it is at that moment, the second pair would be 2 and 3."""
    [file] = fused.folder.glob("*.safetensors")
    before, after = LlamaForCausalLM.from_pretrained(dense).state_dict(), load_file(file)
    for place, number in enumerate(KEPT):
        name = "mlp.up_proj.weight"
        assert torch.equal(after[f"model.layers.{place}.{name}"], before[f"model.layers.{number}.{name}"])

    assert [step.pair for step in fused.report.steps] == PAIRS
    assert [list(group) for group in fused.report.groups] == [[0], [1, 2], [3, 4], [5]]
    said = [line.split(" <- ") for line in fused.report.summary().splitlines() if "<-" in line]
    for pair, (layer, sources), step in zip(PAIRS, said, fused.report.steps, strict=True):
        assert layer == f"  layer {pair[0]}" and re.findall(r"\b[1-5]\b(?!\.)", sources) == [*map(str, pair)]
        assert f"influence {step.influence:.4f}" in sources
    lines = (fused.folder / "README.md").read_text().splitlines()
    assert [line for line in lines if "became one" in line] == [f"- Layers {i}-{j} became one layer." for i, j in PAIRS]
    config = AutoConfig.from_pretrained(fused.folder)
    if config.model_type == "fused_llama":
        assert config.fusion["pairs"] == [list(pair) for pair in PAIRS]
        assert FusionConfig(**config.fusion["config"]) == FusionConfig(**SETTINGS)
        assert AutoModelForCausalLM.from_pretrained(fused.folder).fusion_report == fused.report
