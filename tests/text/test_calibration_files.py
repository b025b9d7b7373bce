"""Calibration files: their kind does not matter, large ones count as a whole, and bad ones get a sentence."""

from __future__ import annotations

import csv
import itertools
import json
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_texts, make_tokenizer

from lf_hf import FusedLlamaForCausalLM, FusionConfig
from lf_hf.text.calibration import MAX_SAMPLES, load_calibration, load_corpus
from lf_hf.text.excerpts import windows
from lf_hf.text.packing import pack_corpus

KINDS = ["list", "txt", "jsonl", "csv", "parquet"]
QUICK: dict[str, Any] = {"num_fusions": 1, "perplexity_tokens": 0}


def given(samples: list[str], kind: str, folder: Path) -> Any:
    """The samples as a list, or the path of a file that holds them."""
    path = folder / f"text.{kind}"
    if kind == "list":
        return samples
    if kind == "txt":
        path.write_text("\n\n".join(samples), encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, samples)), encoding="utf-8")
    elif kind == "csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["text"], *([text] for text in samples)])
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"text": samples}), path)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_texts_give_the_same_tokens_in_any_form(kind: str, tmp_path: Path) -> None:
    samples, tokenizer = [*make_texts(300), "two\nlines"], make_tokenizer()
    calibration, plain = (load_calibration(one) for one in (given(samples, kind, tmp_path), samples))
    assert calibration.texts == plain.texts and len(plain.texts) == 301
    corpora = (load_corpus(one, max_tokens=4096) for one in (given(samples, kind, tmp_path), samples))
    packed, expected = (pack_corpus(tokenizer, corpus, 128, 3000, 320) for corpus in corpora)
    assert all(torch.equal(a, b) for a, b in zip(packed, expected, strict=True))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_rows_without_text_are_passed_over(kind: str, tmp_path: Path) -> None:
    samples: list[Any] = [None, "one", None, "two"]
    if kind == "jsonl":
        samples = [{"text": sample} for sample in samples]
    assert load_calibration(given(samples, kind, tmp_path)).texts == ["one\n", "two\n"]


def test_the_same_texts_give_the_same_model(base: str, tmp_path: Path) -> None:
    models = [
        FusedLlamaForCausalLM.from_pretrained_fused(
            base, calibration=given(make_texts(), kind, tmp_path), method=method, calibration_tokens=1024, **QUICK
        ).state_dict()
        for method in ("mka", "refit")
        for kind in ("list", "txt")
    ]
    for one, other in (models[:2], models[2:]):
        assert all(torch.equal(one[name], other[name]) for name in one)


