"""lf_hf.text.mmlu: the questions that lm-eval ships, the original CSV release, and the prompt."""

import importlib.util
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from conftest import ROOT

from lf_hf.text.mmlu import SUBJECTS, Question, bundled_questions, format_question, read_csv_questions


@pytest.fixture(scope="module")
def bundled() -> dict[str, list[Question]]:
    return bundled_questions()


def test_subjects_and_categories() -> None:
    assert len(SUBJECTS) == 57
    counts = {category: list(SUBJECTS.values()).count(category) for category in SUBJECTS.values()}
    assert counts == {"stem": 19, "other": 13, "social_sciences": 12, "humanities": 13}


def test_bundled_counts(bundled: dict[str, list[Question]]) -> None:
    assert bundled.keys() == SUBJECTS.keys()
    four = {subject for subject, questions in bundled.items() if len(questions) == 4}
    assert four == {"college_chemistry", "formal_logic", "human_aging"}
    assert sum(map(len, bundled.values())) == 282
    odd = [(s, i, len(q.choices)) for s, qs in bundled.items() for i, q in enumerate(qs) if len(q.choices) != 4]
    assert odd == [("college_chemistry", 3, 5)]


def test_bundled_copies(bundled: dict[str, list[Question]]) -> None:
    """lm-eval ships one question twice; whoever splits questions in two must know."""
    copies = {subject for subject, questions in bundled.items() if len(set(questions)) < len(questions)}
    assert copies == {"college_physics"}
    assert bundled["college_physics"][3] == bundled["college_physics"][0]


def test_bundled_text_is_clean(bundled: dict[str, list[Question]]) -> None:
    for questions in bundled.values():
        for question in questions:
            assert 0 <= question.answer < len(question.choices)
            for text in (question.question, *question.choices, question.explanation):
                assert text
                assert text == text.strip()
                assert "Let's think" not in text
                assert "\nA:" not in text
                assert "Wikipedia articles" not in text
            assert not question.explanation.endswith(f"answer is ({'ABCDE'[question.answer]}).")


def test_bundled_options_on_their_own_lines(bundled: dict[str, list[Question]]) -> None:
    question = bundled["elementary_mathematics"][4]
    assert question == Question(
        "Which expression is equivalent to 5 x 9?",
        ("(5 x 4) x (6 x 5)", "(5 x 5) + (5 x 4)", "(5 x 5) + (5 x 9)", "(5 x 9) x (6 x 9)"),
        1,
    )


def test_bundled_stray_answer_is_cut(bundled: dict[str, list[Question]]) -> None:
    assert bundled["abstract_algebra"][1].question == "Find the characteristic of the ring 2Z."


def test_bundled_agrees_with_the_original(bundled: dict[str, list[Question]], mmlu_dir: Path) -> None:
    """Apart from a few retyped ones, each question is one of the subject's original development questions."""

    def key(text: str) -> str:
        return " ".join(text.split())

    found = wrong = 0
    for subject, questions in bundled.items():
        originals = {key(q.question): q for q in read_csv_questions(mmlu_dir, "dev", subject)}
        for question in questions:
            if original := originals.get(key(question.question)):
                found += 1
                wrong += original.answer != question.answer
    assert found >= 270
    # college_chemistry's fifth choice, and one answer that lm-eval corrects.
    assert wrong == 2


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"come with lm-eval; run `pip install lm-eval`"):
        bundled_questions()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "_cot_prompts.json are not as in lm-eval 0.4.13 .*No such file"),
        ("{}", "not as in lm-eval 0.4.13 .*abstract_algebra"),
        ("broken", "not as in lm-eval 0.4.13"),
    ],
)
def test_lm_eval_of_another_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, message: str
) -> None:
    folder = tmp_path / "tasks" / "mmlu" / "flan_cot_fewshot"
    if content is not None:
        folder.mkdir(parents=True)
        if content == "broken":
            blocks = ", ".join(f'"{subject}": "About.\\n\\nQ: Why?\\n(A) 1 (C) 2\\nA: (B)."' for subject in SUBJECTS)
            content = "{" + blocks + "}"
        (folder / "_cot_prompts.json").write_text(content)
    spec = ModuleSpec("lm_eval", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ValueError, match=message):
        bundled_questions()


def test_imports_neither_torch_nor_lm_eval() -> None:
    file = ROOT / "lf_hf" / "text" / "mmlu.py"
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('mmlu', {str(file)!r})\n"
        "sys.modules['mmlu'] = module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert len(module.bundled_questions()) == 57\n"
        "assert not {'torch', 'lm_eval', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_format_question() -> None:
    question = Question("  Two and two? ", ("3", " 4", "5 ", "22"), 1)
    assert format_question(question) == "Two and two?\nA. 3\nB.  4\nC. 5 \nD. 22\nAnswer:"


def write(folder: Path, text: str) -> None:
    (folder / "dev").mkdir()
    (folder / "dev" / "anatomy_dev.csv").write_text(text, encoding="utf-8")


def test_read_csv(tmp_path: Path) -> None:
    write(tmp_path, '"Which, of\n""these""?",é,b,c,"d,e",D\nNone?,None,NA,1.0,01,A\n')
    assert read_csv_questions(tmp_path, "dev", "anatomy") == [
        Question('Which, of\n"these"?', ("é", "b", "c", "d,e"), 3),
        Question("None?", ("None", "NA", "1.0", "01"), 0),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q,1,2,3,4,A\nq,1,2,3,B\n", "row 2 of dev/anatomy_dev.csv cannot be read"),
        ("question,A,B,C,D,answer\n", "row 1 of dev/anatomy_dev.csv cannot be read"),
        ("q,1,2,3,4,E\n", "row 1 of dev/anatomy_dev.csv cannot be read"),
    ],
)
def test_read_csv_errors(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, text)
    with pytest.raises(ValueError, match=message):
        read_csv_questions(tmp_path, "dev", "anatomy")


@pytest.mark.parametrize(("split", "subject"), [("test", "anatomy"), ("dev", "astrology")])
def test_read_csv_missing_file(tmp_path: Path, split: str, subject: str) -> None:
    write(tmp_path, "q,1,2,3,4,A\n")
    with pytest.raises(
        ValueError,
        match=f"original MMLU release.* {split}/{subject}_{split}.csv cannot be read",
    ):
        read_csv_questions(tmp_path, split, subject)


def test_read_csv_release(mmlu_dir: Path) -> None:
    assert sum(len(read_csv_questions(mmlu_dir, "test", subject)) for subject in SUBJECTS) == 14042
    assert all(len(read_csv_questions(mmlu_dir, "dev", subject)) == 5 for subject in SUBJECTS)
