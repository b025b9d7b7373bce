"""Which of a task's metrics papers on depth pruning report."""

from typing import Any

from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask

# By likelihood a character, as in the tables of LLM-Pruner (https://github.com/horseee/LLM-Pruner/issues/25), of papers
# that lay theirs beside them, and of Sheared LLaMA. SliceGPT's have this for ARC-Easy and PIQA too.
NORMALIZED = ("arc_challenge", "hellaswag", "openbookqa")


class Reported(ConfigurableTask):
    """A task of lm-eval with `accuracy` beside its own metrics: that of them which papers report."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={name: value for name, value in config.items() if name != "class"})

    def process_results(self, doc: dict[str, Any], results: Any) -> dict[str, Any]:
        found = super().process_results(doc, results)
        metric = "acc_norm" if self.config.task in NORMALIZED else "acc"
        return {**found, "accuracy": found[metric]}

    def aggregation(self) -> dict[str, Any]:
        return {**super().aggregation(), "accuracy": mean}

    def higher_is_better(self) -> dict[str, Any]:
        return {**super().higher_is_better(), "accuracy": True}
