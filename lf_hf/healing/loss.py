"""The loss of a distillation, with its gradient, in parts over tokens: no more than a part's logits are there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, log_softmax

LOGITS = 1 << 24
"""Logits of a part, about."""

ToLogits = Callable[[Tensor], Tensor]
"""Makes a model's logits of those of its head, entry by entry."""


def unchanged(logits: Tensor) -> Tensor:
    return logits


@dataclass(frozen=True)
class FullTargets:
    """All of the base's predictions, as what its head makes of its final states.

    `states` is (sequences B, tokens T, hidden of the base), after the norm, and `weight` (vocab, hidden of the base).
    """

    states: Tensor
    weight: Tensor
    to_logits: ToLogits = unchanged

    def log_probs(self, rows: slice, temperature: float) -> Tensor:
        """(rows, vocab) in float32."""
        logits = linear(self.states.flatten(0, 1)[rows].to(self.weight.dtype), self.weight)
        return log_softmax(self.to_logits(logits.float()) / temperature, -1)


@dataclass(frozen=True)
class TopTargets:
    """The most likely of the base's predictions of each token.

    `ids` and `log_probs` are (sequences B, tokens T, k). What they leave of probability 1 is that of all other tokens
    together. `own_log_probs` (B, T) is that of the text's next token. `norms` (B, T) is what is to be taken off
    log-probabilities of all tokens over the training's temperature, so that they are such at that temperature.
    """

    ids: Tensor
    log_probs: Tensor
    own_log_probs: Tensor
    norms: Tensor

    def at(self, rows: slice, temperature: float) -> tuple[Tensor, Tensor]:
        """Ids and log-probabilities, (rows, k), at temperature 1 or that of the training."""
        ids, log_probs, norms = (tensor.flatten(0, 1)[rows] for tensor in (self.ids, self.log_probs, self.norms))
        if temperature == 1:
            return ids, log_probs
        return ids, log_probs.float() / temperature - norms[:, None]


@dataclass(frozen=True)
class Loss:
    """What is to be minimised: `1 - next_token_share` of the divergence at `temperature`, times its square."""

    temperature: float = 1.0
    next_token_share: float = 0.0


def distillation_loss(
    states: Tensor,
    weight: Tensor,
    ids: Tensor,
    targets: FullTargets | TopTargets,
    loss: Loss,
    to_logits: ToLogits = unchanged,
) -> Tensor:
    """Mean over tokens of KL(base || student), in nats, times temperature squared, mixed with next-token loss.

    Parameters
    ----------
    states : tensor of shape (sequences B, tokens T, hidden)
        The student's final states, after the norm.
    weight : tensor of shape (vocab, hidden)
        Of the student's head.
    ids : int64 tensor of shape (B, T)
        The text, for the next-token loss, which leaves each sequence's last position out.
    targets : FullTargets or TopTargets
    loss : Loss
    to_logits : callable
        Of the student.

    Returns
    -------
    float32 tensor of shape ()
    """
    return _Distillation.apply(states, weight, ids, targets, loss, to_logits)


