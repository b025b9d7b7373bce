"""Fusing once: several processes, or several runs, share what one of them fused.

The first one to lock a folder fuses and saves there; whoever comes later finds a checkpoint made of the same things.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
from filelock import Timeout
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HOME
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from lf_hf.config import FusionConfig
from lf_hf.files.base import Base
from lf_hf.files.locks import locked
from lf_hf.files.processes import local_processes, local_rank
from lf_hf.files.weights import CHECKPOINT_FILES
from lf_hf.report.report import REPORT_NAME, FusionReport
from lf_hf.text.calibration import Calibration, Corpus

logger = logging.get_logger(__name__)
_READ_BYTES = 1 << 22
_TOKENIZED_CHARACTERS = 1 << 16  # of calibration text, enough to tell tokenizers apart
_MEANING = {
    "base": "another base, or other files in its folder",
    "calibration": "other calibration text or another tokenizer",
    "dtype": "another dtype",
}


def fingerprints(
    base: Base, tokenizer: PreTrainedTokenizerBase, samples: Calibration | None, text: Corpus | None
) -> dict[str, str]:
    """What a fusion is made of besides its FusionConfig: by content, not by name.

    Returns
    -------
    dict with
        base : SHA-256 over the names and the SHA-256 of the base's weights, configs and tokenizer files
        calibration : SHA-256 over the calibration texts, and over the tokens of their beginning
        dtype : as it is
    """
    texts = [*(samples.texts if samples else []), *(text.parts if text else [])]
    calibration = hashlib.sha256()
    for part in texts:
        calibration.update(hashlib.sha256(part.encode()).digest())
        calibration.update(str(tokenizer(part[:_TOKENIZED_CHARACTERS], verbose=False)["input_ids"]).encode())
    return {
        "base": digest(_base_files(base)),
        "calibration": calibration.hexdigest(),
        "dtype": str(base.dtype or base.config.dtype).removeprefix("torch."),
    }


def why_not_reused(folder: Path, config: FusionConfig, wanted: dict[str, str]) -> str | None:
    """One sentence that says what keeps a saved fusion from being used; None where nothing does."""
    if not (folder / REPORT_NAME).is_file():
        return f"{str(folder)!r} holds no fused checkpoint yet."
    try:
        report = FusionReport.load(folder)
    except ValueError as error:
        return str(error)
    if report.fingerprints is None:
        return f"{str(folder)!r} was saved without saying by content what it was made of."
    differing = [name for name, value in wanted.items() if report.fingerprints.get(name) != value]
    if differing:
        return f"{str(folder)!r} was made with {' and '.join(_MEANING[name] for name in differing)}."
    settings = [
        f"{name}={report.config.get(name)!r} instead of {value!r}"
        for name, value in config.to_dict().items()
        if report.config.get(name) != value
    ]
    return f"{str(folder)!r} was fused with {', '.join(settings)}." if settings else None


@contextmanager
def only_fuser(folder: Path) -> Iterator[None]:
    """Keep others that would fuse into a folder, which need not exist, waiting; a file beside it is the lock."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.with_name(f".{folder.name}.fusing")
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(file, timeout=0))
        except Timeout:
            logger.info(f"Waiting for another process that is at work on {str(folder)!r}.")
            stack.enter_context(locked(file))
        yield


def folder_of_launch(base: str, config: FusionConfig) -> Path:
    """A folder that all processes of one launch on this machine share, for one fusion.

    What launches that were cut short have left behind is removed.
    """
    root = Path(HF_HOME) / "lf_hf"
    for old in root.glob(f"{platform.node()}-*-*"):
        if not psutil.pid_exists(int(old.name.split("-")[-2])):
            shutil.rmtree(old, ignore_errors=True)
    fusion = hashlib.sha256(json.dumps([base, config.to_dict()]).encode()).hexdigest()
    return root / f"{platform.node()}-{os.getppid()}-{fusion[:16]}" / "model"


def note_loaded(folder: Path) -> None:
    """Note, with the folder of a launch locked, that this process is done with it; the last one removes it."""
    (folder.parent / f"seen-{local_rank()}").touch()
    if len(list(folder.parent.glob("seen-*"))) >= local_processes():
        shutil.rmtree(folder, ignore_errors=True)  # first, as with the lock's file the lock is gone
        shutil.rmtree(folder.parent, ignore_errors=True)


def _base_files(base: Base) -> list[Path]:
    """The files that decide what a base computes and how it reads text; those of the hub are downloaded."""
    hub = base.hub
    patterns = [str(hub["gguf_file"])] if "gguf_file" in hub else [*CHECKPOINT_FILES]
    if base.loading.get("use_safetensors") is False:
        patterns.append("*.bin")
    if os.path.isdir(base.name):
        folder = Path(base.name)
    else:
        arguments = {name: value for name, value in hub.items() if name not in ("subfolder", "gguf_file")}
        folder = Path(snapshot_download(base.name, allow_patterns=patterns, **arguments))
    folder /= hub.get("subfolder", "")
    return sorted(file for pattern in patterns for file in folder.glob(pattern))


def digest(files: Iterable[Path]) -> str:
    """SHA-256 over the names and contents of some files, several at a time."""
    files = list(files)
    with ThreadPoolExecutor() as pool:
        parts = zip(files, pool.map(_file_digest, files), strict=True)
        return hashlib.sha256(json.dumps([(file.name, digest) for file, digest in parts]).encode()).hexdigest()


def _file_digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as opened:
        while block := opened.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
