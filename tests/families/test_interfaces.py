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
from conftest import QUICK, make_texts, same, save_base, tensors
from safetensors.torch import save_file
from tiny_models import SETTINGS as FAMILY_SETTINGS
from tiny_models import WRAPPED, auto_class, tiny_config, tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

import lf_hf
from lf_hf import FusionReport
from lf_hf.checkpoint.base import Base
from lf_hf.checkpoint.classes import FusedForCausalLM
from lf_hf.evaluate.sweep import sweep
from lf_hf.families.models import MODEL_TYPES, WRAPPERS, family_of, model_class, text_model, text_prefix
from lf_hf.families.table import FAMILIES
from lf_hf.inputs.dry_run import plan_fusion
from lf_hf.settings import FusionConfig

IDS = torch.tensor([[0, 5, 17, 200, 9, 31, 44, 8, 90]])
SETTINGS: dict[str, Any] = {"num_fusions": 2, "method": "refit", "selection": "last", "perplexity_tokens": 0}
SETTINGS |= {"calibration_tokens": 1024, "calibration_length": 16}
TEXT = ["\n".join(make_texts(200, seed=3))]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def stock_class(model_type: str) -> Any:
    return model_class(tiny_config(model_type))


@pytest.fixture(scope="module")
def fused(family_base: Callable[..., Path]) -> Callable[[str], FusedForCausalLM]:
    """A fused model of a family, which tests only read."""
    return functools.cache(
        lambda model_type: lf_hf.from_pretrained_fused(family_base(model_type), calibration=TEXT, **SETTINGS)
    )


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_fused_model_is_one_of_its_family_with_a_report(
    model_type: str, family_base: Callable[..., Path], fused: Callable[[str], FusedForCausalLM], tmp_path: Path
) -> None:
    model = fused(model_type)
    stock, decoder = stock_class(model_type), text_model(model)
    assert isinstance(model, stock) and len(decoder.layers) == decoder.config.num_hidden_layers == 4
    assert decoder.config is model.config.get_text_config()
    dense = stock.from_pretrained(family_base(model_type)).state_dict()
    weights = model.state_dict().items()
    changed = {name for name, tensor in weights if name not in dense or not torch.equal(tensor, dense[name])}
    assert changed and all(f"{text_prefix(model)}layers.3." in name for name in changed)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), type(model)(model.config).eval()):
        twin.load_state_dict(model.state_dict())
        assert type(twin) is type(model) and torch.equal(logits(twin), logits(model))

    model.save_pretrained(tmp_path)
    report = FusionReport.load(tmp_path)
    assert report == model.fusion_report and report.layers_after == 4
    card = (tmp_path / "README.md").read_text()
    assert f" {stock.__name__.partition('For')[0]} with 4 layers, fused from 6" in card and f"- {model_type}\n" in card
    loaded = auto_class(model_type).from_pretrained(tmp_path)
    expected = lf_hf.FusedLlamaForCausalLM if model_type == "llama" else stock
    assert type(loaded) is expected and torch.equal(logits(loaded), logits(model))
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cached, uncached = (model.generate(IDS, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached, uncached) and cached.shape[1] == IDS.shape[1] + 8
    text = torch.arange(IDS.shape[1])[None] >= torch.tensor([[0], [4]])  # the second text is shorter
    padded = model.generate(torch.where(text, IDS, 1), attention_mask=text.long(), **settings)
    assert torch.equal(padded[:1], cached)
    assert torch.equal(padded[1:, 4:], model.generate(IDS[:, 4:], **settings))


def test_a_fused_llama_has_a_format_of_its_own(fused: Callable[[str], FusedForCausalLM], tmp_path: Path) -> None:
    model = fused("llama")
    model.save_pretrained(tmp_path)
    assert model.config.model_type == "fused_llama" and model.config.fusion["pairs"] == [[4, 5], [3, 4]]
    assert AutoConfig.from_pretrained(tmp_path).fusion == model.config.fusion
    decoder = AutoModel.from_pretrained(tmp_path)
    assert type(decoder).__name__ == "FusedLlamaModel"
    with torch.no_grad():
        assert torch.equal(decoder(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


OTHERS = {
    **dict.fromkeys(("qwen3_vl_text", "qwen2_vl", "bert", "gpt2"), "only models of these types fuse: llama, mistral, "),
    **dict.fromkeys(("mixtral", "gpt_oss", "deepseek_v3", "llama4", "ernie4_5_moe"), "it is a mixture .* REAP in llm-"),
    "gemma4": "its layers share keys and values",
    "granitemoehybrid": "its layers are Mamba's",
    "nemotron_h": "its layers are Mamba's",
    "lfm2": "its layers are convolutions",
    "llava": "save its decoder, a 'llama', by itself and fuse that; gemma3, mistral3, qwen3_vl fuse as a whole",
}


@pytest.mark.parametrize("model_type", OTHERS)
def test_a_base_of_another_family_gets_one_sentence_that_says_what_fuses_or_helps(
    model_type: str, tmp_path: Path
) -> None:
    config = AutoConfig.for_model(model_type)
    if model_type == "granitemoehybrid":
        config.num_local_experts = 0  # as in its dense models
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"is a '{model_type}' model; {OTHERS[model_type]}"):
        lf_hf.from_pretrained_fused(tmp_path, **SETTINGS)
    if model_type not in FAMILIES:  # but a part of a vision-language model
        with pytest.raises(ValueError, match=f"type '{model_type}' cannot be fused: {OTHERS[model_type]}"):
            family_of(config)


# One of each way in which layers are stored: biases and kinds, several projections in one piece, gains of 1 + w, norms
# over all heads, factors, two lists of kinds, norms of other names, and kinds that a layer names otherwise.
STORED = "llama qwen2 phi3 gemma3_text olmo2 granite smollm3 glm4 hunyuan_v1_dense exaone4 olmo3".split()
STORED += WRAPPERS


@pytest.mark.parametrize("model_type", STORED)
def test_files_are_the_same_however_they_were_made(
    model_type: str, family_base: Callable[..., Path], fused: Callable[[str], FusedForCausalLM], tmp_path: Path
) -> None:
    high, low = tmp_path / "in memory", tmp_path / "low memory"
    fused(model_type).save_pretrained(high, plain=True)
    given: dict[str, Any] = SETTINGS | {"calibration": TEXT, "max_shard_bytes": 10**9}
    report = lf_hf.fuse_checkpoint(family_base(model_type), low, low_memory=True, **given)
    kept = fused(model_type).fusion_report
    assert kept and (kept.base_digest, kept.weights_digest) == (report.base_digest, report.weights_digest)
    assert json.loads((low / "config.json").read_text()) == json.loads((high / "config.json").read_text())
    assert same(tensors(low), tensors(high))


def test_the_text_of_a_model_of_images_is_fused_and_the_rest_is_left_out(tmp_path: Path) -> None:
    """As AutoModelForCausalLM reads Qwen 3.5, whose files have more; names in files are those of a model of text."""
    text = tiny_model("qwen3_5_text")
    images = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 32}
    config = AutoConfig.for_model("qwen3_5", text_config=text.config.to_dict(), vision_config=images)
    whole = AutoModelForImageTextToText.from_config(config)
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.lm_head.load_state_dict(text.lm_head.state_dict())
    base, low = tmp_path / "base", tmp_path / "low"
    save_base(base, whole)
    save_file(tensors(base) | {"mtp.fc.weight": torch.ones(3, 2)}, base / "model.safetensors", {"format": "pt"})
    model = lf_hf.from_pretrained_fused(base, **QUICK)
    model.save_pretrained(tmp_path / "high")
    report = lf_hf.fuse_checkpoint(base, low, low_memory=True, **QUICK)
    assert model.fusion_report is not None
    for notes in (model.fusion_report.notes, report.notes):
        assert any("mtp.*, model.visual.* are left out" in note for note in notes)
    assert same(tensors(low), tensors(tmp_path / "high")) and tensors(low).keys() == model.state_dict().keys()
    del text.model.layers[5]
    text.config.layer_types = text.config.layer_types[:5]
    assert torch.equal(logits(model), logits(text)) and torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(low)), logits(text)
    )


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "qwen3_vl"])
def test_what_is_kept_in_a_folder_is_plain_and_loads_as_what_was_fused(
    model_type: str, family_base: Callable[..., Path], tmp_path: Path
) -> None:
    fuse = functools.partial(lf_hf.from_pretrained_fused, family_base(model_type), fused_dir=tmp_path, **QUICK)
    first, second = fuse(), fuse()
    assert type(first) is type(second) and first.fusion_report == second.fusion_report and same(first, second)
    assert type(auto_class(model_type).from_pretrained(tmp_path)) is stock_class(model_type)


