"""Text of a user: each kind of file gives the same samples, long ones count as a whole, bad ones get one sentence."""

from __future__ import annotations

import csv
import itertools
import json
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from conftest import make_texts, make_tokenizer
from pyarrow import parquet

from lf_hf.text.calibration import MAX_SAMPLES, load_calibration, load_corpus
from lf_hf.text.packing import pack_corpus

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
    path.write_text("\n".join(map(json.dumps, [{"text": long}, {"messages": []}, {"messages": chat}])))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert load_calibration(path, tokenizer=tokenizer).texts[1:] == ["Hello\n"]


@pytest.mark.parametrize("kind", ["list", "jsonl", "csv", "parquet"])
def test_rows_without_text_are_passed_over(kind: str, tmp_path: Path) -> None:
    blank = " " if kind in ("list", "csv") else None
    assert load_calibration(given([blank, "one", blank, "two\n"], kind, tmp_path)).texts == ["one\n", "two\n"]


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


def test_a_data_set_is_read_as_far_as_it_is_needed_and_a_text_that_fits_is_used_as_it_is(tmp_path: Path) -> None:
    [text, _] = load_corpus(given(halves(4000), "data set", tmp_path), max_tokens=1024).parts.values()
    assert 8 * 1024 <= len(text) < 8 * 1024 + 300 and text.startswith("early 0 ")
    samples = halves(240)
    corpus = load_corpus(given(samples, "txt", tmp_path), max_tokens=1024)
    whole = "".join(f"{text.strip()} \n\n" for text in samples).removesuffix("\n")
    assert len(whole) > 59_000 and corpus.parts["text[1].txt"] == whole and "excerpts" not in corpus.source


def test_of_many_samples_as_many_as_are_compared_are_taken_from_all_of_them() -> None:
    for number in (MAX_SAMPLES + 1, 2 * MAX_SAMPLES, 5 * MAX_SAMPLES - 1):
        calibration = load_calibration([f"{n} layer" for n in range(number)])
        numbers = [int(text.split()[0]) for text in calibration.texts]
        assert len(numbers) == MAX_SAMPLES and numbers == sorted(set(numbers)) and numbers[0] == 0
        assert max(b - a for a, b in itertools.pairwise([*numbers, number])) <= 2 * number / MAX_SAMPLES + 1
        assert f"(1,024 of {number:,} samples, spread evenly)" in calibration.source


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
        ("missing.jsonl", None, r"'missing.jsonl' cannot be read \(.*No such file or directory.*\); give a .txt"),
        ("missing.txt", None, r"'missing.txt' cannot be read \(.*No such file or directory.*\); give a .txt, .jsonl"),
        ("binary.txt", bytes(range(256)), "'binary.txt' cannot be read .*0x80"),
        ("number.jsonl", b'{"text": 3}', r"Sample 1 of number.jsonl cannot be used \(neither a string nor .*\): 3"),
        ("other.jsonl", b'{"a": 1}', "'other.jsonl' cannot be read .it has no column text or messages, but a"),
        ("list.jsonl", b'{"text": "a"}\n\n["abc"]\n', r"'list.jsonl' .*line 3 is not a JSON object: \['abc'\]"),
        ("cut.jsonl", b'{"text": "a"}\n{"text', "'cut.jsonl' cannot be read .line 2 is not JSON"),
        ("comma.csv", b"text,label\nHi,neg\nHello,pos,\n", "'comma.csv' .*line 3: it has more fields than the header"),
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
