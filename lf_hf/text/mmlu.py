"""MMLU questions: the prompt, and two places on disk that hold real questions.

Hendrycks et al., "Measuring Massive Multitask Language Understanding", ICLR 2021.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lf_hf.runtime.errors import explained
from lf_hf.runtime.tasks import SUBJECTS

# In lm-eval 0.4.13 the end of one answer has slipped into the question after it.
_STRAY_ANSWER = (
    "The symmetric group $S_n$ has $\nactorial{n}$ elements, hence it is not true that $S_{10}$ has 10 elements.\n"
)
# How explanations begin and end there, whatever they explain.
_LEAD = re.compile(
    r"^\s*(Let.s (think|solve this( problem)?) step by step\. *|We refer to Wikipedia articles on .*? for help\.\s*)+"
)
_VERDICT = re.compile(r"\s*(\w+, )?[Tt]he answer is \([A-Z]\)\.\s*$")


@dataclass(frozen=True)
class Question:
    """A multiple-choice question; `answer` is the index into `choices` of the right one, `explanation` says why."""

    question: str
    choices: tuple[str, ...]
    answer: int
    explanation: str = field(default="", compare=False)


def format_question(question: Question) -> str:
    """The prompt of a question as in lm-eval's `mmlu`, without its answer."""
    choices = zip(string.ascii_uppercase, question.choices, strict=False)
    lines = [f"{letter}. {text}" for letter, text in choices]
    return "\n".join([question.question.strip(), *lines, "Answer:"])


def lm_eval_path(*names: str) -> Path | None:
    """A path in the folder of lm-eval, if that is installed."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent.joinpath(*names)


def bundled_questions() -> dict[str, list[Question]]:
    """The MMLU development questions that come with lm-eval, four or five of each subject.

    One question of college_chemistry has five choices, all others have four. Raises ValueError if lm-eval is not
    installed, or its file is missing or not of the known form.
    """
    path = lm_eval_path("tasks", "mmlu", "flan_cot_fewshot", "_cot_prompts.json")
    if path is None:
        raise ValueError("The MMLU development questions come with lm-eval; run `pip install lm-eval`.")
    with explained(f"The MMLU questions in {path} are not as in lm-eval 0.4.13", "install that version"):
        prompts = json.loads(path.read_text(encoding="utf-8"))
        return {subject: _parse_prompt(prompts[subject]) for subject in SUBJECTS}


def sample_question(questions: Sequence[Question]) -> Question:
    """The question that `mmlu_sample` asks: the last one with four choices. Nothing is fitted on it."""
    return [question for question in questions if len(question.choices) == 4][-1]


def fitting_questions() -> dict[str, list[Question]]:
    """The bundled questions of each subject without the one that `mmlu_sample` asks: three or four."""
    return {
        subject: [question for question in questions if question != sample_question(questions)]
        for subject, questions in bundled_questions().items()
    }


def _parse_prompt(prompt: str) -> list[Question]:
    """The questions in a subject's chain-of-thought prompt: `Q: ...`, `(A) ... (B) ...`, `A: ...`."""
    questions = []
    for block in prompt.replace(_STRAY_ANSWER, "").split("\n\nQ:")[1:]:
        asked, _, reasoning = block.partition("\nA:")
        text, *parts = re.split(r"\s*\(([A-E])\) ?", asked)
        [right] = re.findall(r"answer is \(([A-Z])\)\.\s*$", reasoning)
        letters, choices = parts[::2], [choice.strip() for choice in parts[1::2]]
        explanation = _VERDICT.sub("", _LEAD.sub("", reasoning)).strip()
        questions.append(Question(text.strip(), tuple(choices), letters.index(right), explanation))
    return questions


def read_csv_questions(directory: str | Path, split: str, subject: str) -> list[Question]:
    """The questions of one subject of the original MMLU release, in order, from `DIRECTORY/SPLIT/SUBJECT_SPLIT.csv`.

    SPLIT is dev, val or test. A row has a question, four choices and the answer's letter; there is no header. Raises
    ValueError if the file is missing, or has a row of another form.
    """
    questions = []
    try:
        with Path(directory, split, f"{subject}_{split}.csv").open(newline="", encoding="utf-8") as file:
            for text, *choices, answer in csv.reader(file):
                [_, _, _, _] = choices
                questions.append(Question(text, tuple(choices), "A B C D".split().index(answer)))
    except (OSError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(
            f"mmlu_dir={str(directory)!r:.200} is not the folder of the original MMLU release, with dev/ and test/: "
            f"row {len(questions) + 1} of {split}/{subject}_{split}.csv cannot be read ({error})."
        ) from None
    return questions
