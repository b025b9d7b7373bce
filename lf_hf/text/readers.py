"""Calibration samples from a user's strings or file: .txt, .jsonl, .csv and .parquet."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lf_hf.checked_json import parse_json

_PARQUET_ROWS = 256  # that are in memory together
_MAX_LINE = 1 << 24  # characters, of a calibration file


def open_samples(calibration: Sequence[str] | str | Path) -> tuple[Iterable[Any], str]:
    """The samples that a user gave, unchecked, and what to call them."""
    if isinstance(calibration, (str, os.PathLike)):
        path = Path(calibration)
        return _read(path), path.name
    if not isinstance(calibration, Sequence) or isinstance(calibration, bytes):
        raise ValueError(f"calibration must be a list of strings or the path of a file, got {calibration!r:.80}.")
    return calibration, "strings given by the caller"


def checked_strings(samples: Iterable[Any], source: str) -> Iterator[str]:
    """The samples that are not blank, checked to be strings; each ends with one newline, as paragraphs of a file do."""
    for number, sample in enumerate(samples):
        if not isinstance(sample, str):
            raise ValueError(f"Calibration sample {number} of {source} must be a string, got {sample!r:.80}.")
        try:
            sample.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"Calibration sample {number} of {source} holds half a character; write it as UTF-8."
            ) from None
        if sample.strip():
            yield sample.rstrip("\n") + "\n"


def _read(path: Path) -> Iterator[Any]:
    if not path.is_file():
        found = "is no file" if path.exists() else "does not exist"
        raise ValueError(f"The calibration file {str(path)!r} {found}; give a file with text.")
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise ValueError(f"Calibration files are {', '.join(readers)}, got {path.name!r}.")
    try:
        path.open("rb").close()
        yield from readers[path.suffix](path)
    except OSError as error:
        raise OSError(f"The calibration file {str(path)!r} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"The calibration file {path.name!r} is not UTF-8 text: {error}.") from None
    except csv.Error as error:
        raise ValueError(f"The calibration file {path.name!r} is not CSV: {error}.") from None


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
            if "text" not in sample:
                raise ValueError(f"Line {number} of {path.name!r} has no field 'text'.")
            sample = sample["text"]
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
        if "text" not in schema.names or pyarrow.types.is_nested(schema.field("text").type):
            raise ValueError(f"{path.name!r} has no column 'text' of strings, but {schema.names!s:.200}.")
        # As a dictionary, in which a text that many rows have is there once.
        with pyarrow.parquet.ParquetFile(path, read_dictionary=["text"]) as table:
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=["text"]):
                for value in batch.column(0):
                    yield value.as_py()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"The calibration file {path.name!r} is not Parquet: {error}.") from None
