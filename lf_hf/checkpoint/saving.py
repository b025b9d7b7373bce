"""A result is a folder that is made whole.

All that a run keeps on a disk lies in one hidden folder inside that of its result. At the end the result's files are
written there, and move up: `config.json` last, so that a folder never opens as half a model. The report names each file
with its digest. Where all of them are so, and there is nothing else, lf_hf may replace the result; a folder with
anything else in it is the user's.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub.utils.sha import sha_fileobj
from pydantic import TypeAdapter
from safetensors import SafetensorError
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME

from lf_hf.report.report import PAGE_NAME, REPORT_NAME, FusionReport
from lf_hf.runtime.errors import explained

WORK = ".lf_hf"
"""In the folder of a result: all that the run which makes it keeps on a disk."""
SCRATCH, FUSED, TEACHER, TRAINING = "scratch", "fused", "teacher", "training"
"""In that: what a plan puts on the disk as long as it is needed; and of a healing the fused model, what was measured on
its base, and states of the training."""
LOGS = "runs"
"""In that of a training, and in a result: where the Trainer's loggers write."""
_FOLDERS = ("additional_chat_templates", LOGS)  # of a result
_LOCK, _MADE_OF, _WRITING, _RESULT = "lock", "made_of.json", "writing", "result"
_LARGE = 1 << 24  # bytes
_LOCK_SECONDS = 0.5  # enough for a writer that is about to end
_NAMES = TypeAdapter(dict[str, str])
PROCESSOR_FILES = (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, "chat_template.json")
"""Beside the tokenizer of a vision-language model: what says how it reads them."""


def checked_folder(path: object) -> Path:
    """The folder that a user means, links followed. Raises ValueError for what is no path of a folder, or not UTF-8."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ValueError(f"The folder to write into must be a path, got {path!r:.80}; '.' is the current folder.")
    given = Path(path)
    if any(place.name == ".." and not place.is_dir() for place in (given, *given.parents)):
        raise ValueError(f"{str(path)!r} leads through a folder that does not exist; make that, or leave it out.")
    with explained(f"{str(path)!r} cannot be written", "choose another folder", (OSError, RuntimeError, ValueError)):
        folder = given.resolve()
        str(folder).encode()  # as safetensors does
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(path)!r} is a file; give a folder to save into.")
    return folder


def target_note(
    folder: Path, made_of: Callable[[], Mapping[str, str]], *sources: Path | None, overwrite: bool
) -> str | None:
    """What is to be known of what a folder holds, in which a run is to put its result: one sentence, or nothing.

    Raises ValueError if it is one of the folders that the run reads, or holds anything but a result of lf_hf as it was
    written; and, unless that may go, if it holds one, or a run that was cut short and is made of something else.
    """
    work = folder / WORK
    if folder in sources:
        raise ValueError(f"{str(folder)!r} is what the run reads; choose another folder for its result.")
    if (work / _RESULT).is_dir():
        return f"{str(folder)!r} holds a result whose files are still to be moved there, which the next run does."
    if others := changed_files(folder):
        problem = f"{str(folder)!r} holds {', '.join(others[:3]):.200}, which is not as lf_hf wrote it"
        raise ValueError(f"{problem}; choose another folder.")
    if (work / _MADE_OF).exists():
        if _goes_on(work, made_of()):
            return f"{str(folder)!r} holds a run that was cut short, which goes on."
        if not overwrite:
            raise ValueError(
                f"{str(folder)!r} holds a run that was cut short, and that makes something else: give its command "
                "again to go on with it, or overwrite=True to begin anew."
            )
    if not _names(folder):
        return None
    if not overwrite:
        raise ValueError(f"{str(folder)!r} holds a result already; give overwrite=True to replace it.")
    return f"{str(folder)!r} holds a result, which would be replaced."


def changed_files(folder: Path) -> list[str]:
    """Names of what is in a folder and not as lf_hf wrote it, and of what is missing."""
    written = _written(folder)
    others = _names(folder) - written.keys()
    if written:
        others -= {REPORT_NAME, PAGE_NAME}
    return sorted({*others, *damaged_files(folder)})


def damaged_files(folder: Path) -> list[str]:
    """Names of the files of a result that are not as they were written, or missing."""
    written = _written(folder).items()
    return [name for name, sha in written if not (folder / name).is_file() or file_sha(folder / name) != sha]


def _written(folder: Path) -> dict[str, str]:
    """Digests of the files of a result by their names, but for the report, which has them; none of any other folder."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return _NAMES.validate_python(json.loads((folder / REPORT_NAME).read_bytes())["files"])
    return {}


def _goes_on(work: Path, made_of: Mapping[str, str]) -> bool:
    """Whether what an earlier run left is of a run that makes the same."""
    with suppress(OSError, ValueError):
        return json.loads((work / _MADE_OF).read_bytes()) == made_of
    return False


