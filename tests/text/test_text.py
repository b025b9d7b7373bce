"""Text of a user is the same in any form of file, and bad text gets one sentence; other text is bundled."""

import csv
import importlib.util
import itertools
import json
import re
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from conftest import make_llama, make_texts, make_tokenizer
from pyarrow import parquet
from tokenizers import decoders
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lf_hf.decoder.decoder import Decoder
from lf_hf.measure.generating import generate
from lf_hf.measure.judge import CONTINUED_LENGTH, write_continuations
from lf_hf.report.data import Continuation
from lf_hf.report.report import damage_notes
from lf_hf.runtime.tasks import SUBJECTS
from lf_hf.text.calibration import (
    DOCUMENTATION,
    MAX_SAMPLES,
    QUESTIONS,
    documentation_halves,
    load_calibration,
    load_corpus,
)
from lf_hf.text.chats import CHATS, Chat, chat_form, chat_text
from lf_hf.text.judging import QUESTION, judging_texts
from lf_hf.text.mmlu import Question, bundled_questions, format_question, read_csv_questions
from lf_hf.text.packing import pack_corpus, pack_tokens

KINDS = ["list", "txt", "jsonl", "csv", "parquet", "data set"]


def given(samples: list[Any], kind: str, folder: Path) -> Any:
    """The samples as a list, or where they are."""
    path = folder / f"text[1].{kind}"
    if kind == "list":
        return samples
    if kind == "txt":
        path.write_text("\n\n".join(samples), encoding="utf-8")
    elif kind == "csv":
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            csv.writer(file).writerows([["id", "text"], *([n, text] for n, text in enumerate(samples))])
    elif kind == "parquet":
        parquet.write_table(pyarrow.table({"id": range(len(samples)), "text": samples}), path)
    else:
        path = path if kind == "jsonl" else folder / "test.jsonl"
        path.write_text("\n".join(json.dumps({"id": n, "text": text}) for n, text in enumerate(samples)), "utf-8")
    return f"{folder}::test:text" if kind == "data set" else path


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_gives_the_same_tokens_in_any_form(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    samples, tokenizer = [*make_texts(300), "two\nlines", "01", "NA", 'a "b", c', "ä"], make_tokenizer()
    text = given(samples, kind, tmp_path)
    calibration, plain = load_calibration(text), load_calibration(samples)
    assert calibration.texts == plain.texts == [f"{sample}\n" for sample in samples]
    corpora = load_corpus(text, max_tokens=4096), load_corpus(samples, max_tokens=4096)
    packed, expected = (pack_corpus(tokenizer, corpus, 128, 3000, 320) for corpus in corpora)
    assert all(torch.equal(a, b) for a, b in zip(packed, expected, strict=True))
    name = {"list": "strings given by the caller", "data set": f"{tmp_path} (test)"}.get(kind, f"text[1].{kind}")
    assert calibration.source == next(iter(corpora[0].parts)) == name
    assert (tmp_path / "cache").exists() == (kind == "data set")


def test_no_field_of_a_table_is_too_long(tmp_path: Path) -> None:
    """Nor any line, wherever the first chat is: readers that go by blocks would have taken the columns of the first."""
    long = "layer " * 2_000_000
    assert load_calibration(given([long, "short"], "csv", tmp_path)).texts[1:] == ["short\n"]
    path, chat = tmp_path / "mixed.jsonl", [{"role": "user", "content": "Hello"}]
    rows = [{"text": long}, {"messages": []}, {"text": "", "messages": chat}, {"messages": json.dumps(chat)}]
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8-sig")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert load_calibration(path, tokenizer=tokenizer).texts[1:] == ["Hello\n", "Hello\n"]


def halves(number: int) -> list[str]:
    """Numbered paragraphs; the second half has other words."""
    return [f"{'early' if n < number / 2 else 'late'} {n} {'layer ' * 40}" for n in range(number)]


@pytest.mark.parametrize("kind", ["list", "txt", "jsonl", "csv", "parquet"])
def test_a_large_text_counts_from_its_beginning_to_its_end(kind: str, tmp_path: Path) -> None:
    corpus = load_corpus(given(halves(4000), kind, tmp_path), max_tokens=1024)
    [text, _] = corpus.parts.values()
    numbers = [int(number) for number in re.findall(r"(?:early|late) (\d+) ", text)]
    assert len(text) <= 64 * 1024 + 2 * 64
    assert numbers == sorted(numbers) and numbers[0] == 0 and numbers[-1] > 3900
    assert max(b - a for a, b in itertools.pairwise(numbers)) < 130  # 64 places in 4000
    assert 0.4 < text.count("early") / len(numbers) < 0.6
    assert "(64 of 986 excerpts of 1,024 characters, spread evenly)" in corpus.source
    sequences = pack_corpus(make_tokenizer(), corpus, 128, 1000, 320)
    words = "".join(str(make_tokenizer().decode(torch.cat(sequences))).split())
    assert "early" in words and "late" in words


class Endless(list[str]):
    """A list that makes its items anew, and never has them all."""

    def __iter__(self) -> Iterator[str]:
        return (f"{n} " * 1000 for n in range(10_000))


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    with (tmp_path / "line.txt").open("wb") as file:
        file.truncate(1 << 28)  # of zeros, without an end of a line
    tracemalloc.start()
    corpus = load_corpus(Endless(), max_tokens=1024)
    samples = load_calibration(Endless(), sample_length=16)
    peak = tracemalloc.get_traced_memory()[1]
    load_calibration(tmp_path / "line.txt")
    peak_of_file = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "99" in next(iter(corpus.parts.values())) and len(samples.texts) == MAX_SAMPLES and peak < 10_000_000
    assert peak_of_file < 1 << 27


@pytest.mark.parametrize(
    ("given", "content", "words"),
    [
        ([], None, "is empty"),
        (["a", 1], None, r"Sample 2 of strings given by the caller cannot be used \(neither a string nor .*\): 1"),
        ("blank.txt", b"\n \n\n", r"The text \(blank.txt\) is empty; give a file with text"),
        ("empty.CSV", b"", r"The text \(empty.CSV\) is empty; give a file with text"),
        ("missing.txt", None, r"'missing.txt' cannot be read \(.*No such file or directory.*\); give a .txt, .jsonl"),
        ("binary.txt", bytes(range(256)), "'binary.txt' cannot be read .*0x80"),
        ("number.jsonl", b'{"text": 3}', r"Sample 1 of number.jsonl cannot be used \(neither a string nor .*\): 3"),
        ("other.jsonl", b'{"a": 1}', "'other.jsonl' cannot be read .it has no column text or messages, but a"),
        ("list.jsonl", b'{"text": "a"}\n\n["abc"]\n', r"'list.jsonl' .*line 3 is not a JSON object: \['abc'\]"),
        ("cut.jsonl", b'{"text": "a"}\n{"text', "'cut.jsonl' cannot be read .line 2 is not JSON"),
        ("comma.csv", b"text,label\nHi,neg\nHello,pos,\n", "'comma.csv' .*line 3: it has more fields than the header"),
        ("twice.csv", b"text,text\nHi,there\n", "'twice.csv' .*line 1: it has two columns text"),
        ("plain.csv", b"id,text\n1,Hello, world\n", "'plain.csv' .*line 2: it has more fields than the header, so put"),
        ("open.csv", b'id,text\n1,"Hello\n', "'open.csv' .*line 2: unexpected end of data"),
        ("other.csv", b"id\n1\n", "'other.csv' cannot be read .it has no column text, but id"),
        ("nested.jsonl", b"[" * 10**6, "'nested.jsonl' cannot be read"),
        ("broken.parquet", b"PAR1 PAR1", "'broken.parquet' cannot be read .Parquet"),
        ("name.docx", None, "'name.docx .train.' cannot be read .* on the Hub .OfflineModeIsEnabled.*, or a data set"),
        ("notes.md", b"words", "'notes.md' cannot be read .files of its kind are not read.; give a .txt, .jsonl, .csv"),
        ("json", None, "'json' cannot be read .that is the name of a file format.; give a .txt"),
        ("text::train", None, "'text::train' cannot be read .that is the name of a file format.; give a .txt"),
        ("", None, "'' cannot be read .it has no name.; give a .txt"),
    ],
)
def test_bad_text_gets_one_sentence(tmp_path: Path, given: Any, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / given).write_bytes(content)
    if isinstance(given, str) and "." in given and given != "name.docx":
        given = tmp_path / given
    for load in (load_calibration, load_corpus):
        with pytest.raises((ValueError, OSError), match=words):
            load(given)


TEMPLATES = {
    "chatml": "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama 3": "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '<x>\n\n' + m.content | trim + "
    "'<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<x>\n\n' }}{% endif %}",
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
    "of tokens that are not special": "{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% else %}{{ '<|Assistant|>' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}",
}
CHAT = [
    {"role": "user", "content": "layer model"},
    {"role": "assistant", "content": "neuron"},
    {"role": "user", "content": "weight"},
]


def with_template(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>", "<x>", "[INST]", "[/INST]"]})
    tokenizer.add_tokens(["<|User|>", "<|Assistant|>"])
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_form_puts_a_chat_together_as_the_template_does(template: str) -> None:
    tokenizer = with_template(template)
    form: Any = chat_form(tokenizer, 400)
    [asks, reply, again] = (tokenizer(message["content"], add_special_tokens=False)["input_ids"] for message in CHAT)
    ids = [*form.opening, *asks, *form.asked, *reply, *form.replied, *again, *form.asked]
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert ids == tokenizer(whole, add_special_tokens=False)["input_ids"]


PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"  # nothing special ends a turn
TALKATIVE = TEMPLATES["mistral"].replace("'[INST]'", f"'[INST]{'Be kind. ' * 40}'")  # instructions in each turn


@pytest.mark.parametrize(
    "template", [None, "", "{% for", "{{ messages[1].content }}", "{{ raise_exception('') }}", PLAIN, TALKATIVE]
)
def test_where_no_form_can_be_told_there_is_none(template: str | None) -> None:
    assert chat_form(with_template(template), 400) is None


def test_what_a_template_writes_does_not_depend_on_the_day() -> None:
    tokenizer = with_template("{{ strftime_now('%d %b %Y, %Y-%m-%d') + ': ' + messages[0].content }}")
    assert chat_text(tokenizer, CHAT) == "26 Jul 2024, 2024-07-26: layer model"


def test_a_token_that_begins_all_texts_is_there_once() -> None:
    tokenizer = with_template("{{ bos_token + messages[0].content }}")
    for adds in (False, True):
        if adds:
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
            )
        corpus = load_corpus([CHAT], max_tokens=1024, tokenizer=tokenizer)
        [first, *_] = pack_corpus(tokenizer, corpus, 8, 1024, 400)
        assert first[0] == tokenizer.bos_token_id and first[1] != tokenizer.bos_token_id


def test_a_model_writes_both_sides_of_a_chat() -> None:
    tokenizer = with_template(TEMPLATES["chatml"])
    form: Any = chat_form(tokenizer, 400)
    end = form.asked[0]
    model = make_llama(vocab_size=len(tokenizer), eos_token_id=[1, end])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(float(name.startswith(("model.embed_tokens", "model.norm"))))
        model.lm_head.weight[end] = 6 / model.config.hidden_size  # so that all tokens are alike, but half are this one
    written = torch.stack(generate(Decoder(model), 8, 160, seed=0, chat=form))
    chats = written[CHATS]
    assert len(chats) == 2 and (written == end).sum() == (chats == end).sum()
    turns = 0
    for sequence in chats.tolist():
        assert sequence[: len(form.opening)] == form.opening
        chat = Chat(form)
        for place, token in enumerate(sequence):
            may_end, expected = chat.may_end, chat.end
            assert chat.next(token) == token  # what the template gives stands where it belongs
            assert token != expected or may_end or place < len(form.opening)  # no turn is empty
        turns += sequence[len(form.opening) :].count(end)
    assert turns > 10
    assert torch.equal(written, torch.stack(generate(Decoder(model), 8, 160, seed=0, chat=form)))


@pytest.mark.parametrize("kind", ["list", "jsonl", "parquet"])
def test_chats_of_a_user_are_written_out_by_the_template(kind: str, tmp_path: Path) -> None:
    tokenizer = with_template(TEMPLATES["chatml"])
    given: Any = [CHAT, CHAT[:2]]
    expected = [str(tokenizer.apply_chat_template(chat, tokenize=False)) for chat in given]
    if kind == "jsonl":
        lines = [json.dumps({"messages": chat}) for chat in given]
        given = tmp_path / "chats.jsonl"
        given.write_text("\n".join([*lines, json.dumps({"text": "plain text"})]))
    elif kind == "parquet":
        parquet.write_table(pyarrow.table({"messages": given}), tmp_path / "chats.parquet")
        given = tmp_path / "chats.parquet"
    expected += ["plain text\n"] * (kind == "jsonl")
    assert load_calibration([*given, []] if kind == "list" else given, tokenizer=tokenizer).texts == expected
    for corpus in (
        load_corpus(given, tokenizer=tokenizer),
        load_corpus(given, max_tokens=4096, to_train=True, tokenizer=tokenizer),
    ):
        assert next(iter(corpus.parts.values())) == "\n".join(expected)


def test_a_part_of_a_message_has_no_fields_of_others(tmp_path: Path) -> None:
    """As templates ask for them by name; a row of Parquet has those of all."""
    parts = [{"type": "text", "text": "Hello"}, {"type": "image", "image": "a.png"}]
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    other = {"function": {"name": "add", "arguments": {"b": 1}}}
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "tool_calls": [call, other]}]
    parquet.write_table(pyarrow.table({"messages": [chat]}), tmp_path / "parts.parquet")
    tokenizer = with_template("{% for m in messages %}{{ m | tojson }}{% endfor %}")
    for given in ([chat], tmp_path / "parts.parquet"):
        [written] = load_calibration(given, tokenizer=tokenizer).texts
        assert [json.loads(message) for message in written.replace("}{", "}\n{").splitlines()] == chat


