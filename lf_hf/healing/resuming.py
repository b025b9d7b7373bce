"""A healing that was cut short: what it was made of is noted beside its states, so that the same one goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lf_hf.checkpoint.identity import differences
from lf_hf.healing.teacher import is_written
from lf_hf.runtime.errors import explained

_NOTE = "healing.json"


def note_healing(work: Path, made_of: Mapping[str, str], train: str, fused: str | None = None) -> None:
    """Note in the folder of its states what a healing is made of and trains, and the digest of the fused weights."""
    note = {"made_of": made_of, "train": train, "fused": fused}
    (work / _NOTE).write_text(json.dumps(note), encoding="utf-8")


def noted_healing(work: Path, made_of: Mapping[str, str]) -> dict[str, Any]:
    """The note of a healing that was made of the same, if all that it goes on from is there; else nothing.

    Raises ValueError where there are states of another one, so that nothing is lost.
    """
    file = work / _NOTE
    if not file.is_file():
        return {}
    advice = f"remove {str(work)!r} to begin anew"
    with explained(f"{str(file)!r}, which says what is healed there, cannot be read", advice):
        note = json.loads(file.read_text(encoding="utf-8"))
        changes = differences(note["made_of"], made_of)
    if not changes:
        return note if is_written(work) else {}
    if any(work.glob("checkpoint-*")):
        raise ValueError(
            f"{str(work.parent)!r} holds a run that was cut short, of another healing ({'; '.join(changes):.500}). "
            "To go on with it, give its command again, with the same lf_hf, Python and hub access "
            f"(or the text 'bundled' if it had none), or {advice}."
        )
    return {}
