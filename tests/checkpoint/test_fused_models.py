"""A fused model behaves as transformers and PEFT expect of a Llama, and says what it was made of."""

import copy
import dataclasses
import json
import pickle
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import peft
import pytest
import torch
from conftest import ON_DISK, QUICK, make_llama, make_texts, make_tokenizer, same, save_base, tensors
from tiny_models import idle
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lf_hf import FusedLlamaForCausalLM, FusionConfig, FusionReport, fuse_checkpoint

IDS = torch.tensor([[0, 5, 17, 200, 9, 31, 44], [0, 8, 150, 3, 3, 260, 12]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """With a tied head; the bases of most other tests have one of their own."""
    return save_base(tmp_path_factory.mktemp("base"), make_llama(tie_word_embeddings=True))


@pytest.fixture(scope="module")
def model(base: str) -> FusedLlamaForCausalLM:
    config = FusionConfig(num_fusions=1, method="mka", perplexity_tokens=0)
    return FusedLlamaForCausalLM.from_pretrained_fused(base, config, calibration=make_texts(), num_fusions=2)


@pytest.fixture(scope="module")
def saved(model: FusedLlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "out"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def fresh(saved: Path) -> FusedLlamaForCausalLM:
    """A model that a test may change."""
    return FusedLlamaForCausalLM.from_pretrained(saved)


def test_what_was_fused_is_said_in_the_numbers_of_the_original(tmp_path: Path) -> None:
    kept, pairs, dense = [0, 1, 3, 5], [(1, 2), (3, 4)], make_llama(num_hidden_layers=6)
    idle(dense, 2, 4)
    dense.config.layer_types = ["full_attention"] * 6
    base = save_base(tmp_path / "base", dense)
    settings: dict[str, Any] = {"method": "truncate", "selection": "least_influence", "calibration_tokens": 1024}
    settings |= {"calibration_length": 32, "num_fusions": 2, "perplexity_tokens": 0}
    text, out = [" ".join(make_texts(400))], tmp_path / "out"
    report = fuse_checkpoint(base, out, calibration=text, **settings, **ON_DISK)
    assert report.pairs == pairs
    assert [list(group) for group in report.groups] == [[0], [1, 2], [3, 4], [5]]

    dense.model.layers = torch.nn.ModuleList(dense.model.layers[number] for number in kept)
    assert same(tensors(out), dense) and dense.num_parameters() == report.parameters_after
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == len(config["layer_types"]) == len(kept)

    for shown in (report.summary(), (out / "README.md").read_text()):
        said = re.findall(r"layer (\d) stands for (\d) to (\d)", shown)
        assert said == [(str(i), str(i), str(j)) for i, j in pairs]
    opened = FusedLlamaForCausalLM.from_pretrained(out)
    fusion = opened.config.fusion
    assert fusion["pairs"] == [*map(list, pairs)] and FusionConfig(**fusion["config"]) == FusionConfig(**settings)
    assert opened.fusion_report == FusionReport.load(out) == report


def test_copies_and_pickles(
    model: FusedLlamaForCausalLM, saved: Path, fresh: FusedLlamaForCausalLM, tmp_path: Path
) -> None:
    assert "lm_head.weight" not in tensors(saved) and FusionReport.load(saved).config["num_fusions"] == 2
    for original in (model, fresh):
        for twin in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
            assert twin.lm_head.weight is twin.model.embed_tokens.weight and same(twin, model)
            assert twin.fusion_report == model.fusion_report and twin.config == original.config
            twin.save_pretrained(tmp_path / "out")
            assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), model)
    new = AutoModelForCausalLM.from_config(model.config)
    assert type(new) is FusedLlamaForCausalLM and new.fusion_report is None
    decoder = AutoModel.from_pretrained(saved)
    assert type(decoder).__name__ == "FusedLlamaModel" and same(decoder, model.model)
    fresh.resize_token_embeddings(330, mean_resizing=False)
    fresh.save_pretrained(tmp_path / "out", plain=True)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), fresh)
    assert FusedLlamaForCausalLM.from_pretrained(tmp_path / "out").config.fusion == fresh.config.fusion is not None


def test_peft_puts_adapters_where_it_does_in_a_llama(fresh: FusedLlamaForCausalLM, saved: Path) -> None:
    llama = LlamaForCausalLM.from_pretrained(saved)
    configs = [kind() for kind in (peft.IA3Config, peft.LoraConfig, peft.VeraConfig)]
    for config in (*configs, peft.AdaLoraConfig(total_step=10), peft.OFTConfig(oft_block_size=4)):
        ours, theirs = (peft.get_peft_model(copy.deepcopy(one), config) for one in (fresh, llama))
        assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]