def test_chats_that_cannot_be_written_out_are_refused_in_one_sentence() -> None:
    neither = "neither a string nor a list of messages that have a role and a content"
    given: list[tuple[Any, str]] = [
        (["text", CHAT], r"^Sample 2 of strings .* cannot be used \(the model's tokenizer has no chat template\)"),
        *(([sample], neither) for sample in ([{"content": "no role"}], [{"role": "no content"}], ["a", "b"])),
    ]
    for samples, message in given:
        with pytest.raises(ValueError, match=message):
            load_corpus(samples, tokenizer=make_tokenizer())
    refusing = with_template("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match=r"\(the model's chat template does not take it \(roles must alternate\)\)"):
        load_corpus([CHAT], tokenizer=refusing)


def test_a_model_is_asked_a_question_in_its_template() -> None:
    tokenizer = with_template(TEMPLATES["chatml"])
    model = make_llama(vocab_size=len(tokenizer))
    *_, (prompt, answer) = write_continuations(Decoder(model), tokenizer).items()
    assert prompt == f"In the chat template: {QUESTION}"
    chat = [{"role": "user", "content": QUESTION}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    length: dict[str, Any] = dict.fromkeys(("min_new_tokens", "max_new_tokens"), CONTINUED_LENGTH)
    generated = model.generate(ids, **length, do_sample=False)[0, ids.shape[1] :]
    assert answer.strip() == str(tokenizer.decode(generated)).strip()
    tokenizer.chat_template = TEMPLATES["chatml"].replace("Be kind.", "Be kind. " * 1000)  # which would take all memory
    assert QUESTION not in "".join(write_continuations(Decoder(model), tokenizer))


def test_a_model_that_writes_nothing_gets_a_note() -> None:
    written, silent = Continuation("A", "b", "c"), Continuation("In the chat template: D", "e", " ")
    assert not damage_notes([], [written, Continuation("A", "", "")], "refit")
    [note] = damage_notes([], [written, silent], "refit")
    assert "after 'In the chat template: D'. Fewer" in note and "'A'" not in note


def test_default_samples_are_the_first_question_of_each_subject_without_its_answer() -> None:
    calibration = load_calibration()
    assert "lm-eval" in calibration.source
    assert calibration.texts == [format_question(bundled_questions()[subject][0]) for subject in SUBJECTS]
    assert len(load_calibration(samples_per_subject=2).texts) == 114
    with pytest.raises(ValueError, match=r"samples_per_subject=4, but .* only 3 questions on college_chemistry"):
        load_calibration(samples_per_subject=4)


def test_training_has_every_question_but_those_of_the_sample_and_says_why_answers_are_right() -> None:
    fitted, trained = (
        corpus.parts[QUESTIONS] for corpus in (load_corpus(), load_corpus(None, max_tokens=8192, to_train=True))
    )
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
    fitted, trained = (
        load_corpus(["a" * length], max_tokens=tokens),
        load_corpus(["a" * length], max_tokens=tokens, to_train=True),
    )
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


@pytest.mark.parametrize("missing", ["lm_eval", "pydoc_data.topics"])
def test_text_serves_without_what_is_not_installed(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    there, gone = (DOCUMENTATION, QUESTIONS) if missing == "lm_eval" else (QUESTIONS, DOCUMENTATION)
    assert [*load_corpus().parts] == [there]
    users = load_corpus(["a" * 10_000], max_tokens=8192, to_train=True)
    assert there in users.full_source and gone not in users.full_source


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


def test_bundled_questions_are_what_the_design_counts_on() -> None:
    bundled = bundled_questions()
    assert bundled.keys() == SUBJECTS.keys() and sum(map(len, bundled.values())) == 282
    assert Counter(SUBJECTS.values()) == {"stem": 19, "other": 13, "social_sciences": 12, "humanities": 13}
    assert bundled["elementary_mathematics"][4] == Question(  # whose options are on lines of their own
        "Which expression is equivalent to 5 x 9?",
        ("(5 x 4) x (6 x 5)", "(5 x 5) + (5 x 4)", "(5 x 5) + (5 x 9)", "(5 x 9) x (6 x 9)"),
        1,
    )
    for question in [question for questions in bundled.values() for question in questions]:
        assert 0 <= question.answer < len(question.choices)
        assert "\nA:" not in question.explanation and not question.explanation.startswith("Let's think")


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
