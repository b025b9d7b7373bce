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

from lf_hf.evaluate.evaluation import Evaluation, _asked
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


@pytest.mark.parametrize(
    ("tasks", "shown"),
    [
        (["task"], ["task"]),
        (["group"], ["group"]),
        (["silent"], ["part", "other"]),
        (["tag"], ["task", "group", "a", "b", "part", "other"]),
        (["task", "tag"], ["task", "group", "a", "b", "part", "other"]),
        (["group", "tag"], ["group", "task", "part", "other"]),
    ],
)
def test_tags_and_groups_without_figures_show_their_tasks(tasks: list[str], shown: list[str]) -> None:
    figure = {"alias": "x", "acc,none": 0.5}
    results = dict.fromkeys(("task", "group", "a", "b", "part", "other"), figure) | {"silent": {"alias": "x"}}
    subtasks = {"group": ["a", "b"], "silent": ["part", "other"], "task": []}
    assert _asked(tasks, results, subtasks) == shown
