"""Where the task configs are."""

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def tasks_path() -> Path:
    """Folder of the lm-eval task configs, for `lm_eval --include_path`."""
    inside = _PACKAGE / "lm_eval_tasks"  # an installed wheel
    return inside if inside.is_dir() else _PACKAGE.parent / "lm_eval_tasks"  # a checkout
