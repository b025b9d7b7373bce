"""Whether pictures can be made: they come with the extra `plot`, and the core does without."""

from __future__ import annotations

import importlib.util

PLOT_PACKAGES = ("jinja2", "matplotlib")


def missing_packages() -> str:
    """One sentence about what is not installed that pictures need, or nothing."""
    missing = [name for name in PLOT_PACKAGES if importlib.util.find_spec(name) is None]
    if not missing:
        return ""
    return f'Pictures and pages need {" and ".join(missing)}; run `pip install "lf_hf[plot]"`.'
