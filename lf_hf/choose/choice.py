"""The groups of layers that become one each: the last layers, those of least influence, or groups by cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch

from lf_hf.choose.costs import GroupCosts, num_pieces, split_text
from lf_hf.choose.methods import MAKING, num_groups
from lf_hf.choose.sets import estimate_costs, propose_sets
from lf_hf.decoder.decoder import Decoder, Group, Groups
from lf_hf.decoder.demand import Need, Setup, times
from lf_hf.decoder.hidden_states import cosine_sums, influences
from lf_hf.families.table import Kind
from lf_hf.measure.dense import Measurements
from lf_hf.measure.predictions import logits_bytes
from lf_hf.refit.states import run_boundaries
from lf_hf.runtime.amounts import (
    JUDGED_AT_ONCE,
    JUDGING_LENGTH,
    JUDGING_PART,
    MIXTURE_SHARE,
    SHORT,
    judged_stride,
    num_rough_tokens,
    num_trials,
)
from lf_hf.runtime.progress import progress
from lf_hf.settings import FusionConfig

_INFLUENCE_TOKENS = 8192  # calibration tokens that influences are measured on
_AHEAD = 3  # likely sets whose groups are measured in one pass through the layers


@dataclass(frozen=True)
class Choice:
    """The groups that become one layer each, and what was measured to choose them.

    `costs` are those of single groups in nats a token, where they are finite, and `influences` those of the dense
    model's layers.
    """

    groups: Groups
    costs: dict[Group, float] = field(default_factory=dict)
    influences: list[float] = field(default_factory=list)


def choose(decoder: Decoder, config: FusionConfig, measured: Measurements) -> Choice:
    """Choose groups of layers of the dense model that leave `config.num_fusions` layers fewer."""
    if config.selection == "last":
        top = decoder.num_layers - 1
        return Choice(((top - config.num_fusions, top),))
    if config.selection == "least_influence":
        return _choose_least_influence(decoder, config, measured)
    return _choose_by_cost(decoder, config, measured)


@torch.no_grad()
def _choose_least_influence(decoder: Decoder, config: FusionConfig, measured: Measurements) -> Choice:
    """Join to the layer below those layers that change the residual stream least."""
    assert measured.text is not None
    sequences = measured.text.first(_INFLUENCE_TOKENS)
    embedded = decoder.embed(decoder.make_batches(sequences))
    boundaries = pairwise(run_boundaries(decoder, embedded))
    layers = progress(boundaries, total=decoder.num_layers, desc="Influences", unit="layer", leave=False)
    of_layers = influences([cosine_sums(before, after) for before, after in layers])
    kinds = decoder.family.config_kinds(decoder.config) if config.averages else None
    groups = least_influence_groups(of_layers, config.num_fusions, decoder.inner_layers, kinds)
    return Choice(groups, influences=of_layers)


def least_influence_groups(
    influences: Sequence[float], num_fusions: int, inner: range, kinds: Sequence[Kind] | None = None
) -> Groups:
    """Groups in which the `num_fusions` layers of least influence join the layer below them.

    Layers that are not in `inner` stay by themselves. Where `kinds` are given, only layers of one kind are joined.
    """
    candidates = list(inner[1:])
    if kinds is not None:
        candidates = [number for number in candidates if kinds[number] == kinds[number - 1]]
    candidates.sort(key=lambda number: influences[number])
    groups: list[Group] = []
    for number in sorted(candidates[:num_fusions]):
        if groups and groups[-1][1] == number - 1:
            groups[-1] = (groups[-1][0], number)
        else:
            groups.append((number - 1, number))
    return tuple(groups)


def _choose_by_cost(decoder: Decoder, config: FusionConfig, measured: Measurements) -> Choice:
    """Choose the set of groups that, its layers made roughly, moves the model's predictions least.

    Raises ValueError if no set has costs that are finite.
    """
    assert measured.text is not None
    text = split_text(measured.text, num_rough_tokens(decoder.family.mlp_width(decoder.config)))
    known = measured.kept.group_costs.setdefault(config.unhealed.method, {})
    costs = GroupCosts(decoder, text, partial(MAKING[config.method].roughly, ridge=config.ridge))
    costs.by_group |= known
    trials = try_sets(costs, config.num_fusions, num_trials(measured.text.source.tokens))
    of_layers = influences([cosine_sums(before, after) for before, after in pairwise(costs.boundaries)])
    # Costs of longer groups must not influence other numbers of fusions, which may not measure them.
    known |= {(first, last): cost for (first, last), cost in costs.by_group.items() if last - first <= SHORT}
    chosen = min(trials, key=lambda groups: trials[groups], default=())
    if not math.isfinite(trials.get(chosen, math.inf)):
        raise ValueError(
            f"No groups of layers that leave {config.num_fusions} fewer can be fitted: the fits overflow or are not "
            "stable; use a dtype of wider range, such as bfloat16, more text, or fewer fusions."
        )
    finite = {group: cost for group, cost in costs.by_group.items() if math.isfinite(cost)}
    return Choice(chosen, finite, of_layers)


def try_sets(costs: GroupCosts, num_fusions: int, count: int) -> dict[Groups, float]:
    """What at most `count` sets of groups cost as wholes: those that are expected to cost least.

    All groups of two and of three layers are measured. What longer ones cost is estimated from these, and measured
    where they are in one of the cheapest sets. Which set is next depends on what those before it cost.
    """
    inner = costs.decoder.inner_layers
    most = min(num_fusions, SHORT, costs.decoder.longest_group - 1)
    short = {(n, n + more) for more in range(1, most + 1) for n in inner[:-more]}
    if missing := short - costs.by_group.keys():
        costs.measure(missing)
    trials: dict[Groups, float] = {}
    for _ in progress(range(count), desc="Trying sets of groups", unit="set", leave=False):
        groups = _next_set(costs, trials, num_fusions)
        if groups is None:
            break
        trials[groups] = costs.measure_set(groups)
    return trials


def _next_set(costs: GroupCosts, trials: dict[Groups, float], num_fusions: int) -> Groups | None:
    """The set to try next, with the costs of its groups measured; None if no set is left."""
    while True:
        expected = estimate_costs(costs.by_group, costs.decoder.longest_group)
        proposed = propose_sets(expected, trials, num_fusions, count=_AHEAD)
        if not proposed:
            return None
        if costs.by_group.keys() >= set(proposed[0]):
            return proposed[0]
        costs.measure({group for groups in proposed for group in groups} - costs.by_group.keys())


def choosing(setup: Setup, config: FusionConfig) -> Need:
    """What `choose` takes."""
    if config.selection == "groups":
        return _choosing_by_cost(setup, config)
    tokens = min(_INFLUENCE_TOKENS, config.calibration_tokens) * (config.selection == "least_influence")
    inside = setup.running(config.calibration_length, tokens)
    return Need(inside, 2 * setup.states(tokens), setup.forward(tokens, setup.shape.layers))


def _choosing_by_cost(setup: Setup, config: FusionConfig) -> Need:
    shape, length, fusions, groups = setup.shape, config.calibration_length, config.least_fusions, num_groups(config)
    fitted = min(num_rough_tokens(shape.mlp), config.calibration_tokens)
    pieces = num_pieces(config.calibration_tokens * (1 - MIXTURE_SHARE), length)
    judging = pieces * JUDGING_LENGTH  # of sets; a part of it judges groups
    judging_groups = judging // JUDGING_PART + 2 * JUDGING_LENGTH  # by twos
    # No more sets than there are ways to join so many layers, of which neither the first nor the last is one.
    trials = min(num_trials(config.calibration_tokens), math.comb(shape.inner - 1, fusions))
    short = sum(shape.inner - more for more in range(1, min(fusions, SHORT) + 1))
    measured = short + trials  # and those of the sets, of which about one is new in each
    stride = judged_stride(shape.vocab)
    # Lists: at all boundaries, inside a group, of groups that are judged, and above those of sets.
    lists = setup.states((shape.layers + 1) * (fitted + judging) + (2 * setup.longest + 3) * fitted)
    lists += setup.states(measured * judging_groups + trials * groups * (fitted + judging))
    fit = partial(MAKING[config.method].count_roughly, setup, length, fitted, is_rough=True)
    longest_fit, _ = fit(setup.longest)
    # Sets are judged one by one, and some groups beside each other.
    set_logits = logits_bytes(setup, setup.batch(JUDGING_LENGTH, judging) // stride, 2)
    models = min(JUDGED_AT_ONCE, short) + 1
    group_logits = logits_bytes(setup, setup.batch(JUDGING_LENGTH, judging_groups) // stride, models)
    running = setup.running(length, max(fitted, pieces * min(length, JUDGING_LENGTH)))
    work = setup.forward(fitted * 2 + judging, shape.layers)
    # What a group gives runs through the layers above it, on average a half, and sets from their first group up.
    work += setup.forward(measured * judging_groups, shape.layers // 2)
    work += setup.forward(trials * (fitted + judging), shape.layers * 2 // 3)
    work += setup.head((measured * judging_groups + trials * judging) // stride)
    work += times(fit(2)[1], measured) + times(fit(1 + math.ceil(fusions / groups))[1], trials * groups)
    inside = running + max(longest_fit, set_logits, group_logits)
    return Need(inside, lists, work, away=setup.longest * shape.layer_bytes)
