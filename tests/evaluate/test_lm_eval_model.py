"""`lm_eval --model fused`: model args, and what lm-eval records. What it refuses is in test_bad_input.py."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUICK, make_llama
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import lf_hf
from lf_hf import FusedLlamaForCausalLM, FusionConfig
from lf_hf.evaluate.lm_eval_model import FusedLM

PAIRS = [("layer model neuron", " weight"), ("fuse match row", " column"), ("token state", " train small")]


@pytest.fixture(scope="module")
def saved(base: str, text: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint fused in Python and saved."""
    folder = str(tmp_path_factory.mktemp("fused") / "model")
    settings = FusionConfig(num_fusions=2, perplexity_tokens=0)
    FusedLlamaForCausalLM.from_pretrained_fused(base, settings, calibration=str(text)).save_pretrained(folder)
    return folder


def make_lm(pretrained: Any, **kwargs: Any) -> FusedLM:
    return FusedLM(pretrained, device="cpu", **kwargs)


def loglikelihoods(lm: HFLM) -> list[float]:
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(PAIRS)]
    return [value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)]


def test_settings_have_names_of_their_own() -> None:
    theirs = inspect.signature(HFLM.__init__).parameters.keys()
    assert not theirs & {*FusionConfig.known, "calibration", "fused_dir"}
    assert get_model("fused_llama") is FusedLM


def test_fusing_while_loading_equals_fusing_saving_and_loading(base: str, text: Path, saved: str) -> None:
    lm, loaded = make_lm(base, num_fusions=2, calibration=str(text), perplexity_tokens=100), make_lm(saved)
    assert loglikelihoods(lm) == loglikelihoods(loaded)
    info, again = (either.get_model_info()["fusion"] for either in (lm, loaded))
    assert (again["pairs"], again["ratios"]) == (info["pairs"], info["ratios"])
    assert json.loads(json.dumps(info)) == info
    assert info["config"] == FusionConfig(num_fusions=2, perplexity_tokens=100).to_dict()
    assert info["pairs"] == [[3, 4], [2, 3]] and info["layers"] == [5, 3]
    assert all(i + j == pytest.approx(1) and 0.5 < i < 0.74 for i, j in info["ratios"])
    assert info["layers_removed_fraction"] == pytest.approx(2 / 5)
    before, after = info["parameters"]
    assert (before, after) == (make_llama().num_parameters(), lm.model.num_parameters())
    assert info["parameters_removed_fraction"] == pytest.approx(1 - after / before)
    assert "text.txt" in json.dumps(info["calibration"])
    assert [judged["tokens"] for judged in info["perplexities"]] == [100, 100]


def test_a_budget_and_a_healing_after_it(base: str, text: Path) -> None:
    settings = {"method": "truncate", "max_divergence": "1e9", "calibration_length": "32", "calibration_tokens": "1024"}
    lm = make_lm(base, **settings, heal_tokens="1024", perplexity_tokens="0", calibration=str(text))
    report = lm.model.fusion_report
    assert report.budget is not None and report.budget.allowed == 1e9 and report.layers_after == 1
    assert report.healed is not None and report.healed.steps == 1
    said = lm.get_model_info()["fusion"]
    assert said["healed"]["steps"] == 1 and said["budget"]["allowed"] == 1e9


@pytest.mark.parametrize("fusing", [True, False])
def test_arguments_of_transformers_and_lm_eval_pass(fusing: bool, base: str, fused: Path) -> None:
    given = (
        f"pretrained={base},target_layers=4,method=truncate,perplexity_tokens=0" if fusing else f"pretrained={fused}"
    )
    given += ",dtype=bfloat16,attn_implementation=eager,low_cpu_mem_usage=True,use_cache=False,weights_only=True"
    given += ",max_length=64,logits_cache=0,add_bos_token=True"
    options = {"device": "cpu", "batch_size": "auto:2", "max_batch_size": 2}
    lm = FusedLM.create_from_arg_string(given, options)
    assert lm.model.config._attn_implementation == "eager" and lm.model.config.use_cache is False
    assert (lm.model.dtype, lm.max_length, lm.add_bos_token) == (torch.bfloat16, 64, True)
    assert len(loglikelihoods(lm)) == len(PAIRS)
    # Placed by accelerate, on the one device that there is.
    placed = make_lm(base, **QUICK, parallelize=True, max_cpu_memory="4GiB")
    assert loglikelihoods(placed) == loglikelihoods(make_lm(fused)) == loglikelihoods(make_lm(Path(base), **QUICK))


