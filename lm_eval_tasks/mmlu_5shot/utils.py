"""Where mmlu_5shot's questions come from."""

from dataclasses import asdict
from typing import Any

import datasets

from lf_hf.text.mmlu import read_csv_questions


def load_mmlu(subject: str, mmlu_dir: str | None = None, **_: Any) -> dict[str, datasets.Dataset]:
    """Give the splits of a subject: from cais/mmlu on the hub, or from CSV files where `mmlu_dir` is given.

    lm-eval calls this with `dataset_kwargs` and all of its metadata (--metadata and the model args). `mmlu_dir`
    is the folder of the original release, with `dev/` and `test/`; a ValueError says what is wrong with it.
    """
    if mmlu_dir is None:
        return dict(datasets.load_dataset("cais/mmlu", subject))
    return {
        split: datasets.Dataset.from_list([asdict(q) for q in read_csv_questions(mmlu_dir, split, subject)])
        for split in ("dev", "test")
    }
