"""Fused models of every family: what they are in memory and in files, and what other programs make of them."""

from __future__ import annotations

import copy
import functools
import json
import logging
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUICK, make_texts, same, tensors
from tiny_models import tiny_config, tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import lf_hf
from lf_hf import FusionReport
from lf_hf.checkpoint.base import Base
from lf_hf.checkpoint.classes import FusedForCausalLM
from lf_hf.evaluate.sweep import sweep
from lf_hf.families import FAMILIES
from lf_hf.plan import plan_fusion
from lf_hf.settings import FusionConfig

IDS = torch.tensor([[0, 5, 17, 200, 9, 31, 44, 8, 90]])
SETTINGS: dict[str, Any] = {"num_fusions": 2, "method": "refit", "selection": "last", "perplexity_tokens": 0}
SETTINGS |= {"calibration_tokens": 1024, "calibration_length": 32}
TEXT = ["\n".join(make_texts(200, seed=3))]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def fused(family_base: Callable[..., Path]) -> Callable[[str], FusedForCausalLM]:
    """A fused model of a family, which tests only read."""
    return functools.cache(
        lambda model_type: lf_hf.from_pretrained_fused(family_base(model_type), calibration=TEXT, **SETTINGS)
    )


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_fused_model_is_one_of_its_family_with_a_report(
    model_type: str, family_base: Callable[..., Path], fused: Callable[[str], FusedForCausalLM], tmp_path: Path
) -> None:
    model, stock = fused(model_type), FAMILIES[model_type].causal_lm
    assert isinstance(model, stock) and len(model.model.layers) == model.config.num_hidden_layers == 4
    dense = stock.from_pretrained(family_base(model_type)).state_dict()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, dense[name])}
    assert changed and all(".layers.3." in name for name in changed)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), type(model)(model.config).eval()):
        twin.load_state_dict(model.state_dict())
        assert type(twin) is type(model) and torch.equal(logits(twin), logits(model))

    model.save_pretrained(tmp_path)
    report = FusionReport.load(tmp_path)
    assert report == model.fusion_report and report.layers_after == 4
    card = (tmp_path / "README.md").read_text()
    assert f" {FAMILIES[model_type].title} with 4 layers, fused from 6" in card and f"- {model_type}\n" in card
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = lf_hf.FusedLlamaForCausalLM if model_type == "llama" else stock
    assert type(loaded) is expected and torch.equal(logits(loaded), logits(model))
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cached, uncached = (model.generate(IDS, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached, uncached) and cached.shape[1] == IDS.shape[1] + 8


def test_a_fused_llama_has_a_format_of_its_own(fused: Callable[[str], FusedForCausalLM], tmp_path: Path) -> None:
    model = fused("llama")
    model.save_pretrained(tmp_path)
    assert model.config.model_type == "fused_llama" and model.config.fusion["pairs"] == [[4, 5], [3, 4]]
    assert AutoConfig.from_pretrained(tmp_path).fusion == model.config.fusion
    decoder = AutoModel.from_pretrained(tmp_path)
    assert type(decoder).__name__ == "FusedLlamaModel"
    with torch.no_grad():
        assert torch.equal(decoder(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gemma3", "qwen2_vl", "bert", "gpt2"])
def test_a_base_of_another_family_gets_one_sentence_that_names_those_that_fuse(model_type: str, tmp_path: Path) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    said = f"is a '{model_type}' model; only dense decoders of text fuse, which are those of type llama, mistral, "
    with pytest.raises(ValueError, match=said):
        lf_hf.from_pretrained_fused(tmp_path, **SETTINGS)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_files_are_the_same_however_they_were_made(
    model_type: str, family_base: Callable[..., Path], fused: Callable[[str], FusedForCausalLM], tmp_path: Path
) -> None:
    high, low = tmp_path / "in memory", tmp_path / "low memory"
    fused(model_type).save_pretrained(high, plain=True)
    given: dict[str, Any] = SETTINGS | {"calibration": TEXT, "max_shard_bytes": 10**9}
    lf_hf.fuse_checkpoint(family_base(model_type), low, low_memory=True, **given)
    assert json.loads((low / "config.json").read_text()) == json.loads((high / "config.json").read_text())
    assert same(tensors(low), tensors(high))


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_what_is_kept_in_a_folder_is_plain_and_loads_as_what_was_fused(
    model_type: str, family_base: Callable[..., Path], tmp_path: Path
) -> None:
    fuse = functools.partial(lf_hf.from_pretrained_fused, family_base(model_type), fused_dir=tmp_path, **QUICK)
    first, second = fuse(), fuse()
    assert type(first) is type(second) and first.fusion_report == second.fusion_report and same(first, second)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is FAMILIES[model_type].causal_lm


WITHOUT_LF_HF = """
import sys, torch
class NoLfHf:
    def find_spec(self, name, path=None, target=None):
        if name == "lf_hf":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoLfHf())
from transformers import AutoModelForCausalLM, AutoTokenizer
ids, out, *folders = sys.argv[1:]
computed = {}
for folder in folders:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(map(len, info.values())), info
    assert AutoTokenizer.from_pretrained(folder)("layer model").input_ids
    with torch.no_grad():
        computed[folder] = type(model).__name__, model(torch.load(ids)).logits
assert "lf_hf" not in sys.modules
torch.save(computed, out)
"""


def test_stock_transformers_opens_plain_checkpoints_of_every_family(
    fused: Callable[[str], FusedForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(IDS, "ids.pt")
    for model_type in FAMILIES:
        fused(model_type).save_pretrained(model_type, plain=True)
    command = [sys.executable, "-c", WITHOUT_LF_HF, "ids.pt", "out.pt", *FAMILIES]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for model_type, (name, found) in torch.load("out.pt").items():
        assert name == FAMILIES[model_type].causal_lm.__name__
        assert torch.equal(found, logits(fused(model_type)))


# What a config has beside what transformers 5 writes into one of the same shape.
ROPE = {"rope_theta": 10000.0, "rope_scaling": None}
OLDER: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "olmo2", "granite"), ROPE),
    "phi3": ROPE | {"partial_rotary_factor": 1.0},
    "gemma3_text": {"rope_theta": 1e6, "rope_local_base_freq": 10000.0, "rope_scaling": None},
    "smollm3": ROPE | {"rope_theta": 2e6},
}


SHORT = {"original_max_position_embeddings": 64}
SCALED: dict[str, dict[str, Any]] = {
    "phi3": {"type": "longrope", "long_factor": [1.5] * 3, "short_factor": [1.1] * 3},  # it refused more than three
    "llama": SHORT | {"rope_type": "longrope", "factor": 8.0, "long_factor": [1.5] * 4, "short_factor": [1.1] * 4},
    "qwen2": SHORT | {"rope_type": "yarn", "factor": 4.0},
    "gemma3_text": {"rope_type": "linear", "factor": 8.0},
}


@pytest.mark.parametrize(("model_type", "rope"), [*((name, None) for name in FAMILIES), *SCALED.items()])
def test_the_config_of_a_plain_checkpoint_key_by_key(
    model_type: str, rope: dict[str, Any] | None, family_base: Callable[..., Path], tmp_path: Path
) -> None:
    """It is the stock config of a model of its shape, and says what has a new name under the old one as well.

    It names no code of its base.
    """
    asked: dict[str, Any] = {"rope_scaling": rope, "rope_theta": 5000.0} if rope else {}
    if rope and model_type == "phi3":
        asked |= SHORT | {"partial_rotary_factor": 0.75}
    base = family_base(model_type, auto_map={"AutoConfig": "configuration_phi3.Phi3Config"}, **copy.deepcopy(asked))
    model = lf_hf.from_pretrained_fused(base, trust_remote_code=True, **QUICK)
    model.save_pretrained(tmp_path / "plain", plain=True)
    # The first five layers of the base, which are those that are left.
    tiny_model(model_type, num_hidden_layers=5, **copy.deepcopy(asked)).save_pretrained(tmp_path / "stock")
    plain, stock = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "stock"))
    assert plain == stock | OLDER[model_type] | asked | {"torch_dtype": "float32"}
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")), logits(model))


