"""Calibration text: samples that are compared, and running text that is fitted or trained on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from string import ascii_uppercase
from sysconfig import get_path

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from lf_hf.runtime.amounts import MIXTURE_SHARE, WRITTEN_SHARE
from lf_hf.runtime.tasks import SUBJECTS
from lf_hf.settings import TextSource
from lf_hf.text.mmlu import fitting_questions, format_question
from lf_hf.text.sources import read_samples, sample_evenly, split_windows

logger = logging.get_logger(__name__)
QUESTIONS = "MMLU development questions"
DOCUMENTATION = "Python documentation (first half)"
"""Name of a part of a corpus; the documentation's second half, which judges, is of its kind."""
SOURCE_CODE = "modules of Python's standard library"
MAX_SAMPLES = 1024
"""Samples that are compared with each other at most; of more as many are taken, spread evenly over them."""
TOKEN_CHARACTERS = 64  # no text has longer tokens on average
_TRAINING_CHARACTERS = 8  # a token: more than usual
# Characters that stand beside a user's text for each of its tokens: answered questions, a fifth of the 4 characters of
# a token, or some ten thousand tokens; to train on, documentation too, a seventh. Each is at most half as long as it.
_QUESTION_CHARACTERS, _MAX_QUESTION_CHARACTERS = 0.8, 40_000
_DOCUMENTATION_CHARACTERS, _DOCUMENTATION_EXCERPT = 0.6, 2048
_PACKAGES = "asyncio", "concurrent", "email", "http", "importlib", "json", "logging", "unittest", "urllib", "xml"
_TOKENS_FOR_TWO = 98304  # of the default mixture: from here on it has two questions of each subject
_NOTE = "Calibrated on the bundled mixture; text of your own domain gives a better model"


@dataclass(frozen=True)
class CalibrationSamples:
    """Calibration samples, and for people where they are from; `labels` are the MMLU subjects of MMLU questions."""

    texts: list[str]
    source: str
    labels: list[str] | None = None


@dataclass(frozen=True)
class Corpus:
    """Running text: `parts` of one kind each, by names that tell people where they are from.

    The dense model writes `generated_share` of the tokens. `is_bundled`: it is the mixture of what is installed.
    `note` is what users should know of it.
    """

    parts: dict[str, str]
    generated_share: float = 0.0
    is_bundled: bool = False
    note: str = ""

    @property
    def texts(self) -> list[str]:
        """The parts without their names."""
        return list(self.parts.values())

    @property
    def source(self) -> str:
        """Where the parts are from."""
        return ", ".join(self.parts)

    @property
    def full_source(self) -> str:
        """Where all of the text is from."""
        return f"{self.source}, text by the model itself" if self.generated_share else self.source


