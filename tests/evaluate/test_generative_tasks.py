"""The figure of each task that a sweep shows, also where a model writes its answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
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
WRITING: dict[str, Any] = {
    "task": "writing",
    "unsafe_code": True,
    "output_type": "generate_until",
    "generation_kwargs": {"until": ["</s>"], "max_gen_toks": LENGTH, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "filter_list": [
        {"name": "strict", "filter": [{"function": "take_first"}]},
        {"name": "lowered", "filter": [{"function": "lowercase"}, {"function": "take_first"}]},
    ],
}
MakeTasks = Callable[..., None]


@pytest.fixture
def make_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeTasks:
    """Make tasks of these questions and some answers, and groups; no others are there."""

    def make(answers: Sequence[str], *tasks: dict[str, Any]) -> None:
        rows = [json.dumps({"question": q, "answer": a}) for q, a in zip(QUESTIONS, answers, strict=True)]
        (tmp_path / "data.jsonl").write_text("\n".join(rows))
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}}}
        asked = {"test_split": "test", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}"}
        for number, task in enumerate(tasks):
            content = task if "group" in task else data | asked | task
            (tmp_path / f"{number}.yaml").write_text(yaml.safe_dump(content))
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        monkeypatch.setattr("lf_hf.evaluate.evaluation.TaskManager", lambda **_: manager)

    return make


def test_the_share_of_answers_written_as_wanted(make_tasks: MakeTasks, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = make_llama()
    tokenizer = make_tokenizer()
    answers = []
    for question in QUESTIONS:
        prompt = tokenizer(question, return_tensors="pt")["input_ids"]
        written = model.generate(prompt, max_new_tokens=LENGTH, do_sample=False)[0, prompt.shape[1] :]
        answers.append(tokenizer.decode(written, skip_special_tokens=True))
    make_tasks([*answers[:3], "something else"], WRITING)
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(ValueError, match=r"The task writing runs programs .* set HF_ALLOW_CODE_EVAL=1"):
        Evaluation(["writing"])
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    [(name, score)] = Evaluation(["writing"], batch_size=2).scores(model, tokenizer).items()
    assert name == "writing" and score.stderr is not None
    assert score == Score("exact_match (strict)", 0.75, score.stderr, higher_is_better=True)


def test_a_tag_shows_its_tasks_and_a_group_its_own_figure_or_else_its_tasks(make_tasks: MakeTasks) -> None:
    choosing = {"output_type": "multiple_choice", "doc_to_choice": ["model", "row"]}
    names = {"lone": ["tagged"], "other": ["tagged"], "part": [], "piece": []}
    tasks = [choosing | {"task": name, "tag": tags} for name, tags in names.items()]
    groups: list[dict[str, Any]] = [{"group": "silent", "task": ["part"]}]
    groups += [{"group": "group", "task": ["piece"], "aggregate_metric_list": [{"metric": "acc"}]}]
    make_tasks(["model"] * 4, *tasks, *groups)
    scores = Evaluation(["silent", "group", "tagged"]).scores(make_llama(), make_tokenizer())
    assert list(scores) == ["part", "group", "lone", "other"]
