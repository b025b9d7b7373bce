"""lm-eval, the command line, sweeps and healing, with models of every family."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_texts, make_tokenizer
from lm_eval import simple_evaluate
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from tiny_models import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import lf_hf
from lf_hf.cli import main
from lf_hf.evaluate.lm_eval_model import FusedLM
from lf_hf.families import FAMILIES
from lf_hf.healing.settings import TRAIN

QUICK: dict[str, Any] = {"num_fusions": 2, "method": "truncate", "perplexity_tokens": 0}
of_every_family = pytest.mark.parametrize("model_type", FAMILIES)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def base(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp("base")
            tiny_model(model_type).save_pretrained(made[model_type])
            make_tokenizer().save_pretrained(made[model_type])
        return made[model_type]

    return base


def evaluated(lm: Any) -> dict[str, Any]:
    results: dict[str, Any] = simple_evaluate(
        lm,
        tasks=["mmlu_sample_anatomy"],
        task_manager=TaskManager(include_path=str(lf_hf.tasks_path()), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    return results


@of_every_family
def test_lm_eval_fuses_and_opens_models(model_type: str, make: Callable[[str], Path], tmp_path: Path) -> None:
    """Both give the answers of the model itself, and the results say what was fused."""
    settings = ",".join(f"{name}={value}" for name, value in QUICK.items())
    arguments: dict[str, Any] = {"device": "cpu", "batch_size": 4}
    while_loading = get_model("fused").create_from_arg_string(
        f"pretrained={make(model_type)},fused_dir={tmp_path},{settings}", arguments
    )
    opened = get_model("fused").create_from_arg_string(f"pretrained={tmp_path}", arguments)
    found = [evaluated(lm) for lm in (while_loading, opened)]
    assert all(results["config"]["fusion"]["layers"] == [6, 4] for results in found)
    answers = [[sample["filtered_resps"] for sample in results["samples"]["mmlu_sample_anatomy"]] for results in found]
    assert answers[0] == answers[1] and answers[0]

    [[sample]] = [results["samples"]["mmlu_sample_anatomy"][:1] for results in found[:1]]
    context, continuation = sample["arguments"]["gen_args_0"].values()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    start = [tokenizer.bos_token_id] if "gemma" in model_type else []  # which lm-eval adds for these
    ids = [*start, *tokenizer(context + continuation).input_ids]
    predicted = model(tokenizer(context, return_tensors="pt").input_ids.new_tensor([ids])).logits[0].log_softmax(-1)
    by_hand = sum(
        predicted[n - 1, ids[n]].item() for n in range(len(start) + len(tokenizer(context).input_ids), len(ids))
    )
    assert sample["filtered_resps"][0][0] == pytest.approx(by_hand, abs=1e-3)


def test_fused_llama_takes_llamas_only(make: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a 'qwen3' model; evaluate it with --model fused"):
        get_model("fused_llama")(str(make("qwen3")), **QUICK)
    lf_hf.fuse_checkpoint(make("qwen3"), tmp_path, **QUICK)
    with pytest.raises(ValueError, match="is a 'fused_qwen3' model; evaluate it with --model fused"):
        get_model("fused_llama")(str(tmp_path), device="cpu")
    assert issubclass(get_model("fused_llama"), FusedLM) and get_model("fused") is FusedLM


@pytest.mark.parametrize("model_type", ["bert", "mixtral"])
def test_lm_eval_refuses_what_does_not_fuse(model_type: str, tmp_path: Path) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"is a '{model_type}' model; only dense decoders of text fuse"):
        get_model("fused")(str(tmp_path), **QUICK)


@of_every_family
def test_the_command_line_plans_and_fuses(
    model_type: str, make: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["fuse", str(make(model_type)), str(tmp_path / "out"), "--target-layers", "4", "--method", "truncate"]
    assert main([*command, "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert main([*command, "--low-memory", "--perplexity-tokens", "0"]) == 0
    done = capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert f"{model.num_parameters():,}" in planned and f"{model.num_parameters():,}" in done


@of_every_family
def test_a_sweep_fuses_and_evaluates(model_type: str, make: Callable[[str], Path], tmp_path: Path) -> None:
    from lf_hf.evaluate.sweep import sweep

    points = sweep(
        str(make(model_type)),
        tmp_path,
        num_fusions=[1],
        methods=["truncate"],
        tasks=["mmlu_sample_anatomy"],
        settings={"perplexity_tokens": 64},
    )
    assert [point.layers for point in points] == [6, 5]
    assert all(math.isfinite(value) for point in points for value in point.perplexities.values())


@of_every_family
@pytest.mark.parametrize("train", TRAIN)
def test_healing_brings_a_model_nearer_to_its_base(
    model_type: str, train: str, make: Callable[[str], Path], tmp_path: Path
) -> None:
    if train == "lora":
        pytest.importorskip("peft")
    settings = QUICK | {"method": "truncate", "perplexity_tokens": 512}
    lf_hf.fuse_checkpoint(make(model_type), tmp_path / "fused", plain=train == "all", **settings)
    report = lf_hf.heal(
        tmp_path / "fused",
        tmp_path / "healed",
        base=make(model_type),
        text=make_texts(2000),
        tokens=2048,
        length=32,
        batch_tokens=128,
        train=train,
        learning_rate=1e-3,
    )
    assert report.healed is not None
    assert all(judged.divergence_after < judged.divergence_before for judged in report.healed.judged)
    assert type(AutoConfig.from_pretrained(tmp_path / "healed")) is type(AutoConfig.from_pretrained(tmp_path / "fused"))
