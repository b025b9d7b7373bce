from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama, make_texts, make_tokenizer

from lf_hf import FusionConfig
from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.measure import calibration_sequences
from lf_hf.text.calibration import (
    DOCUMENTATION,
    MAX_SAMPLES,
    Calibration,
    Corpus,
    documentation_halves,
    load_calibration,
    load_corpus,
    load_training_text,
)
from lf_hf.text.mmlu import SUBJECTS, bundled_questions, format_question
from lf_hf.text.packing import interleaved, pack_corpus, pack_tokens, tokenize_samples

SAMPLES = ["first sample\nof two lines", "second, with a comma", "third"]


def write(folder: Path, kind: str) -> Path:
    path = folder / f"samples.{kind}"
    if kind == "txt":
        path.write_text("\n\n".join(SAMPLES) + "\n", encoding="utf-8")
    elif kind == "jsonl":
        lines = [json.dumps({"text": SAMPLES[0]}), "", json.dumps(SAMPLES[1]), json.dumps({"text": SAMPLES[2]})]
        path.write_text("\n".join(lines), encoding="utf-8")
    elif kind == "csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([["id", "text"], *([str(n), text] for n, text in enumerate(SAMPLES))])
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"text": SAMPLES}), path)
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_samples(tmp_path: Path, kind: str) -> None:
    calibration = load_calibration(write(tmp_path, kind))
    assert [text.strip() for text in calibration.texts] == SAMPLES
    assert calibration.source == f"samples.{kind}"


def test_strings_are_samples_and_blank_ones_left_out() -> None:
    assert load_calibration(["a", " ", "b\n"]).texts == ["a\n", "b\n"]


def test_a_long_set_is_cut() -> None:
    assert len(load_calibration(["a"] * (MAX_SAMPLES + 5)).texts) == MAX_SAMPLES


def test_default_is_the_first_question_of_each_subject_without_its_answer() -> None:
    calibration = load_calibration()
    assert len(calibration.texts) == 57 and "lm-eval" in calibration.source
    for text, subject in zip(calibration.texts, SUBJECTS, strict=True):
        assert text.startswith(bundled_questions()[subject][0].question.strip())
        assert text.endswith("\nAnswer:")


