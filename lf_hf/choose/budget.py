"""How many layers a budget allows to fuse: a search by trials, measured on text that nothing is fitted to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from transformers.utils import logging

from lf_hf.decoder.decoder import Decoder
from lf_hf.families.models import free_layers
from lf_hf.measure.dense import Kept, Measurements
from lf_hf.measure.judge import judge, predict_texts
from lf_hf.report.data import BudgetInfo
from lf_hf.report.figures import FIGURES, Figure
from lf_hf.runtime.amounts import most_fusions
from lf_hf.runtime.errors import reason
from lf_hf.settings import FusionConfig

logger = logging.get_logger(__name__)
T = TypeVar("T")
_SHARE = 1 / 8  # of the sequences that a budget is measured on; nothing is fitted to these
_FEW = 2000  # tokens: with fewer, what a budget allows is uncertain
_GUESSES = 4  # trials that follow a power law
_POWER = 1.3  # exponent of that law, until two trials give one


def search_budget(
    decoder: Decoder,
    config: FusionConfig,
    measured: Measurements,
    fuse_layers: Callable[[Decoder, FusionConfig, Measurements], T],
) -> tuple[Decoder, T, BudgetInfo, Measurements]:
    """Fuse copies of the dense model, with `fuse_layers`, to the most fusions that a budget allows.

    Returns the copy with these fusions, what `fuse_layers` gave for it, what was tried, and the measurements without
    the text that it was tried on. Raises ValueError if there is too little text, or the budget allows no fusion.
    """
    assert measured.text is not None
    aside, text = measured.text.hold_out(max(1, int(len(measured.text.given) * _SHARE)))
    if not aside:
        raise ValueError(
            "A budget needs two sequences of calibration text, one of them to measure on; give more text, or lower "
            "calibration_length."
        )
    sequences = text.sequences
    source = replace(text.source, samples=len(sequences), tokens=sum(map(len, sequences)))
    judged = predict_texts(decoder, {"": aside}, {"": "held-out text"})
    limited = next(figure for figure in FIGURES if figure.limit and getattr(config, figure.limit) is not None)
    name = limited.limit
    allowed = getattr(config, name)
    num_tokens = sum(map(len, aside))
    notes = [*text.notes]
    if num_tokens < _FEW:
        given = round(_FEW / _SHARE)
        notes.append(
            f"{name}={allowed:g} is judged on only {num_tokens:,} tokens of the calibration text, so the number of "
            f"fusions that it allows is uncertain; give {given:,} tokens of text or more, and calibration_tokens="
            f"{2 * given} or more."
        )
        logger.warning(notes[-1])
    measured = replace(measured, text=text._replace(source=source, notes=notes), kept=Kept())

    def attempt(count: int) -> tuple[float, tuple[Decoder, T]]:
        copy = decoder.copy()
        level = replace(config, num_fusions=count, max_divergence=None, max_perplexity_ratio=None)
        fused = fuse_layers(copy, level, measured)
        [found] = judge(copy, judged)
        return found.ratio if limited.change == "times" else found.figures[limited.name], (copy, fused)

    free, _ = free_layers(decoder.model_config, config.selection)
    most = most_fusions(len(free), decoder.longest_group if config.selection == "groups" else len(free))
    (copy, fused), tried = search(limited, allowed, most, attempt)
    budget = BudgetInfo(name, allowed, num_tokens, tried)
    return copy, fused, budget, measured


def search(
    limited: Figure, allowed: float, most: int, attempt: Callable[[int], tuple[float, T]]
) -> tuple[T, dict[int, float]]:
    """The result with the most fusions that the budget allows, and what each number that was tried costs.

    The figure `limited` may be `allowed`, and the model allows `most` fusions. `attempt` fuses a copy of the model so
    many times, and gives what that costs, and the result. Raises ValueError if the budget allows no fusion.
    """
    costs: dict[int, float] = {}
    best: T | None = None
    low, high = 0, most + 1  # what is allowed, and what is not
    while high - low > 1:
        count = _next_count(costs, limited, allowed, low, high)
        result = None
        try:
            costs[count], result = attempt(count)
        except ValueError as error:
            if count == 1:
                raise
            logger.warning(f"{count} fusions cannot be made ({reason(error)}); fewer are tried.")
            costs[count] = math.inf
        if costs[count] <= allowed:
            best, low = result, count
        else:
            high = count
        del result  # makes room for the next
    if best is None:
        raise ValueError(f"{limited.limit}={allowed:g} allows no fusion: with 1 it is {costs[1]:.4g}; raise it.")
    return best, costs


def _next_count(tried: Mapping[int, float], limited: Figure, allowed: float, low: int, high: int) -> int:
    """How many fusions to try next between one number that is allowed and one that is not.

    Costs grow about as a power of the number, estimated from the trials next to the bounds. If a few such guesses
    do not suffice, the range is halved.
    """
    if not tried:
        return max(1, high // 8)

    def growing(cost: float) -> float:  # a perplexity ratio is the exponential of something like a divergence
        return math.log(cost) if limited.change == "times" and cost > 0 else cost

    costs = {count: growing(cost) for count, cost in tried.items()}
    points = [(math.log(count), math.log(cost)) for count, cost in costs.items() if 0 < cost < math.inf]
    if len(tried) >= _GUESSES or not points:
        return (low + high) // 2
    points.sort(key=lambda point: abs(point[0] - math.log(max(1, low))))
    log_count, log_cost = points[0]
    power = _POWER
    if len(points) > 1 and points[1][1] != log_cost:
        power = max(0.5, (points[1][1] - log_cost) / (points[1][0] - log_count))
    guess = log_count + (math.log(growing(allowed)) - log_cost) / power
    rounded = math.floor(math.exp(min(guess, 20.0)) + 0.5)
    return min(max(low + 1, rounded), high - 1)
