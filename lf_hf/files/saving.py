"""Writing a checkpoint folder: all or nothing, with all that belongs beside the weights."""

from __future__ import annotations

import ctypes
import fnmatch
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import Timeout
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from lf_hf.files.locks import locked
from lf_hf.files.model_card import model_card
from lf_hf.report.report import REPORT_NAME, FusionReport

_LOCK_SECONDS = 0.5  # enough for a writer that is about to end
# What a checkpoint is made of, and so goes when another one takes its place.
_OF_A_CHECKPOINT = re.compile(
    "|".join(
        map(
            fnmatch.translate,
            (
                "*.safetensors",
                "*.safetensors.index.json",
                CONFIG_NAME,
                "generation_config.json",
                "tokenizer*",
                "special_tokens_map.json",
                "added_tokens.json",
                "vocab.json",
                "merges.txt",
                "chat_template*",
                "additional_chat_templates",
                f"{Path(REPORT_NAME).stem}.*",  # also pages made of it
                "README.md",
            ),
        )
    )
)


def check_replaceable(folder: Path) -> bool:
    """Whether a folder holds a fused checkpoint that saving would replace.

    Raises
    ------
    ValueError
        If it holds other files and no fused checkpoint, or is a file or a mount point.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file; give a folder to save into.")
    if os.path.ismount(folder):
        raise ValueError(
            f"{str(folder)!r} is a mount point, which no new folder can take the place of; give a folder inside it, "
            f"such as {str(folder / 'fused')!r}."
        )
    if (folder / REPORT_NAME).is_file():
        return True
    if folder.is_dir() and any(not entry.is_dir() for entry in folder.iterdir()):
        raise ValueError(f"{str(folder)!r} is not empty and holds no fused checkpoint; choose another folder.")
    return False


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of `folder` when the block ends well and vanishes when it does not.

    What is in `folder` besides a checkpoint's own files, such as a training's checkpoints, moves to the new one.

    Whenever the process is killed, `folder` is what it was, or the new one, whole. (Where the system cannot exchange
    two folders in one step, which Linux can, there may be none: the next save brings the old one back.) What a killed
    process left beside `folder` goes with the next save.

    Raises
    ------
    ValueError
        If `folder` is a file or a mount point, or holds other files and no fused checkpoint.
    OSError
        If another process is saving there, or if files cannot be written.
    """
    folder = folder.resolve()
    check_replaceable(folder)
    scratch = folder.with_name(f".{folder.name}.saving")
    new = scratch / "new"
    in_place = False
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with only_writer(folder, folder.with_name(f".{folder.name}.lock")):
            _clear(scratch, folder)
            check_replaceable(folder)
            new.mkdir(parents=True)
            try:
                yield new
                _follow_umask(new)
                done = new.rename(scratch / "done")
                _swap(done, folder)
                in_place = True
            finally:
                _clear(scratch, folder)
    except BlockingIOError:
        raise
    except (OSError, SafetensorError) as error:
        if in_place:
            raise OSError(
                f"{str(folder)!r} was written, but other files that were there could not move to it ({error}); "
                f"move them from {str(scratch)!r} by hand."
            ) from error
        raise OSError(f"{str(folder)!r} was not written ({error}); what was there before is as it was.") from error


@contextmanager
def only_writer(folder: Path, file: Path) -> Iterator[None]:
    """Keep others from saving into `folder` meanwhile, by a lock on `file`."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(file, timeout=_LOCK_SECONDS))
        except Timeout:
            raise BlockingIOError(
                f"Another process is saving into {str(folder)!r}; wait until it is done, or choose another folder."
            ) from None
        yield


def _clear(scratch: Path, folder: Path) -> None:
    """Finish an exchange, or undo it where a killed process left it between its steps, and remove what is left."""
    old, done = scratch / "old", scratch / "done"
    if old.is_dir() and not folder.exists():
        old.rename(folder)
    for place in (old, done):  # after an exchange `done` is what was there before
        if place.is_dir() and folder.is_dir():
            _keep_others(place, folder)
    shutil.rmtree(scratch, ignore_errors=True)


def _keep_others(before: Path, folder: Path) -> None:
    """Move what is no part of a checkpoint from the folder that was there before into the one in its place."""
    for entry in before.iterdir():
        if not _OF_A_CHECKPOINT.match(entry.name) and not (folder / entry.name).exists():
            entry.rename(folder / entry.name)


def _follow_umask(folder: Path) -> None:
    """Give the files in a folder the mode of any new file: safetensors keeps those that it writes to the user alone."""
    probe = folder.with_name("mode")
    probe.touch()
    for file in folder.iterdir():
        file.chmod(probe.stat().st_mode)


def _swap(new: Path, folder: Path) -> None:
    """Put `new` in the place of `folder`; what was there is at `new`, or beside it as "old", afterwards."""
    if not folder.exists() or not any(folder.iterdir()):
        new.replace(folder)
    elif not _exchange(new, folder):
        old = new.with_name("old")
        folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            old.rename(folder)
            raise


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths in one step, by Linux's renameat2; false where the system or the disk cannot."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # another system, or an older C library
        return False
    return bool(renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def write_companions(
    folder: Path, report: FusionReport | None, tokenizer: PreTrainedTokenizerBase | None, *, as_llama: bool
) -> None:
    """Write the tokenizer, the report and the model card into a checkpoint's folder, as far as they are known."""
    if tokenizer is not None:
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # the tokenizers library has no error of its own for a full disk
            raise OSError(f"tokenizer: {error}") from error
    if as_llama:
        _write_older_names(folder)
    if report is not None:
        report.save(folder)
        (folder / "README.md").write_text(model_card(report, as_llama=as_llama), encoding="utf-8")


def _write_older_names(folder: Path) -> None:
    """Say what transformers 5 gave new names under the old ones too, in the config and the tokenizer's.

    transformers 4, and what builds on it (vLLM up to 0.23, llama.cpp's converter), takes a missing `rope_theta` for
    10000 without a word, and does not know the tokenizer class. transformers 5 reads both.
    """
    file = folder / CONFIG_NAME
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        rope = dict(config.get("rope_parameters") or {})
        if "rope_theta" in rope:
            config["rope_theta"] = rope.pop("rope_theta")
            config["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
        if "dtype" in config:
            config["torch_dtype"] = config["dtype"]
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    file = folder / "tokenizer_config.json"
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        if config.get("tokenizer_class") == "TokenizersBackend":
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(config.get("extra_special_tokens"), list):
            config["additional_special_tokens"] = config.pop("extra_special_tokens")
        file.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
