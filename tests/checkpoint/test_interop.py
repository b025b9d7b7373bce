"""What is saved opens elsewhere: stock transformers, readers of Llama configs, peft, quantisation, the hub."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import yaml
from conftest import make_llama, make_texts, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lf_hf import FusedLlamaForCausalLM, FusionReport, fuse_checkpoint

IDS = torch.tensor([[0, 5, 17, 200, 9, 31, 44] * 20])  # longer than what the scaled rope was made for
SETTINGS: dict[str, Any] = {"num_fusions": 2, "method": "truncate", "perplexity_tokens": 0}

# A config as transformers 4 wrote it and as most Llamas on the hub have it. What vLLM and llama.cpp's converter read of
# it, and transformers 4 under them, is all here.
OLD_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": [1, 3],
    "head_dim": 16,  # not hidden_size / num_attention_heads
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 5,
    "num_key_value_heads": 2,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 64,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.0",
    "use_cache": True,
    "vocab_size": 320,
}


class Plain(NamedTuple):
    base: Path
    folder: Path


@pytest.fixture(scope="module", params=[(False, True), (True, False)], ids=["low memory", "tied"])
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Plain:
    """A base in the old format, and what was fused of it as a plain Llama, in memory or layer by layer."""
    tied, low_memory = request.param
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<x>"]})
    tokenizer.chat_template = "{{ messages[0].content }}"
    folder = tmp_path_factory.mktemp("plain")
    config = OLD_CONFIG | ({"rope_scaling": None, "tie_word_embeddings": True} if tied else {})
    left_out = ("dtype", "torch_dtype", "model_type", "rope_parameters")
    llama = make_llama(**{name: value for name, value in copy.deepcopy(config).items() if name not in left_out})
    llama.bfloat16().save_pretrained(folder / "base")
    (folder / "base" / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder / "base")
    fuse_checkpoint(folder / "base", folder / "out", plain=True, low_memory=low_memory, **SETTINGS)
    return Plain(folder / "base", folder / "out")


def test_the_config_is_the_bases_with_fewer_layers_in_old_words_and_new(plain: Plain) -> None:
    """transformers 4 would take a missing rope_theta for 10000 without a word; so do programs that build on it."""
    base = json.loads((plain.base / "config.json").read_text())
    config = json.loads((plain.folder / "config.json").read_text())
    for name in base.keys() - {"num_hidden_layers", "transformers_version"}:
        assert config[name] == base[name], name
    assert config["num_hidden_layers"] == 3
    # The new words for the same, which vLLM from 0.24 and transformers 5 read.
    assert config["dtype"] == base["torch_dtype"]
    assert config["rope_parameters"] == {
        "rope_theta": base["rope_theta"],
        **(base["rope_scaling"] or {"rope_type": "default"}),
    }
    assert not {"fusion", "quantization_config"} & config.keys()


def test_the_tokenizer_is_one_that_transformers_4_knows(plain: Plain) -> None:
    config = json.loads((plain.folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<x>"]
    assert not isinstance(config.get("extra_special_tokens"), list)  # transformers 4 wants a dict there
    ours, theirs = AutoTokenizer.from_pretrained(plain.folder), AutoTokenizer.from_pretrained(plain.base)
    for text in ["<x> layer model<s>", *make_texts(5)]:
        assert ours(text).input_ids == theirs(text).input_ids
    assert ours.all_special_ids == theirs.all_special_ids and ours.chat_template == theirs.chat_template


def test_lora_trains_only_itself_and_loads_again(base: str, tmp_path: Path) -> None:
    """The adapter names the fused model as its base; what it is merged into says that its weights changed since."""
    model = FusedLlamaForCausalLM.from_pretrained_fused(base, **SETTINGS)
    assert model.name_or_path == model.config._name_or_path == ""  # it is nowhere yet, and it is not its base
    model.save_pretrained(tmp_path / "fused")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    torch.manual_seed(0)
    tuned = peft.get_peft_model(model, config)
    trainable = {name: parameter for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 3 * 3 * 2 and all("lora_" in name for name in trainable)
    optimizer, losses = torch.optim.SGD(trainable.values(), lr=0.1), list[float]()
    for _ in range(2):
        loss = tuned(input_ids=IDS, labels=IDS).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[1] < losses[0]
    after = {name.replace(".base_layer", ""): parameter for name, parameter in model.named_parameters()}
    assert all(torch.equal(parameter, after[name]) for name, parameter in before.items())

    tuned.save_pretrained(str(tmp_path / "adapter"))
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert again.peft_config["default"].base_model_name_or_path == str(tmp_path / "fused")
    merged = copy.deepcopy(again).merge_and_unload()
    with torch.no_grad():
        wanted = tuned.eval()(IDS).logits
        assert torch.equal(again(IDS).logits, wanted)
        torch.testing.assert_close(merged(IDS).logits, wanted, rtol=0, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    report, changed = FusionReport.load(tmp_path / "fused"), FusionReport.load(tmp_path / "merged")
    assert dataclasses.replace(changed, notes=report.notes) == report and "changed after fusing" in changed.notes[0]
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits, merged(IDS).logits)


class Hub:
    """What would go to the hub stays here."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self.private: bool | None = None
        self.branches: list[str] = []
        self.commit: dict[str, object] = {}

    def __call__(self, token: object = None) -> Hub:
        return self

    def create_repo(self, repo_id: str, *, private: bool | None = None, **_: object) -> Any:
        self.private = private
        return type("Repo", (), {"repo_id": f"me/{repo_id}"})

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        assert repo_id == "me/small" and exist_ok
        self.branches.append(branch)

    def upload_folder(self, repo_id: str, folder_path: str | Path, **commit: object) -> str:
        self.commit = commit
        texts = (path for path in Path(folder_path).iterdir() if path.suffix != ".safetensors")
        weights = dict.fromkeys((path.name for path in Path(folder_path).glob("*.safetensors")), "")
        self.files = {path.name: path.read_text(encoding="utf-8") for path in texts} | weights
        return f"https://huggingface.co/{repo_id}/commit/1"


