"""Writing a checkpoint folder: all or nothing, with all that belongs beside the weights."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lf_hf.model_card import model_card
from lf_hf.report import REPORT_NAME, FusionReport


def check_replaceable(folder: Path) -> bool:
    """Whether there is a fused checkpoint in a folder; raise ValueError if there is anything else."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file; give a folder to save into.")
    replaces = folder.is_dir() and any(folder.iterdir())
    if replaces and not (folder / REPORT_NAME).is_file():
        raise ValueError(f"{str(folder)!r} is not empty and holds no fused checkpoint; choose another folder.")
    return replaces


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that takes its place when the block ends well and vanishes when it does not."""
    folder = folder.absolute()
    replaces = check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    scratch.mkdir()
    try:
        yield scratch
        if replaces:
            old = folder.with_name(f"{scratch.name}.old")
            folder.rename(old)
            scratch.rename(folder)
            shutil.rmtree(old)
        else:
            scratch.replace(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_companions(
    folder: Path, report: FusionReport | None, tokenizer: PreTrainedTokenizerBase | None, *, as_llama: bool
) -> None:
    """Write the tokenizer, the report and the model card into a checkpoint's folder, as far as they are known."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if report is not None:
        report.save(folder)
        (folder / "README.md").write_text(model_card(report, as_llama=as_llama), encoding="utf-8")
