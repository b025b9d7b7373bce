"""Calibration text: samples that are compared, and running text that is fitted or trained on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from string import ascii_uppercase
from sysconfig import get_path

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from lf_hf.runtime.launch import Processes
from lf_hf.settings import CALIBRATION_TOKENS, FusionConfig
from lf_hf.text.hub import GENERAL, MMLU, first_rows
from lf_hf.text.mmlu import SUBJECTS, format_question, questions_of, questions_to_fit
from lf_hf.text.sources import TextSource, read_samples, spread_evenly, windows

logger = logging.get_logger(__name__)
BUNDLED = "bundled"
"""In place of a user's text: what is installed, whatever the hub has."""
QUESTIONS = "MMLU development questions"
DOCUMENTATION = "Python documentation (first half)"
"""The name of a part of a corpus; the documentation's second half, which judges, is of its kind."""
SOURCE_CODE = "modules of Python's standard library"
MAX_SAMPLES = 1024
"""Samples that are compared with each other at most; of a longer file as many are taken, spread evenly over it."""
TOKEN_CHARACTERS = 64  # no text has tokens that are longer on average
_TRAINING_CHARACTERS = 8  # a token: more than usual
# The share of the tokens that the model itself writes, of the default mixture to fit to and of all other text. It keeps
# what no other text touches.
_MOSTLY_WRITTEN, _WRITTEN_SHARE = 0.5, 1 / 3
# Beside a user's text, by its tokens: answered questions, a fifth of the 4 characters that a token has, or some ten
# thousand tokens; to train on, a seventh of documentation too; of each at most half as much as there is of the text.
_QUESTION_CHARACTERS, _MOST_QUESTION_CHARACTERS = 0.8, 40_000
_DOCUMENTATION_CHARACTERS, _DOCUMENTATION_EXCERPT = 0.6, 2048
_PACKAGES = "asyncio", "concurrent", "email", "http", "importlib", "json", "logging", "unittest", "urllib", "xml"
_TOKENS_FOR_TWO = 98304  # of the default mixture: with so many it has two questions of each subject

_OWN_TEXT = "text of your own domain gives"
_COST = (
    "Calibrated on installed text, as the hub gave none ({}): other kinds of text then have 1.1 to 1.4 times the "
    f"perplexity that {_OWN_TEXT} them"
)


@dataclass(frozen=True)
class CalibrationSamples:
    """Calibration samples, and for people where they are from.

    `labels` are the MMLU subjects of the texts, where they are MMLU questions.
    """

    texts: list[str]
    source: str
    labels: list[str] | None = None


@dataclass(frozen=True)
class Corpus:
    """Running text: `parts` of one kind each, by names that say to people where they are from.

    `generated_share` of the tokens is for the dense model itself to write. `by_default` says that it is the mixture of
    what is installed, and `note` what users should know of it.
    """

    parts: dict[str, str]
    generated_share: float = 0.0
    by_default: bool = False
    note: str = ""

    @property
    def source(self) -> str:
        """Where the text that is given is from."""
        return ", ".join(self.parts)

    @property
    def full_source(self) -> str:
        """Where all of the text is from."""
        return f"{self.source}, text by the model itself" if self.generated_share else self.source


