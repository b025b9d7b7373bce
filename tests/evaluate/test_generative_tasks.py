"""Tasks in which a model writes its answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import make_llama, make_tokenizer
from lm_eval.tasks import TaskManager

from lf_hf.evaluate.evaluation import Evaluation
from lf_hf.evaluate.points import Score

QUESTIONS = ["layer model", "neuron weight fuse", "match row column", "head state"]
LENGTH = 6  # tokens of an answer


@pytest.fixture
def make_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make a task "writing" of questions and answers, which is the only one there is."""

    def make(answers: list[str], **fields: Any) -> None:
        rows = [json.dumps({"question": q, "answer": a}) for q, a in zip(QUESTIONS, answers, strict=True)]
        (tmp_path / "data.jsonl").write_text("\n".join(rows))
        task = {
            "task": "writing",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
            "output_type": "generate_until",
            "test_split": "test",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["</s>"], "max_gen_toks": LENGTH, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
            "filter_list": [
                {"name": "strict", "filter": [{"function": "take_first"}]},
                {"name": "lowered", "filter": [{"function": "lowercase"}, {"function": "take_first"}]},
            ],
        }
        (tmp_path / "writing.yaml").write_text(yaml.safe_dump(task | fields))
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        monkeypatch.setattr("lf_hf.evaluate.evaluation.TaskManager", lambda **_: manager)

    return make


def test_the_share_of_answers_that_are_written_as_wanted(
    make_task: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = make_llama()
    tokenizer = make_tokenizer()
    answers = []
    for question in QUESTIONS:
        prompt = tokenizer(question, return_tensors="pt")["input_ids"]
        written = model.generate(prompt, max_new_tokens=LENGTH, do_sample=False)[0, prompt.shape[1] :]
        answers.append(tokenizer.decode(written, skip_special_tokens=True))
    make_task([*answers[:3], "something else"], unsafe_code=True)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    [(name, score)] = Evaluation(["writing"], batch_size=2).scores(model, tokenizer).items()
    assert name == "writing" and score.stderr is not None
    assert score == Score("exact_match (strict)", 0.75, score.stderr, higher_is_better=True)


def test_a_task_that_runs_what_the_model_writes_asks_first(
    make_task: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_task([""] * 4, unsafe_code=True)
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(ValueError, match=r"The task writing runs programs .* set HF_ALLOW_CODE_EVAL=1"):
        Evaluation(["writing"])


def test_a_tag_shows_its_tasks_and_a_group_its_own_figure_or_else_its_tasks(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps({"question": "layer", "answer": "model"}) + "\n")
    names = {"lone": ["tagged"], "other": ["tagged"], "part": [], "piece": []}
    for name, tags in names.items():
        data: dict[str, Any] = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        }
        fields: dict[str, Any] = {"test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}"}
        fields |= {"doc_to_choice": ["model", "row"], "doc_to_target": "{{answer}}", "task": name, "tag": tags}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(data | fields))
    summed: dict[str, Any] = {"aggregate_metric_list": [{"metric": "acc"}]}
    groups = {"silent": {"task": ["part"]}, "group": {"task": ["piece"]} | summed}
    for name, more in groups.items():
        (tmp_path / f"_{name}.yaml").write_text(yaml.safe_dump({"group": name, **more}))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lf_hf.evaluate.evaluation.TaskManager", lambda **_: manager)
        scores = Evaluation(["silent", "group", "tagged"]).scores(make_llama(), make_tokenizer())
    assert list(scores) == ["part", "group", "lone", "other"]
