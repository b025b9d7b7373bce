"""What the hub is asked for by default: the beginnings of two files, for which a run waits ten seconds at most.

A process of its own reads them, which can be ended whatever it waits for; it runs this file, so nothing of lf_hf is
imported here.
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
"""Seconds until the hub has to have given what it is asked for."""
failure: str | None = None
"""Why the hub did not give something; then this process does not ask it again."""


@dataclass(frozen=True)
class HubFile:
    """Some columns of the first rows of a Parquet file, at a fixed commit of a data set on the hub."""

    repo: str
    commit: str
    path: str
    columns: list[str]
    rows: int


GENERAL = HubFile(
    "HuggingFaceFW/fineweb-edu",
    "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
    "sample/10BT/000_00000.parquet",
    columns=["text"],
    rows=1000,
)
"""Text of many kinds: pages of the web that explain something, from all years of Common Crawl (ODC-By); some 5 MB."""

MMLU = HubFile(
    "cais/mmlu",
    "c30699e8356da336a370243923dbaf21066bb9fe",
    "all/validation-00000-of-00001.parquet",
    columns=["subject", "question", "choices", "answer"],
    rows=10_000,
)
"""All 1,531 questions of MMLU's validation split (MIT)."""


def first_rows(file: HubFile) -> list[dict[str, Any]]:
    """The rows, the same ones each time: from the cache, or from the hub, and then they are in the cache.

    Raises OSError if the hub does not give them in time, or is not to be asked.
    """
    global failure
    cached: Path | None = None
    with suppress(OSError, ValueError, RuntimeError):  # of a cache that cannot be made or read; without a home
        cached = cached_assets_path("lf_hf", file.repo, file.commit) / f"{Path(file.path).stem}.json"
        return json.loads(cached.read_bytes())
    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    if failure is None:
        try:
            command = [sys.executable, __file__, json.dumps(asdict(file))]
            content = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=True).stdout
            rows = json.loads(content)
        except subprocess.TimeoutExpired:
            failure = f"it took more than {PATIENCE:.0f} seconds"
        except subprocess.CalledProcessError as error:
            failure = f"{' '.join(error.stderr.decode(errors='replace').split()):.200}"
        except (OSError, ValueError) as error:  # of a process that cannot be started, or prints something else
            failure = f"{error}"
    if failure is not None:
        raise OSError(failure)
    if cached is not None:
        with suppress(OSError):
            new = cached.with_suffix(f".{os.getpid()}")
            new.write_bytes(content)
            new.replace(cached)
    return rows


def _read(repo: str, commit: str, path: str, columns: list[str], rows: int) -> list[dict[str, Any]]:
    """In the process of its own: as little of the file as holds the rows."""
    from huggingface_hub import HfFileSystem
    from pyarrow.parquet import ParquetFile

    with HfFileSystem().open(f"datasets/{repo}@{commit}/{path}") as file:
        batches = ParquetFile(file).iter_batches(100, columns=columns)
        read = list(islice((row for batch in batches for row in batch.to_pylist()), rows))
    if not read or any(list(row) != columns for row in read):
        raise ValueError(f"{path} of {repo} does not hold what it is known to hold")
    return read


if __name__ == "__main__":
    try:
        print(json.dumps(_read(**json.loads(sys.argv[1]))))
    except Exception as error:  # of any kind: the network's, the hub's, the reader's
        sys.exit(f"{type(error).__name__}: {error}")
