"""Notes of a report about what a fusion has broken."""

from __future__ import annotations

from collections.abc import Sequence

from lf_hf.report.data import Continuation, PerplexityInfo
from lf_hf.settings import METHODS

_HARMFUL_RATIO = 2


def damage_notes(judged: Sequence[PerplexityInfo], continuations: Sequence[Continuation], method: str) -> list[str]:
    """Notes about perplexities that more than doubled, and about prompts after which only the base writes something.

    The advice depends on the method that layers were fused by.
    """
    notes = []
    collapsed = [text for text in judged if not text.fused <= _HARMFUL_RATIO * text.dense]  # NaN is harm, too
    if collapsed:
        moved = " and ".join(f"from {text.dense:.4g} to {text.fused:.4g} ({text.name})" for text in collapsed)
        notes.append(
            f"Perplexity went {moved}: the fused model predicts text far worse than its base, even where "
            f"multiple-choice scores look fine. {METHODS[method].advice}"
        )
    prompts = [repr(text.prompt) for text in continuations if text.dense.strip() and not text.fused.strip()]
    if prompts:
        notes.append(
            f"The fused model writes nothing where its base goes on, after {', '.join(prompts)}. Fewer fusions help, "
            "or text of that kind to calibrate and heal on."
        )
    return notes