@pytest.mark.parametrize("push", ["push_to_hub", "save_pretrained"])
def test_what_is_pushed_explains_itself_and_goes_where_it_is_to(
    fused: Path, push: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A private model above all."""
    hub, plain = Hub(), push == "push_to_hub"
    monkeypatch.setattr("lf_hf.checkpoint.classes.HfApi", hub)
    model = FusedLlamaForCausalLM.from_pretrained(fused)
    report = model.fusion_report = dataclasses.replace(model.fusion_report, base="meta-llama/Meta-Llama-3-8B")
    asked: dict[str, Any] = {"commit_message": "mine", "commit_description": "a fusion", "create_pr": True}
    asked |= {"revision": "branch"}
    if plain:
        address = model.push_to_hub("small", plain=True, private=True, tags=["small"], **asked)
        assert address.startswith("https://huggingface.co/me/small")
    else:
        model.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="small", private=True, **asked)
    assert hub.private is True and hub.branches == ["branch"]
    assert {name: hub.commit[name] for name in asked} == asked

    assert model.name_or_path == str(fused)
    assert {"config.json", "generation_config.json", "model.safetensors", "fusion_report.json"} <= hub.files.keys()
    assert {"tokenizer.json", "tokenizer_config.json", "README.md"} <= hub.files.keys()
    assert json.loads(hub.files["config.json"])["model_type"] == ("llama" if plain else "fused_llama")
    _, head, text = hub.files["README.md"].split("---\n", 2)
    data = yaml.safe_load(head)
    assert data["base_model"] == "meta-llama/Meta-Llama-3-8B" and data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation" and "layer-fusion" in data["tags"]
    assert ("small" in data["tags"]) == plain == ("import lf_hf" not in text)
    assert "AutoModelForCausalLM.from_pretrained(" in text
    assert all(value in text for row in report.rows() for value in (row.name, row.change))
    assert all(f"| `{name}` | `{value}` |" in text for name, value in report.settings.items())
