"""The task folders: mmlu_5shot asks what lm-eval's own 5-shot mmlu asks, and mmlu_sample builds offline."""

import functools
import hashlib
import itertools
import logging
import runpy
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import pytest
from lm_eval import simple_evaluate, utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

import lf_hf
from lf_hf.text.mmlu import SUBJECTS, bundled_questions, format_question, read_csv_questions


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Serve cais/mmlu from the CSV release where it is there; refuse any other data set."""

    @functools.cache
    def load_dataset(path: str, name: str) -> datasets.DatasetDict:
        assert path == "cais/mmlu"
        folder = request.getfixturevalue("mmlu_dir")
        splits = {}
        for split in ("test", "dev"):
            rows = [asdict(q) | {"subject": name} for q in read_csv_questions(folder, split, name)]
            splits[split] = datasets.Dataset.from_list(rows)
        return datasets.DatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(logging.getLogger("lm_eval"), "level", logging.ERROR)
    # lm-eval compiles a template for every prompt; kept, 14,042 questions take seconds instead of minutes.
    monkeypatch.setattr(utils.env, "from_string", functools.cache(utils.env.from_string))


@functools.cache
def lm_evals_own() -> TaskManager:
    return TaskManager()


@functools.cache
def their_mmlu() -> dict[str, Any]:
    return dict(lm_evals_own().load("mmlu"))


def ours(**metadata: Any) -> TaskManager:
    return TaskManager(include_path=str(lf_hf.tasks_path()), include_defaults=False, metadata=metadata)


def all_requests(task: Any, num_fewshot: int | None = None, *, every: int = 1) -> Iterator[tuple[Any, ...]]:
    """All that reaches a model: context and continuation, in order, for each choice of one in `every` questions."""
    if num_fewshot is not None:
        task.set_config("num_fewshot", num_fewshot)
    for number, doc in itertools.islice(enumerate(task.eval_docs), None, None, every):
        context = task.fewshot_context(doc, num_fewshot=task.config.num_fewshot)
        for instance in task.construct_requests(doc, context, metadata=(task.config.task, number, 1)):
            yield instance.request_type, instance.arguments


def test_requests_equal_those_of_mmlu(mmlu_dir: Path) -> None:
    theirs = their_mmlu()["tasks"]
    tasks = ours(mmlu_dir=str(mmlu_dir), pretrained="base", num_fusions=4, seed=0).load("mmlu_5shot")["tasks"]
    assert tasks.keys() == {f"mmlu_5shot_{subject}" for subject in SUBJECTS}
    assert sum(len(task.eval_docs) for task in tasks.values()) == 14042
    from_hub = ours().load(["mmlu_5shot_anatomy", "mmlu_5shot_virology"])["tasks"]
    for name, task in [*tasks.items(), *from_hub.items()]:
        own = theirs[name.replace("mmlu_5shot", "mmlu")]
        assert len(task.eval_docs) == len(own.eval_docs)
        assert list(all_requests(task, every=20)) == list(all_requests(own, num_fewshot=5, every=20))


class HashLM(LM):
    """Answers by a hash of the request: the same for the same text, otherwise as good as random."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        digests = (hashlib.sha256(repr(request.arguments).encode()).digest() for request in requests)
        return [(-float(digest[0]) - digest[1] / 256, False) for digest in digests]

    def generate_until(self, requests: list[Instance]) -> Any:
        pytest.fail("a task of multiple choice asked for text")

    loglikelihood_rolling = generate_until


def test_aggregate_weights_questions_like_mmlu(mmlu_dir: Path) -> None:
    settings: dict[str, Any] = {"model": HashLM(), "limit": 0.04, "bootstrap_iters": 0}
    mine = simple_evaluate(tasks=["mmlu_5shot"], task_manager=ours(mmlu_dir=str(mmlu_dir)), **settings)
    theirs = simple_evaluate(tasks=["mmlu"], task_manager=lm_evals_own(), num_fewshot=5, **settings)
    for group in ("mmlu", "mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities"):
        result = mine["results"][group.replace("mmlu", "mmlu_5shot")]
        assert result["acc,none"] == theirs["results"][group]["acc,none"]
        assert result["alias"] == theirs["results"][group]["alias"].replace("mmlu", "mmlu_5shot")


def test_sample_asks_the_last_question_and_not_calibrations_and_says_that_it_is_not_mmlu() -> None:
    loaded, theirs = ours(pretrained="base", num_fusions=4).load("mmlu_sample"), their_mmlu()["group_map"]
    tasks = loaded["tasks"]
    assert loaded["group_map"] == {
        group.replace("mmlu", "mmlu_sample"): [child.replace("mmlu", "mmlu_sample") for child in children]
        for group, children in theirs.items()
    }
    assert "not MMLU" in loaded["groups"]["mmlu_sample"].alias
    assert tasks.keys() == {f"mmlu_sample_{subject}" for subject in SUBJECTS}
    for subject, (calibration, *others) in bundled_questions().items():
        task = tasks[f"mmlu_sample_{subject}"]
        *shots, asked = [question for question in others if question != calibration and len(question.choices) == 4]
        contexts, choices = zip(*(arguments for _, arguments in all_requests(task)), strict=True)
        prompts = [f"{format_question(shot)} {'ABCD'[shot.answer]}" for shot in shots]
        about = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}."
        assert set(contexts) == {"\n\n".join([about, *prompts, format_question(asked)])}
        assert choices == (" A", " B", " C", " D")
        assert task.doc_to_target(task.eval_docs[0]) == asked.answer
        assert len(shots) == task.config.num_fewshot
        assert calibration.question not in contexts[0]
        assert task.config.metadata["purpose"] == "smoke test, not MMLU"


def test_folders_hold_what_the_generator_writes() -> None:
    folder = lf_hf.tasks_path()
    expected = runpy.run_path(str(folder / "generate.py"))["all_files"]()
    assert {str(p.relative_to(folder)): p.read_text() for p in folder.glob("mmlu_*/*.yaml")} == expected
