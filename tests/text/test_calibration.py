"""What is calibrated and trained on, and how it becomes sequences of tokens."""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import make_texts, make_tokenizer
from tokenizers.processors import TemplateProcessing

from lf_hf.text.calibration import (
    DOCUMENTATION,
    QUESTIONS,
    SOURCE_CODE,
    CalibrationSamples,
    Corpus,
    documentation_halves,
    load_calibration,
    load_corpus,
    load_training_text,
)
from lf_hf.text.mmlu import SUBJECTS, bundled_questions, format_question
from lf_hf.text.packing import pack_corpus, pack_tokens, tokenize_samples


def test_default_samples_are_the_first_question_of_each_subject_without_its_answer() -> None:
    calibration = load_calibration()
    assert "lm-eval" in calibration.source
    assert calibration.texts == [format_question(bundled_questions()[subject][0]) for subject in SUBJECTS]
    assert len(load_calibration(samples_per_subject=2).texts) == 114
    with pytest.raises(ValueError, match=r"samples_per_subject=4, but .* only 3 questions on college_chemistry"):
        load_calibration(samples_per_subject=4)


def test_training_has_every_question_but_those_of_the_sample_and_says_why_answers_are_right() -> None:
    fitted, trained = (corpus.parts[QUESTIONS] for corpus in (load_corpus(), load_training_text(None, 8192)))
    more = load_corpus(max_tokens=131072).parts[QUESTIONS]  # has two of each subject
    for first, *others, last in bundled_questions().values():
        if len(last.choices) > 4:
            others, last = [*others[:-1], last], others[-1]
        assert last.question not in trained and first.question in fitted
        assert all(question.question in more for question in (first, others[0]))
        for question in (first, *others):
            assert format_question(question) in trained and (question == first or question.question not in fitted)
            assert f"Answer: {question.choices[question.answer]}\n{question.explanation}" in trained


@pytest.mark.parametrize(("length", "tokens"), [(2_000_000, 131072), (8000, 8192), (2_000_000, 6800), (10, 131072)])
def test_questions_and_documentation_stand_beside_a_users_text_as_smaller_parts(length: int, tokens: int) -> None:
    fitted, trained = load_corpus(["a" * length], max_tokens=tokens), load_training_text(["a" * length], tokens)
    assert [*fitted.parts][1:] == [QUESTIONS] and [*trained.parts][1:] == [DOCUMENTATION, QUESTIONS]
    assert fitted.full_source.endswith(f"{QUESTIONS}, text by the model itself")
    for text, *_, questions in (fitted.parts.values(), trained.parts.values()):
        assert set(text) == {"a", "\n"} and len(questions) == int(min(len(text) / 2, tokens * 0.8, 40_000))
        assert length == 10 or "Answer: " in questions
    documentation, first = trained.parts[DOCUMENTATION], documentation_halves()[0]
    assert len(documentation) == int(min(len(next(iter(trained.parts.values()))) / 2, tokens * 0.6))
    pieces = [documentation[start : start + 200] for start in range(0, len(documentation), 2050)]
    places = [first.index(piece) for piece in pieces]
    assert places == sorted(places)
    assert places[-1] > len(first) * (0.7 if len(pieces) > 5 else 0.3 if len(pieces) > 1 else -1)


def test_documentation_goes_beside_no_text_of_its_own_kind_and_programs_beside_the_default() -> None:
    own, ours = load_training_text([documentation_halves()[0]], 131072), load_training_text(None, 8192)
    assert [*own.parts][1:] == [QUESTIONS] and "\nimport " in ours.parts[SOURCE_CODE] and ours.generated_share == 1 / 3


@pytest.mark.parametrize("missing", ["lm_eval", "pydoc_data.topics"])
def test_text_serves_without_what_is_not_installed(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    there, gone = (DOCUMENTATION, QUESTIONS) if missing == "lm_eval" else (QUESTIONS, DOCUMENTATION)
    assert [*load_corpus().parts] == [there]
    users = load_training_text(["a" * 10_000], 8192)
    assert there in users.full_source and gone not in users.full_source


def test_samples_are_cut_and_checked_against_the_model_and_leave_the_tokenizer_as_it_was() -> None:
    tokenizer = make_tokenizer()
    before = tokenizer.backend_tokenizer.to_str()
    samples = tokenize_samples(tokenizer, CalibrationSamples(["layer " * 50, "model"], "x"), 8, 320)
    assert len(samples[0]) == 8 and len(samples[1]) < 8 and tokenizer.backend_tokenizer.to_str() == before
    with pytest.raises(ValueError, match="but the model has 10 embeddings"):
        tokenize_samples(tokenizer, CalibrationSamples(["layer"], "x"), 8, 10)


def test_sequences_are_spread_over_the_text() -> None:
    tokenizer = make_tokenizer()
    text = " ".join(make_texts(100))
    everything = pack_tokens(tokenizer, text, 20, 10**6)
    assert torch.cat(everything).tolist() == tokenizer(text)["input_ids"][: 20 * len(everything)]
    some = pack_tokens(tokenizer, text, 20, 200)
    places = [next(n for n, piece in enumerate(everything) if torch.equal(piece, one)) for one in some]
    assert places == [n * len(everything) // 10 for n in range(10)] and places[-1] > len(everything) / 2
    assert pack_tokens(tokenizer, text, 16, 1) == []  # none has a single token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    begun = pack_tokens(tokenizer, text, 50, 200)
    assert [(len(sequence), int(sequence[0])) for sequence in begun] == [(50, 0)] * 4


def test_parts_of_a_corpus_share_the_tokens() -> None:
    tokenizer = make_tokenizer()
    corpus = Corpus({"x": " ".join(make_texts(100)), "y": "layer"})
    sequences = pack_corpus(tokenizer, corpus, 20, 200, 320)
    assert 150 < sum(map(len, sequences)) <= 200
    assert tokenizer("layer")["input_ids"] in [sequence.tolist() for sequence in sequences]
    with pytest.raises(ValueError, match=r"\(x\) has only \d tokens, which do not fill one sequence"):
        pack_corpus(tokenizer, Corpus({"x": "layer"}), 20, 200, 320)
