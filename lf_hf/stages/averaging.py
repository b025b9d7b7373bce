"""Stage 5: a group of layers as one by the published method, the weighted average of aligned layers.

A group is folded from its top: the last two layers become one, then that one and the layer below it, and so on.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor

from lf_hf.decoder.decoder import Decoder, Group
from lf_hf.decoder.demand import Need, Setup, Work, times
from lf_hf.report.data import FusedLayer, MadeLayer
from lf_hf.runtime.numerics import in_float64
from lf_hf.settings import FusionConfig
from lf_hf.stages.alignment import align_layer

AverageKey = tuple[int, str, float]
"""Key of an average that is kept: the last layer, the alignment and ratio_beta."""
_ROWS = 256  # rows of a matrix that are merged at a time, in a wider type


@torch.no_grad()
def average(
    decoder: Decoder,
    group: Group,
    similarity: NDArray[np.float64],
    *,
    alignment: str,
    ratio_beta: float,
    known: dict[AverageKey, MadeLayer] | None = None,
) -> MadeLayer:
    """One layer for a group of layers of the dense model: their average, each aligned to the one below it.

    `similarity` (layers L, layers L) is that of the dense model's layers: a fused layer keeps the similarity of its
    first one. `known` are averages of groups that end with the same layer, to go on from; this one takes its place
    there.
    """
    first, last = group
    key = last, alignment, ratio_beta
    known = {} if known is None else known
    folded = known.get(key)
    if folded is None or folded.entry.layers[0] < first:
        folded = MadeLayer(decoder.family.unpacked(decoder.layer(last)), {}, FusedLayer([last], [1.0]))
    weights, entry = dict(folded.weights), folded.entry
    del folded  # so that weights go as soon as they are aligned, and those as soon as they are merged
    for i in range(entry.layers[0] - 1, first - 1, -1):
        weights_i = decoder.family.unpacked(decoder.layer(i))
        weights, matches = align_layer(decoder, weights_i, weights, alignment)
        ratio = fusion_ratio(similarity, i, i + 1, ratio_beta)
        weights = merge_weights(weights_i, weights, ratio)
        entry = entry.joined(i, ratio, matches)
    known[key] = MadeLayer(weights, {}, entry)
    return known[key]


def fusion_ratio(similarity: NDArray[np.float64], i: int, j: int, beta: float = 1.0) -> float:
    """Share alpha_i of layer i of the dense model in its fusion with layer j; layer j's is 1 - alpha_i.

    alpha_i = sigmoid(beta * s_i / (s_i + s_j)), where s is a layer's mean similarity to all layers, of `similarity`
    (layers L, layers L). For beta = 1 and positive similarities the result lies in 0.5 to 0.74. Layers without any
    similarity count alike.
    """
    s_i, s_j = similarity[i].mean(), similarity[j].mean()
    return float(expit(beta * (s_i / (s_i + s_j) if s_i + s_j else 0.5)))


def merge_weights(weights_i: dict[str, Tensor], weights_j: dict[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """ratio * layer i + (1 - ratio) * layer j, of all weights but norms', which stay layer i's.

    Both are emptied on the way, to make room: what is mapped of a file counts as memory once it was read.
    """
    names = [name for name in weights_i if "norm" not in name]
    return {name: weighted_sum(weights_i.pop(name), weights_j.pop(name), ratio) for name in names}


def weighted_sum(tensor_i: Tensor, tensor_j: Tensor, ratio: float) -> Tensor:
    """ratio * tensor_i + (1 - ratio) * tensor_j, computed in float64 and rounded once to their dtype."""
    fused = torch.empty_like(tensor_i)
    for rows, rows_i, rows_j in zip(*(tensor.split(_ROWS) for tensor in (fused, tensor_i, tensor_j)), strict=True):
        rows.copy_(in_float64(rows_i) * ratio + in_float64(rows_j.to(rows_i.device)) * (1 - ratio))
    return fused


def averaging(setup: Setup, config: FusionConfig) -> Need:
    """What averages take: rows of all projections are compared and assigned, where the solver's steps grow about as
    rows to the power 2.5."""
    shape, fusions, is_aligned = setup.shape, config.least_fusions, config.alignment != "none"
    work = Work(bytes=fusions * shape.layer * 40)
    compared = (shape.mlp, shape.mlp, shape.hidden, shape.queries, shape.keys, shape.keys, shape.hidden)
    for rows in compared if is_aligned else ():
        work += Work(product=2 * rows * rows * shape.hidden, bytes=int(12 * rows**2.5))
    rows = shape.mlp * is_aligned
    return Need(fusions * shape.layer_bytes + 12 * rows**2 + 12 * shape.hidden * rows, 0, times(work, fusions))
