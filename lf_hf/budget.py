"""How many layers a budget allows to fuse: a search by trials, measured on text that nothing is fitted to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from lf_hf.report.records import BudgetTrial

T = TypeVar("T")
_GUESSES = 4  # trials that follow a power law
_POWER = 1.3  # with which costs grow, until two trials say


def search(
    name: str, allowed: float, most: int, attempt: Callable[[int], tuple[BudgetTrial, T]]
) -> tuple[T, list[BudgetTrial]]:
    """The result with the most fusions that the budget allows, and all trials. Raises ValueError if it allows none.

    The setting `name` is `allowed`, and the model allows `most` fusions. `attempt` fuses a copy of the model so many
    times, and gives what that costs, and the result.
    """
    tried: list[BudgetTrial] = []
    best: T | None = None
    low, high = 0, most + 1  # what is allowed, and what is not
    while high - low > 1:
        count = _next_trial(tried, name, allowed, low, high)
        trial, result = attempt(count)
        tried.append(trial)
        if trial.costs(name) <= allowed:
            best, low = result, count
        else:
            high = count
        del result  # makes room for the next
    if best is None:
        raise ValueError(f"{name}={allowed:g} allows no fusion: with 1 it is {tried[-1].costs(name):.4g}; raise it.")
    return best, tried


def _next_trial(tried: Sequence[BudgetTrial], name: str, allowed: float, low: int, high: int) -> int:
    """How many fusions to try next between one number that is allowed and one that is not.

    Costs grow about as a power of the number, which the trials next to the bounds say. Where they do not, as a few
    trials have shown then, the range is halved.
    """
    if not tried:
        return max(1, high // 8)

    def cost(value: float) -> float:  # a perplexity ratio is the exponential of something like a divergence
        return math.log(value) if name == "max_perplexity_ratio" and value > 0 else value

    costs = {trial.num_fusions: cost(trial.costs(name)) for trial in tried}
    points = [(math.log(count), math.log(value)) for count, value in costs.items() if 0 < value < math.inf]
    if len(tried) >= _GUESSES or not points:
        return (low + high) // 2
    points.sort(key=lambda point: abs(point[0] - math.log(max(1, low))))
    (at, there), power = points[0], _POWER
    if len(points) > 1 and points[1][1] != there:
        power = max(0.5, (points[1][1] - there) / (points[1][0] - at))
    guess = at + (math.log(cost(allowed)) - there) / power
    return min(max(low + 1, math.floor(math.exp(min(guess, 20.0)) + 0.5)), high - 1)