class _Distillation(torch.autograd.Function):
    """The gradient is made together with the loss, as softmaxes are half of it already; logits are never kept."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        ids: Tensor,
        targets: FullTargets | TopTargets,
        loss: Loss,
        to_logits: ToLogits,
    ) -> Tensor:
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
        if dtype == torch.float16:  # in which gradients of single tokens vanish
            dtype = torch.float32
        needs_states, needs_weight = ctx.needs_input_grad[:2]
        with torch.autocast(kind, enabled=False):
            flat, head = states.flatten(0, 1).to(dtype), weight.to(dtype)  # (B T, hidden), (vocab, hidden)
            following = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -1)], dim=1).flatten()  # (B T,)
            counts = len(following), int((following >= 0).sum())
            grad_states = torch.empty_like(flat, dtype=states.dtype) if needs_states else None
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
            total = torch.zeros((), device=states.device)
            for rows in parts(len(flat), len(weight)):
                of_head = linear(flat[rows], head).float()  # (rows, vocab)
                with torch.enable_grad():
                    logits = to_logits(of_head.requires_grad_())
                value, gradient = _of_part(logits.detach(), following[rows], rows, targets, loss, counts)
                total += value
                if logits is not of_head:
                    [gradient] = torch.autograd.grad(logits, of_head, gradient)
                if grad_states is not None or grad_weight is not None:
                    gradient = gradient.to(dtype)
                if grad_states is not None:
                    grad_states[rows] = (gradient @ head).to(states.dtype)
                if grad_weight is not None:
                    grad_weight += gradient.T @ flat[rows]
        ctx.shape = states.shape
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(grad_states, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_states, grad_weight = ctx.saved_tensors
        return (
            None if grad_states is None else grad_states.view(ctx.shape) * grad_output,
            None if grad_weight is None else (grad_weight * grad_output).to(ctx.weight_dtype),
            None,
            None,
            None,
            None,
        )


def parts(count: int, vocab_size: int) -> Iterator[slice]:
    """`count` tokens, some at a time."""
    rows = max(1, LOGITS // vocab_size)
    for start in range(0, count, rows):
        yield slice(start, min(start + rows, count))


def _of_part(
    logits: Tensor,
    following: Tensor,
    rows: slice,
    targets: FullTargets | TopTargets,
    loss: Loss,
    counts: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """A part's share of the loss, and its gradient at `logits`, (rows, vocab)."""
    temperature, share = loss.temperature, loss.next_token_share
    value, gradient = torch.zeros((), device=logits.device), torch.zeros((), device=logits.device)
    if share < 1:
        found = log_softmax(logits / temperature, -1)
        if isinstance(targets, FullTargets):
            divergence, gradient = full_divergence(found, targets.log_probs(rows, temperature))
        else:
            divergence, gradient = top_divergence(found, *targets.at(rows, temperature))
        weight = (1 - share) * temperature / counts[0]
        value, gradient = divergence.sum() * weight * temperature, gradient.mul_(weight)
    if share > 0:
        found = log_softmax(logits, -1)
        there = (following >= 0)[:, None]
        index = following.clamp(min=0)[:, None]
        weight = share / max(1, counts[1])
        value = value - (found.gather(1, index) * there).sum() * weight
        own = found.exp_().scatter_add_(1, index, torch.full_like(index, -1, dtype=found.dtype))
        gradient = gradient + own * (there * weight)
    return value, gradient


def full_divergence(found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """KL(wanted || found) of each row, and its gradient at the logits of `found`; log-probabilities of all tokens."""
    p = wanted.exp()
    return torch.linalg.vecdot(p, wanted - found), found.exp().sub_(p)


def top_divergence(found: Tensor, ids: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """As `full_divergence`, with all tokens that are not in `ids` (rows, k) taken for one."""
    ids, wanted = ids.long(), log_probs.float()
    p = wanted.exp()
    rest_p = (1 - p.sum(-1)).clamp(min=0)  # (rows,)
    of_top = found.gather(1, ids)
    q = found.exp()
    # Summed up without those of the top, as 1 minus their sum loses what is small.
    rest_q = q.scatter(1, ids, 0).sum(-1)
    tiny = torch.finfo(q.dtype).tiny
    divergence = (p * (wanted - of_top)).sum(-1)
    some = (rest_p > 0) & (rest_q > 0)
    divergence = divergence + torch.where(
        some, rest_p * (rest_p.clamp(min=tiny).log() - rest_q.clamp(min=tiny).log()), 0.0
    )
    scale = torch.where(some, 1 - rest_p / rest_q.clamp(min=tiny), 1.0)
    gradient = (q * scale[:, None]).scatter(1, ids, q.gather(1, ids) - p)
    return divergence, gradient
