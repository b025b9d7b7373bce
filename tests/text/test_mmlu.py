"""lf_hf.text.mmlu: the questions that lm-eval ships, the original CSV release, and the prompt."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from lf_hf.text.mmlu import SUBJECTS, Question, bundled_questions, read_csv_questions


def test_bundled_questions_are_what_the_design_counts_on() -> None:
    bundled = bundled_questions()
    assert bundled.keys() == SUBJECTS.keys() and sum(map(len, bundled.values())) == 282
    assert Counter(SUBJECTS.values()) == {"stem": 19, "other": 13, "social_sciences": 12, "humanities": 13}
    assert bundled["abstract_algebra"][1].question == "Find the characteristic of the ring 2Z."  # no stray answer
    assert bundled["elementary_mathematics"][4] == Question(  # whose options are on lines of their own
        "Which expression is equivalent to 5 x 9?",
        ("(5 x 4) x (6 x 5)", "(5 x 5) + (5 x 4)", "(5 x 5) + (5 x 9)", "(5 x 9) x (6 x 9)"),
        1,
    )
    for question in [question for questions in bundled.values() for question in questions]:
        assert 0 <= question.answer < len(question.choices)
        for text in (question.question, *question.choices, question.explanation):
            assert text and text == text.strip()
            assert not [words for words in ("Let's think", "\nA:", "Wikipedia articles") if words in text]
        assert not question.explanation.endswith(f"answer is ({'ABCDE'[question.answer]}).")


def test_bundled_agrees_with_the_original(mmlu_dir: Path) -> None:
    """Apart from a few retyped ones, each question is one of the subject's original development questions."""
    found = wrong = 0
    for subject, questions in bundled_questions().items():
        originals = {" ".join(q.question.split()): q for q in read_csv_questions(mmlu_dir, "dev", subject)}
        for question in questions:
            if original := originals.get(" ".join(question.question.split())):
                found += 1
                wrong += original.answer != question.answer
    assert found >= 270
    assert wrong == 2  # college_chemistry's fifth choice, and one answer that lm-eval corrects


def test_lm_eval_of_another_shape_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = dict.fromkeys(SUBJECTS, "About.\n\nQ: Why?\n(A) 1 (C) 2\nA: (B).")
    folder = tmp_path / "tasks" / "mmlu" / "flan_cot_fewshot"
    folder.mkdir(parents=True)
    spec: ModuleSpec | None = ModuleSpec("lm_eval", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    for content, words in ((None, "No such file"), ("{}", "abstract_algebra"), (json.dumps(blocks), "")):
        if content is not None:
            (folder / "_cot_prompts.json").write_text(content)
        with pytest.raises(ValueError, match=f"_cot_prompts.json are not as in lm-eval 0.4.13 .*{words}"):
            bundled_questions()
    spec = None
    with pytest.raises(ValueError, match="come with lm-eval; run `pip install lm-eval`"):
        bundled_questions()


def test_the_original_release_is_read_and_anything_else_refused(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    file = tmp_path / "dev" / "anatomy_dev.csv"
    file.write_text('"Which, of\n""these""?",é,b,c,"d,e",D\nNone?,None,NA,1.0,01,A\n', encoding="utf-8")
    assert read_csv_questions(tmp_path, "dev", "anatomy") == [
        Question('Which, of\n"these"?', ("é", "b", "c", "d,e"), 3),
        Question("None?", ("None", "NA", "1.0", "01"), 0),
    ]
    for row, text in ((2, "q,1,2,3,4,A\nq,1,2,3,B\n"), (1, "question,A,B,C,D,answer\n"), (1, "q,1,2,3,4,E\n")):
        file.write_text(text)
        with pytest.raises(ValueError, match=f"row {row} of dev/anatomy_dev.csv cannot be read"):
            read_csv_questions(tmp_path, "dev", "anatomy")
    with pytest.raises(ValueError, match=r"original MMLU release.* test/anatomy_test.csv cannot be read"):
        read_csv_questions(tmp_path, "test", "anatomy")
