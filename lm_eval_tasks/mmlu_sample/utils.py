"""Where mmlu_sample's questions come from."""

from collections.abc import Sequence
from typing import Any

import datasets

from lf_hf.text.mmlu import Question, bundled_questions, sample_question


def load_sample(subject: str, **_: Any) -> dict[str, datasets.Dataset]:
    """Give a subject's splits out of the development questions that lm-eval ships; nothing is downloaded.

    `test` is the one question that no model is fitted or healed on, `dev` (the shots) the others with four choices. The
    first question belongs to calibration and is in neither, nor is its copy in college_physics. Other arguments are
    lm-eval's metadata.
    """
    first, *others = bundled_questions()[subject]
    asked = sample_question(others)
    shots = [q for q in others if q not in (first, asked) and len(q.choices) == 4]
    return {"dev": _dataset(shots), "test": _dataset([asked])}


def _dataset(questions: Sequence[Question]) -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [{"question": q.question, "choices": q.choices, "answer": q.answer} for q in questions]
    )
