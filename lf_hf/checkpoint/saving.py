"""Saving into a folder that belongs to its user: all or nothing, and nothing of the user's is touched.

A save writes into a hidden folder inside the target. Once all is there, a file beside it says so, and everything moves
to its place file by file: `config.json` is taken away first and put back last. So a folder opens as the old model or
as the new one, or, between those two moments, not at all; where a process was killed then, the next save there, or load
by a class of lf_hf, finishes the move. What a save wrote stands in the report under "files", and only that is removed
by a later one.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from huggingface_hub.utils.sha import sha_fileobj
from pydantic import TypeAdapter
from safetensors import SafetensorError
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, logging

from lf_hf.checkpoint.card import CARD_NAME
from lf_hf.report.report import CHANGED_NOTE, REPORT_NAME
from lf_hf.runtime.errors import explained

logger = logging.get_logger(__name__)
WORK = ".lf_hf-healing"
"""In the folder of the result: what a healing that is not done goes on from."""
LOGS = "runs"
"""In that folder, and in the result's: where the Trainer's loggers write."""
SCRATCH = ".lf_hf-scratch"
"""In the folder of the result: what a plan puts on a disk, as long as a run needs it."""
_SAVING, _LOCK = ".lf_hf-saving", ".lf_hf-saving.lock"
_TEMPLATES = "additional_chat_templates"  # the one folder of a checkpoint
_COMPLETE = "complete"  # in _SAVING, once all files are in "new" beside it: names of those to remove, one a line
_LARGE = 1 << 24  # bytes
_OBJECT = TypeAdapter(dict[str, Any])  # of JSON
_LOCK_SECONDS = 0.5  # enough for a writer that is about to end
_WHOLE_TOKENIZER = {"tokenizer.json", TOKENIZER_CONFIG_FILE, "tokenizer.model"}  # what may be one, with its config
_TOKENIZER = {"special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"}
_TOKENIZER |= _WHOLE_TOKENIZER
PROCESSOR_FILES = (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, "chat_template.json")
"""Beside the tokenizer of a vision-language model: what says how it reads them."""
# All forms in which transformers writes a model's weights; the groups are the variant.
_WEIGHTS = re.compile(r"model(?:\.(.+?))?(?:-\d{5}-of-\d{5})?\.safetensors(?:\.index(?:\.(.+))?\.json)?")


def checked_folder(path: object) -> Path:
    """The folder that a user means, links followed. Raises ValueError for what is no path of a folder, or not UTF-8."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ValueError(f"The folder to write into must be a path, got {path!r:.80}; '.' is the current folder.")
    given = Path(path)
    if any(place.name == ".." and not place.is_dir() for place in (given, *given.parents)):
        raise ValueError(f"{str(path)!r} leads through a folder that does not exist; make that, or leave it out.")
    folder = given.resolve()
    with explained(f"{str(path)!r} cannot be written", "give a path in UTF-8", UnicodeEncodeError):
        str(folder).encode()  # as safetensors does
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(path)!r} is a file; give a folder to save into.")
    return folder


def check_replaceable(path: object, base: str, *, remade: bool = False) -> bool:
    """Whether a folder holds a fused checkpoint, which a fusion of `base`, a name or path, would replace.

    Raises ValueError if it is the base's own or no folder, or holds a healed model or one that lf_hf did not write
    so. With `remade` a healed model may be replaced that says what it was made of.
    """
    folder = checked_folder(path)
    finish_save(folder)
    report, _, ours = _last_save(folder)
    patterns = (CONFIG_NAME, "*.safetensors", "*.safetensors.index*.json", "pytorch_model*.bin*", "*.gguf")
    foreign = sorted({file.name for pattern in patterns for file in folder.glob(pattern)} - ours)
    problem = None
    if folder.is_dir() and Path(base).resolve() == folder:
        problem = "is the base itself"
    elif CHANGED_NOTE in report.get("notes", ()):
        problem = "holds a fused model that was changed since"
    elif report.get("healed") and not (remade and report.get("fingerprints")):
        problem = "holds a healed model"
    elif foreign:
        problem = f"holds {', '.join(foreign[:3]):.200}, which lf_hf did not write or which changed since"
    if problem:
        raise ValueError(f"{str(path)!r} {problem}; choose another folder.")
    return CONFIG_NAME in ours


