"""How far a model's predictions of some texts are from the base's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, log_softmax
from transformers import LlamaForCausalLM

from lf_hf.healing.loss import FullTargets, TopTargets, full_divergence, parts, top_divergence
from lf_hf.healing.teacher import Item, Teacher


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
def judge(model: LlamaForCausalLM, items: Sequence[Item], teacher: Teacher) -> Judgement:
    """Compare a model in memory with the base on some sequences."""
    sums = torch.zeros(5, dtype=torch.float64)
    for item in items:
        batch = {name: tensor[None].to(model.device) for name, tensor in item.items()}
        targets = teacher.targets(batch)
        states = model.model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state[0]
        following = batch["input_ids"][0, 1:]
        for rows in parts(len(following), model.config.vocab_size):
            found = log_softmax(linear(states[rows], model.lm_head.weight).float(), -1)
            sums += _sums(found, targets, rows, following[rows, None])
    count, own, dense, apart, agreed = sums.tolist()
    # A model that fusion broke can exceed what a float holds.
    own, dense = torch.tensor([own / count, dense / count], dtype=torch.float64).exp().tolist()
    return Judgement(own, dense, apart / count, agreed / count)


def _sums(found: Tensor, targets: FullTargets | TopTargets, rows: slice, following: Tensor) -> Tensor:
    """Of some tokens: how many, both models' negative log-likelihoods, divergences, agreements."""
    if isinstance(targets, FullTargets):
        wanted = targets.log_probs(rows, 1.0).to(found.device)
        divergence, best, dense = full_divergence(found, wanted)[0], wanted.argmax(-1), wanted.gather(1, following)
    else:
        ids, log_probs = targets.ids[0, rows], targets.log_probs[0, rows]
        divergence, best, dense = top_divergence(found, ids, log_probs)[0], ids[:, 0], targets.own_log_probs[0, rows]
    figures = [-found.gather(1, following).sum(), -dense.sum(), divergence.sum(), (found.argmax(-1) == best).sum()]
    return torch.tensor([len(found), *(float(figure) for figure in figures)], dtype=torch.float64)
