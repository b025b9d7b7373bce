"""PEFT's default target modules for fused models: those that it has for their bases."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_TABLES = "peft.utils.constants"


def register_with_peft(model_types: Mapping[str, str]) -> None:
    """Let PEFT methods that know where adapters go in a model of some type know the same of the fused one.

    That is all but AdaptionPrompt, which has tables of its own, with classes in them. `model_types` are those of fused
    models, each with that of its base.

    PEFT is not imported for that, which would cost seconds: what it has is copied as soon as somebody else imports it.
    """
    if _TABLES in sys.modules:
        _copy_entries(sys.modules[_TABLES], model_types)
    else:
        sys.meta_path.insert(0, _TablesFinder(model_types))


class _TablesFinder(MetaPathFinder):
    """Finds PEFT's tables as Python would, and has their loader copy the entries afterwards."""

    def __init__(self, model_types: Mapping[str, str]) -> None:
        self.model_types = model_types

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TABLES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        run_module = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run_module(module)
            _copy_entries(module, self.model_types)

        # On the instance: a loader of our own would hide the real one's get_source.
        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        sys.meta_path.remove(self)
        return spec


def _copy_entries(tables: ModuleType, model_types: Mapping[str, str]) -> None:
    for name, table in vars(tables).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict):
            for fused, base in model_types.items():
                if base in table:
                    table.setdefault(fused, table[base])
