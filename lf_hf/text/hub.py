"""Default text from the hub: the first rows of two files, for which a run waits ten seconds at most.

A child process reads them, as it can be ended whatever it waits for. It runs this file, which imports nothing of lf_hf.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from huggingface_hub import cached_assets_path, constants

PATIENCE = 10.0
"""Seconds that the hub has to give a file."""
failure: str | None = None
"""Why the hub did not give a file; after that this process does not ask again."""


@dataclass(frozen=True)
class HubFile:
    """Some columns of the first rows of a Parquet file, at a fixed commit of a data set on the hub."""

    repo: str
    commit: str
    path: str
    columns: list[str]
    rows: int

    @property
    def name(self) -> str:
        """Data set and commit, for people."""
        return f"{self.repo} at {self.commit[:8]}"


GENERAL = HubFile(
    "HuggingFaceFW/fineweb-edu",
    "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
    "sample/10BT/000_00000.parquet",
    columns=["text"],
    rows=1000,
)
"""Educational web pages from all years of Common Crawl (ODC-By), some 5 MB."""

MMLU = HubFile(
    "cais/mmlu",
    "c30699e8356da336a370243923dbaf21066bb9fe",
    "all/validation-00000-of-00001.parquet",
    columns=["subject", "question", "choices", "answer"],
    rows=10_000,
)
"""All 1,531 questions of MMLU's validation split (MIT)."""


def load_rows(file: HubFile) -> list[dict[str, Any]]:
    """The rows of a file from the cache, or from the hub, which puts them into the cache.

    Raises OSError if the hub does not give them in time, or is not to be asked.
    """
    global failure
    cached: Path | None = None
    with suppress(OSError, ValueError, RuntimeError):  # no home, or a cache that cannot be made or read
        cached = cached_assets_path("lf_hf", file.repo, file.commit) / f"{Path(file.path).stem}.json"
        return json.loads(cached.read_bytes())
    if constants.HF_HUB_OFFLINE or failure:
        raise OSError(failure or "HF_HUB_OFFLINE is set")
    try:
        content = _download(file)
        rows = json.loads(content)
    except (OSError, ValueError) as error:
        failure = str(error) or "it ended without a word"
        raise OSError(failure) from None
    if cached is not None:
        with suppress(OSError):
            new = cached.with_suffix(f".{os.getpid()}")
            new.write_bytes(content)
            new.replace(cached)
    return rows


def _download(file: HubFile) -> bytes:
    """What a child process prints, which runs this file. Raises OSError if it fails or takes too long."""
    command = [sys.executable, __file__, json.dumps(asdict(file))]
    try:
        return subprocess.run(command, capture_output=True, timeout=PATIENCE, check=True).stdout
    except subprocess.TimeoutExpired:
        raise OSError(f"it took more than {PATIENCE:.0f} seconds") from None
    except subprocess.CalledProcessError as error:
        words = error.stderr.decode(errors="replace").split()
        raise OSError(f"{' '.join(words):.200}") from None


def _read(wanted: HubFile) -> list[dict[str, Any]]:
    """Read as little of a file as holds the rows; in the child process."""
    from huggingface_hub import HfFileSystem
    from pyarrow.parquet import ParquetFile

    with HfFileSystem().open(f"datasets/{wanted.repo}@{wanted.commit}/{wanted.path}") as file:
        batches = ParquetFile(file).iter_batches(100, columns=wanted.columns)
        every = (row for batch in batches for row in batch.to_pylist())
        return list(islice(every, wanted.rows))


if __name__ == "__main__":
    try:
        print(json.dumps(_read(HubFile(**json.loads(sys.argv[1])))))
    except Exception as error:  # of the network, the hub or the reader
        sys.exit(f"{type(error).__name__}: {error}")
