"""Progress bars."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from transformers.utils import logging


def progress(iterable: Iterable[Any] | None = None, **kwargs: Any) -> Any:
    """A tqdm bar that `transformers.utils.logging.disable_progress_bar()` silences.

    Of several processes on a machine only the first one has it. Arguments are tqdm's.
    """
    silent = os.environ.get("LOCAL_RANK", "0") != "0"
    return logging.tqdm(iterable, disable=silent, **kwargs)
