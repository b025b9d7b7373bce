"""The identity of a fusion or a healing: its base by content, the settings in effect, and its text.

Kept fusions, the points of a sweep and runs that were cut short are used again where it is equal.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lf_hf.checkpoint.base import Base
from lf_hf.checkpoint.saving import damaged_files, file_sha
from lf_hf.report.report import FusionReport
from lf_hf.settings import ALGORITHM

JUDGING = ("perplexity_tokens", "speed")
"""Settings of what is measured on a fused model, which do not change it."""
_TOKENIZED_CHARACTERS = 1 << 16  # of each text, enough to tell tokenizers apart
_MEANING = {
    "base": "another base, or other files in its folder",
    "text": "other calibration text or another tokenizer",
    "dtype": "another dtype",
    "algorithm": "another version of lf_hf",
}


def identity(base: str, settings: Mapping[str, Any], text: str, **others: object) -> dict[str, str]:
    """Identity of a fusion or a healing, of the `files_digest` of its base, its settings in effect, the `text_digest`
    of its text and what else the result depends on.
    """
    decisive = {name: value for name, value in settings.items() if name != "speed"}
    found = {"base": base, "text": text, "algorithm": ALGORITHM, "settings": json.dumps(decisive, sort_keys=True)}
    return {name: str(value) for name, value in (found | others).items()}


def identity_key(identity: Mapping[str, str]) -> str:
    """SHA-256 of an identity, for names of files and points."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What an identity was before, where it is another one now: a phrase for each difference of what is made."""
    found = []
    for name, value in now.items():
        if name == "settings":
            earlier, later = json.loads(before[name]), json.loads(value)
            keys = sorted((earlier | later).keys() - {*JUDGING})
            differing = [key for key in keys if earlier.get(key) != later.get(key)]
            found += [f"{key}={earlier.get(key)!r} instead of {later.get(key)!r}" for key in differing]
        elif before.get(name) != value:
            found.append(_MEANING.get(name) or f"another {name}")
    return found


def files_digest(base: Base) -> str:
    """SHA-256 over the names and contents of a base's weights, configs and tokenizer files.

    The arguments of loading that choose among files or change the config belong to it, where there are any.
    """
    files = base.content_files()
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(file_sha, files))
    content = [(file.name, digest) for file, digest in zip(files, digests, strict=True)]
    chosen = {}
    for name in sorted(base.loading):
        if name == "variant" or (name != "dtype" and hasattr(base.config, name)):
            chosen[name] = repr(base.loading[name])
    return hashlib.sha256(json.dumps([content, chosen]).encode()).hexdigest()


def text_digest(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of texts, of the tokens at their beginning, and of a tokenizer's vocabulary and chat template."""
    digest = hashlib.sha256(str(tokenizer.chat_template).encode())
    vocabulary = tokenizer.get_vocab()
    words = " ".join(sorted(vocabulary, key=vocabulary.__getitem__))
    for text in (words, *texts):
        digest.update(hashlib.sha256(text.encode()).digest())
        digest.update(str(tokenizer(text[:_TOKENIZED_CHARACTERS], verbose=False)["input_ids"]).encode())
    return digest.hexdigest()


def why_not_reused(folder: Path, made_of: Mapping[str, str]) -> str | None:
    """One sentence that says why the result in a folder is not one of this identity; None if it is."""
    try:
        report = FusionReport.load(folder)
    except ValueError as error:
        return str(error)
    if damaged := damaged_files(folder):
        return f"{', '.join(damaged)} in {str(folder)!r} changed since it was fused."
    if report.fingerprints is None:
        return f"{str(folder)!r} was saved without saying by content what it was made of."
    differing = differences(report.fingerprints, made_of)
    return f"{str(folder)!r} was made with {' and '.join(differing)}." if differing else None