def test_samples_per_subject_beyond_what_is_there_is_an_error() -> None:
    assert len(load_calibration(samples_per_subject=2).texts) == 114
    with pytest.raises(ValueError, match=r"samples_per_subject=5, but .* only 4 questions on college_chemistry"):
        load_calibration(samples_per_subject=5)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("blank.txt", b"\n \n\n", r"\(blank.txt\) is empty"),
        ("number.jsonl", b'{"text": 3}', "sample 0 of number.jsonl must be a string or a list of messages, got 3"),
        ("empty.csv", b"", "'empty.csv' has no column 'text'"),
    ],
)
def test_bad_files_get_one_sentence(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_calibration(tmp_path / name)


@pytest.mark.parametrize(
    ("value", "message"), [([], "is empty"), ([1, 2], "sample 0 .* must be a string or a list of messages, got 1")]
)
def test_bad_strings_get_one_sentence(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_calibration(value)


def test_tokenized_samples_are_cut_and_checked_against_the_model() -> None:
    tokenizer = make_tokenizer()
    samples = tokenize_samples(tokenizer, Calibration(["layer " * 50, "model"], "x"), 8, 320)
    assert len(samples[0]) == 8 and len(samples[1]) < 8
    with pytest.raises(ValueError, match="but the model has 10 embeddings"):
        tokenize_samples(tokenizer, Calibration(["layer"], "x"), 8, 10)


def test_sequences_are_spread_over_the_text() -> None:
    tokenizer = make_tokenizer()
    text = " ".join(make_texts(100))
    everything = pack_tokens(tokenizer, text, 20, 10**6)
    ids = tokenizer(text)["input_ids"]
    assert torch.cat(everything).tolist() == ids[: 20 * len(everything)]
    some = pack_tokens(tokenizer, text, 20, 200)
    places = [next(n for n, piece in enumerate(everything) if torch.equal(piece, one)) for one in some]
    assert places == [n * len(everything) // 10 for n in range(10)] and places[-1] > len(everything) / 2


def test_no_sequence_has_a_single_token() -> None:
    assert pack_tokens(make_tokenizer(), "layer " * 100, 16, 1) == []


def test_parts_of_a_corpus_share_the_budget() -> None:
    tokenizer = make_tokenizer()
    corpus = Corpus([" ".join(make_texts(100)), "layer"], "x")
    sequences = pack_corpus(tokenizer, corpus, 20, 200, 320)
    assert 150 < sum(map(len, sequences)) <= 200
    assert tokenizer("layer")["input_ids"] in [sequence.tolist() for sequence in sequences]
    with pytest.raises(ValueError, match=r"\(x\) has only \d tokens, which do not fill one sequence"):
        pack_corpus(tokenizer, Corpus(["layer"], "x"), 20, 200, 320)


def test_training_has_every_question_but_those_of_the_sample_and_says_why_answers_are_right() -> None:
    fitted, trained = load_corpus().parts[1], load_training_text(None, 8192).parts[1]
    for first, *others, last in bundled_questions().values():
        if len(last.choices) > 4:
            others, last = [*others[:-1], last], others[-1]
        assert last.question not in trained and first.question in fitted
        for question in (first, *others):
            assert format_question(question) in trained and (question == first or question.question not in fitted)
            assert f"Answer: {question.choices[question.answer]}\n{question.explanation}" in trained


@pytest.mark.parametrize(("length", "max_tokens"), [(500_000, 49152), (500_000, 8192), (6000, 49152)])
def test_answered_questions_stand_beside_a_users_text_as_a_smaller_part(length: int, max_tokens: int) -> None:
    corpus = load_corpus(["a" * length], max_tokens=max_tokens)
    text, questions = corpus.parts
    assert text == "a" * length + "\n"
    assert len(questions) == int(min(len(text) / 2, max_tokens * 4 / 5))
    assert "Answer: " in questions
    assert "MMLU development questions, text by the model itself" in corpus.full_source


@pytest.mark.parametrize(
    ("length", "tokens"), [(2_000_000, 131072), (40_000, 131072), (8000, 131072), (2_000_000, 6800), (10, 131072)]
)
def test_documentation_stands_beside_a_users_text_that_is_trained_on(length: int, tokens: int) -> None:
    corpus = load_training_text(["a" * length], tokens)
    text, documentation, questions = corpus.parts
    assert corpus.names[1:] == [DOCUMENTATION, "MMLU development questions"]
    assert (
        set(text) == {"a", "\n"}
        and questions == load_corpus(["a" * length], max_tokens=tokens, explained=True).parts[1]
    )
    assert len(documentation) == int(min(len(text) / 2, tokens * 0.6))
    first = documentation_halves()[0]
    pieces = [documentation[start : start + 200] for start in range(0, len(documentation), 2050)]
    places = [first.index(piece) for piece in pieces]
    assert places == sorted(places)
    assert places[-1] > len(first) * (0.7 if len(pieces) > 5 else 0.3 if len(pieces) > 1 else -1)


def test_documentation_goes_beside_no_text_of_its_own_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_training_text(None, 8192) == load_corpus(max_tokens=8192, explained=True)
    own = load_training_text([documentation_halves()[0]], 131072)
    assert DOCUMENTATION not in own.names and len(own.parts) == 2
    monkeypatch.setattr("lf_hf.text.calibration.documentation_halves", lambda: ("", ""))  # a Python without it
    assert load_training_text(make_texts(), 8192) == load_corpus(
        make_texts(), max_tokens=8192, excerpt=1024, explained=True
    )


def test_a_users_text_serves_without_the_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise ValueError("they come with lm-eval, which is not installed")

    monkeypatch.setattr("lf_hf.text.calibration.bundled_questions", missing)
    corpus = load_corpus(make_texts())
    assert len(corpus.parts) == 1 and "MMLU" not in corpus.full_source
    with pytest.raises(ValueError, match="they come with lm-eval"):
        load_corpus()


def test_tokenizing_leaves_the_tokenizer_as_it_was() -> None:
    tokenizer = make_tokenizer()
    before = tokenizer.backend_tokenizer.to_str()
    [sample] = tokenize_samples(tokenizer, Calibration(["layer " * 100], "here"), 16, 320)
    assert len(sample) == 16 and tokenizer.backend_tokenizer.to_str() == before


def test_lists_are_mixed_evenly() -> None:
    one, other = torch.arange(30).split(1), torch.arange(100, 110).split(1)
    both = torch.cat(interleaved(one, [], other))
    assert both[both < 100].tolist() == list(range(30)) and both[both >= 100].tolist() == list(range(100, 110))
    for end in range(1, 41):  # whatever beginning is taken has its share of both
        assert abs(int((both[:end] >= 100).sum()) - end / 4) <= 1


def test_documentation_halves_share_no_paragraph() -> None:
    first, second = documentation_halves()
    assert len(first) > 100_000 and len(second) > 100_000
    paragraphs = [set(re.split(r"\n\n+", half)) for half in (first, second)]
    assert not paragraphs[0] & paragraphs[1]


def test_a_tokenizer_that_adds_a_first_token_has_it_before_every_sequence() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    sequences = pack_tokens(tokenizer, " ".join(make_texts(30)), 50, 200)
    assert all(sequence[0] == 0 for sequence in sequences)
    assert [len(sequence) for sequence in sequences] == [50] * 4


def test_text_that_is_given_fills_a_sequence_beside_what_the_model_writes() -> None:
    config = FusionConfig(1, "refit", calibration_tokens=1024, calibration_length=1000)
    decoder = ModelDecoder(make_llama(max_position_embeddings=2048))
    corpus = Corpus(["\n".join(make_texts(200))], "a text", generated_share=0.5)
    sequences, _ = calibration_sequences(decoder, make_tokenizer(), corpus, config)
    assert [len(sequence) for sequence in sequences] == [1000]
