"""The distillation loss with its gradient, some tokens at a time, so that logits of a whole batch never exist.

This module knows nothing of models: it takes final states, the weight of a head, and the teacher's predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, log_softmax

from lf_hf.decoder.predictions import kl_divergence

LOGITS = 1 << 27
"""About how many logits exist at a time, in the type of the computation."""
FLOAT_LOGITS, FLOAT_LOGITS_ON_CPU = 1 << 24, 1 << 17
"""How many of them are worked on at a time in float32: on the CPU so few that they stay in its cache."""

ToLogits = Callable[[Tensor], Tensor]
"""What a family does to the output of its head, entry by entry."""

LogProbs = Callable[[slice, Tensor], Tensor]
"""Teacher's log-probabilities of some rows of a part; the second argument is the student's, of the same shape."""


def unchanged(logits: Tensor) -> Tensor:
    return logits


@dataclass(frozen=True)
class FullTargets:
    """All of the teacher's predictions.

    `states` (sequences B, tokens T, hidden of the teacher) are its final states after the norm, and `weight` (vocab,
    hidden of the teacher) is its head's.
    """

    states: Tensor
    weight: Tensor
    to_logits: ToLogits = unchanged

    def part(self, rows: slice, temperature: float) -> LogProbs:
        """Of some of the batch's tokens, which are numbered through its sequences."""
        logits = linear(self.states.flatten(0, 1)[rows].to(self.weight.dtype), self.weight)
        return lambda some, _: log_softmax(self.to_logits(logits[some].float()) / temperature, -1)


@dataclass(frozen=True)
class TopTargets:
    """The most likely of the teacher's predictions of each token.

    `ids` and `log_probs` are (sequences B, tokens T, k). What they leave of probability 1 belongs to all other tokens
    together. `norms` (B, T) is what to subtract from log-probabilities divided by the training's temperature to make
    them log-probabilities at that temperature.
    """

    ids: Tensor
    log_probs: Tensor
    norms: Tensor

    def part(self, rows: slice, temperature: float) -> LogProbs:
        ids, log_probs = (tensor.flatten(0, 1)[rows] for tensor in (self.ids.long(), self.log_probs.float()))
        if temperature != 1:
            log_probs = log_probs / temperature - self.norms.flatten()[rows, None]
        return lambda some, student: _completed(ids[some], log_probs[some], student)


Targets = FullTargets | TopTargets
"""The teacher's predictions of a batch."""


def _completed(ids: Tensor, log_probs: Tensor, student: Tensor) -> Tensor:
    """Log-probabilities of all tokens from those of the top (rows, k): the rest is spread as the student spreads it.

    KL and its gradient are then those between two distributions in which all other tokens count as one.
    """
    tiny = torch.finfo(torch.float32).tiny
    rest = (1 - log_probs.exp().sum(-1, keepdim=True)).clamp(min=tiny)
    # Summed up without the top, as 1 minus the sum of the top loses what is small.
    of_student = student.exp().scatter_(1, ids, 0).sum(-1, keepdim=True).clamp(min=tiny)
    return (student + (rest.log() - of_student.log())).scatter_(1, ids, log_probs)


@dataclass(frozen=True)
class Loss:
    """What is minimised: `1 - next_token_share` of the divergence at `temperature` times its square, and the rest."""

    temperature: float = 1.0
    next_token_share: float = 0.0


def distillation_loss(
    states: Tensor, weight: Tensor, ids: Tensor, targets: Targets, loss: Loss, to_logits: ToLogits = unchanged
) -> Tensor:
    """Mean over tokens of KL(teacher || student), in nats, times temperature squared, mixed with next-token loss.

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
    """Makes the gradient together with the loss, as softmaxes are half of it already; logits are never kept."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, ids: Tensor, targets: Targets, loss: Loss, to_logits: ToLogits
    ) -> Tensor:
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
        if dtype == torch.float16:  # in which gradients of single tokens vanish
            dtype = torch.float32
        needs_states, needs_weight = ctx.needs_input_grad[:2]
        with torch.autocast(kind, enabled=False):
            flat, head = states.flatten(0, 1).to(dtype), weight.to(dtype)  # (B T, hidden), (vocab, hidden)
            # The tokens that follow; -1 after the last one of each sequence.
            next_ids = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -1)], dim=1).flatten()
            grad_states = torch.empty_like(flat, dtype=states.dtype) if needs_states else None
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
            total = torch.zeros((), device=states.device)
            counts = len(next_ids), int((next_ids >= 0).sum())
            for rows in parts(len(flat), len(weight), LOGITS):
                logits, teacher = linear(flat[rows], head), targets.part(rows, loss.temperature)
                for some in parts(len(logits), len(weight), FLOAT_LOGITS_ON_CPU if kind == "cpu" else FLOAT_LOGITS):
                    value, gradient = _of_rows(
                        logits[some], to_logits, teacher, some, next_ids[rows][some], loss, counts
                    )
                    total += value
                    logits[some] = gradient  # which takes the place of what it is of
                if grad_states is not None:
                    grad_states[rows] = (logits @ head).to(states.dtype)
                if grad_weight is not None:
                    grad_weight += logits.T @ flat[rows]
        ctx.shape, ctx.weight_dtype = states.shape, weight.dtype
        ctx.save_for_backward(grad_states, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_states, grad_weight = ctx.saved_tensors
        of_states = None if grad_states is None else grad_states.view(ctx.shape) * grad_output
        of_weight = None if grad_weight is None else (grad_weight * grad_output).to(ctx.weight_dtype)
        return of_states, of_weight, None, None, None, None


def parts(count: int, vocab_size: int, logits: int) -> Iterator[slice]:
    """`count` tokens, as many at a time as have about so many logits."""
    rows = max(1, logits // vocab_size)
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))


def _of_rows(
    head_output: Tensor,
    to_logits: ToLogits,
    teacher: LogProbs,
    some: slice,
    next_ids: Tensor,
    loss: Loss,
    counts: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """What some rows add to the loss, and its gradient at the output of the head, (rows, vocab)."""
    of_head, temperature, share = head_output.float(), loss.temperature, loss.next_token_share
    with torch.enable_grad():
        attached = to_logits(of_head.requires_grad_())
    logits = attached.detach()
    student = log_softmax(logits if temperature == 1 else logits / temperature, -1)
    expected = teacher(some, student)
    probabilities = expected.exp()
    of_teacher = (1 - share) * temperature / counts[0]
    value = kl_divergence(expected, student, probabilities).sum() * (of_teacher * temperature)
    plain = student if temperature == 1 else log_softmax(logits, -1)
    next_token_weights = (next_ids >= 0)[:, None] * (share / max(1, counts[1]))
    index = next_ids.clamp(min=0)[:, None]
    value = value - (plain.gather(1, index) * next_token_weights).sum()
    if temperature == 1:
        gradient = student.exp_().mul_(next_token_weights + of_teacher)
    else:
        gradient = plain.exp_().mul_(next_token_weights).add_(student.exp_(), alpha=of_teacher)
    gradient.sub_(probabilities, alpha=of_teacher).scatter_add_(1, index, -next_token_weights)
    if attached is not of_head:
        [gradient] = torch.autograd.grad(attached, of_head, gradient)
    return value, gradient
