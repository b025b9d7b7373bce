"""A healing that was cut short: what it is made of is noted beside its states, so that the same one goes on or ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lf_hf.checkpoint.identity import differences
from lf_hf.checkpoint.saving import LOGS, SCRATCH, WORK, changed_files, finish_save, locked_folder
from lf_hf.healing.teacher import is_written
from lf_hf.report.report import FusionReport
from lf_hf.runtime.errors import explained
from lf_hf.runtime.launch import compute_once

_NOTE = "healing.json"
STATES_VERSION = "2"  # of the layout of what a healing goes on from


def note_healing(work: Path, **facts: Any) -> None:
    """Note in the folder of its states what a healing is `made_of`, what it `train`s, and digests of weights.

    These are those of the model that was `fused` there, if one was, and at the end of what was `healed`.
    """
    new = work / f"{_NOTE}.new"
    new.write_text(json.dumps(facts), encoding="utf-8")
    new.replace(work / _NOTE)


def noted_healing(work: Path, made_of: Callable[[], Mapping[str, str]]) -> dict[str, Any]:
    """The note of a healing that was made of the same, if all that it goes on from is there; else nothing.

    What the present one is made of is computed only where there is a note, in all processes of a launch. Raises
    ValueError where there are states of another one, so that nothing is lost.
    """
    if not compute_once((work / _NOTE).is_file):
        return {}
    present = made_of()
    return compute_once(lambda: _note_of(work, present))


def _note_of(work: Path, present: Mapping[str, str]) -> dict[str, Any]:
    advice = f"remove {str(work)!r} to begin anew"
    with explained(f"{str(work / _NOTE)!r}, which says what is healed there, cannot be read", advice):
        note = _read(work)
        changes = differences(note["made_of"], present)
    if not changes:
        return note if is_written(work) else {}
    if any(work.glob("checkpoint-*")):
        raise ValueError(
            f"{str(work.parent)!r} holds a run that was cut short, of another healing ({'; '.join(changes):.500}). "
            f"To go on with it, give its command again, with the same lf_hf and Python, or {advice}."
        )
    return {}


def holds_fused(folder: Path, note: Mapping[str, Any]) -> bool:
    """Whether a folder holds, whole, the fused model that the healing of a note began with there."""
    with suppress(OSError, ValueError):
        return note.get("fused", "") == FusionReport.load(folder).weights_digest and not changed_files(folder)
    return False


def save_healed(folder: Path, save: Callable[[], None], digest: str | None) -> None:
    """Save a healed model, whose weights have this digest, into a folder, and remove what its healing went on from."""
    note_healing(folder / WORK, **_read(folder / WORK) | {"healed": digest})
    save()
    _end(folder)


def ended_healing(folder: Path, made_of: Callable[[], Mapping[str, str]]) -> FusionReport | None:
    """The report of a model in a folder that was healed and saved there by a run of the same, killed as it ended.

    What that run left of its work is removed.
    """
    note = compute_once(lambda: _note_of_result(folder))
    if not note or differences(note["made_of"], made_of()):
        return None

    def end() -> None:
        with locked_folder(folder, wait=True):
            _end(folder)

    compute_once(end)
    shutil.rmtree(folder / SCRATCH, ignore_errors=True)  # of each machine
    return compute_once(lambda: FusionReport.load(folder))


def _read(work: Path) -> dict[str, Any]:
    return json.loads((work / _NOTE).read_text(encoding="utf-8"))


def _note_of_result(folder: Path) -> dict[str, Any]:
    """The note that belongs to the healed model in a folder; else nothing."""
    finish_save(folder)
    with suppress(OSError, ValueError):
        note, report = _read(folder / WORK), FusionReport.load(folder)
        if report.healed and note.get("healed") == report.weights_digest is not None and not changed_files(folder):
            return note
    return {}


def _end(folder: Path) -> None:
    """Remove what a healing went on from, its note last, and keep its logs."""
    work = folder / WORK
    if (work / LOGS).is_dir():
        shutil.copytree(work / LOGS, folder / LOGS, copy_function=_copy_new, dirs_exist_ok=True)
    for entry in () if work.is_symlink() else work.glob("*"):  # none where the run that saved it has just ended
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != _NOTE:
            entry.unlink()
    shutil.rmtree(work, ignore_errors=True)


def _copy_new(source: str, target: str) -> None:
    """Copy a file unless there is one of that name: it is the user's."""
    if not Path(target).exists():
        shutil.copy2(source, target)
