"""Calibration samples from a user's strings, chats or file: .txt, .jsonl, .csv and .parquet."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lf_hf.runtime.checked_json import parse_json
from lf_hf.text.chats import Messages, chat_text, is_chat

_PARQUET_ROWS = 256  # that are in memory together
_MAX_LINE = 1 << 24  # characters, of a text file

Samples = Sequence[str | Messages] | str | Path
"""Text that a user gives: strings and chats, or the path of a file with them."""

OpenTokenizer = Callable[[], PreTrainedTokenizerBase]
"""Opens the model's tokenizer, for whose chat template chats are written out; other text does without."""


def open_samples(calibration: Samples) -> tuple[Iterable[Any], str]:
    """The samples that a user gave, unchecked, and what to call them."""
    if isinstance(calibration, (str, os.PathLike)):
        path = Path(calibration)
        return _read(path), path.name
    if not isinstance(calibration, Sequence) or isinstance(calibration, bytes):
        raise ValueError(f"calibration must be a list of strings or the path of a file, got {calibration!r:.80}.")
    return calibration, "strings given by the caller"


def checked_strings(samples: Iterable[Any], source: str, open_tokenizer: OpenTokenizer | None) -> Iterator[str]:
    """The samples that are not blank, checked to be strings; each ends with one newline, as paragraphs of a file do.

    Chats are written out by the tokenizer's template.
    """
    tokenizer: PreTrainedTokenizerBase | None = None
    for number, sample in enumerate(samples):
        if is_chat(sample):
            if open_tokenizer is None:
                raise ValueError(
                    f"Calibration sample {number} of {source} is a chat, which needs the model's tokenizer; give "
                    "open_tokenizer."
                )
            tokenizer = tokenizer or open_tokenizer()
            try:
                sample = _without_first(tokenizer, chat_text(tokenizer, sample))
            except ValueError as error:
                raise ValueError(f"Calibration sample {number} of {source} is a chat, but {error}.") from None
        if not isinstance(sample, str):
            raise ValueError(
                f"Calibration sample {number} of {source} must be a string or a list of messages, got {sample!r:.80}."
            )
        try:
            sample.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"Calibration sample {number} of {source} holds half a character; write it as UTF-8."
            ) from None
        if sample.strip():
            yield sample.rstrip("\n") + "\n"


def _without_first(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text without the token that the tokenizer itself puts before each."""
    first = tokenizer.bos_token
    adds = first is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(first) if adds else text


def _read(path: Path) -> Iterator[Any]:
    if not path.is_file():
        found = "is no file" if path.exists() else "does not exist"
        raise ValueError(f"The text file {str(path)!r} {found}; give a file with text.")
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise ValueError(f"Text files are {', '.join(readers)}, got {path.name!r}.")
    try:
        path.open("rb").close()
        yield from readers[path.suffix](path)
    except OSError as error:
        raise OSError(f"The text file {str(path)!r} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"The text file {path.name!r} is not UTF-8 text: {error}.") from None
    except csv.Error as error:
        raise ValueError(f"The text file {path.name!r} is not CSV: {error}.") from None


def _lines(path: Path, newline: str | None = None) -> Iterator[str]:
    """The lines of a UTF-8 file, with or without a byte order mark; none is too long for memory."""
    with path.open(encoding="utf-8-sig", newline=newline) as file:
        number = 1
        while line := file.readline(_MAX_LINE + 1):
            if len(line) > _MAX_LINE:
                raise ValueError(
                    f"Line {number} of {path.name!r} has more than {_MAX_LINE:,} characters; break it into several."
                )
            yield line
            number += 1


def _read_txt(path: Path) -> Iterator[str]:
    paragraph: list[str] = []
    size = 0
    for line in _lines(path):
        if line.strip():
            paragraph.append(line)
            size += len(line)
        if paragraph and (not line.strip() or size > _MAX_LINE):
            yield "".join(paragraph)
            paragraph, size = [], 0
    yield "".join(paragraph)


def _read_jsonl(path: Path) -> Iterator[Any]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        sample = parse_json(line, f"Line {number} of {path.name!r}")
        if isinstance(sample, dict):
            field = next((name for name in ("text", "messages") if name in sample), None)
            if field is None:
                raise ValueError(f"Line {number} of {path.name!r} has no field 'text' or 'messages'.")
            sample = "" if sample[field] is None else sample[field]
        yield sample


def _read_csv(path: Path) -> Iterator[str]:
    limit = csv.field_size_limit(_MAX_LINE)  # for all of this process; the usual one is less than a long document
    try:
        rows = csv.DictReader(_lines(path, newline=""))
        if "text" not in (rows.fieldnames or []):
            raise ValueError(f"{path.name!r} has no column 'text' in its first line, but {rows.fieldnames!s:.200}.")
        for row in rows:
            yield row["text"] or ""
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"Reading {path.name!r} needs pyarrow; run `pip install pyarrow`.") from None
    try:
        schema = pyarrow.parquet.read_schema(path)
        nested = {name: pyarrow.types.is_nested(schema.field(name).type) for name in schema.names}
        name = next((name for name, holds in (("text", False), ("messages", True)) if nested.get(name) is holds), None)
        if name is None:
            raise ValueError(
                f"{path.name!r} has no column 'text' of strings or 'messages' of chats, but {schema.names!s:.200}."
            )
        # As a dictionary, in which a text that many rows have is there once.
        with pyarrow.parquet.ParquetFile(path, read_dictionary=None if nested[name] else [name]) as table:
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=[name]):
                for value in batch.column(0):
                    yield "" if (sample := value.as_py()) is None else sample
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"The text file {path.name!r} is not Parquet: {error}.") from None
