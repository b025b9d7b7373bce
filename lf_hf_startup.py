"""Make `lm_eval --model fused` and `fused_llama` work in lm-eval releases that do not look for plugins themselves.

lf_hf_startup.start, and before Python 3.15 lf_hf_startup.pth, call `arm` whenever Python starts, and lf_hf does when it
is imported, as in a notebook that was running when it was installed. This module imports nothing but `sys` until
lm_eval.models is imported: then it adds the names to lm-eval's model registry. It never raises. Releases that find
plugins by entry point (their registry has `load_plugins`) are left alone.
"""

import sys

TYPE_CHECKING = False  # typing's own constant would cost an import of typing at every start
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

MODELS = {
    "fused": "lf_hf.evaluate.lm_eval_model:FusedLM",
    "fused_llama": "lf_hf.evaluate.lm_eval_model:FusedLM",
}


class LmEvalFinder:
    """Finds lm_eval.models as Python would, and has its loader register the models afterwards."""

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Give the spec of lm_eval.models, and None (another finder's turn) for every other module."""
        if fullname != "lm_eval.models":
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        run_module = spec.loader.exec_module

        def exec_module(module: "ModuleType") -> None:
            run_module(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            register()

        # On the instance: a loader of our own would hide the real one's get_source and get_data.
        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Add the models to lm-eval's registry as names that are resolved on first use."""
    try:
        from lm_eval.api import registry

        for name, target in MODELS.items():
            if not hasattr(registry, "load_plugins") and name not in registry.model_registry:
                registry.model_registry.register(name, target=target)
    except Exception as error:  # an lm-eval of another shape must go on working for all its other models
        import logging

        logging.getLogger(__name__).warning("lf_hf could not add %s to lm-eval: %r", " and ".join(MODELS), error)


def arm() -> None:
    """Wait for lm_eval.models to be imported, if it is not; a second call changes nothing."""
    if "lm_eval.models" in sys.modules:
        register()
    elif not any(isinstance(finder, LmEvalFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, LmEvalFinder())
