"""Where calibration text comes from, and the text that judges the result: the two never overlap."""

from __future__ import annotations

import csv
import importlib.util
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lf_hf.config import FusionConfig
from lf_hf.mmlu import SUBJECTS, Question, bundled_questions, format_question
from lf_hf.records import parse_json

logger = logging.getLogger(__name__)

# What the model writes itself keeps what no other text touches: a share of the tokens of the default corpus, and of
# a user's.
_GENERATED_SHARE = 0.5
_GENERATED_SHARE_OF_USERS = 1 / 3
# Answered questions stand beside a user's text too, up to half as much as there is of it, or a fifth of all tokens.
_QUESTION_CHARACTERS_PER_TOKEN = 0.8  # a fifth of the 4 that a token has
_QUESTIONS_SOURCE = "MMLU development questions"
_TOKEN_CHARACTERS = 64  # no text has tokens that are longer on average
_PARQUET_ROWS = 256  # that are in memory together
_MAX_LINE = 1 << 24  # characters, of a calibration file

MAX_SAMPLES = 1024
"""Samples that are compared with each other at most; of a longer file the first ones count."""


@dataclass(frozen=True)
class Calibration:
    """Calibration samples and where they are from.

    Attributes
    ----------
    texts : list of str
        One calibration sample each.
    source : str
        For people: where the texts are from.
    labels : list of str or None
        MMLU subject of each text, where they are MMLU questions.
    """

    texts: list[str]
    source: str
    labels: list[str] | None = None


def load_needed(
    config: FusionConfig, calibration: Sequence[str] | str | Path | None
) -> tuple[Calibration | None, Corpus | None]:
    """What a fusion with `config` needs of samples for layer similarity and of running text.

    Raises
    ------
    ValueError
        If `calibration` can not be used, or has too few samples.
    """
    samples = None
    if config.needs_similarity:
        samples = load_calibration(
            calibration, samples_per_subject=config.samples_per_subject, sample_length=config.sample_length
        )
        config.check_num_samples(len(samples.texts))
    text = load_corpus(calibration, max_tokens=config.calibration_tokens) if config.needs_text else None
    return samples, text


@dataclass(frozen=True)
class Corpus:
    """Running text for calibration.

    Attributes
    ----------
    parts : list of str
        One string for each kind of text.
    source : str
        For people: where the text is from.
    generated_share : float
        Share of the tokens that the dense model itself is to write.
    by_default : bool
        Whether it is the mixture that is there offline, and not a user's text.
    """

    parts: list[str]
    source: str
    generated_share: float = 0.0
    by_default: bool = False

    @property
    def full_source(self) -> str:
        """Where all of the text is from."""
        return f"{self.source}, text by the model itself" if self.generated_share else self.source


def load_corpus(calibration: Sequence[str] | str | Path | None = None, *, max_tokens: int = 32768) -> Corpus:
    """Running text from a user's strings or file, or, with None, a mixture of what is there offline.

    The model writes half of the mixture. Beside a user's text it writes a third, and the mixture's questions are a
    fifth: what narrow text does not touch is lost.

    Parameters
    ----------
    calibration : list of str, path, or None
        As for `load_calibration`. None: text that the model writes itself, the first half of Python's
        documentation, and one MMLU development question a subject, with its answer.
    max_tokens : int
        How many tokens are to be used at most; 64 characters are read for each, and no more.

    Raises
    ------
    ValueError
        If the file is missing, empty, of an unknown kind or not text, or a sample is not a string.
    """
    if calibration is None:
        parts = [part for part in (documentation_halves()[0], _answered_questions()) if part]
        source = f"Python documentation (first half), {_QUESTIONS_SOURCE}"
        return Corpus(parts, source, _GENERATED_SHARE, by_default=True)
    samples, source = _open(calibration)
    parts, left = [], max_tokens * _TOKEN_CHARACTERS
    for part in _strings(samples, source):
        parts.append(part[:left])
        left -= len(parts[-1])
        if left == 0:
            break
    text = "\n\n".join(parts)
    if not text:
        raise ValueError(f"The calibration text ({source}) is empty; give a file with text.")
    try:
        questions = _answered_questions()[: int(min(len(text) / 2, _QUESTION_CHARACTERS_PER_TOKEN * max_tokens))]
    except ValueError as error:
        logger.warning("Without questions beside the calibration text: %s", error)
        return Corpus([text], source, _GENERATED_SHARE_OF_USERS)
    return Corpus([text, questions], f"{source}, {_QUESTIONS_SOURCE}", _GENERATED_SHARE_OF_USERS)


