"""FusedLlamaLM: model args, errors, and what lm-eval records, on tiny checkpoints."""

import inspect
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama, make_texts
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

import lf_hf
from lf_hf import FusedLlamaForCausalLM, FusionConfig
from lf_hf.evaluate.lm_eval_model import FusedLlamaLM

PAIRS = [("layer model neuron", " weight"), ("fuse match row", " column"), ("token state", " train small")]


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("calibration") / "texts.txt"
    path.write_text("\n\n".join(make_texts()))
    return str(path)


@pytest.fixture(scope="module")
def saved(base: str, calibration: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint fused in Python and saved."""
    folder = str(tmp_path_factory.mktemp("fused") / "model")
    settings = FusionConfig(num_fusions=2, perplexity_tokens=0)
    FusedLlamaForCausalLM.from_pretrained_fused(base, settings, calibration=calibration).save_pretrained(folder)
    return folder


def make_lm(pretrained: Any, **kwargs: Any) -> FusedLlamaLM:
    return FusedLlamaLM(pretrained, device="cpu", **kwargs)


def fuse_lm(base: str, **kwargs: Any) -> FusedLlamaLM:
    """Fuse with values as the command line gives them."""
    return make_lm(base, **{"num_fusions": "2", "method": "truncate", "perplexity_tokens": "0"} | kwargs)


def loglikelihoods(lm: HFLM) -> list[float]:
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(PAIRS)]
    return [value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)]


def test_documented_arguments_are_those_of_fusion_config() -> None:
    documentation = inspect.getdoc(FusedLlamaLM.__init__) or ""
    settings = documentation[documentation.index("**kwargs") : documentation.index("And every argument")]
    assert re.findall(r"``(\w+)``", settings) == [*FusionConfig.known]
    theirs = inspect.signature(HFLM.__init__).parameters.keys()
    assert not theirs & {*FusionConfig.known, "calibration", "fused_dir"}
    assert get_model("fused_llama") is FusedLlamaLM


def test_fusing_while_loading_equals_fusing_saving_and_loading(base: str, calibration: str, saved: str) -> None:
    fused = make_lm(base, num_fusions=2, calibration=calibration, perplexity_tokens=0)
    loaded = make_lm(saved)
    assert loglikelihoods(fused) == loglikelihoods(loaded)


def test_a_budget_and_a_healing_after_it(base: str, calibration: str) -> None:
    settings = {"method": "truncate", "max_divergence": "1e9", "calibration_length": "32", "calibration_tokens": "1024"}
    lm = make_lm(base, **settings, heal_tokens="1024", perplexity_tokens="0", calibration=calibration)
    report = lm.model.fusion_report
    assert report.budget is not None and report.budget.allowed == 1e9 and report.layers_after == 1
    assert report.healed is not None and report.healed.steps == 1


def test_what_was_fused_is_kept(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = fuse_lm(base, fused_dir=str(tmp_path / "fused"))
    monkeypatch.setattr("lf_hf.pipeline.fuse", None)
    kept = fuse_lm(base, fused_dir=str(tmp_path / "fused"))
    assert loglikelihoods(fused) == loglikelihoods(kept)
    assert fused.get_model_info() == kept.get_model_info()


def test_arguments_of_hflm_pass_through(base: str) -> None:
    lm = fuse_lm(base, dtype="bfloat16", batch_size="auto", max_batch_size=2, max_length=64, add_bos_token=True)
    assert lm.model.dtype == torch.bfloat16
    assert (lm.max_length, lm.add_bos_token) == (64, True)
    assert len(loglikelihoods(lm)) == len(PAIRS)
    placed = fuse_lm(base, parallelize=True, max_cpu_memory="4GiB")  # by accelerate, on the one device that there is
    assert loglikelihoods(placed) == loglikelihoods(fuse_lm(base))


def test_tokenizer_from_elsewhere(base: str, make_base: Callable[..., str]) -> None:
    bare = make_base()
    for file in Path(bare).glob("tokenizer*"):
        file.unlink()
    lm = fuse_lm(bare, tokenizer=base, perplexity_tokens="50")
    assert loglikelihoods(lm)


def test_peft_adapter(base: str, saved: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = FusedLlamaForCausalLM.from_pretrained(saved)
    torch.manual_seed(0)
    adapter = peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(model, adapter).save_pretrained(tmp_path)
    plain, adapted = make_lm(saved), make_lm(saved, peft=str(tmp_path))
    assert loglikelihoods(plain) != loglikelihoods(adapted)
    assert adapted.get_model_info()["fusion"] == plain.get_model_info()["fusion"]
    assert adapted.config.num_hidden_layers == 3


def test_a_model_instead_of_a_name(saved: str) -> None:
    model = FusedLlamaForCausalLM.from_pretrained(saved)
    lm = FusedLlamaLM(model, tokenizer=AutoTokenizer.from_pretrained(saved))
    assert loglikelihoods(lm) == loglikelihoods(make_lm(saved))
    assert lm.get_model_info()["fusion"]["layers"] == [5, 3]


def test_model_info(base: str, calibration: str, saved: str) -> None:
    lm = make_lm(base, num_fusions=2, calibration=calibration, perplexity_tokens=100)
    info = lm.get_model_info()["fusion"]
    assert json.loads(json.dumps(info)) == info
    assert info["config"] == FusionConfig(num_fusions=2, perplexity_tokens=100).to_dict()
    assert info["pairs"] == [[3, 4], [2, 3]]
    assert all(i + j == pytest.approx(1) and 0.5 < i < 0.74 for i, j in info["ratios"])
    assert info["layers"] == [5, 3]
    assert info["layers_removed_fraction"] == pytest.approx(2 / 5)
    before, after = info["parameters"]
    assert (before, after) == (make_llama().num_parameters(), lm.model.num_parameters())
    assert info["parameters_removed_fraction"] == pytest.approx(1 - after / before)
    assert "texts.txt" in json.dumps(info["calibration"])
    assert "57" in json.dumps(info["calibration"])
    assert [judged["tokens"] for judged in info["perplexities"]] == [100, 100]
    assert all(judged["divergence"] > 0 and 0 <= judged["agreement"] < 1 for judged in info["perplexities"])

    again = make_lm(saved).get_model_info()["fusion"]
    assert (again["pairs"], again["ratios"]) == (info["pairs"], info["ratios"])


def test_summary_is_logged(base: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(logging.getLogger("lm_eval"), "propagate", True)
    with caplog.at_level(logging.INFO, "lm_eval"):
        lm = fuse_lm(base)
        assert caplog.messages.count(lm.model.fusion_report.summary()) == 1
        caplog.clear()
        monkeypatch.setenv("LOCAL_RANK", "1")
        fuse_lm(base)
        assert lm.model.fusion_report.summary() not in caplog.messages


def test_results_carry_the_fusion(base: str) -> None:
    results = simple_evaluate(
        model="fused_llama",
        model_args=f"pretrained={base},num_fusions=2,method=mka,entropy_neighbors=20,sample_length=64,perplexity_tokens=0",
        device="cpu",
        tasks=["mmlu_sample_anatomy"],
        task_manager=TaskManager(include_path=str(lf_hf.tasks_path()), include_defaults=False),
        bootstrap_iters=0,
    )
    fusion = results["config"]["fusion"]
    assert fusion["config"]["method"] == "mka"
    assert fusion["config"]["entropy_neighbors"] == 20
    # With neither a hub nor a file, calibration falls back to the questions that lm-eval ships.
    assert "lm-eval ships" in json.dumps(fusion["calibration"])
    assert results["config"]["model_num_parameters"] == fusion["parameters"][1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "is a 'llama' model that is not fused; give num_fusions=N with a base's name"),
        (
            {"method": "mka", "seed": 1},
            "method, seed without num_fusions has no effect; add num_fusions=N, or a",
        ),
        ({"calibration": "x.txt"}, "calibration without num_fusions has no effect"),
        ({"fused_dir": "x"}, "fused_dir without num_fusions has no effect"),
        ({"num_fusions": 1, "method": "mkaa"}, "Unknown method 'mkaa'; did you mean 'mka'"),
        ({"num_fusions": 1, "kernal_scale": 4}, "Unknown argument 'kernal_scale'; did you mean 'kernel_scale'"),
        ({"num_fusions": 1, "delta": "x"}, "delta=x cannot be combined with num_fusions=1; fuse and save"),
        ({"num_fusions": 1, "tp_plan": "auto"}, "tp_plan=auto cannot be combined with num_fusions"),
    ],
)
def test_errors(base: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_lm(base, **arguments)


def test_only_bases_are_fused_and_only_fused_models_opened(saved: str) -> None:
    fused = FusedLlamaForCausalLM.from_pretrained(saved)
    for pretrained, settings, message in (
        (saved, {"num_fusions": 1}, "is fused already"),
        (fused, {"num_fusions": 1}, "base must be the folder or hub name of a checkpoint, got FusedLlamaForCausalLM"),
        (make_llama(), {}, "`pretrained` is a 'llama' model that is not fused"),
    ):
        with pytest.raises(ValueError, match=message):
            make_lm(pretrained, **settings)
