"""PEFT's default target modules for fused models: those that it has for their bases."""

from __future__ import annotations

import functools
import importlib.util
from contextlib import suppress

from lf_hf.checkpoint.configuration import FUSED
from lf_hf.families import FAMILIES


@functools.cache
def register_peft() -> None:
    """Let PEFT methods that know where adapters go in a model of some type know the same of the fused one.

    That is all but AdaptionPrompt, which has tables of its own, with classes in them. It happens when the first fused
    model is made, and not when lf_hf is imported, as PEFT may take long to import.
    """
    if importlib.util.find_spec("peft") is None:
        return
    with suppress(Exception):  # of any kind, from an installation of PEFT that does not work
        from peft.utils import constants

        for name, table in vars(constants).items():
            if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict):
                table |= {FUSED + base: table[base] for base in FAMILIES if base in table and FUSED + base not in table}
