"""Evaluating a model in memory by lm-eval's `simple_evaluate`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lf_hf.evaluate.points import Score
from lf_hf.runtime.tasks import tasks_path
from lf_hf.runtime.words import unknown_name

_RUNS_CODE = "HF_ALLOW_CODE_EVAL"  # the variable by which a user lets the package `evaluate` run code
# The first that a task has stands for it.
_METRICS = ("accuracy", "acc", "exact_match", "acc_norm", "f1", "word_perplexity")


@dataclass
class Evaluation:
    """Tasks, groups and tags of lm-eval or of this project that were found and whose data is there.

    Raises ValueError if there is no such task, if one has fewer examples than `num_fewshot`, or if one runs what the
    model writes and the user has not allowed that.
    """

    tasks: Sequence[str]
    limit: float | None = None
    num_fewshot: int | None = None
    batch_size: int | str | None = None
    metadata: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self.tasks = list(dict.fromkeys(self.tasks))
        self._manager = TaskManager(include_path=str(tasks_path()), metadata=dict(self.metadata or {}))
        for task in self.tasks:
            if task not in self._manager.all_tasks:
                raise ValueError(unknown_name("task", task, tuple(self._manager.all_tasks)))
        self._may_run_code = os.environ.get(_RUNS_CODE) == "1"
        loaded = self._manager.load(self.tasks)["tasks"]  # data that cannot be fetched: found out here
        for name, task in loaded.items():
            self._check_num_fewshot(name, task)
            if getattr(task, "UNSAFE_CODE", False) and not self._may_run_code:
                raise ValueError(
                    f"The task {name} runs programs that the model writes; set {_RUNS_CODE}=1 to allow that, on a "
                    "machine where they can do no harm."
                )
        tags = [task for task in self.tasks if task in self._manager.all_tags]
        self._of_tags = {tag: list(self._manager.load(tag)["tasks"]) for tag in tags}

    def _check_num_fewshot(self, name: str, task: Any) -> None:
        if self.num_fewshot is None or task.get_config("num_fewshot") == 0:
            return  # the task's own number
        most = len(task.fewshot_docs()) if self.num_fewshot else 0
        if self.num_fewshot not in range(most + 1):
            raise ValueError(f"num_fewshot must be 0 to {most} for the task {name}, got {self.num_fewshot!r:.80}.")

    def scores(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Score]:
        """Main metric of each task; of a tag, and of a group without a figure, those of its tasks."""
        batch_size = self.batch_size or ("auto" if model.device.type not in ("cpu", "mps") else 1)
        evaluated: Any = simple_evaluate(
            HFLM(model, tokenizer=tokenizer, batch_size=batch_size, backend="causal"),
            tasks=self.tasks,
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            task_manager=self._manager,
            log_samples=False,
            confirm_run_unsafe_code=self._may_run_code,
        )
        results, better = evaluated["results"], evaluated["higher_is_better"]
        members = evaluated["group_subtasks"] | self._of_tags

        def with_figures(name: str) -> list[str]:
            if _figures(results.get(name, {})):
                return [name]
            return list(chain(*map(with_figures, members.get(name, ()))))

        figures = dict.fromkeys(chain(*map(with_figures, self.tasks)))
        return {task: _score(results[task], better.get(task, {})) for task in figures}


def _figures(values: Mapping[str, Any]) -> list[str]:
    return [name for name, value in values.items() if isinstance(value, float) and "_stderr" not in name]


def _score(values: Mapping[str, Any], higher_is_better: Mapping[str, bool | None]) -> Score:
    """The main metric of one task's results, which lm-eval names `metric,filter`; the filter takes the answer out."""
    name = min(_figures(values), key=lambda name: [*_METRICS, name.split(",")[0]].index(name.split(",")[0]))
    metric, _, filtered = name.partition(",")
    stderr = values.get(f"{metric}_stderr,{filtered}")
    better = higher_is_better.get(metric) is not False  # None for a group whose tasks do not agree
    shown = metric if filtered == "none" else f"{metric} ({filtered})"
    return Score(shown, values[name], stderr if isinstance(stderr, float) else None, better)