def test_a_start_token_in_the_evaluation_changes_nothing_in_the_model(base: str, text: Path, tmp_path: Path) -> None:
    given = QUICK | {"method": "refit", "selection": "last"}
    given |= {"calibration": str(text), "calibration_tokens": 1024}
    plain = make_lm(base, fused_dir=str(tmp_path / "plain"), **given)
    started = make_lm(base, fused_dir=str(tmp_path / "started"), add_bos_token=True, **given)
    assert started.tokenizer.add_bos_token and not getattr(plain.tokenizer, "add_bos_token", False)
    for name in ("model.safetensors", "tokenizer_config.json", "tokenizer.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "started" / name).read_bytes()


def test_tokenizer_from_elsewhere(base: str, make_base: Callable[..., str]) -> None:
    bare = make_base()
    for file in Path(bare).glob("tokenizer*"):
        file.unlink()
    assert loglikelihoods(make_lm(bare, **QUICK | {"perplexity_tokens": 50}, tokenizer=base))


def test_peft_adapter(saved: str, base: str, tmp_path: Path) -> None:
    """Of the fused model; one that was trained on the base would be put onto other layers."""
    peft = pytest.importorskip("peft")
    model = FusedLlamaForCausalLM.from_pretrained(saved)
    adapter = peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(model, adapter).save_pretrained(tmp_path)
    plain, adapted = make_lm(saved), make_lm(saved, peft=str(tmp_path))
    assert loglikelihoods(plain) != loglikelihoods(adapted)
    assert adapted.get_model_info()["fusion"] == plain.get_model_info()["fusion"]
    assert adapted.config.num_hidden_layers == 3
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), adapter).save_pretrained(tmp_path / "base's")
    for pretrained, settings in ((saved, {}), (base, QUICK)):
        with pytest.raises(ValueError, match=r"peft=.* was trained on .*, the base, whose layers have other numbers"):
            make_lm(pretrained, peft=str(tmp_path / "base's"), **settings)


def test_a_model_instead_of_a_name(saved: str) -> None:
    model = FusedLlamaForCausalLM.from_pretrained(saved)
    lm = make_lm(model, tokenizer=AutoTokenizer.from_pretrained(saved))
    model.tokenizer = lm.tokenizer  # as of one that was fused in this process
    assert loglikelihoods(make_lm(model)) == loglikelihoods(lm)
    assert loglikelihoods(lm) == loglikelihoods(make_lm(saved))
    assert lm.get_model_info()["fusion"]["layers"] == [5, 3]
    with pytest.raises(ValueError, match="must be the folder or hub name of a checkpoint, got FusedLlamaForCausalLM"):
        make_lm(model, num_fusions=1)
    with pytest.raises(ValueError, match="`pretrained` is a 'llama' model that is not fused"):
        make_lm(make_llama())


def test_one_summary_is_logged(base: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(logging.getLogger("lm_eval"), "propagate", True)
    summaries = []
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with caplog.at_level(logging.INFO, "lm_eval"):
            summaries.append(make_lm(base, **QUICK).model.fusion_report.summary())
    assert [message for message in caplog.messages if "Fused " in message] == summaries[:1]


TASK = "mmlu_5shot_anatomy"  # real prompts of 5 shots, not long ones


def test_mmlu_with_four_fusions(
    tiny_gguf: Path,
    mmlu_dir: Path,
    tmp_path: Path,
    run_lm_eval: Callable[[list[str]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = {"num_fusions": 4, "perplexity_tokens": 64, "sample_length": 16, "fused_dir": tmp_path / "fused"}
    settings |= {"entropy_neighbors": 20}
    source = {"pretrained": tiny_gguf.parent, "gguf_file": tiny_gguf.name, **settings}
    model_args = ",".join(f"{name}={value}" for name, value in source.items())
    words = ["--model", "fused_llama", "--model_args", model_args, "--device", "cpu", "--limit", "1", "--log_samples"]
    words += ["--tasks", TASK, "--include_path", str(lf_hf.tasks_path())]
    words += ["--metadata", json.dumps({"mmlu_dir": str(mmlu_dir)}), "--output_path", str(tmp_path / "results")]
    run_lm_eval(words)
    assert "|anatomy|" in capsys.readouterr().out.replace(" ", "")

    [results] = tmp_path.glob("results/*/results_*.json")
    config = json.loads(results.read_text())["config"]
    fusion = config["fusion"]
    assert fusion["config"]["method"] == "neural_alignment" and fusion["config"]["entropy_neighbors"] == 20
    # With neither a hub nor a file, calibration falls back to the questions that lm-eval ships.
    assert "lm-eval ships" in json.dumps(fusion["calibration"])
    assert fusion["pairs"] == [[4, 5], [3, 4], [2, 3], [1, 2]]
    assert all(i + j == pytest.approx(1) and 0.5 < i < 0.74 for i, j in fusion["ratios"])
    assert fusion["layers"] == [6, 2]
    assert config["model_num_parameters"] == fusion["parameters"][1]

    # What it kept is no GGUF any more; opened by itself it answers alike.
    lm = FusedLM(str(tmp_path / "fused"), device="cpu")
    assert lm.config.model_type == "llama" and not hasattr(lm.config, "quantization_config")
    assert len(lm.model.model.layers) == 2 and lm.model.num_parameters() == fusion["parameters"][1]
    [samples] = tmp_path.glob(f"results/*/samples_{TASK}_*.jsonl")
    first = json.loads(samples.read_text(encoding="utf-8").splitlines()[0])
    requests = [tuple(first["arguments"][f"gen_args_{n}"][f"arg_{k}"] for k in (0, 1)) for n in range(4)]
    again = lm.loglikelihood([Instance("loglikelihood", {}, request, n) for n, request in enumerate(requests)])
    assert [value for value, _ in again] == pytest.approx([float(said[0][0]) for said in first["resps"]], abs=1e-4)
