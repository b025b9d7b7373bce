"""Errors of other libraries, said in one sentence of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pydantic import ValidationError

Kinds = type[Exception] | tuple[type[Exception], ...]


def reason(error: Exception) -> str:
    """The message of an error on one line, to be put in brackets; of pydantic's the first, as it names them all."""
    message = str(error)
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        place = "".join(f"{part}: " for part in first["loc"])
        message = f"{place}{first['msg']}, got {first['input']!r:.80}"
    return " ".join(message.split()).rstrip(".")[:300]


@contextmanager
def explained(problem: str, advice: str, kinds: Kinds = Exception) -> Iterator[None]:
    """Raise errors of these kinds as a ValueError: `problem`, in brackets the error's message, and `advice`.

    Memory that ran out is another matter, and stays what it is.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except kinds as error:
        raise ValueError(f"{problem} ({reason(error)}); {advice}.") from None
