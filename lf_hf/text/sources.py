"""Text that a user gives: strings and chats, a file with them, or a data set on the Hugging Face hub."""

from __future__ import annotations

import codecs
import csv
import importlib.util
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic_core import from_json
from transformers import PreTrainedTokenizerBase

from lf_hf.runtime.errors import explained
from lf_hf.settings import TextSource
from lf_hf.text.chats import bos_prefix, chat_text, is_chat

Item = TypeVar("Item")
_ADVICE = "give a .txt, .jsonl, .csv or .parquet file, or a data set"
_COLUMNS = ("text", "messages")  # the first one that is there is read
_CHARACTERS_PER_TOKEN = 8  # more than usual text has, so that so much from the hub is enough
_MAX_LINE = 1 << 24  # characters that are read at once


def read_samples(
    given: TextSource, tokens: int, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[Iterator[str], str]:
    """A user's samples without blank ones, and a name for them. Each sample ends with one newline.

    A data set gives its first samples, of some `tokens` tokens together; anything else gives all. A sample that is no
    text, or cannot be read, raises ValueError when its turn comes.
    """
    if isinstance(given, str | os.PathLike):
        rows, source = _open_rows(os.fspath(given), tokens * _CHARACTERS_PER_TOKEN)
    elif isinstance(given, Sequence) and not isinstance(given, bytes):
        rows, source = iter(given), "strings given by the caller"
    else:
        raise ValueError(f"Text must be a list of strings, a file or the name of a data set, got {given!r:.80}.")
    return _checked_samples(rows, source, tokenizer), source


def _open_rows(given: str, characters: int) -> tuple[Iterator[Any], str]:
    path = Path(given)
    read = {".txt": _read_paragraphs, ".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if reader := read.get(path.suffix.lower()):
        return _explain_errors(reader(path), path.name), path.name
    name, config, split, column = (given.split(":", 3) + [""] * 3)[:4]
    problem = ""
    if path.is_file():
        problem = "files of its kind are not read"
    elif not name:
        problem = "it has no name"
    # These names stand for all files of a kind in the current folder.
    elif name.isidentifier() and importlib.util.find_spec(f"datasets.packaged_modules.{name}"):
        problem = "that is the name of a file format"
    if problem:
        shown = path.name if path.is_file() else given
        raise ValueError(f"The text {shown!r} cannot be read ({problem}); {_ADVICE}.")
    source = f"{name} ({split or 'train'})"
    columns = [column] if column else _COLUMNS
    return _explain_errors(_read_data_set(name, config, split or "train", columns, characters), source), source


def _explain_errors(rows: Iterator[Any], name: str) -> Iterator[Any]:
    """The rows, whose reader may fail in ways of its own at any of them."""
    with explained(f"The text {name!r} cannot be read", _ADVICE):
        yield from rows


def _read_paragraphs(path: Path) -> Iterator[str]:
    """What blank lines separate in a UTF-8 file with or without a byte order mark; long paragraphs come in pieces."""
    paragraph = ""
    with path.open(encoding="utf-8-sig") as file:
        while line := file.readline(_MAX_LINE):
            blank = not line.strip()
            if not blank:
                paragraph += line
            if blank or len(paragraph) >= _MAX_LINE:
                yield paragraph
                paragraph = ""
    yield paragraph


def _read_csv(path: Path) -> Iterator[Any]:
    csv.field_size_limit((1 << 31) - 1)  # of the whole process; by default 131072, and no system takes more
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            if (rows.fieldnames or []).count(_COLUMNS[0]) > 1:
                raise csv.Error(f"it has two columns {_COLUMNS[0]}")
            for row in rows:
                if None in row:  # under it are the fields that have no name
                    raise csv.Error("it has more fields than the header, so put text with commas in quotes")
                yield from _read_column(row, _COLUMNS[:1])
        except csv.Error as error:
            raise ValueError(f"line {rows.reader.line_num}: {error}") from None


def _read_jsonl(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = from_json(line.removeprefix(codecs.BOM_UTF8))
            except ValueError as error:
                raise ValueError(f"line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is not a JSON object: {row!r:.80}")
            yield from _read_column(row, _COLUMNS)


def _read_parquet(path: Path) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        present = [name for name in _COLUMNS if name in file.schema_arrow.names]
        for batch in file.iter_batches(16, columns=present or None):
            for row in batch.to_pylist():
                yield from _read_column(row, _COLUMNS)


def _read_data_set(name: str, config: str, split: str, columns: Sequence[str], characters: int) -> Iterator[Any]:
    from datasets import load_dataset

    for row in load_dataset(name, config or None, split=split, streaming=True):
        for sample in _read_column(row, columns):
            yield sample
            characters -= len(str(sample))
        if characters <= 0:
            return


def _read_column(row: Mapping[str, Any], columns: Sequence[str]) -> list[Any]:
    """What a row has in the first of some columns that is filled; nothing where none is. Chats may be JSON in text."""
    present = [name for name in columns if name in row]
    if not present:
        raise ValueError(f"it has no column {' or '.join(columns)}, but {', '.join(row)}")
    filled = [name for name in present if row[name] not in (None, "")]
    if filled[:1] == ["messages"] and isinstance(row["messages"], str):
        return [from_json(row["messages"])]
    return [row[name] for name in filled[:1]]


def _checked_samples(samples: Iterable[Any], source: str, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    for number, sample in enumerate(samples, 1):
        try:
            text = _as_text(sample, tokenizer)
        except ValueError as error:
            raise ValueError(f"Sample {number} of {source} cannot be used ({error}): {sample!r:.80}.") from None
        if text.strip():
            yield text.rstrip("\n") + "\n"


def _as_text(sample: Any, tokenizer: PreTrainedTokenizerBase | None) -> str:
    if isinstance(sample, list) and not sample:  # a chat in which nothing is said
        return ""
    if is_chat(sample):
        assert tokenizer is not None, "chats need a tokenizer"
        sample = chat_text(tokenizer, sample)
        if bos_prefix(tokenizer):  # the tokenizer puts it there itself
            sample = sample.removeprefix(str(tokenizer.bos_token))
    if not isinstance(sample, str):
        raise ValueError("neither a string nor a list of messages that have a role and a content")
    sample.encode()  # fails for half a character
    return sample


def sample_evenly(items: Iterable[str], count: int) -> tuple[list[str], int]:
    """At most `count` items, spread evenly over all of them, and how many items there are.

    It goes through the items once, and holds at most twice as many as it returns.
    """
    sampled: list[str] = []
    stride, total = 1, 0
    for item in items:
        if total % stride == 0:
            sampled.append(item)
        total += 1
        if len(sampled) == 2 * count:
            sampled = sampled[::2]
            stride *= 2
    if len(sampled) > count:
        sampled = evenly(sampled, count)
    return sampled, total


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """`count` of at least as many items, spread evenly over them."""
    return [items[n * len(items) // count] for n in range(count)]


def split_windows(texts: Iterable[str], size: int) -> Iterator[str]:
    """Pieces of `size` characters of the texts, which end with a newline; an empty line separates two texts.

    The last piece may be shorter.
    """
    rest, separator = "", ""
    for text in texts:
        rest += separator + text
        separator = "\n"
        for start in range(0, len(rest) - size + 1, size):
            yield rest[start : start + size]
        rest = rest[len(rest) // size * size :]
    if rest:
        yield rest
