"""Sentences about what a fusion has broken, for a report's notes."""

from __future__ import annotations

from collections.abc import Sequence

from lf_hf.report.records import Continuation, PerplexityInfo

COLLAPSED = "Perplexity went"  # begins the note about perplexities that more than doubled
SILENT = "The fused model writes nothing"  # begins the note about that


def damage_notes(
    judged: Sequence[PerplexityInfo], continuations: Sequence[Continuation] = (), *, fitted: bool
) -> list[str]:
    """A sentence about perplexities that more than doubled, if any did; `fitted` says whether layers were.

    And one about prompts after which the base writes something and the fused model only blanks, if there are any.
    """
    notes = []
    if collapsed := [info for info in judged if not info.fused <= 2 * info.dense]:
        moved = " and ".join(f"from {info.dense:.4g} to {info.fused:.4g} ({info.name})" for info in collapsed)
        advice = "method=refit fits the fused layers to the base and keeps far more of it."
        if fitted:
            advice = "Fewer fusions, or calibration text of the kind that the model will be used for, keep more of it."
        notes.append(
            f"{COLLAPSED} {moved}: the fused model predicts text far worse than its base, even where multiple-choice "
            f"scores look fine. {advice}"
        )
    if prompts := [repr(text.prompt) for text in continuations if text.dense.strip() and not text.fused.strip()]:
        notes.append(
            f"{SILENT} where its base goes on, after {', '.join(prompts)}. Fewer fusions help, or text of that kind "
            "to calibrate and heal on."
        )
    return notes
