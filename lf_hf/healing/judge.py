"""How far a model's predictions of some texts are from the base's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from lf_hf.families import CausalLM, family_of
from lf_hf.healing.loss import FullTargets, TopTargets, full_divergence, parts, top_divergence
from lf_hf.healing.teacher import Item, Teacher, stacked
from lf_hf.runtime.launch import ALONE, Processes

_TOKENS = 4096  # that pass the layers together


@dataclass(frozen=True)
class Judgement:
    """Means over the predicted tokens of a text.

    `perplexity` and `dense` are exp of the mean negative log-likelihood of the model and of the base. `divergence` is
    KL(base || model) in nats, and `agreement` how often the most likely token of both is the same.
    """

    perplexity: float
    dense: float
    divergence: float
    agreement: float


@torch.no_grad()
def judge(model: CausalLM, items: Sequence[Item], teacher: Teacher, processes: Processes = ALONE) -> Judgement:
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
            sums += _sums(found, targets, rows, following[rows].to(found.device))
    count, own, dense, apart, agreed = processes.all_reduce_sums(sums)
    # A model that fusion broke can exceed what a float holds.
    own, dense = torch.tensor([own / count, dense / count], dtype=torch.float64).exp().tolist()
    return Judgement(own, dense, apart / count, agreed / count)


def _sums(found: Tensor, targets: FullTargets | TopTargets, rows: slice, following: Tensor) -> Tensor:
    """Of some tokens: how many, both models' negative log-likelihoods, divergences, agreements."""
    there, index = following >= 0, following.clamp(min=0)[:, None]
    if isinstance(targets, FullTargets):
        wanted = targets.log_probs(rows, 1.0).to(found.device)
        divergence, best, dense = full_divergence(found, wanted)[0], wanted.argmax(-1), wanted.gather(1, index)[:, 0]
    else:
        ids, log_probs, dense = (
            tensor.flatten(0, 1)[rows].to(found.device)
            for tensor in (targets.ids, targets.log_probs, targets.own_log_probs)
        )
        divergence, best = top_divergence(found, ids, log_probs)[0], ids[:, 0]
    figures = [-found.gather(1, index)[:, 0], -dense, divergence, (found.argmax(-1) == best).float()]
    return torch.stack([there.sum().double().cpu(), *(figure[there].sum().double().cpu() for figure in figures)])
