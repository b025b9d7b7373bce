"""Text where none is given: calibrated, trained and judged on, from the hub and from what is installed."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.machinery import ModuleSpec
from pathlib import Path

import pyarrow
import pytest
import torch
from conftest import make_texts, make_tokenizer
from pyarrow import parquet
from tokenizers.processors import TemplateProcessing

from lf_hf.runtime.tasks import SUBJECTS
from lf_hf.text import hub
from lf_hf.text.calibration import (
    BUNDLED,
    DOCUMENTATION,
    HUB,
    QUESTIONS,
    SOURCE_CODE,
    CalibrationSamples,
    Corpus,
    documentation_halves,
    load_calibration,
    load_corpus,
    load_training_text,
)
from lf_hf.text.judging import JudgingText, judging_sequences, judging_texts, relation
from lf_hf.text.mmlu import Question, bundled_questions, format_question, read_csv_questions
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


DOCS, REASONING = judging_texts()


def paragraphs(text: str) -> set[str]:
    """Those long enough not to be in two texts by chance."""
    return {part.strip() for part in re.split(r"\n\s*\n", text) if len(part.strip()) >= 60}


def test_two_kinds_of_text_enough_of_each_share_no_paragraph_with_default_text_or_questions() -> None:
    assert (DOCS.name, REASONING.name) == ("docs", "reasoning")
    assert min(len(paragraphs(judging.text)) for judging in (DOCS, REASONING)) > 50
    assert all(judging.source and len(judging.text) > 40_000 for judging in (DOCS, REASONING))  # some 10,000 tokens
    questions = [question.question for questions in bundled_questions().values() for question in questions]
    others = ["\n\n".join(texts) for texts in (load_corpus().parts.values(), load_calibration().texts, questions)]
    assert not paragraphs(DOCS.text) & paragraphs(REASONING.text)
    for judging in (DOCS, REASONING):
        assert not [part for part in paragraphs(judging.text) if any(part in other for other in others)]
        assert not [text for text in questions if len(text) >= 60 and text in judging.text]


@pytest.mark.parametrize("judging", [DOCS, REASONING], ids=lambda judging: judging.name)
def test_relation_says_what_was_fitted(judging: JudgingText) -> None:
    own = " ".join(make_texts(400))
    assert relation(judging, []) == relation(judging, [own], ["my text"]) == "unseen"
    corpora = load_corpus(), load_training_text([own], 8192)
    assert {relation(judging, corpus.parts.values(), corpus.parts) for corpus in corpora} == {
        "kin" if judging is DOCS else "unseen"
    }
    half = judging.text[len(judging.text) // 4 : len(judging.text) * 3 // 4]
    for corpus in corpora:
        assert relation(judging, [own, own + "\n\n" + half], corpus.parts) == "seen"


@pytest.mark.parametrize(("tokens", "longest", "shape"), [(300, 1024, (1, 300)), (2000, 256, (7, 256)), (1, 8, (1, 2))])
def test_models_are_judged_on_sequences_of_one_length(tokens: int, longest: int, shape: tuple[int, int]) -> None:
    sequences = judging_sequences(make_tokenizer(), tokens, longest)
    assert {name: torch.stack(of_text).shape for name, of_text in sequences.items()} == {
        "docs": shape,
        "reasoning": shape,
    }


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


def table(**columns: object) -> bytes:
    content = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), content, row_group_size=300)
    return content.getvalue()


COUNT = 57 * 2
FILES = {
    hub.GENERAL.path: table(id=range(3000), text=[f"page {n} {text}" for n, text in enumerate(make_texts(3000))]),
    hub.MMLU.path: table(
        question=[f"asked {n}" for n in range(COUNT)],
        subject=[*SUBJECTS] * 2,
        choices=[["a", "b", "c", "d"]] * COUNT,
        answer=[1] * COUNT,
    ),
}


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks of a server, for two files, or something else."""

    manner, released = "good", threading.Event()
    requests = 0

    def do_GET(self) -> None:
        type(self).requests += 1
        body, status, file = b"<html>Please log in</html>", 200, FILES.get(self.path.split("/", 6)[-1], b"")
        if self.manner == "hangs":
            self.released.wait()
        elif self.manner == "good" and file:
            first, last = (int(place) for place in self.headers["range"].removeprefix("bytes=").split("-"))
            body, status = file[first : last + 1], 206
        elif self.manner == "good":
            files = [{"type": "file", "path": path, "size": len(file), "oid": "0"} for path, file in FILES.items()]
            of_set = {"id": "a/b", "sha": self.path.split("/")[-1]}
            body = json.dumps(files if "/tree/" in self.path else of_set).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        with suppress(OSError):  # of whom no longer listens
            for byte in [body] if self.manner != "trickles" else [b" "] * len(body):
                self.wfile.write(byte)
                time.sleep(0.2 if self.manner == "trickles" else 0)

    do_POST = do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    class Own(Hub):
        released = threading.Event()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setattr(hub, "failure", None)
    yield Own
    Own.released.set()
    server.shutdown()