def _answered_questions() -> str:
    """One MMLU development question a subject, with its answer, each in two formats that are far from each other."""
    questions = [questions[0] for questions in bundled_questions().values()]
    lettered = [f"{format_question(q)} {ascii_uppercase[q.answer]}. {q.choices[q.answer]}" for q in questions]
    plain = [f"Question: {q.question}\nAnswer: {q.choices[q.answer]}" for q in questions]
    pairs = list(zip(lettered, plain, strict=True))
    return "\n\n".join(pair[(n + second) % 2] for second in (0, 1) for n, pair in enumerate(pairs))


def load_calibration(
    calibration: Sequence[str] | str | Path | None = None, *, samples_per_subject: int = 1, sample_length: int = 512
) -> Calibration:
    """Calibration texts from a user's strings or file, or, with None, one MMLU question a subject.

    Parameters
    ----------
    calibration : list of str, path, or None
        Path: .txt (samples separated by blank lines), .jsonl (strings, or objects with "text"), .csv or
        .parquet (a column "text"). None: questions without answers of MMLU's validation split if the Hugging
        Face hub or its cache answers, else of the development questions that lm-eval ships. Never MMLU's test
        split.
    samples_per_subject : int
        Questions a subject where `calibration` is None.
    sample_length : int
        How many tokens of a sample are to be used; 64 characters are kept for each, and no more.

    Raises
    ------
    ValueError
        If the file is missing, empty, of an unknown kind or not text, or a sample is not a string.
    """
    if calibration is None:
        return _mmlu_calibration(samples_per_subject)
    samples, source = _open(calibration)
    longest = sample_length * _TOKEN_CHARACTERS
    texts = [sample[:longest] for sample in islice(_strings(samples, source), MAX_SAMPLES)]
    if not texts:
        raise ValueError(f"The calibration set ({source}) is empty; give at least one sample of text.")
    return Calibration(texts, source)


def tokenize_samples(
    tokenizer: PreTrainedTokenizerBase, calibration: Calibration, sample_length: int, vocab_size: int
) -> list[Tensor]:
    """Token ids of each calibration text, cut to `sample_length`: int64 tensors of shape (tokens T_i,).

    Raises
    ------
    ValueError
        If a text gives no tokens, or ids that a model with `vocab_size` embeddings does not have.
    """
    samples = []
    for text in calibration.texts:
        # Cut here: a tokenizer that truncates would do so ever after, and be saved so.
        ids = tokenizer(text, verbose=False)["input_ids"][:sample_length]
        if not ids:
            raise ValueError(f"The tokenizer makes no tokens of the calibration text {text!r:.80}.")
        check_ids(max(ids), vocab_size)
        samples.append(torch.tensor(ids))
    return samples