def halves(number: int) -> list[str]:
    """Numbered paragraphs; the second half has other words."""
    return [f"{'early' if n < number / 2 else 'late'} {n} {'layer ' * 40}" for n in range(number)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_text_counts_from_its_beginning_to_its_end(kind: str, tmp_path: Path) -> None:
    corpus = load_corpus(given(halves(4000), kind, tmp_path), max_tokens=1024)
    text = corpus.parts[0]
    numbers = [int(number) for number in re.findall(r"(?:early|late) (\d+) ", text)]
    assert len(text) <= 64 * 1024 + 2 * 64
    assert numbers == sorted(numbers) and numbers[0] == 0 and numbers[-1] > 3900
    assert max(b - a for a, b in itertools.pairwise(numbers)) < 130  # 64 places in 4000
    assert 0.4 < text.count("early") / len(numbers) < 0.6
    assert "(64 excerpts of 1,024 characters, spread evenly over 986 such)" in corpus.source
    sequences = pack_corpus(make_tokenizer(), corpus, 128, 1000, 320)
    words = "".join(str(make_tokenizer().decode(torch.cat(sequences))).split())
    assert "early" in words and "late" in words


def test_a_text_that_fits_is_used_as_it_is(tmp_path: Path) -> None:
    """Up to 64 characters a token, and past the windows in which it is read."""
    samples = halves(240)
    corpus = load_corpus(given(samples, "txt", tmp_path), max_tokens=1024)
    assert corpus.parts[0] == "".join(f"{text.strip()} \n\n" for text in samples).removesuffix("\n")
    assert len(corpus.parts[0]) > 59_000 and "excerpts" not in corpus.source


@pytest.mark.parametrize("sizes", [[], [0], [3], [5], [4, 4], [1, 2, 3, 20], [10, 5, 5, 5], [2, 3, 0, 1]])
def test_windows_hold_all_of_the_texts(sizes: list[int]) -> None:
    texts = [chr(ord("a") + n) * size for n, size in enumerate(sizes)]
    pieces = list(windows(texts, 5))
    assert "".join(pieces) == "\n".join(texts)
    assert all(len(piece) == 5 for piece in pieces[:-1])


def test_of_many_samples_as_many_as_are_compared_are_taken_from_all_of_them() -> None:
    for number in (MAX_SAMPLES + 1, 2 * MAX_SAMPLES, 5 * MAX_SAMPLES - 1):
        calibration = load_calibration([f"{n} layer" for n in range(number)])
        numbers = [int(text.split()[0]) for text in calibration.texts]
        assert len(numbers) == MAX_SAMPLES and numbers == sorted(set(numbers)) and numbers[0] == 0
        assert max(b - a for a, b in itertools.pairwise(numbers)) <= 2 * number / MAX_SAMPLES + 1
        assert number - numbers[-1] <= 2 * number / MAX_SAMPLES + 1
        assert f"(1,024 samples, spread evenly over {number:,})" in calibration.source


class Endless(list[str]):
    """A list that makes its items anew, and never has them all."""

    def __iter__(self) -> Iterator[str]:
        return (f"{n} " * 1000 for n in range(10_000))


def test_memory_does_not_grow_with_the_text() -> None:
    tracemalloc.start()
    corpus = load_corpus(Endless(), max_tokens=1024)
    samples = load_calibration(Endless(), sample_length=16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000 and "99" in corpus.parts[0] and len(samples.texts) == MAX_SAMPLES  # of 49 MB


@pytest.mark.parametrize(
    ("samples", "noise"), [(["layer model"] * 60, True), ([f"{n}" for n in range(10)] * 6, True), (make_texts(), False)]
)
def test_samples_that_say_nothing_are_noted(samples: list[str], noise: bool, base: str) -> None:
    model = FusedLlamaForCausalLM.from_pretrained_fused(base, calibration=samples, method="mka", **QUICK)
    assert model.fusion_report is not None
    notes = [note for note in model.fusion_report.notes if note.startswith("The layer similarities are noise")]
    assert len(notes) == noise


def test_samples_of_one_token_are_noted(base: str) -> None:
    model = FusedLlamaForCausalLM.from_pretrained_fused(
        base, calibration=make_texts(200), method="mka", sample_length=1, entropy_neighbors=5, **QUICK
    )
    assert model.fusion_report is not None
    assert any("the longest has 1 token;" in note for note in model.fusion_report.notes)


def parquet(path: Path, **columns: Any) -> None:
    pyarrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    writer.write_table(pyarrow.table(columns), path)


@pytest.mark.parametrize("columns", [{"a": ["b"]}, {"text": [["a"]]}, {"text": [{"a": "b"}]}])
def test_a_parquet_file_without_text_gets_one_sentence(columns: dict[str, Any], tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", **columns)
    with pytest.raises(
        ValueError, match=r"'a.parquet' has no column 'text' of strings or 'messages' of chats, but \['(a|text)'\]"
    ):
        load_calibration(tmp_path / "a.parquet")


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet"])
def test_a_file_that_cannot_be_read_is_not_said_to_be_something_else(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = given(make_texts(), kind, tmp_path)

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(OSError, match=rf"The text file '.*text\.{kind}' cannot be read: Permission denied\."):
        load_calibration(path)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.int32])
def test_integers_of_numpy_are_integers(kind: Any) -> None:
    config = FusionConfig(num_fusions=kind(3), seed=kind(7))
    assert config == FusionConfig(num_fusions=3, seed=7) and type(config.num_fusions) is int
    assert json.dumps(config.to_dict())
    with pytest.raises(ValueError, match="num_fusions must be an integer of at least 1"):
        FusionConfig(num_fusions=kind(0))