def load_calibration(
    calibration: TextSource | None = None,
    *,
    samples_per_subject: int = 1,
    sample_length: int = 512,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> CalibrationSamples:
    """Calibration samples from a user's text or, with None, one MMLU question a subject.

    Parameters
    ----------
    calibration : list of str or chats, file, data set, or None
        A chat is a list of messages, as chat templates take them: [{"role": "user", "content": "..."}, ...].
        File: .txt (samples separated by blank lines), or .jsonl, .csv or .parquet with a column "text", or "messages"
        of chats. Data set: NAME[:CONFIG[:SPLIT[:COLUMN]]] on the Hugging Face hub, of which the beginning is streamed.
        None: the MMLU development questions that lm-eval ships, without their answers.
    samples_per_subject : int
        Questions a subject if no text is given.
    sample_length : int
        Tokens of a sample that are used. Of more than 1024 samples as many are taken, spread evenly over them.
    tokenizer : optional
        The model's, by whose template chats are written out.

    Raises
    ------
    ValueError, OSError
        If the text cannot be read, is empty, or has a sample that is neither a string nor a chat.
    """
    if calibration is None:
        return _mmlu_samples(samples_per_subject)
    samples, source = read_samples(calibration, MAX_SAMPLES * sample_length, tokenizer)
    cut = (sample[: sample_length * TOKEN_CHARACTERS] for sample in samples)
    texts, remark = _sample_items(cut, MAX_SAMPLES, source, "samples")
    return CalibrationSamples(texts, source + remark)


def _sample_items(items: Iterable[str], count: int, source: str, kind: str) -> tuple[list[str], str]:
    """At most so many items, and a remark if there are more. Raises ValueError if there are none."""
    sampled, total = sample_evenly(items, count)
    if not total:
        raise ValueError(f"The text ({source}) is empty; give a file with text.")
    if len(sampled) == total:
        return sampled, ""
    return sampled, f" ({len(sampled):,} of {total:,} {kind}, spread evenly)"


def _mmlu_samples(samples_per_subject: int) -> CalibrationSamples:
    questions = fitting_questions()
    subject = min(questions, key=lambda subject: len(questions[subject]))
    if len(questions[subject]) < samples_per_subject:
        raise ValueError(
            f"samples_per_subject={samples_per_subject}, but there are only {len(questions[subject])} questions on "
            f"{subject}; lower it, or give calibration= a file of your own."
        )
    labels = [subject for subject in SUBJECTS for _ in range(samples_per_subject)]
    texts = [format_question(question) for subject in SUBJECTS for question in questions[subject][:samples_per_subject]]
    return CalibrationSamples(texts, f"{QUESTIONS} that lm-eval ships", labels)


def load_corpus(
    calibration: TextSource | None = None,
    *,
    max_tokens: int = 49152,
    to_train: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Corpus:
    """Running text from a user's or, with None, the bundled mixture.

    Because what narrow text does not touch is lost, other text stands beside a user's: the model writes a third of the
    tokens, and answered questions are a fifth. Text to train on has more questions, with explanations, and Python's
    documentation, unless the text has it already. The mixture is the first half of Python's documentation and, if
    lm-eval is installed, one answered MMLU development question a subject (from 98,304 tokens on two); to train on,
    source code too. Of it the model writes half, or a third to train on. Arguments and errors are as of
    `load_calibration`, and:

    Parameters
    ----------
    max_tokens : int
        Tokens that are used at most. Of a text of more than 64 characters for each (8 to train on) 64 excerpts are
        taken, spread evenly over it.
    to_train : bool
        Whether a model is to be trained on the text, and not fitted to it.
    """
    if calibration is None:
        return _mix_bundled(max_tokens, to_train)
    samples, source = read_samples(calibration, max_tokens, tokenizer)
    size = max_tokens
    if to_train:
        size = max(1, max_tokens * _TRAINING_CHARACTERS // TOKEN_CHARACTERS)
    windows = split_windows(samples, size)
    pieces, remark = _sample_items(windows, TOKEN_CHARACTERS, source, f"excerpts of {size:,} characters")
    text = ("\n\n" if remark else "").join(pieces)
    parts = {source + remark: text}
    if to_train:
        parts[DOCUMENTATION] = _excerpt_documentation(text, _DOCUMENTATION_CHARACTERS * max_tokens)
    limit = min(len(text) / 2, _QUESTION_CHARACTERS * max_tokens, _MAX_QUESTION_CHARACTERS)
    parts[QUESTIONS] = _question_text(1, to_train)[: int(limit)]
    return Corpus({name: part for name, part in parts.items() if part}, WRITTEN_SHARE)


def _mix_bundled(max_tokens: int, to_train: bool) -> Corpus:
    parts = {DOCUMENTATION: documentation_halves()[0]}
    if to_train:
        parts[SOURCE_CODE] = _source_code(max(1, max_tokens // 1024))
    per_subject = 2 if max_tokens >= _TOKENS_FOR_TWO else 1
    parts[QUESTIONS] = _question_text(per_subject, to_train)
    parts = {name: part for name, part in parts.items() if part}
    if not parts:
        raise ValueError("There is no text: neither Python's documentation nor lm-eval is installed; give a file.")
    share = WRITTEN_SHARE if to_train else MIXTURE_SHARE
    return Corpus(parts, share, is_bundled=True, note=_NOTE)


def _source_code(count: int) -> str:
    """At most so many modules of Python's standard library, spread evenly over some packages, if they are files."""
    folders = (Path(get_path("stdlib"), name) for name in _PACKAGES)
    files = [file for folder in folders for file in sorted(folder.glob("*.py"))]
    step = max(1, math.ceil(len(files) / count))
    return "\n\n".join(file.read_text("utf-8") for file in files[::step])


def _excerpt_documentation(text: str, limit: float) -> str:
    """Documentation to stand beside a text, spread evenly over all of it; none if the text has it already."""
    characters = int(min(len(text) / 2, limit))
    count = max(1, math.ceil(characters / _DOCUMENTATION_EXCERPT))
    pieces, _ = sample_evenly(split_windows([documentation_halves()[0]], _DOCUMENTATION_EXCERPT), count)
    if any(piece in text for piece in pieces):
        return ""
    return "\n\n".join(pieces)[:characters]


def _question_text(per_subject: int, to_train: bool) -> str:
    """So many questions of each subject with their answers, or all of them with explanations; "" without lm-eval.

    Subjects take turns. Each question has letters once and is in plain words once, far from each other.
    """
    try:
        subjects = fitting_questions().values()
    except ValueError as error:
        logger.warning("Without questions in the calibration text: %s", error)
        return ""
    turns = list(zip_longest(*subjects))
    if not to_train:
        turns = turns[:per_subject]
    pairs = []
    for number, question in enumerate(filter(None, chain(*turns))):
        answer = question.choices[question.answer]
        lettered = f"{format_question(question)} {ascii_uppercase[question.answer]}. {answer}"
        plain = f"Question: {question.question}\nAnswer: {answer}"
        if to_train:
            plain += f"\n{question.explanation}"
        pairs.append((plain, lettered) if number % 2 else (lettered, plain))
    return "\n\n".join([first for first, _ in pairs] + [second for _, second in pairs])


def documentation_halves() -> tuple[str, str]:
    """Python's own reference documentation, English prose that comes with it, as two texts that share no paragraph.

    The first half is for calibration, the second for judging. Both are empty if Python was installed without
    `pydoc_data.topics`.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return "", ""
    paragraphs = [part.strip("\n") for name in sorted(topics) for part in topics[name].split("\n\n")]
    # Some topics contain others, so paragraphs repeat; each is kept where it comes first.
    distinct = [paragraph for paragraph in dict.fromkeys(paragraphs) if paragraph.strip()]
    middle = len(distinct) // 2
    return "\n\n".join(distinct[:middle]), "\n\n".join(distinct[middle:])