def pack_tokens(tokenizer: PreTrainedTokenizerBase, text: str, length: int, max_tokens: int) -> list[Tensor]:
    """Sequences of `length` tokens, spread evenly over a text, that have at most `max_tokens` tokens together.

    Each sequence starts with the tokenizer's own beginning-of-sequence token if it adds one by itself. Of a text of
    more than 64 * `max_tokens` characters only those are looked at.

    Returns
    -------
    list of int64 tensors of shape (tokens <= length,)
        Only the last one may be shorter, and none has fewer than two tokens.
    """
    ids = tokenizer(text[: max_tokens * _TOKEN_CHARACTERS], add_special_tokens=False, verbose=False)["input_ids"]
    prefix = [token for token in tokenizer("a")["input_ids"][:1] if token == tokenizer.bos_token_id]
    step = length - len(prefix)
    pieces = [torch.tensor(prefix + ids[start : start + step]) for start in range(0, len(ids), step)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    if sum(map(len, pieces)) <= max_tokens:
        return pieces
    count = max(1, max_tokens // length)
    pieces = [pieces[n * len(pieces) // count][:max_tokens] for n in range(count)]
    return [piece for piece in pieces if len(piece) > 1]


def pack_corpus(
    tokenizer: PreTrainedTokenizerBase, corpus: Corpus, length: int, max_tokens: int, vocab_size: int
) -> list[Tensor]:
    """Sequences of a corpus, at most `max_tokens` tokens in all, an equal share from each part as far as it goes.

    Returns
    -------
    list of int64 tensors of shape (tokens <= length,)
        Each part is spread evenly over the list.

    Raises
    ------
    ValueError
        If there are fewer tokens than one sequence has, or ids that the model does not have.
    """
    packed: dict[str, list[Tensor]] = {}
    left = max_tokens
    for part in sorted(corpus.parts, key=len):  # what short parts do not use goes to longer ones
        packed[part] = pack_tokens(tokenizer, part, length, left // (len(corpus.parts) - len(packed)))
        left -= sum(map(len, packed[part]))
    sequences = mixed(*(packed[part] for part in corpus.parts))
    total = sum(map(len, sequences))
    if total < length:
        raise ValueError(
            f"The calibration text ({corpus.source}) has only {total} tokens, which do not fill one sequence of "
            f"calibration_length={length}; give more text."
        )
    check_ids(max(int(sequence.max()) for sequence in sequences), vocab_size)
    return sequences


def mixed(*lists: Sequence[Tensor]) -> list[Tensor]:
    """The items of some lists in one, in which each list is spread evenly."""
    placed = [((n + 0.5) / len(items), item) for items in lists for n, item in enumerate(items)]
    return [item for _, item in sorted(placed, key=itemgetter(0))]


def documentation_halves() -> tuple[str, str]:
    """Python's own reference documentation as two texts that share no paragraph.

    English prose that is there wherever Python is: the first half is for calibration, the second for judging.
    Both are empty where Python was installed without `pydoc_data.topics`.
    """
    if importlib.util.find_spec("pydoc_data") is None:
        return "", ""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return "", ""
    # Some topics contain others, so paragraphs repeat; each is kept where it comes first.
    paragraphs = dict.fromkeys(
        paragraph.strip("\n") for name in sorted(topics) for paragraph in topics[name].split("\n\n")
    )
    ordered = [paragraph for paragraph in paragraphs if paragraph.strip()]
    middle = len(ordered) // 2
    return "\n\n".join(ordered[:middle]), "\n\n".join(ordered[middle:])


def check_ids(largest: int, vocab_size: int) -> None:
    """Raise ValueError if a token id is beyond the model's embeddings."""
    if largest >= vocab_size:
        raise ValueError(
            f"The tokenizer gives token id {largest}, but the model has {vocab_size} embeddings; use the tokenizer "
            "that belongs to the model."
        )


def _mmlu_calibration(samples_per_subject: int) -> Calibration:
    try:
        questions, source = _hub_questions(), "cais/mmlu, validation split"
    except Exception as error:  # no `datasets`, no network, no cache, a changed data set: each means "not there"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        logger.info("No MMLU validation questions from the hub (%s).", reason)
        questions, source = bundled_questions(), "MMLU development questions that lm-eval ships"
        if samples_per_subject > 1:
            logger.warning("samples_per_subject=%d takes questions that mmlu_sample asks.", samples_per_subject)
    texts = []
    for subject in SUBJECTS:
        if len(questions[subject]) < samples_per_subject:
            raise ValueError(
                f"samples_per_subject={samples_per_subject}, but {source} has only {len(questions[subject])} "
                f"questions on {subject}; lower it, or give calibration= a file of your own."
            )
        texts += [format_question(question) for question in questions[subject][:samples_per_subject]]
    logger.info("Calibrating on %d questions: %s.", len(texts), source)
    return Calibration(texts, source, [subject for subject in SUBJECTS for _ in range(samples_per_subject)])


def _hub_questions() -> dict[str, list[Question]]:
    from datasets import load_dataset

    questions: dict[str, list[Question]] = {subject: [] for subject in SUBJECTS}
    for row in load_dataset("cais/mmlu", "all", split="validation"):
        questions[row["subject"]].append(Question(row["question"], tuple(row["choices"]), row["answer"]))
    return questions


def _open(calibration: Sequence[str] | str | Path) -> tuple[Iterable[Any], str]:
    """The samples that a user gave, unchecked, and what to call them."""
    if isinstance(calibration, (str, os.PathLike)):
        path = Path(calibration)
        return _read(path), path.name
    if not isinstance(calibration, Sequence) or isinstance(calibration, bytes):
        raise ValueError(f"calibration must be a list of strings or the path of a file, got {calibration!r:.80}.")
    return calibration, "strings given by the caller"


def _strings(samples: Iterable[Any], source: str) -> Iterator[str]:
    """The samples that are not blank, checked to be strings."""
    for number, sample in enumerate(samples):
        if not isinstance(sample, str):
            raise ValueError(f"Calibration sample {number} of {source} must be a string, got {sample!r:.80}.")
        if any("\ud800" <= character <= "\udfff" for character in sample):
            raise ValueError(f"Calibration sample {number} of {source} holds half a character; write it as UTF-8.")
        if sample.strip():
            yield sample


def _read(path: Path) -> Iterator[Any]:
    if not path.is_file():
        found = "is no file" if path.exists() else "does not exist"
        raise ValueError(f"The calibration file {str(path)!r} {found}; give a file with text.")
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise ValueError(f"Calibration files are {', '.join(readers)}, got {path.name!r}.")
    try:
        yield from readers[path.suffix](path)
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
        # As a dictionary, in which a text that many rows have is there once.
        with pyarrow.parquet.ParquetFile(path, read_dictionary=["text"]) as table:
            if "text" not in table.schema_arrow.names:
                raise ValueError(f"{path.name!r} has no column 'text', but {table.schema_arrow.names!s:.200}.")
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=["text"]):
                for value in batch.column(0):
                    yield value.as_py()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"The calibration file {path.name!r} is not Parquet: {error}.") from None
