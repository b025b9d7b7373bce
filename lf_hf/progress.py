"""Progress bars."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers.utils import logging

from lf_hf.processes import local_rank


def progress(iterable: Iterable[Any] | None = None, **kwargs: Any) -> Any:
    """A tqdm bar that `transformers.utils.logging.disable_progress_bar()` silences.

    Of several processes on a machine only the first one has it. Arguments are tqdm's.
    """
    return logging.tqdm(iterable, disable=local_rank() != 0, **kwargs)