@contextmanager
def locked_folder(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep others from writing into `folder`, which is made, and goes again if nothing was written.

    The lock is a file in it that exists while it is held; a killed process keeps nobody out. Raises BlockingIOError
    if another process is at work there, unless `wait`.
    """
    lock = FileLock(folder / _LOCK)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    seconds = -1 if wait else _LOCK_SECONDS
    try:
        with _explained(folder):
            try:
                lock.acquire(timeout=seconds)  # which makes the folder
            except FileNotFoundError:  # another process, which wrote nothing, has just removed it
                lock.acquire(timeout=seconds)
        yield
    finally:
        with suppress(Timeout, OSError):
            lock.acquire(timeout=0)  # again: Ctrl-C may have come when its file was there and it was not yet held
            with suppress(PermissionError):  # Windows removes no file that is open
                (folder / _LOCK).unlink(missing_ok=True)  # while it is held: whoever waits for it sees that it is gone
            lock.release(force=True)
        with suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


@contextmanager
def replaced_files(folder: Path, *, own_tokenizer: bool = False) -> Iterator[Path]:
    """A new hidden folder, whose files go into `folder` when the block ends well and vanish when it does not.

    To be used in `locked_folder`. A tokenizer in `folder` that lf_hf has not written stays, and the new one vanishes,
    unless `own_tokenizer` says that the user chose it; so does a model card. Raises OSError for what cannot be written.
    """
    new = folder / _SAVING / "new"
    _finish(folder)
    try:
        with _explained(folder):
            new.mkdir(parents=True)
            yield new
            stale = _prepare(folder, new, own_tokenizer=own_tokenizer)
            marker = new.with_name("writing")
            marker.write_text("\n".join(stale), encoding="utf-8")
            for file in (*_files(new).values(), marker):
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
            marker.replace(new.with_name(_COMPLETE))
    finally:
        _finish(folder)


def finish_save(folder: Path) -> None:
    """Finish the move that a killed save left, or remove what it left incomplete; where that can be done now."""
    if (folder / _SAVING).is_dir():
        with suppress(OSError), locked_folder(folder):
            _finish(folder)


@contextmanager
def _explained(folder: Path, state: str = "what was there before is unchanged") -> Iterator[None]:
    """Raise errors of writing again, with the folder's name and its state."""
    try:
        yield
    except Timeout:
        advice = "wait until it is done, or choose another folder"
        raise BlockingIOError(f"Another process is saving into {str(folder)!r}; {advice}.") from None
    except (OSError, SafetensorError) as error:
        raise OSError(f"{str(folder)!r} was not written ({error}); {state}.") from error


def _finish(folder: Path) -> None:
    """Move what a save has completed to its place; whatever else is in the hidden folder goes."""
    saving = folder / _SAVING
    with _explained(folder, "the new files are complete, so fix the cause, and load or save there again to move them"):
        if saving.is_symlink():  # lf_hf never makes one
            saving.unlink()
        if (saving / _COMPLETE).is_file() and not (saving / "new").is_symlink():
            _move(folder, saving / "new")
            (saving / _COMPLETE).unlink()
        shutil.rmtree(saving, ignore_errors=True)


def _move(folder: Path, new: Path) -> None:
    """Move new files into a folder, and remove those that they replace; config.json goes first and comes last."""
    if (folder / _TEMPLATES).is_symlink():  # it leads out of the folder
        shutil.rmtree(new / _TEMPLATES, ignore_errors=True)
    written = _files(new)
    stale = new.with_name(_COMPLETE).read_text(encoding="utf-8", errors="replace").split("\n")
    if CONFIG_NAME in written:
        (folder / CONFIG_NAME).unlink(missing_ok=True)
    for name in _files(folder).keys() & stale:
        (folder / name).unlink()
    for name in sorted(written, key=CONFIG_NAME.__eq__):
        (folder / name).parent.mkdir(exist_ok=True)
        written[name].replace(folder / name)


def changed_files(folder: Path) -> list[str]:
    """Those of the weights and config.json that are not as the last save wrote them."""
    _, manifest, ours = _last_save(folder)
    return sorted(name for name in manifest.keys() - ours if name == CONFIG_NAME or _variant(name) is not None)


def _prepare(folder: Path, new: Path, *, own_tokenizer: bool) -> list[str]:
    """Leave out of `new` what would overwrite the user's, and note in the report what is in it; returns what goes."""
    _, manifest, ours = _last_save(folder)
    there, written = _files(folder), _files(new)
    kept = _users_files(folder, there, written, there.keys() - ours, own_tokenizer=own_tokenizer)
    for name in kept & written.keys():
        written.pop(name).unlink()
    for name, file in written.items():
        if (folder / name).is_dir() or (folder / name).parent.is_file():
            raise OSError(f"{name} has the name of something else there")
        file.chmod(new.stat().st_mode & 0o666)  # safetensors keeps what it writes to the user alone
    stale: set[str] = set()
    if CONFIG_NAME in written:  # else adapters, which go beside a model
        variants = {_variant(name) for name in written} - {None}
        stale = {name for name in ours if _variant(name) is None and not name.startswith("adapter_")}
        stale |= {name for name in there if _variant(name) in variants}
        stale -= kept | written.keys()
    if REPORT_NAME in written:
        values = json.loads(written[REPORT_NAME].read_text(encoding="utf-8"))
        values["files"] = {name: manifest[name] for name in sorted(ours - stale)}
        values["files"] |= {name: _digest(file) for name, file in sorted(written.items())}
        written[REPORT_NAME].write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return sorted(stale)


def _users_files(
    folder: Path, there: dict[str, Path], written: dict[str, Path], users: Set[str], *, own_tokenizer: bool
) -> set[str]:
    """Names of the files that stay as the user has them: model card, templates and, as a whole, the tokenizer."""
    kept = {name for name in users if name == CARD_NAME or name.startswith(_TEMPLATES)}
    if own_tokenizer:
        return kept
    tokenizer = users & {*_TOKENIZER, *PROCESSOR_FILES}
    if any(_digest(written[name]) != _digest(there[name]) for name in tokenizer & written.keys()):
        logger.warning(f"The tokenizer in {str(folder)!r} is not lf_hf's and stays; remove it to get the base's.")
    kept |= tokenizer
    if tokenizer & _WHOLE_TOKENIZER and TOKENIZER_CONFIG_FILE in there:  # else the new one goes beside what is there
        kept |= _TOKENIZER
        kept |= {name for name in there | written if name.startswith(_TEMPLATES)}
    return kept


def _last_save(folder: Path) -> tuple[dict[str, Any], dict[str, str], set[str]]:
    """The report of the last save into a folder, digests of the files that it wrote, and names of those still so."""
    report: dict[str, Any] = {}
    manifest: dict[str, str] = {}
    with suppress(OSError, ValueError):
        report = _OBJECT.validate_json((folder / REPORT_NAME).read_bytes())
        noted = _OBJECT.validate_python(report.get("files"))
        manifest = {name: digest for name, digest in noted.items() if name.isprintable()}
    ours = {name for name, file in _files(folder).items() if name in manifest and _digest(file) == manifest[name]}
    return report, manifest, ours


def _files(folder: Path) -> dict[str, Path]:
    """The files in a folder that may be a checkpoint's, by their names in it; links to folders are not followed."""
    files, templates = list(folder.glob("*")), folder / _TEMPLATES
    if not templates.is_symlink():
        files += templates.glob("*")
    return {file.relative_to(folder).as_posix(): file for file in files if file.is_file()}


def _digest(file: Path) -> str:
    """SHA-256 of a file; "" for the report, which holds the digests."""
    return "" if file.name == REPORT_NAME else file_sha(file)


def file_sha(file: Path) -> str:
    """SHA-256 of all that is in a file; a large one is read once in a process, as long as it is not written again."""
    status = file.stat()
    if status.st_size < _LARGE:  # which may be written twice before the clock of the disk goes on
        return _read_sha.__wrapped__(file)
    return _read_sha(file, status.st_ino, status.st_size, status.st_mtime_ns)


@functools.cache
def _read_sha(file: Path, *_: int) -> str:
    """SHA-256 of a file; the numbers are those that change when it is written."""
    with file.open("rb") as opened:
        return sha_fileobj(opened).hex()


def _variant(name: str) -> str | None:
    """The variant of a file of weights, "" for none; None for any other file."""
    match = _WEIGHTS.fullmatch(name)
    if match is None:
        return None
    return match[1] or match[2] or ""
