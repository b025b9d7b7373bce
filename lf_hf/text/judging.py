"""Text that judges a fused model: two kinds, neither of which is in the bundled calibration text."""

from __future__ import annotations

import functools
import platform
from contextlib import suppress
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lf_hf.text.calibration import documentation_halves
from lf_hf.text.mmlu import lm_eval_path
from lf_hf.text.packing import pack_tokens

PROMPTS = (
    "The first snow of the year fell on a Tuesday. By noon the whole village was",
    "Question: A baker fills 4 trays with 6 rolls each and sells 9 of the rolls. How many rolls are left?\n"
    "Answer: First, the baker made",
    'def mean(numbers):\n    """The average of a list of numbers, 0 for an empty list."""\n    if',
)
"""What the dense and the fused model continue, for people to read: prose, arithmetic and a program."""
QUESTION = "Which city is the capital of France, and what is it known for?"
"""What both are asked in the base's chat template, if it has one."""


@dataclass(frozen=True)
class JudgingText:
    """A text by the head of its column; `source` says what it is, and whether its kind is in the bundled text."""

    name: str
    source: str
    text: str


def judging_texts() -> list[JudgingText]:
    """The second half of Python's documentation, and worked reasoning questions, as far as they are installed.

    The second are the BIG-bench Hard examples (Suzgun et al., arXiv:2210.09261) that lm-eval ships.
    """
    half = f"the second half of Python {platform.python_version()}'s documentation"
    docs = JudgingText("docs", f"{half}, of which the bundled text has the first", documentation_halves()[1])
    worked = "worked BIG-bench Hard questions that lm-eval ships, a kind that the bundled text does not have"
    reasoning = JudgingText("reasoning", worked, _reasoning())
    return [judging for judging in (docs, reasoning) if judging.text]


def judging_sequences(tokenizer: PreTrainedTokenizerBase, tokens: int, longest: int) -> dict[str, list[Tensor]]:
    """Some `tokens` tokens of each judging text by its name: int64 sequences of one length, shape (tokens T,).

    A model before and after fusing and after healing is judged on these. `longest` is what a sequence has at most.
    """
    length = min(longest, max(2, tokens))  # of a single token nothing is predicted
    packed = {}
    for judging in judging_texts():
        sequences = pack_tokens(tokenizer, judging.text, length, max(length, tokens))
        packed[judging.name] = [sequence for sequence in sequences if len(sequence) == length]
    return packed


@functools.cache
def _reasoning() -> str:
    folder = lm_eval_path("tasks", "bbh", "cot_fewshot")
    if folder is None:
        return ""
    import yaml  # lm-eval's own dependency

    examples = []
    for file in sorted(folder.glob("[!_]*.yaml")):
        with suppress(yaml.YAMLError, KeyError, TypeError, AttributeError):  # another layout, of another lm-eval
            samples = yaml.safe_load(file.read_text(encoding="utf-8"))["fewshot_config"]["samples"]
            examples += [f"{sample['input'].strip()}\n{sample['target'].strip()}" for sample in samples]
    return "\n\n".join(examples)
