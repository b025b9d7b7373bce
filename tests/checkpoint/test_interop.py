"""What is saved opens elsewhere: stock transformers, readers of Llama configs, peft, quantisation, the hub."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import peft
import pytest
import torch
import yaml
from conftest import files, make_llama, make_texts, make_tokenizer, same
from transformers import AutoModelForCausalLM, AutoTokenizer

from lf_hf import FusedLlamaForCausalLM, FusionReport, fuse_checkpoint

IDS = torch.tensor([[0, 5, 17, 200, 9, 31, 44] * 20])
SETTINGS: dict[str, Any] = {"num_fusions": 2, "method": "truncate", "perplexity_tokens": 0}

ROPE = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(("tied", "low_memory"), [(False, True), (True, False)])
def test_a_plain_model_is_in_old_words_and_new(tied: bool, low_memory: bool, tmp_path: Path) -> None:
    """Its base has a config as transformers 4 wrote it and as most Llamas on the hub have it.

    transformers 4 would take a missing rope_theta for 10000 without a word; so do vLLM before 0.24 and llama.cpp's
    converter, which build on it.
    """
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<x>"]})
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(tmp_path / "base")
    # A head size that is not hidden_size / num_attention_heads.
    make_llama(head_dim=16, tie_word_embeddings=tied, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    base = json.loads((tmp_path / "base" / "config.json").read_text())
    base |= {"torch_dtype": base.pop("dtype"), "eos_token_id": [1, 3], "transformers_version": "4.46.0"}
    del base["rope_parameters"]
    base |= {"rope_theta": 500000.0, "rope_scaling": None if tied else ROPE | {"rope_type": "llama3"}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(base))
    fuse_checkpoint(tmp_path / "base", tmp_path / "out", plain=True, low_memory=low_memory, **SETTINGS)

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    rope = {"rope_theta": 500000.0} | (base["rope_scaling"] or {"rope_type": "default"})
    words = {"num_hidden_layers": 3, "dtype": "bfloat16", "rope_parameters": rope}
    expected = base | words | {"transformers_version": config["transformers_version"]}
    assert config == expected

    words = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert words["tokenizer_class"] == "PreTrainedTokenizerFast" and words["additional_special_tokens"] == ["<x>"]
    assert not isinstance(words.get("extra_special_tokens"), list)  # transformers 4 wants a dict there
    ours, theirs = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("out", "base"))
    for text in ["<x> layer model<s>", *make_texts(5)]:
        assert ours(text).input_ids == theirs(text).input_ids
    assert ours.all_special_ids == theirs.all_special_ids and ours.chat_template == theirs.chat_template


def test_adapters_know_the_fused_model_and_what_they_are_merged_into_says_so(base: str, tmp_path: Path) -> None:
    model = FusedLlamaForCausalLM.from_pretrained_fused(base, **SETTINGS)
    assert model.name_or_path == model.config._name_or_path == ""  # it is nowhere yet, and it is not its base
    model.save_pretrained(tmp_path / "fused")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
    )
    tuned = peft.get_peft_model(model, config)
    tuned(input_ids=IDS, labels=IDS).loss.backward()
    trained = [name for name, parameter in tuned.named_parameters() if parameter.grad is not None]
    assert len(trained) == 3 * 3 * 2 and all("lora_" in name for name in trained)

    tuned.save_pretrained(str(tmp_path / "adapter"))
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert again.peft_config["default"].base_model_name_or_path == str(tmp_path / "fused")
    merged = copy.deepcopy(again).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        wanted = tuned.eval()(IDS).logits
        assert torch.equal(again(IDS).logits, wanted)
        torch.testing.assert_close(saved(IDS).logits, wanted, rtol=0, atol=1e-4)
    assert same(saved, merged)
    report, changed = FusionReport.load(tmp_path / "fused"), FusionReport.load(tmp_path / "merged")
    assert dataclasses.replace(changed, notes=report.notes) == report and "changed after fusing" in changed.notes[0]


@pytest.mark.parametrize("push", ["push_to_hub", "save_pretrained"])
def test_what_is_pushed_explains_itself_and_goes_where_it_is_to(
    fused: Path, push: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A private model above all."""
    pushed, plain = dict[str, bytes](), push == "push_to_hub"

    def upload_folder(*, folder_path: str | Path, **_: object) -> str:
        pushed.update(files(Path(folder_path)))
        return "https://huggingface.co/me/small/commit/1"

    hub = Mock()
    hub.create_repo.return_value.repo_id = "me/small"
    hub.upload_folder.side_effect = upload_folder
    monkeypatch.setattr("lf_hf.checkpoint.classes.HfApi", lambda token: hub)
    model = FusedLlamaForCausalLM.from_pretrained(fused)
    report = model.fusion_report = dataclasses.replace(model.fusion_report, base="meta-llama/Meta-Llama-3-8B")
    asked: dict[str, Any] = {"commit_message": "mine", "commit_description": "a fusion", "create_pr": True}
    asked |= {"revision": "branch"}
    if plain:
        address = model.push_to_hub("small", plain=True, private=True, tags=["small"], **asked)
        assert address.startswith("https://huggingface.co/me/small")
    else:
        model.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="small", private=True, **asked)
    hub.create_repo.assert_called_once_with("small", private=True, exist_ok=True)
    hub.create_branch.assert_called_once_with("me/small", branch="branch", exist_ok=True)
    assert asked.items() <= hub.upload_folder.call_args.kwargs.items()
    assert hub.upload_folder.call_args.kwargs["repo_id"] == "me/small" and model.name_or_path == str(fused)

    assert {"config.json", "generation_config.json", "model.safetensors", "fusion_report.json"} <= pushed.keys()
    assert {"tokenizer.json", "tokenizer_config.json", "README.md"} <= pushed.keys()
    assert json.loads(pushed["config.json"])["model_type"] == ("llama" if plain else "fused_llama")
    _, head, text = pushed["README.md"].decode().split("---\n", 2)
    data = yaml.safe_load(head)
    assert data["base_model"] == "meta-llama/Meta-Llama-3-8B" and data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation" and "layer-fusion" in data["tags"]
    assert ("small" in data["tags"]) == plain == ("import lf_hf" not in text)
    assert "AutoModelForCausalLM.from_pretrained(" in text
    assert all(value in text for row in report.rows() for value in (row.name, row.change))
