"""Text that a user gives: strings and chats, a file with them, or a data set on the Hugging Face hub."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedTokenizerBase

from lf_hf.text.chats import Messages, chat_text, first_token, is_chat

TextSource = Sequence[str | Messages] | str | Path
"""Strings and chats; or where they are: a .txt, .jsonl, .csv or .parquet file, or NAME[:CONFIG[:SPLIT[:COLUMN]]] of a
data set on the hub (or in a folder)."""

# What `datasets` calls a kind of file, and what keeps long texts out of memory and text from becoming numbers.
_TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".csv": ("csv", {"usecols": ["text"], "converters": {"text": str}, "keep_default_na": False, "chunksize": 256}),
    ".parquet": ("parquet", {"batch_size": 16}),
}
_COLUMNS = ("text", "messages")  # of which the first that is there is read
_CHARACTERS_PER_TOKEN = 8  # more than any usual text has, so that so much from the hub is enough
_LONGEST_LINE = 1 << 24  # characters that are read at once


def read_samples(
    given: TextSource, tokens: int, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[Iterator[str], str]:
    """The samples that a user gave, but for blank ones, and what to call them; each ends with one newline.

    Of a data set on the hub they are the first ones, of some `tokens` tokens together; otherwise all of them. Chats are
    written out by the tokenizer's template. A sample that is no text, or cannot be read, raises ValueError or OSError
    when its turn comes.
    """
    if isinstance(given, str | os.PathLike):
        path = Path(given)
        name, config, split, column = (f"{given}".split(":", 3) + [""] * 3)[:4]
        if path.suffix == ".txt":
            source, rows = path.name, _paragraphs(path)
        elif path.suffix in _TABLES:
            source, rows = path.name, _rows_of_file(path)
        else:
            split = split or "train"
            source = f"{name} ({split})"
            rows = _rows_of_set(name, config, split, column, tokens * _CHARACTERS_PER_TOKEN)
        return _checked(_explained(rows, source), source, tokenizer), source
    if not isinstance(given, Sequence) or isinstance(given, bytes):
        raise ValueError(f"Text must be a list of strings, a file or the name of a data set, got {given!r:.80}.")
    source = "strings given by the caller"
    return _checked(given, source, tokenizer), source


def _explained(rows: Iterator[Any], name: str) -> Iterator[Any]:
    """The rows, whose reader may fail in ways of its own, at any of them."""
    try:
        yield from rows
    except Exception as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        reason = " ".join(str(getattr(error, "strerror", None) or error).split()).rstrip(".")
        advice = "give a .txt, .jsonl, .csv or .parquet file, or a data set"
        raise kind(f"The text {name!r} cannot be read ({reason:.300}); {advice}.") from None


def _paragraphs(path: Path) -> Iterator[str]:
    """What blank lines separate in a UTF-8 file, with or without a byte order mark; endless ones are in pieces."""
    with path.open(encoding="utf-8-sig") as file:
        paragraph = ""
        while line := file.readline(_LONGEST_LINE):
            if line.strip():
                paragraph += line
            if not line.strip() or len(paragraph) >= _LONGEST_LINE:
                yield paragraph
                paragraph = ""
        yield paragraph


def _rows_of_file(path: Path) -> Iterator[Any]:
    if path.is_file() and not path.stat().st_size:  # in which the readers find no columns
        return
    kind, options = _TABLES[path.suffix]
    with TemporaryDirectory() as cache:
        files = glob.escape(str(path.absolute()))
        yield from _load_column(_COLUMNS, kind, split="train", data_files=files, cache_dir=cache, **options)


def _rows_of_set(name: str, config: str, split: str, column: str, characters: int) -> Iterator[Any]:
    for sample in _load_column([column] if column else _COLUMNS, name, config or None, split=split):
        yield sample
        characters -= len(str(sample))
        if characters <= 0:
            return


def _load_column(names: Sequence[str], *data_set: str | None, **options: Any) -> Iterator[Any]:
    """Load a data set: what each of its rows has in the first of some columns that is there."""
    from datasets import load_dataset

    for row in load_dataset(*data_set, streaming=True, **options):
        name = next((name for name in names if row.get(name) is not None), None)
        if name is not None:
            yield row[name]
        elif not any(name in row for name in names):
            raise ValueError(f"it has no column {' or '.join(names)}, but {', '.join(row)}")


def _checked(samples: Iterable[Any], source: str, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    for number, sample in enumerate(samples, 1):
        try:
            if is_chat(sample):
                assert tokenizer is not None, "chats need a tokenizer"
                sample = chat_text(tokenizer, sample)
                if first_token(tokenizer):  # which the tokenizer puts there itself
                    sample = sample.removeprefix(str(tokenizer.bos_token))
            if not isinstance(sample, str):
                raise ValueError("neither a string nor a list of messages that have a role and a content")
            sample.encode()  # which half a character cannot be
        except ValueError as error:
            raise ValueError(f"Sample {number} of {source} cannot be used ({error}): {sample!r:.80}.") from None
        if sample.strip():
            yield sample.rstrip("\n") + "\n"


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
