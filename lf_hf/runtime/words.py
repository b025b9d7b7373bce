"""Words of messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MOST_LISTED = 30  # known names in a sentence


def plural(count: int, noun: str) -> str:
    """A noun after a number."""
    return noun if count == 1 else f"{noun}s"


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """One sentence that says that `name` is no known `kind`, with the nearest known name if there is one."""
    names = list(known)
    nearest = difflib.get_close_matches(name, names, n=1)
    if nearest:
        return f"Unknown {kind} {name!r:.80}; did you mean {nearest[0]!r}?"
    listed = names if len(names) <= _MOST_LISTED else [*names[:_MOST_LISTED], "..."]
    return f"Unknown {kind} {name!r:.80}; known are {', '.join(listed)}."
