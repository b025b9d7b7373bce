"""Notes of a report about what a fusion has broken."""

from __future__ import annotations

from collections.abc import Sequence

from lf_hf.report.data import Continuation, PerplexityInfo

COLLAPSED = "Perplexity went"  # the note about perplexities that more than doubled begins so
SILENT = "The fused model writes nothing"  # likewise the note about that
_HARMFUL_RATIO = 2
_TO_FIT = "The method refit fits the fused layers to the base and keeps far more of it."
_TO_FIT_BETTER = "Fewer fusions, or calibration text of the kind that the model will be used for, keep more of it."


def damage_notes(
    judged: Sequence[PerplexityInfo], continuations: Sequence[Continuation] = (), *, fitted: bool
) -> list[str]:
    """Notes about perplexities that more than doubled, and about prompts after which only the base writes something.

    `fitted` says whether the fused layers were fitted, on which the advice depends.
    """
    notes = []
    collapsed = [text for text in judged if not text.fused <= _HARMFUL_RATIO * text.dense]  # NaN is harm, too
    if collapsed:
        moved = " and ".join(f"from {text.dense:.4g} to {text.fused:.4g} ({text.name})" for text in collapsed)
        advice = _TO_FIT_BETTER if fitted else _TO_FIT
        notes.append(
            f"{COLLAPSED} {moved}: the fused model predicts text far worse than its base, even where multiple-choice "
            f"scores look fine. {advice}"
        )
    prompts = [repr(text.prompt) for text in continuations if text.dense.strip() and not text.fused.strip()]
    if prompts:
        notes.append(
            f"{SILENT} where its base goes on, after {', '.join(prompts)}. Fewer fusions help, or text of that kind "
            "to calibrate and heal on."
        )
    return notes
