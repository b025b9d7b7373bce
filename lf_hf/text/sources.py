"""Text that a user gives: strings and chats, a file with them, or a data set on the Hugging Face hub."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedTokenizerBase

from lf_hf.text.chats import Messages, chat_text, is_chat

Samples = Sequence[str | Messages] | str | Path
"""Strings and chats; or where they are: a .txt, .jsonl, .csv or .parquet file, or NAME[:CONFIG[:SPLIT[:COLUMN]]] of a
data set on the hub (or in a folder)."""

OpenTokenizer = Callable[[], PreTrainedTokenizerBase]
"""Opens the model's tokenizer, for whose chat template chats are written out; other text does without."""

# What `datasets` calls a kind of file, and what keeps long texts out of memory and text from becoming numbers.
_TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".csv": ("csv", {"usecols": ["text"], "converters": {"text": str}, "keep_default_na": False, "chunksize": 256}),
    ".parquet": ("parquet", {"batch_size": 16}),
}
_COLUMNS = ("text", "messages")  # of which the first that is there is read
_CHARACTERS_PER_TOKEN = 8  # more than any usual text has, so that so much from the hub is enough
_LONGEST_LINE = 1 << 24  # characters that are read at once


def open_samples(given: Samples, tokens: int) -> tuple[Iterable[Any], str]:
    """The samples that a user gave, unchecked, and what to call them.

    Of a data set on the hub they are the first ones, of some `tokens` tokens together; otherwise all of them.
    """
    if isinstance(given, str | os.PathLike):
        path = Path(given)
        if path.suffix == ".txt":
            return _read(path.name, lambda: _paragraphs(path)), path.name
        if path.suffix in _TABLES:
            return _read(path.name, lambda: _rows_of_file(path)), path.name
        name, config, split, column = (f"{given}".split(":", 3) + [""] * 3)[:4]
        split = split or "train"
        rows = _read(name, lambda: _rows_of_set(name, config, split, column, tokens * _CHARACTERS_PER_TOKEN))
        return rows, f"{name} ({split})"
    if not isinstance(given, Sequence) or isinstance(given, bytes):
        raise ValueError(f"Text must be a list of strings, a file or the name of a data set, got {given!r:.80}.")
    return given, "strings given by the caller"


def _read(name: str, rows: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """The rows, whose reader may fail in ways of its own, at any of them."""
    try:
        yield from rows()
    except Exception as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        reason = " ".join(str(getattr(error, "strerror", None) or error).split()).rstrip(".")
        kinds = ", ".join((".txt", *_TABLES))
        raise kind(f"The text {name!r} cannot be read ({reason:.300}); give a {kinds} file, or a data set.") from None


def _paragraphs(path: Path) -> Iterator[str]:
    """What blank lines separate in a UTF-8 file, with or without a byte order mark; endless ones are in pieces."""
    with path.open(encoding="utf-8-sig") as file:
        paragraph: list[str] = []
        size = 0
        while line := file.readline(_LONGEST_LINE):
            if line.strip():
                paragraph.append(line)
                size += len(line)
            if paragraph and (not line.strip() or size >= _LONGEST_LINE):
                yield "".join(paragraph)
                paragraph, size = [], 0
        yield "".join(paragraph)


def _rows_of_file(path: Path) -> Iterator[Any]:
    from datasets import load_dataset

    kind, options = _TABLES[path.suffix]
    with path.open("rb") as file:
        first = file.readline(_LONGEST_LINE)
    if kind != "parquet" and len(first) == _LONGEST_LINE:
        raise ValueError(f"its first line has more than {_LONGEST_LINE:,} bytes")
    with TemporaryDirectory() as cache:
        options = options | {"data_files": glob.escape(str(path.absolute())), "cache_dir": cache}
        yield from _column(load_dataset(kind, split="train", streaming=True, **options) if first else [])


def _rows_of_set(name: str, config: str, split: str, column: str, characters: int) -> Iterator[Any]:
    from datasets import load_dataset

    rows = load_dataset(name, config or None, split=split, streaming=True)
    for sample in _column(rows, [column] if column else _COLUMNS):
        yield sample
        characters -= len(str(sample))
        if characters <= 0:
            return


def _column(rows: Iterable[dict[str, Any]], names: Sequence[str] = _COLUMNS) -> Iterator[Any]:
    """What the rows have in the first of some columns that is there."""
    for row in rows:
        name = next((name for name in names if row.get(name) is not None), None)
        if name is not None:
            yield row[name]
        elif not any(name in row for name in names):
            raise ValueError(f"it has no column {' or '.join(names)}, but {', '.join(row)}")


def checked_strings(samples: Iterable[Any], source: str, open_tokenizer: OpenTokenizer | None) -> Iterator[str]:
    """The samples that are not blank, checked to be strings; each ends with one newline, as paragraphs of a file do.

    Chats are written out by the tokenizer's template.
    """
    tokenizer: PreTrainedTokenizerBase | None = None
    for number, sample in enumerate(samples, 1):
        try:
            if is_chat(sample):
                assert open_tokenizer is not None, "chats need a tokenizer"
                tokenizer = tokenizer or open_tokenizer()
                sample = _without_first(tokenizer, chat_text(tokenizer, sample))
            if not isinstance(sample, str):
                raise ValueError("neither a string nor a list of messages that have a role and a content")
            sample.encode()  # which half a character cannot be
        except ValueError as error:
            raise ValueError(f"Sample {number} of {source} cannot be used ({error}): {sample!r:.80}.") from None
        if sample.strip():
            yield sample.rstrip("\n") + "\n"


def _without_first(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text without the token that the tokenizer itself puts before each."""
    first = tokenizer.bos_token
    adds = first is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(first) if adds else text


def spread_evenly(items: Iterable[str], count: int) -> tuple[list[str], int]:
    """At most `count` of the items, spread evenly over all of them, and how many items there are.

    It takes one pass, in which at most twice as many are held.
    """
    held: list[str] = []
    stride, total = 1, 0
    for item in items:
        if total % stride == 0:
            held.append(item)
        total += 1
        if len(held) == 2 * count:
            held = held[::2]
            stride *= 2
    if len(held) > count:
        held = [held[n * len(held) // count] for n in range(count)]
    return held, total


def windows(texts: Iterable[str], size: int) -> Iterator[str]:
    """Pieces of `size` characters of all of some texts, which end with a newline; an empty line is between two of them.

    The last piece may be shorter.
    """
    rest, between = "", ""
    for text in texts:
        rest += between + text
        between = "\n"
        for start in range(0, len(rest) - size + 1, size):
            yield rest[start : start + size]
        rest = rest[len(rest) // size * size :]
    if rest:
        yield rest
