"""What a library says of an error, in one sentence of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

Kinds = type[Exception] | tuple[type[Exception], ...]


def reason(error: Exception) -> str:
    """The message of an error, on one line, to be put in brackets."""
    return f"{' '.join(str(error).split()).rstrip('.'):.300}"


@contextmanager
def explained(problem: str, advice: str, kinds: Kinds = Exception) -> Iterator[None]:
    """Raise an error of some kinds, or of any, as a ValueError: `problem`, in brackets what it says, and `advice`."""
    try:
        yield
    except kinds as error:
        raise ValueError(f"{problem} ({reason(error)}); {advice}.") from None
