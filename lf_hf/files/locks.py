"""One process at a time: a lock that is a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock


@contextmanager
def locked(file: Path, *, timeout: float = -1) -> Iterator[None]:
    """Hold the lock `file`, which is there meanwhile only; a killed process keeps nobody out.

    Parameters
    ----------
    file : Path
    timeout : float
        Seconds to wait for another process that holds it; -1 is for as long as it takes.

    Raises
    ------
    filelock.Timeout
    """
    lock = FileLock(file)
    lock.acquire(timeout=timeout)
    try:
        yield
    finally:
        with suppress(PermissionError):  # Windows removes no file that is open
            file.unlink(missing_ok=True)  # while it is held: whoever waits for it sees that it is gone
        lock.release()
