"""Errors of other libraries, said in one sentence of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

Kinds = type[Exception] | tuple[type[Exception], ...]


def reason(error: Exception) -> str:
    """The message of an error on one line, to be put in brackets."""
    message = " ".join(str(error).split())
    return message.rstrip(".")[:300]


@contextmanager
def explained(problem: str, advice: str, kinds: Kinds = Exception) -> Iterator[None]:
    """Raise errors of these kinds as a ValueError: `problem`, in brackets the error's message, and `advice`."""
    try:
        yield
    except kinds as error:
        raise ValueError(f"{problem} ({reason(error)}); {advice}.") from None
