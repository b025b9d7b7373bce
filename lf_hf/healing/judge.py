"""How far a model's predictions of some texts are from the base's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from lf_hf.decoder.predictions import Predictions, token_figures
from lf_hf.families import CausalLM, family_of
from lf_hf.healing.loss import FullTargets, TopTargets, parts, top_divergence
from lf_hf.healing.teacher import Item, Teacher, stacked
from lf_hf.runtime.launch import ALONE, Processes

_TOKENS = 4096  # that pass the layers together


@torch.no_grad()
def judge(model: CausalLM, items: Sequence[Item], teacher: Teacher, processes: Processes = ALONE) -> Predictions:
    """Compare a model in memory with the base on some sequences of one length, of which each process reads a share."""
    family, sums = family_of(model.config), torch.zeros(5, dtype=torch.float64)
    mine, together = processes.shard(items), max(1, _TOKENS // len(items[0]["input_ids"]))
    for start in range(0, len(mine), together):
        batch = {name: tensor.to(model.device) for name, tensor in stacked(mine[start : start + together]).items()}
        ids, targets = batch["input_ids"], teacher.targets(batch)
        states = model.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
        following = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -1)], dim=1).flatten()  # -1: predicts nothing
        for rows in parts(len(following), model.config.vocab_size):
            found = log_softmax(family.logits(model.config, model.lm_head(states[rows]).float()), -1)
            figures = _figures(found, targets, rows, following[rows].clamp(min=0).to(found.device))
            sums += figures[:, (following[rows] >= 0).to(found.device)].double().sum(-1).cpu()
    return Predictions.from_sums(*processes.all_reduce_sums(sums))


def _figures(found: Tensor, targets: FullTargets | TopTargets, rows: slice, following: Tensor) -> Tensor:
    """`token_figures` of some tokens, (5, rows); from the base's most likely tokens where there are no others."""
    if isinstance(targets, FullTargets):
        return token_figures(found, following, targets.log_probs(rows, 1.0).to(found.device))
    ids, log_probs, dense = (
        tensor.flatten(0, 1)[rows].to(found.device)
        for tensor in (targets.ids, targets.log_probs, targets.own_log_probs)
    )
    figures = token_figures(found, following)
    figures[2:] = torch.stack(
        [-dense, top_divergence(found, ids, log_probs)[0], (found.argmax(-1) == ids[:, 0]).to(dense)]
    )
    return figures