WITHOUT_LF_HF = """
import sys, torch
class NoLfHf:
    def find_spec(self, name, path=None, target=None):
        if name == "lf_hf":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoLfHf())
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
ids, out, *folders = sys.argv[1:]
computed = {}
for folder in folders:
    auto_class = AutoModelForImageTextToText if folder in WRAPPERS else AutoModelForCausalLM
    model, info = auto_class.from_pretrained(folder, output_loading_info=True)
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
    for model_type in MODEL_TYPES:
        fused(model_type).save_pretrained(model_type, plain=True)
    program = WITHOUT_LF_HF.replace("WRAPPERS", repr(WRAPPERS))
    command = [sys.executable, "-c", program, "ids.pt", "out.pt", *MODEL_TYPES]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for model_type, (name, found) in torch.load("out.pt").items():
        assert name == stock_class(model_type).__name__
        assert torch.equal(found, logits(fused(model_type)))


# What a config has beside what transformers 5 writes into one of the same shape.
ROPE = {"rope_theta": 10000.0, "rope_scaling": None}
BY_TYPE = {"rope_local_base_freq": 5e5, "sliding_window_pattern": 4}
OLDER: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "olmo2", "granite"), ROPE),
    "phi3": ROPE | {"partial_rotary_factor": 1.0},
    "gemma3_text": {"rope_theta": 1e6, "rope_local_base_freq": 10000.0, "rope_scaling": None},
    "smollm3": ROPE | {"rope_theta": 2e6},
    **dict.fromkeys(("exaone4", "gemma", "ministral", "seed_oss"), ROPE),
    "ernie4_5": ROPE | {"rope_theta": 5e5},
    "glm4": ROPE | {"partial_rotary_factor": 0.5},
    "olmo3": ROPE | {"rope_theta": 5e5} | (BY_TYPE if FAMILIES["olmo3"].rotary_of_type else {}),
    "qwen3_5_text": ROPE | {"partial_rotary_factor": 0.5},
}
for name in ("cwm", "hunyuan_v1_dense", "ministral3"):
    scaling = dict(FAMILY_SETTINGS[name]["rope_parameters"])
    OLDER[name] = {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
OLDER |= {name: {"text_config": OLDER.get(decoder, ROPE)} for name, (decoder, _) in WRAPPED.items()}


SHORT = {"original_max_position_embeddings": 64}
SCALED: dict[str, dict[str, Any]] = {
    "phi3": {"type": "longrope", "long_factor": [1.5] * 3, "short_factor": [1.1] * 3},  # it refused more than three
    "llama": SHORT | {"rope_type": "longrope", "factor": 8.0, "long_factor": [1.5] * 4, "short_factor": [1.1] * 4},
    "qwen2": SHORT | {"rope_type": "yarn", "factor": 4.0},
    "gemma3_text": {"rope_type": "linear", "factor": 8.0},
}


@pytest.mark.parametrize(("model_type", "rope"), [*((name, None) for name in MODEL_TYPES), *SCALED.items()])
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
    older = dict(OLDER[model_type])
    if text := older.pop("text_config", None):
        stock["text_config"] |= text | {"dtype": "float32", "torch_dtype": "float32"}
        stock["vision_config"] |= {"dtype": "float32"}
    assert plain == stock | older | asked | {"torch_dtype": "float32"}
    assert torch.equal(logits(auto_class(model_type).from_pretrained(tmp_path / "plain")), logits(model))


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
    ("model_type", "lists", "usual"),
    [
        ("gemma3_text", "layer_types", {"sliding_window_pattern": 6}),
        ("gemma3", "layer_types", {"sliding_window_pattern": 6}),
        ("qwen3_5_text", "layer_types", {"full_attention_interval": 4}),
        ("smollm3", "layer_types, no_rope_layers", {}),
    ],
)
def test_layers_in_an_order_of_their_own_are_pointed_out(
    model_type: str,
    lists: str,
    usual: dict[str, Any],
    family_base: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """llama.cpp knows where such families have which kind of layer, and does not read it from the config."""
    moved = {name: getattr(tiny_config(model_type).get_text_config(), name)[::-1] for name in lists.split(", ")}
    said = f"The kinds of this model's layers ({lists}) are in an order of their own"
    monkeypatch.setattr(logging.getLogger("lf_hf"), "propagate", True)
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
