"""What each method does to groups of layers: how it makes a layer of a group, and one to try, and what that takes.

What settings and people know of a method is in `settings.METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lf_hf.decoder.decoder import Decoder, Groups
from lf_hf.decoder.demand import Need, Setup, Work
from lf_hf.measure.dense import Measurements
from lf_hf.refit.bottom_up import fit_groups, making
from lf_hf.refit.fit import fit_group, fitting
from lf_hf.report.data import FusedLayer, MadeLayer
from lf_hf.runtime.progress import progress
from lf_hf.settings import FusionConfig
from lf_hf.stages.averaging import average, averaging

_HELD_OUT = 4  # sequences of calibration text that layers are not fitted to, but judged on


@dataclass(frozen=True)
class Making:
    """How one layer is made of each group of layers of the dense model.

    `make` makes them all, from the bottom up, and `count` says what that takes. With `roughly`, for which
    `count_roughly` counts, groups are tried where they are chosen by cost.
    """

    make: Callable[[Decoder, Groups, FusionConfig, Measurements], Iterator[MadeLayer]]
    count: Callable[[Setup, FusionConfig], Need]
    roughly: Callable[..., MadeLayer] = fit_group
    count_roughly: Callable[..., tuple[int, Work]] = fitting


def num_groups(config: FusionConfig) -> int:
    """About how many groups there are: by cost few long ones are chosen, and by influence mostly pairs."""
    a_group = {"last": config.least_fusions, "least_influence": 4 / 3, "groups": 5 / 2}  # layers that go in it
    return max(1, round(config.least_fusions / a_group[config.selection]))


def _average(dense: Decoder, groups: Groups, config: FusionConfig, measured: Measurements) -> Iterator[MadeLayer]:
    assert measured.similarity is not None
    for group in progress(groups, desc="Fusing", unit="group"):
        yield average(
            dense,
            group,
            measured.similarity.matrix,
            alignment=config.alignment,
            ratio_beta=config.ratio_beta,
            known=measured.kept.averages,
        )


def _first(dense: Decoder, groups: Groups, config: FusionConfig, measured: Measurements) -> Iterator[MadeLayer]:
    for first, last in groups:
        layers = list(range(first, last + 1))
        yield MadeLayer({}, {}, FusedLayer(layers, shares=[1.0, *[0.0] * (last - first)]))


def _fit(dense: Decoder, groups: Groups, config: FusionConfig, measured: Measurements) -> Iterator[MadeLayer]:
    assert measured.text is not None
    held_out, text = measured.text.hold_out(_HELD_OUT)
    return fit_groups(dense, groups, text.sequences, [*held_out, *text.other], ridge=config.ridge)


def _count_first(setup: Setup, config: FusionConfig) -> Need:
    return Need(0, 0, Work(), here=config.least_fusions * setup.shape.layer_bytes)


def _count_fit(setup: Setup, config: FusionConfig) -> Need:
    return making(setup, config, num_groups(config))


_AVERAGE, _FIT = Making(_average, averaging), Making(_fit, _count_fit)
MAKING = {
    "neural_alignment": _AVERAGE,
    "mka": _AVERAGE,
    "truncate": Making(_first, _count_first),
    "refit": _FIT,
    "healed": _FIT,
}
"""By the name of the method."""