@contextmanager
def run_folder(
    folder: Path, made_of: Mapping[str, str], *sources: Path | None, overwrite: bool, wait: bool = False
) -> Iterator[bool]:
    """Begin a run in the folder of its result, which is locked; what it keeps goes into `WORK` there.

    Gives False where an earlier run of the same was killed as it ended, and all is done now. What an earlier run of the
    same left is there to go on from. Raises the errors of `target_note`.
    """
    work = folder / WORK
    with locked_folder(folder, wait=wait):
        if (work / _RESULT).is_dir():
            _move_up(folder)
            if FusionReport.load(folder).fingerprints == made_of:
                yield False
                return
        target_note(folder, lambda: made_of, *sources, overwrite=overwrite)
        if not _goes_on(work, made_of):
            _clear(work)
        with writing(folder):
            (work / _MADE_OF).write_text(json.dumps(made_of), encoding="utf-8")
        try:
            yield True
        finally:
            for name in (_WRITING, SCRATCH):
                shutil.rmtree(work / name, ignore_errors=True)
            if {entry.name for entry in work.iterdir()} <= {_LOCK, _MADE_OF}:
                (work / _MADE_OF).unlink(missing_ok=True)  # there is nothing to go on from


@contextmanager
def locked_folder(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other runs out of a folder, which is made, and goes again if nothing was written.

    A killed process keeps nobody out. Raises BlockingIOError if another process is at work there, unless `wait`.
    """
    lock = FileLock(folder / WORK / _LOCK)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    seconds = -1 if wait else _LOCK_SECONDS
    try:
        with writing(folder):
            try:
                lock.acquire(timeout=seconds)  # which makes the folder
            except FileNotFoundError:  # another process has just removed it
                lock.acquire(timeout=seconds)
        yield
    finally:
        with suppress(Timeout, OSError):
            lock.acquire(timeout=0)  # again: Ctrl-C may have come when its file was there and it was not yet held
            with suppress(PermissionError):  # Windows removes no file that is open
                Path(lock.lock_file).unlink(missing_ok=True)  # while it is held: who waits for it sees that it is gone
            lock.release(force=True)
        with suppress(OSError):  # not empty
            for path in (folder / WORK, *made):
                path.rmdir()


def write_whole(folder: Path, name: str, write: Callable[[Path], None]) -> Path:
    """Write files by a function into a folder of this name in `WORK`, which is there only when it is whole.

    The report in it gets the digests of all files. Raises OSError for what cannot be written.
    """
    new, whole = folder / WORK / _WRITING, folder / WORK / name
    shutil.rmtree(new, ignore_errors=True)
    with writing(folder):
        new.mkdir(parents=True)
        write(new)
        for file in filter(Path.is_file, new.rglob("*")):
            file.chmod(new.stat().st_mode & 0o666)  # safetensors keeps what it writes to the user alone
        values = json.loads((new / REPORT_NAME).read_bytes())
        values["files"] = {name: file_sha(new / name) for name in sorted(_names(new) - {REPORT_NAME})}
        (new / REPORT_NAME).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        new.replace(whole)
    return whole


def write_result(folder: Path, write: Callable[[Path], None]) -> None:
    """Write the files of a result by a function, and let them take the place of what is in a folder that is locked."""
    write_whole(folder, _RESULT, write)
    _move_up(folder)


def _move_up(folder: Path) -> None:
    """Move the files of a result to their place: config.json last, and before it the report, which names them all.

    Before that the files of the result that is replaced go, its config.json first.
    """
    result, order = folder / WORK / _RESULT, {REPORT_NAME: 1, CONFIG_NAME: 2}
    with writing(folder, "its files are complete, so fix the cause, and give the command again to move them"):
        if written := _written(result):
            (folder / CONFIG_NAME).unlink(missing_ok=True)
            for name in _names(folder) - written.keys():
                (folder / name).unlink()
            for name in _FOLDERS:
                with suppress(OSError):  # there is none, or it is not empty
                    (folder / name).rmdir()
        for name in sorted(_names(result), key=lambda name: order.get(name, 0)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (result / name).replace(folder / name)
        _clear(folder / WORK)


def _clear(work: Path) -> None:
    """Remove all that a run keeps, but its lock; the folder of a result last, as by that its end is known."""
    for entry in sorted(work.iterdir(), key=lambda entry: entry.name == _RESULT):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != _LOCK:
            entry.unlink()


@contextmanager
def writing(folder: Path, state: str = "what was there before is unchanged") -> Iterator[None]:
    """Raise errors of writing again, with the folder's name and its state."""
    try:
        yield
    except Timeout:
        advice = "wait until it is done, or choose another folder"
        raise BlockingIOError(f"Another process is at work in {str(folder)!r}; {advice}.") from None
    except (OSError, SafetensorError) as error:
        raise OSError(f"{str(folder)!r} was not written ({error}); {state}.") from error


def _names(folder: Path) -> set[str]:
    """What is in a folder, but for what a run keeps there: files, also in folders of a result, and other folders."""
    paths = set(folder.iterdir()) if folder.is_dir() else set()
    for inside in filter(Path.is_dir, paths & {folder / name for name in _FOLDERS}):
        paths = paths - {inside} | {path for path in inside.rglob("*") if not path.is_dir()}
    return {path.relative_to(folder).as_posix() for path in paths} - {WORK}


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
