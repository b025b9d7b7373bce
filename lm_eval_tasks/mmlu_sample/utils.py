"""Where mmlu_sample's questions come from."""

from dataclasses import asdict
from typing import Any

import datasets

from lf_hf.text.mmlu import bundled_questions


def load_sample(subject: str, **_: Any) -> dict[str, datasets.Dataset]:
    """Give a subject's splits out of the development questions that lm-eval ships; nothing is downloaded.

    `test` is the last question with four choices, `dev` (the shots) the others with four choices. The first
    question belongs to calibration and is in neither, nor is its copy in college_physics. Other arguments are
    lm-eval's metadata.
    """
    first, *others = bundled_questions()[subject]
    questions = [asdict(q) for q in others if q != first and len(q.choices) == 4]
    return {
        "dev": datasets.Dataset.from_list(questions[:-1]),
        "test": datasets.Dataset.from_list(questions[-1:]),
    }