def test_general_text_and_questions_come_from_the_hub_once(online: type[Hub]) -> None:
    fitted, trained, calibration = load_corpus(max_tokens=4096), load_training_text(None, 131072), load_calibration()
    asked = online.requests
    assert asked and not fitted.is_bundled and "general text" in fitted.note
    general = "HuggingFaceFW/fineweb-edu at 87f09149"
    assert [*fitted.parts] == [general, QUESTIONS] and [*trained.parts] == [general, DOCUMENTATION, QUESTIONS]
    for text in (fitted.parts[general], trained.parts[general]):
        assert text.startswith("page 0 ") and "page 999 " in text and "page 1000 " not in text
    assert calibration.source == "cais/mmlu at c30699e8, validation split" and calibration.labels == list(SUBJECTS)
    assert calibration.texts[1] == "asked 1\nA. a\nB. b\nC. c\nD. d\nAnswer:"
    online.manner = "garbage"  # what was read is in the cache
    assert load_corpus(max_tokens=4096) == fitted and load_calibration() == calibration
    assert online.requests == asked
    assert load_corpus(HUB, max_tokens=4096) == fitted and load_calibration(HUB) == calibration
    bundled = load_corpus(BUNDLED), load_calibration(BUNDLED)
    assert [*bundled[0].parts] == [DOCUMENTATION, QUESTIONS] and "lm-eval" in bundled[1].source


@pytest.mark.parametrize("manner", ["hangs", "trickles", "garbage", "refuses", "chatty"])
def test_a_hub_that_does_not_answer_as_it_should_costs_ten_seconds_at_most(
    manner: str, online: type[Hub], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert hub.PATIENCE == 10
    monkeypatch.setattr(hub, "PATIENCE", 2.0)
    if manner == "refuses":
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    elif manner == "chatty":  # a Python that says something wherever it starts
        (tmp_path / "sitecustomize.py").write_text("print('hello')")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    else:
        online.manner = manner
    corpora = [load_corpus()]
    asked = online.requests
    corpora += [load_corpus(), load_training_text(None, 8192)]
    samples = load_calibration()
    assert all({DOCUMENTATION, QUESTIONS} <= corpus.parts.keys() and corpus.is_bundled for corpus in corpora)
    assert "lm-eval" in samples.source and samples == load_calibration(BUNDLED)
    assert online.requests == asked and not list((tmp_path / "assets").rglob("*.json"))
    for load in (load_corpus, load_calibration):
        with pytest.raises(OSError, match=r"hub does not give the default text .* 'bundled' as calibration text"):
            load(HUB)
    assert "as the hub gave none (" in corpora[0].note and "1.1 to 1.4 times the perplexity" in corpora[0].note
