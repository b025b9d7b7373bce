"""The tasks of depth_pruning are lm-eval's own, with the accuracies that papers report."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import statistics
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import pytest
from builders import make_point
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

import lf_hf
from lf_hf.evaluate.evaluation import Evaluation
from lf_hf.evaluate.points import DENSE
from lf_hf.evaluate.tables import results_rows

ROWS = 8  # of each data set
LETTERS = "ABCD"
CHOICES = ["layer", "a deep model of rows", "head state", "fuse"]  # of different lengths, so that metrics differ
LISTED = {"choices": {"text": CHOICES, "label": [*LETTERS]}}
MEAN = "depth_pruning::mean"
MEMBERS = "arc_easy arc_challenge hellaswag winogrande boolq piqa openbookqa race rte".split()
FOLDERS = "arc hellaswag winogrande super_glue/boolq piqa openbookqa race glue/rte gsm8k".split()


def problem(number: int) -> str:
    return repr([{"question": f"Row {number}", "options": CHOICES, "answer": LETTERS[number % 4]}])


def row_of(data: str, number: int) -> dict[str, Any]:
    """A row of a data set, in the form that it has on the hub."""
    text, answer = f"layer model {number}", number % 2
    rows: dict[str, dict[str, Any]] = {
        "allenai/ai2_arc": {"question": text, "answerKey": LETTERS[number % 4]} | LISTED,
        "Rowan/hellaswag": {
            "ctx_a": text,
            "ctx_b": "it",
            "activity_label": "a",
            "endings": CHOICES,
            "label": f"{number % 4}",
        },
        "allenai/winogrande": {
            "sentence": f"{text} _ is large.",
            "option1": "a",
            "option2": "row",
            "answer": f"{1 + answer}",
        },
        "aps/super_glue": {"passage": text, "question": "is it", "label": answer},
        "baber/piqa": {"goal": text, "sol1": CHOICES[0], "sol2": CHOICES[1], "label": answer},
        "allenai/openbookqa": {"question_stem": text, "answerKey": LETTERS[number % 4]} | LISTED,
        "EleutherAI/race": {"article": text, "problems": problem(number)},
        "nyu-mll/glue": {"sentence1": text, "sentence2": "row", "label": answer},
        "openai/gsm8k": {"question": text, "answer": f"So #### {number}"},
    }
    return rows[data]


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> TaskManager:
    """The tasks, with data sets of a few rows."""

    @functools.cache
    def load_dataset(path: str, name: str | None = None) -> datasets.DatasetDict:
        rows = datasets.Dataset.from_list([row_of(path, number) for number in range(ROWS)])
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), rows))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(
        utils.env, "from_string", functools.cache(utils.env.from_string)
    )  # which takes most of the time
    theirs = [str(Path(lm_eval.tasks.__file__).parent / folder) for folder in FOLDERS]
    made = TaskManager(include_path=[str(lf_hf.tasks_path()), *theirs], include_defaults=False)
    monkeypatch.setattr("lf_hf.evaluate.evaluation.TaskManager", lambda **_: made)
    return made


class HashLM(LM):
    """Answers by a hash of the request, and with the same sum to each that asks for text."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        digests = (hashlib.sha256(repr(request.arguments).encode()).digest() for request in requests)
        return [(-float(digest[0]), False) for digest in digests]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return ["It is #### 3"] * len(requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> Any:
        pytest.fail("a perplexity was asked for")


def test_a_sweep_shows_each_accuracy_their_mean_and_what_is_left_of_the_bases(
    manager: TaskManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = manager.load("depth_pruning")
    assert loaded["group_map"] == {"depth_pruning": [MEAN, *MEMBERS, "gsm8k"], MEAN: MEMBERS}
    shots = {name: task.config.num_fewshot for name, task in loaded["tasks"].items()}
    assert shots == dict.fromkeys(MEMBERS, 0) | {"gsm8k": 5}

    monkeypatch.setattr("lf_hf.evaluate.evaluation.HFLM", lambda *_, **__: HashLM())
    model: Any = None
    scores = Evaluation(["depth_pruning"]).scores(model, model)
    theirs = evaluate(HashLM(), manager.load(MEMBERS), bootstrap_iters=0, log_samples=False)["results"]
    expected = {name: theirs[name]["acc,none"] for name in MEMBERS}
    for name in ("arc_challenge", "hellaswag", "openbookqa"):
        assert theirs[name]["acc_norm,none"] != expected[name]
        expected[name] = theirs[name]["acc_norm,none"]
    mean = statistics.fmean(expected.values())
    assert {name: score.value for name, score in scores.items()} == pytest.approx(
        {MEAN: mean} | expected | {"gsm8k": 1 / ROWS}
    )

    base = dataclasses.replace(make_point(DENSE, 0, 0.0), scores=scores)
    halved = {MEAN: dataclasses.replace(scores[MEAN], value=mean / 2, stderr=None)}
    head, first, second = results_rows([base, dataclasses.replace(make_point("refit", 4, 0.0), scores=halved)])
    column = head.index(MEAN)
    assert first[column].startswith(f"{mean:.4f} ± ") and second[column] == f"{mean / 2:.4f} (50.0%)"