ROPE = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("tied", [False, True])
def test_a_plain_model_is_in_old_words_and_new(tied: bool, tmp_path: Path) -> None:
    """Its base has a config as transformers 4 wrote it and as most Llamas on the hub have it.

    transformers 4 would take a missing rope_theta for 10000 without a word; so do vLLM before 0.24 and llama.cpp's
    converter, which build on it.
    """
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<x>"]})
    tokenizer.chat_template = "{{ messages[0].content }}"
    # A head size that is not hidden_size / num_attention_heads.
    save_base(tmp_path / "base", make_llama(head_dim=16, tie_word_embeddings=tied, dtype=torch.bfloat16), tokenizer)
    base = json.loads((tmp_path / "base" / "config.json").read_text())
    base |= {"torch_dtype": base.pop("dtype"), "eos_token_id": [1, 3], "transformers_version": "4.46.0"}
    del base["rope_parameters"]
    base |= {"rope_theta": 500000.0, "rope_scaling": None if tied else ROPE | {"rope_type": "llama3"}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(base))
    fuse_checkpoint(tmp_path / "base", tmp_path / "out", **QUICK | {"num_fusions": 2})

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
    model = FusedLlamaForCausalLM.from_pretrained_fused(base, **QUICK | {"num_fusions": 2})
    assert model.name_or_path == model.config._name_or_path == ""  # it is nowhere yet, and it is not its base
    model.save_pretrained(tmp_path / "fused")
    placed: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}
    tuned = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **placed))
    tuned(input_ids=IDS, labels=IDS).loss.backward()
    trained = [name for name, parameter in tuned.named_parameters() if parameter.grad is not None]
    assert len(trained) == 3 * 3 * 2 and all("lora_" in name for name in trained)

    tuned.save_pretrained(str(tmp_path / "adapter"))
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert again.peft_config["default"].base_model_name_or_path == str(tmp_path / "fused")
    kinds: tuple[Any, ...] = (FusedLlamaForCausalLM, AutoModelForCausalLM)
    followed = [kind.from_pretrained(tmp_path / "adapter") for kind in kinds]  # to the model that it is for
    assert all(type(found) is FusedLlamaForCausalLM and found.fusion_report is not None for found in followed)
    merged = copy.deepcopy(again).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        wanted = tuned.eval()(IDS).logits
        assert all(torch.equal(found(IDS).logits, wanted) for found in (again, *followed))
        torch.testing.assert_close(saved(IDS).logits, wanted, rtol=0, atol=1e-4)
    assert same(saved, merged)
    report, changed = FusionReport.load(tmp_path / "fused"), FusionReport.load(tmp_path / "merged")
    assert dataclasses.replace(changed, changed=False) == report and "changed after fusing" in changed.all_notes[0]


@pytest.mark.parametrize("push", ["push_to_hub", "save_pretrained"])
def test_what_is_pushed_is_explained(saved: Path, push: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A private model above all."""
    pushed, plain = dict[str, bytes](), push == "push_to_hub"

    def create_commit(*, operations: list[Any], **_: object) -> str:
        pushed.update((each.path_in_repo, Path(each.path_or_fileobj).read_bytes()) for each in operations)
        return "https://huggingface.co/me/small/commit/1"

    hub = Mock()
    hub.create_repo.return_value.repo_id = "me/small"
    hub.create_commit.side_effect = create_commit
    monkeypatch.setattr("lf_hf.checkpoint.classes.create_repo", hub.create_repo)
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: hub)
    model = FusedLlamaForCausalLM.from_pretrained(saved)
    model.fusion_report = dataclasses.replace(model.fusion_report, base="meta-llama/Meta-Llama-3-8B")
    asked: dict[str, Any] = {"commit_message": "mine", "commit_description": "a fusion", "create_pr": True}
    asked |= {"revision": "branch"}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    (tmp_path / "out" / "gone").symlink_to("nowhere")
    if plain:
        address = model.push_to_hub("small", plain=True, private=True, tags="small", **asked)
        assert address.startswith("https://huggingface.co/me/small")
    else:
        model.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="small", private=True, **asked)
    hub.create_repo.assert_called_once_with("small", private=True, token=None, exist_ok=True)
    hub.create_branch.assert_called_once_with(repo_id="me/small", branch="branch", token=None, exist_ok=True)
    assert asked.items() <= hub.create_commit.call_args.kwargs.items() and "mine" not in pushed
    assert hub.create_commit.call_args.kwargs["repo_id"] == "me/small" and model.name_or_path == str(saved)

    expected = {"config.json", "generation_config.json", "model.safetensors", "fusion_report.json", "README.md"}
    assert expected | {"tokenizer.json", "tokenizer_config.json"} <= pushed.keys()
    assert json.loads(pushed["config.json"])["model_type"] == ("llama" if plain else "fused_llama")
    card = pushed["README.md"].decode()
    assert card.startswith("---\nbase_model: meta-llama/Meta-Llama-3-8B\n")
    assert ("\n- small\n" in card) == plain == ("import lf_hf" not in card)