def test_what_cannot_be_done_is_said_before_a_model_is_loaded(
    family_base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qwen3, gemma2, fuse = family_base("qwen3"), family_base("gemma2"), lf_hf.from_pretrained_fused
    fuse(qwen3, **QUICK).save_pretrained(tmp_path / "fused")
    monkeypatch.delattr(Base, "load")
    (tmp_path / "text.txt").write_text("\n\n".join(make_texts()))
    swept: dict[str, Any] = {"num_fusions": [2], "methods": ["refit", "mka"], "tasks": ["piqa"]}
    swept |= {"calibration": tmp_path / "text.txt"}
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: lf_hf.FusedLlamaForCausalLM.from_pretrained(tmp_path / "fused"), "load it with AutoModelForCausalLM"),
        (lambda: fuse(qwen3, attn_implementation="flex_attention", **QUICK), "flex_attention"),
        (lambda: fuse(gemma2, num_fusions=2, method="mka"), "Only layers of one kind are averaged"),
        (lambda: plan_fusion(gemma2, FusionConfig(2, "mka")), "Only layers of one kind are averaged"),
        (lambda: sweep(gemma2, tmp_path / "sweep", **swept), "Only layers of one kind are averaged"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("model_type", "lists"), [("gemma3_text", "layer_types"), ("smollm3", "layer_types, no_rope_layers")]
)
def test_layers_in_an_order_of_their_own_are_pointed_out(
    model_type: str,
    lists: str,
    family_base: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """llama.cpp knows where such families have which kind of layer, and does not read it from the config."""
    moved = {name: getattr(tiny_config(model_type), name)[::-1] for name in lists.split(", ")}
    said = f"The kinds of this model's layers ({lists}) are in an order of their own"
    monkeypatch.setattr(logging.getLogger("lf_hf"), "propagate", True)
    usual = {"sliding_window_pattern": 6} if model_type == "gemma3_text" else {}
    for base, told in ((family_base(model_type, **moved), True), (family_base(model_type, **usual), False)):
        caplog.clear()
        lf_hf.from_pretrained_fused(base, **QUICK).save_pretrained(tmp_path, plain=True)
        card = " ".join((tmp_path / "README.md").read_text().replace("\\", "").split())
        assert (said in card) == told == any(said in message for message in caplog.messages)
        if model_type == "gemma3_text":  # transformers before 4.53 would count by it, and fails without a number
            config = json.loads((tmp_path / "config.json").read_text())
            assert config["sliding_window_pattern"] == (None if told else 6)  # any beyond the 5 layers


def test_the_sentencepiece_model_goes_along(family_base: Callable[..., Path], tmp_path: Path) -> None:
    """llama.cpp's converter makes the tokenizers of Phi 3 and Gemma 2 of nothing else."""
    base = Path(shutil.copytree(family_base("gemma2"), tmp_path / "base"))
    (base / "tokenizer.model").write_bytes(b"a sentencepiece model")
    for _ in range(2):
        lf_hf.from_pretrained_fused(base, fused_dir=tmp_path / "kept", **QUICK).save_pretrained(tmp_path / "saved")
    lf_hf.fuse_checkpoint(base, tmp_path / "low memory", low_memory=True, **QUICK)
    for folder in ("kept", "saved", "low memory"):
        assert (tmp_path / folder / "tokenizer.model").read_bytes() == b"a sentencepiece model"
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("layer").input_ids
