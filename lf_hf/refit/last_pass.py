"""The last pass: every fused layer is fitted, from the bottom up, to what the dense model computes there."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from lf_hf.decoder.interface import Decoder
from lf_hf.refit.group import fit_group
from lf_hf.refit.states import StateStore
from lf_hf.refit.traces import trace
from lf_hf.report.records import FittedLayer
from lf_hf.runtime.progress import progress
from lf_hf.settings import FusionConfig


@torch.no_grad()
def fit_from_bottom(
    decoder: Decoder,
    groups: Sequence[list[int]],
    sequences: Sequence[Tensor],
    config: FusionConfig,
) -> list[FittedLayer]:
    """Fit every fused layer, from the bottom up, to what the dense model computes at its place.

    Parameters
    ----------
    decoder : Decoder
        Its fused layers are changed.
    groups : sequence of lists of int
        For each layer, the layers of the dense model that it stands for.
    sequences : sequence of int64 tensors of shape (tokens T,)
        Calibration text.
    config : FusionConfig
        With merge="select" each fused layer is made again from all layers of its group, else it is fitted as it is.
    """
    widest = max(map(len, groups))
    embedded = decoder.embed(decoder.batches(decoder.processes.shard(sequences)))
    # At a time: the group's traces, and the states before and after it of the dense and of the fused model.
    with StateStore.with_room(decoder, sum(state.nbytes for state in embedded) * (2 * widest + 5)) as store:
        dense: Sequence[Tensor] = store.keep(embedded)
        states = dense
        del embedded
        fitted = []
        originals = decoder.originals(range(sum(map(len, groups))))
        for index, group in enumerate(progress(groups, desc="Last pass", unit="layer")):
            if len(group) == 1:
                layer = next(originals)
                after = store.keep(decoder.run_layer(layer, state) for state in dense)
                if states is not dense:
                    states = store.keep(decoder.run_layer(layer, state) for state in states)
                else:
                    states = after
                dense = after
                del layer
                continue
            with ExitStack() as stack:
                layers = [next(originals) for _ in group]
                traces = trace(decoder, layers, dense, store)
                if config.merge != "select":
                    layers = [stack.enter_context(decoder.layer(index))]
                fit = fit_group(decoder, layers, traces, states, store, refit=config.refit, ridge=config.ridge)
            decoder.replace(index, fit.weights, fit.kind)
            dense = traces.output
            del traces
            with decoder.layer(index) as layer:
                states = store.keep(decoder.run_layer(layer, state) for state in states)
            fitted.append(FittedLayer(group, fit.heads_kept, fit.channels_kept, fit.error_before, fit.error_after))
    return fitted