def load_needed(
    config: FusionConfig, calibration: TextSource | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[CalibrationSamples | None, Corpus | None]:
    """What a fusion with `config` needs of samples for layer similarity and of running text.

    The first process of a launch reads it for all, so each has to call this. Raises ValueError if `calibration` cannot
    be used, or has too few samples.
    """

    def load() -> tuple[CalibrationSamples | None, Corpus | None]:
        samples, text = None, None
        if config.needs_similarity:
            settings = {name: getattr(config, name) for name in ("samples_per_subject", "sample_length")}
            samples = load_calibration(calibration, **settings, tokenizer=tokenizer)
            config.check_num_samples(len(samples.texts))
        if config.needs_text:
            text = load_corpus(calibration, max_tokens=config.calibration_tokens, tokenizer=tokenizer)
        return samples, text

    return Processes.of_launch().broadcast_object(load)


def load_training_text(
    text: TextSource | None, tokens: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> Corpus:
    """As `load_corpus`, to train on so many tokens; as `load_needed`, what the first process of a launch reads."""
    return Processes.of_launch().broadcast_object(
        lambda: load_corpus(text, max_tokens=tokens, to_train=True, tokenizer=tokenizer)
    )


def load_calibration(
    calibration: TextSource | None = None,
    *,
    samples_per_subject: int = 1,
    sample_length: int = 512,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> CalibrationSamples:
    """Calibration samples from a user's text, or, with None, one MMLU question a subject.

    Parameters
    ----------
    calibration : list of str or chats, file, data set, or None
        A chat is a list of messages, as chat templates take them: [{"role": "user", "content": "..."}, ...].
        File: .txt (samples separated by blank lines), or .jsonl, .csv or .parquet with a field "text", or "messages" of
        chats. Data set: NAME[:CONFIG[:SPLIT[:COLUMN]]] on the Hugging Face hub, of which the beginning is streamed;
        default the only configuration, train, and "text" or "messages". None: questions without answers of MMLU's
        validation split if the hub or its cache answers, else, as with "bundled", of the development questions that
        lm-eval ships. Never MMLU's test split.
    samples_per_subject : int
        Questions a subject where `calibration` is None.
    sample_length : int
        How many tokens of a sample are to be used; 64 characters are kept for each, and no more. Of more than 1024
        samples as many are taken, spread evenly over them, and the source says so.
    tokenizer : optional
        The model's, by whose template chats are written out.

    Raises
    ------
    ValueError, OSError
        If the text cannot be read, is empty, or has a sample that is neither a string nor a chat.
    """
    if calibration is None or calibration == BUNDLED:
        return _mmlu_calibration(samples_per_subject, ask_hub=calibration is None)
    samples, source = read_samples(calibration, MAX_SAMPLES * sample_length, tokenizer)
    cut = (sample[: sample_length * TOKEN_CHARACTERS] for sample in samples)
    texts, spread = _taken(cut, MAX_SAMPLES, source, "samples")
    return CalibrationSamples(texts, source + spread)


def _taken(items: Iterable[str], count: int, source: str, kind: str) -> tuple[list[str], str]:
    """At most so many of the items, and what to say of them where there are more. Raises ValueError for none."""
    taken, total = spread_evenly(items, count)
    if not total:
        raise ValueError(f"The text ({source}) is empty; give a file with text.")
    return taken, f" ({len(taken):,} of {total:,} {kind}, spread evenly)" if len(taken) < total else ""


def _mmlu_calibration(samples_per_subject: int, *, ask_hub: bool) -> CalibrationSamples:
    questions, source = {}, "cais/mmlu, validation split"
    if ask_hub:
        with suppress(OSError):
            questions = questions_of(first_rows(MMLU))
    if not questions:
        questions, source = questions_to_fit(), "MMLU development questions that lm-eval ships"
    subject = min(SUBJECTS, key=lambda subject: len(questions[subject]))
    if len(questions[subject]) < samples_per_subject:
        raise ValueError(
            f"samples_per_subject={samples_per_subject}, but {source} has only {len(questions[subject])} questions on "
            f"{subject}; lower it, or give calibration= a file of your own."
        )
    labels = [subject for subject in SUBJECTS for _ in range(samples_per_subject)]
    texts = [format_question(question) for subject in SUBJECTS for question in questions[subject][:samples_per_subject]]
    return CalibrationSamples(texts, source, labels)


def load_corpus(
    calibration: TextSource | None = None,
    *,
    max_tokens: int = CALIBRATION_TOKENS,
    to_train: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Corpus:
    """Running text from a user's, or, with None, general text from the hub, or else a mixture of what is installed.

    The model writes half of the mixture. Beside other text it writes a third, and answered questions are a fifth: what
    narrow text does not touch is lost. Text to train on has more questions, with explanations, and a seventh of its
    tokens are Python's documentation, unless it is this documentation itself. The mixture to train on has source code
    too, and a third of it is written.

    Parameters
    ----------
    calibration : list of str or chats, file, data set, or None
        As for `load_calibration`. None: a thousand pages of FineWeb-Edu, if the hub or its cache answers within ten
        seconds, else, as with "bundled", text that the model writes itself, the first half of Python's documentation,
        and, where lm-eval is installed, one MMLU development question a subject (from 98,304 tokens on two), answered.
    max_tokens : int
        How many tokens are to be used at most. Of a text of more than 64 characters for each (8 to train on) 64
        excerpts are taken, spread evenly over it, and the source says so.
    to_train : bool
        Whether a model is to be trained on the text, and not fitted to it.
    tokenizer : optional
        As for `load_calibration`.

    Raises
    ------
    ValueError, OSError
        As for `load_calibration`, or if neither documentation nor lm-eval is installed.
    """
    own, name, note = calibration, "", ""
    if calibration == BUNDLED:
        own, note = None, f"Calibrated on the bundled mixture; {_OWN_TEXT} a better model"
    elif calibration is None:
        try:
            own = [page["text"] for page in first_rows(GENERAL)]
            name = f"{GENERAL.repo} at {GENERAL.commit[:8]}"
            note = f"Calibrated on general text; {_OWN_TEXT} a better model"
        except OSError as error:
            note = _COST.format(error)
            logger.warning_once(f"{note}.")
    of_each = 2 if own is None and max_tokens >= _TOKENS_FOR_TWO else 1
    questions = _answered_questions(None if to_train else of_each, explained=to_train)
    documentation = documentation_halves()[0]
    if own is None:
        code = _source_code(max(1, max_tokens // 1024)) if to_train else ""
        parts = {DOCUMENTATION: documentation, SOURCE_CODE: code, QUESTIONS: questions}
    else:
        samples, source = read_samples(own, max_tokens, tokenizer)
        size = max(1, max_tokens * _TRAINING_CHARACTERS // TOKEN_CHARACTERS) if to_train else max_tokens
        pieces, spread = _taken(windows(samples, size), TOKEN_CHARACTERS, source, f"excerpts of {size:,} characters")
        text = ("\n\n" if spread else "").join(pieces)
        beside = _beside(text, documentation, _DOCUMENTATION_CHARACTERS * max_tokens) if to_train else ""
        most = min(len(text) / 2, _QUESTION_CHARACTERS * max_tokens, _MOST_QUESTION_CHARACTERS)
        parts = {(name or source) + spread: text, DOCUMENTATION: beside, QUESTIONS: questions[: int(most)]}
    parts = {name: part for name, part in parts.items() if part}
    if not parts:
        raise ValueError("There is no text: neither Python's documentation nor lm-eval is installed; give a file.")
    share = _MOSTLY_WRITTEN if own is None and not to_train else _WRITTEN_SHARE
    return Corpus(parts, share, by_default=own is None, note=note)


def _source_code(count: int) -> str:
    """At most so many modules of Python's standard library, spread evenly over some packages, as far as it is files."""
    folders = (Path(get_path("stdlib"), name) for name in _PACKAGES)
    files = [file for folder in folders for file in sorted(folder.glob("*.py"))]
    return "\n\n".join(file.read_text("utf-8") for file in files[:: math.ceil(len(files) / count) or 1])


def _beside(text: str, documentation: str, limit: float) -> str:
    """Some documentation, spread evenly over it; none, if the text has it already."""
    characters = int(min(len(text) / 2, limit))
    count = max(1, math.ceil(characters / _DOCUMENTATION_EXCERPT))
    pieces, _ = spread_evenly(windows([documentation], _DOCUMENTATION_EXCERPT), count)
    return "" if any(piece in text for piece in pieces) else "\n\n".join(pieces)[:characters]


def _answered_questions(of_each: int | None, *, explained: bool) -> str:
    """MMLU development questions with their answers, each in two formats that are far from each other.

    So many questions a subject, or all but those that `mmlu_sample` asks, one of each subject after the other. With
    `explained` the second format says why the answer is right. Nothing where lm-eval is not installed.
    """
    try:
        subjects = [of[:of_each] for of in questions_to_fit().values()]
    except ValueError as error:
        logger.warning("Without questions in the calibration text: %s", error)
        return ""
    questions = [question for nth in zip_longest(*subjects) for question in nth if question is not None]
    lettered = [f"{format_question(q)} {ascii_uppercase[q.answer]}. {q.choices[q.answer]}" for q in questions]
    plain = [f"Question: {q.question}\nAnswer: {q.choices[q.answer]}" for q in questions]
    if explained:
        plain = [f"{text}\n{q.explanation}" for text, q in zip(plain, questions, strict=True)]
    pairs = list(zip(lettered, plain, strict=True))
    return "\n\n".join(pair[(n + second) % 2] for second in (0, 1) for n, pair in enumerate(pairs))


def other_text(corpus: Corpus) -> list[str]:
    """Texts of kinds that a corpus has little of, on which fused layers are judged: worked examples, and documentation.

    Worked examples are explained answers to questions that are neither in a corpus for fits nor in `mmlu_sample`. There
    are none without lm-eval, and documentation stands beside a user's text alone.
    """
    texts = [] if corpus.by_default else [documentation_halves()[0]]
    with suppress(ValueError):
        others = [question for of in questions_to_fit().values() for question in of[2:]]
        texts.append("\n\n".join(f"Question: {q.question}\nAnswer: {q.explanation}" for q in others))
    return [text for text in texts if text]


def documentation_halves() -> tuple[str, str]:
    """Python's own reference documentation as two texts that share no paragraph.

    English prose that is there wherever Python is: the first half is for calibration, the second for judging.
    Both are empty where Python was installed without `pydoc_data.topics`.
    """
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
