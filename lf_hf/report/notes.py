"""Notes of a report about what a fusion has broken."""

from __future__ import annotations

from collections.abc import Sequence

from lf_hf.report.data import Continuation, PerplexityInfo
from lf_hf.settings import FITTING

_HARMFUL_RATIO = 2
_TO_FIT = "The method refit fits the fused layers to the base and keeps far more of it."
_TO_FIT_BETTER = "Fewer fusions, or calibration text of the kind that the model will be used for, keep more of it."


def damage_notes(
    judged: Sequence[PerplexityInfo], continuations: Sequence[Continuation], method: str | None
) -> list[str]:
    """Notes about perplexities that more than doubled, and about prompts after which only the base writes something.

    The advice depends on the method that layers were fused by.
    """
    notes = []
    collapsed = [text for text in judged if not text.fused <= _HARMFUL_RATIO * text.dense]  # NaN is harm, too
    if collapsed:
        moved = " and ".join(f"from {text.dense:.4g} to {text.fused:.4g} ({text.name})" for text in collapsed)
        advice = _TO_FIT_BETTER if method in FITTING else _TO_FIT
        notes.append(
            f"Perplexity went {moved}: the fused model predicts text far worse than its base, even where "
            f"multiple-choice scores look fine. {advice}"
        )
    prompts = [repr(text.prompt) for text in continuations if text.dense.strip() and not text.fused.strip()]
    if prompts:
        notes.append(
            f"The fused model writes nothing where its base goes on, after {', '.join(prompts)}. Fewer fusions help, "
            "or text of that kind to calibrate and heal on."
        )
    return notes
