"""Evaluating a model in memory through lm-eval's Python API."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate.utils import patch_environment
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lf_hf import tasks_path
from lf_hf.checkpoint.classes import FusedForCausalLM
from lf_hf.evaluate.lm_eval_model import FusedLM
from lf_hf.evaluate.points import Score
from lf_hf.runtime.fields import unknown_name

_RUNS_CODE = "HF_ALLOW_CODE_EVAL"  # with which a user says so to the package `evaluate`
_METRICS = ("acc", "exact_match", "acc_norm", "f1", "word_perplexity")  # the first that a task has stands for it


class Evaluation:
    """lm-eval tasks that were found and whose data is there.

    Parameters
    ----------
    tasks : sequence of str
        Tasks, groups or tags of lm-eval, or of this project.
    limit, num_fewshot, batch_size, metadata
        As for lm-eval.

    Raises
    ------
    ValueError
        If there is no such task, or one runs what the model writes and the user has not allowed that.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        limit: float | None = None,
        num_fewshot: int | None = None,
        batch_size: int | str = 1,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self._tasks = list(dict.fromkeys(tasks))
        self._limit, self._num_fewshot, self._batch_size = limit, num_fewshot, batch_size
        self._manager = TaskManager(include_path=str(tasks_path()), metadata=dict(metadata or {}))
        for task in self._tasks:
            if task not in self._manager.all_tasks:
                raise ValueError(unknown_name("task", task, tuple(self._manager.all_tasks)))
        loaded = self._manager.load(self._tasks)["tasks"]  # a data set that cannot be fetched is found out here
        self._may_run_code = os.environ.get(_RUNS_CODE) == "1"
        for name, task in loaded.items():
            if getattr(task, "UNSAFE_CODE", False) and not self._may_run_code:
                raise ValueError(
                    f"The task {name} runs programs that the model writes; set {_RUNS_CODE}=1 to allow that, on a "
                    "machine where they can do no harm."
                )

    def scores(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Score]:
        """Main metric of each task; for a tag, of each of its tasks. Each process of a launch evaluates by itself."""
        wrapper = FusedLM if isinstance(model, FusedForCausalLM) else HFLM
        lm = wrapper(model, tokenizer=tokenizer, batch_size=self._batch_size, backend="causal")
        with patch_environment(LOCAL_RANK=0):  # lm-eval gives its results to one process of a launch
            evaluated = simple_evaluate(
                lm,
                tasks=self._tasks,
                task_manager=self._manager,
                limit=self._limit,
                num_fewshot=self._num_fewshot,
                log_samples=False,
                confirm_run_unsafe_code=self._may_run_code,
            )
        results: Mapping[str, Mapping[str, Any]] = evaluated["results"]
        better = evaluated.get("higher_is_better", {})
        asked = _asked(self._tasks, results, evaluated.get("group_subtasks", {}))
        return {task: _score(results[task], better.get(task, {})) for task in asked}


def _asked(
    tasks: Sequence[str], results: Mapping[str, Mapping[str, Any]], subtasks: Mapping[str, Sequence[str]]
) -> list[str]:
    """The results of the tasks that were asked for: of a tag, or a group without a figure, those of its tasks."""

    def with_figures(task: str) -> list[str]:
        if _figures(results.get(task, {})):
            return [task]
        return [name for part in subtasks.get(task, []) for name in with_figures(part)]

    def members(task: str) -> set[str]:
        return {task}.union(*map(members, subtasks.get(task, [])))

    named = [task for task in tasks if task in results or task in subtasks]
    others = set(results).difference(*map(members, named)) if len(named) < len(tasks) else set()
    shown = [*named, *(task for task in results if task in others)]
    return list(dict.fromkeys(name for task in shown for name in with_figures(task)))


def _figures(values: Mapping[str, Any]) -> list[str]:
    return [name for name, value in values.items() if isinstance(value, float) and "_stderr" not in name]


def _score(values: Mapping[str, Any], higher_is_better: Mapping[str, bool | None]) -> Score:
    """The main metric of one task's results, which lm-eval names `metric,filter`; the filter takes the answer out."""
    metrics = _figures(values)
    name = min(metrics, key=lambda name: [*_METRICS, name.split(",")[0]].index(name.split(",")[0]))
    metric, _, filtered = name.partition(",")
    stderr = values.get(f"{metric}_stderr,{filtered}")
    better = higher_is_better.get(metric) is not False  # None for a group whose tasks do not agree
    shown = metric if filtered == "none" else f"{metric} ({filtered})"
    return Score(shown, values[name], stderr if isinstance(stderr, float) else None, better)
