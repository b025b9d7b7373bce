"""MMLU questions: its subjects, its prompt, and two places on disk that hold real questions.

Hendrycks et al., "Measuring Massive Multitask Language Understanding", ICLR 2021. Standard library only.
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

SUBJECTS: dict[str, str] = {
    "abstract_algebra": "stem",
    "anatomy": "stem",
    "astronomy": "stem",
    "business_ethics": "other",
    "clinical_knowledge": "other",
    "college_biology": "stem",
    "college_chemistry": "stem",
    "college_computer_science": "stem",
    "college_mathematics": "stem",
    "college_medicine": "other",
    "college_physics": "stem",
    "computer_security": "stem",
    "conceptual_physics": "stem",
    "econometrics": "social_sciences",
    "electrical_engineering": "stem",
    "elementary_mathematics": "stem",
    "formal_logic": "humanities",
    "global_facts": "other",
    "high_school_biology": "stem",
    "high_school_chemistry": "stem",
    "high_school_computer_science": "stem",
    "high_school_european_history": "humanities",
    "high_school_geography": "social_sciences",
    "high_school_government_and_politics": "social_sciences",
    "high_school_macroeconomics": "social_sciences",
    "high_school_mathematics": "stem",
    "high_school_microeconomics": "social_sciences",
    "high_school_physics": "stem",
    "high_school_psychology": "social_sciences",
    "high_school_statistics": "stem",
    "high_school_us_history": "humanities",
    "high_school_world_history": "humanities",
    "human_aging": "other",
    "human_sexuality": "social_sciences",
    "international_law": "humanities",
    "jurisprudence": "humanities",
    "logical_fallacies": "humanities",
    "machine_learning": "stem",
    "management": "other",
    "marketing": "other",
    "medical_genetics": "other",
    "miscellaneous": "other",
    "moral_disputes": "humanities",
    "moral_scenarios": "humanities",
    "nutrition": "other",
    "philosophy": "humanities",
    "prehistory": "humanities",
    "professional_accounting": "other",
    "professional_law": "humanities",
    "professional_medicine": "other",
    "professional_psychology": "social_sciences",
    "public_relations": "social_sciences",
    "security_studies": "social_sciences",
    "sociology": "social_sciences",
    "us_foreign_policy": "social_sciences",
    "virology": "other",
    "world_religions": "humanities",
}
"""The 57 subjects, each with its category."""
_PROMPTS = Path("tasks", "mmlu", "flan_cot_fewshot", "_cot_prompts.json")
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
    r"""Give the MMLU prompt of a question, without its answer.

    Parameters
    ----------
    question : Question

    Returns
    -------
    str
        The stripped question, a line `A. ...` for each choice, and `Answer:`, as lm-eval's `mmlu` has it.
    """
    options = zip(string.ascii_uppercase, question.choices, strict=False)
    lines = [question.question.strip(), *(f"{letter}. {text}" for letter, text in options), "Answer:"]
    return "\n".join(lines)


def bundled_questions() -> dict[str, list[Question]]:
    """Read the MMLU development questions that come with lm-eval; nothing is downloaded.

    Returns
    -------
    dict of str to list of Question
        For each of the 57 subjects four or five questions in the order of the file. One question of
        college_chemistry has five choices, every other has four.

    Raises
    ------
    ValueError
        If lm-eval is not installed, or its file is missing or not of the known form.
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise ValueError(
            "The MMLU development questions come with lm-eval, which is not installed; run `pip install '.[lm-eval]'` "
            "in lf_hf's checkout."
        )
    path = Path(spec.origin).parent / _PROMPTS
    if not path.is_file():
        raise ValueError(f"The installed lm-eval has no {path}; lf_hf knows the layout of lm-eval 0.4.13.")
    prompts = json.loads(path.read_text(encoding="utf-8"))
    if missing := sorted(SUBJECTS.keys() - prompts.keys()):
        raise ValueError(f"{path} lacks the MMLU subjects {', '.join(missing)}.")
    return {subject: _parse_prompt(prompts[subject], f"{path}, {subject}") for subject in SUBJECTS}


def asked_in_sample(questions: Sequence[Question]) -> Question:
    """The question that `mmlu_sample` asks of a subject, the last with four choices. Nothing is fitted on it."""
    return [question for question in questions if len(question.choices) == 4][-1]


def _parse_prompt(prompt: str, where: str) -> list[Question]:
    """Take the questions out of a subject's chain-of-thought prompt: `Q: ...`, `(A) ... (B) ...`, `A: ...`."""
    questions = []
    for number, block in enumerate(prompt.replace(_STRAY_ANSWER, "").split("\n\nQ:")[1:], 1):
        asked, _, reasoning = block.partition("\nA:")
        text, *parts = re.split(r"\s*\(([A-E])\) ?", asked)
        letters = string.ascii_uppercase[: len(parts) // 2]
        right = re.search(r"answer is \(([A-Z])\)\.\s*$", reasoning)
        if len(letters) < 4 or "".join(parts[::2]) != letters or right is None or right[1] not in letters:
            raise ValueError(f"{where}, question {number} is not of the form that lf_hf knows from lm-eval 0.4.13.")
        choices = tuple(choice.strip() for choice in parts[1::2])
        explanation = _VERDICT.sub("", _LEAD.sub("", reasoning)).strip()
        questions.append(Question(text.strip(), choices, letters.index(right[1]), explanation))
    return questions


def read_csv_questions(directory: str | Path, split: str, subject: str) -> list[Question]:
    """Read one subject of the original MMLU release, `DIRECTORY/SPLIT/SUBJECT_SPLIT.csv`.

    Parameters
    ----------
    directory : str or Path
        The folder that holds `dev/`, `val/` and `test/`.
    split : {"dev", "val", "test"}
    subject : str
        One of `SUBJECTS`.

    Returns
    -------
    list of Question
        Every row of the file in order: question, four choices, and the answer as a letter; no header.

    Raises
    ------
    ValueError
        If the file is missing, is empty, or has a row of another form.
    """
    if not isinstance(directory, (str, Path)):
        raise ValueError(f"mmlu_dir must be the folder of the original MMLU release, got {directory!r:.80}.")
    path = Path(directory) / split / f"{subject}_{split}.csv"
    if not path.is_file():
        raise ValueError(
            f"No MMLU file {path}; the folder must hold the original release (dev/, test/), and the subject be "
            "one of lf_hf.text.mmlu.SUBJECTS."
        )
    questions = []
    with path.open(newline="", encoding="utf-8") as file:
        try:
            for number, row in enumerate(csv.reader(file), 1):
                if len(row) != 6:
                    raise ValueError(
                        f"{path}, row {number} has {len(row)} columns; MMLU has 6: question, A, B, C, D, answer."
                    )
                if row[5] not in ("A", "B", "C", "D"):
                    raise ValueError(f"{path}, row {number} has the answer {row[5]!r:.80}; it must be A, B, C or D.")
                questions.append(Question(row[0], tuple(row[1:5]), "ABCD".index(row[5])))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path} is not a CSV file of UTF-8 text: {error}.") from None
    if not questions:
        raise ValueError(f"{path} holds no question.")
    return questions
