"""The distillation loss with its gradient, some tokens at a time, so that logits of a whole batch never exist.

This module knows nothing of models: it takes final states, the weight of a head, and the teacher's predictions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, log_softmax, pad

from lf_hf.runtime.amounts import FLOAT_LOGITS, FLOAT_LOGITS_ON_CPU, TRAINED_LOGITS

ToLogits = Callable[[Tensor], Tensor]
"""What a family does to the output of its head, entry by entry."""


@dataclass(frozen=True)
class Targets:
    """The teacher's predictions of a batch.

    `states` (sequences B, tokens T, hidden of the teacher) are its final states after the norm, and `weight` (vocab,
    hidden of the teacher) is its head's. `to_logits` is the student's, too, as both are of one family.
    """

    states: Tensor
    weight: Tensor
    to_logits: ToLogits


@dataclass(frozen=True)
class Loss:
    """What is minimised: `1 - next_token_share` of the divergence at `temperature` times its square, and the rest."""

    temperature: float = 1.0
    next_token_share: float = 0.0


def distillation_loss(states: Tensor, weight: Tensor, ids: Tensor, targets: Targets, loss: Loss) -> Tensor:
    """Mean over tokens of KL(teacher || student), in nats, times temperature squared, mixed with next-token loss.

    Parameters
    ----------
    states : tensor of shape (sequences B, tokens T, hidden)
        The student's final states, after the norm.
    weight : tensor of shape (vocab, hidden)
        The student's head.
    ids : int64 tensor of shape (B, T)
        The text, for the next-token loss, which leaves each sequence's last position out.
    targets : Targets
    loss : Loss

    Returns
    -------
    float32 tensor of shape ()
    """
    return _Distillation.apply(states, weight, ids, targets, loss)


class _Distillation(torch.autograd.Function):
    """Makes the gradient together with the loss, as softmaxes are half of it already; logits are never kept."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, ids: Tensor, targets: Targets, loss: Loss) -> Tensor:
        device, vocab_size = states.device, len(weight)
        float_logits = FLOAT_LOGITS_ON_CPU if device.type == "cpu" else FLOAT_LOGITS
        dtype = _computation_dtype(states)
        next_ids = pad(ids[:, 1:], (0, 1), value=-1).flatten()  # -1 after the last token of a sequence
        # Weights of a token: of its divergence, divided by the temperature, and of its next-token loss.
        divergence = (1 - loss.next_token_share) * loss.temperature / ids.numel()
        next_token = loss.next_token_share / max(1, ids[:, 1:].numel())
        per_token = partial(_loss_and_gradient, loss.temperature, divergence, next_token, targets.to_logits)
        total = torch.zeros((), device=device)
        grad_states = torch.empty_like(states).flatten(0, 1) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        with torch.autocast(device.type, enabled=False):
            flat = states.flatten(0, 1).to(dtype)  # (B T, hidden)
            head = weight.to(dtype)
            of_teacher = targets.states.flatten(0, 1)
            for rows in _row_slices(len(flat), vocab_size, TRAINED_LOGITS):
                logits = linear(flat[rows], head)
                teacher = linear(of_teacher[rows].to(targets.weight.dtype), targets.weight)
                following = next_ids[rows]
                for part in _row_slices(len(logits), vocab_size, float_logits):
                    expected = log_softmax(targets.to_logits(teacher[part].float()) / loss.temperature, -1)
                    value, gradient = per_token(logits[part], expected, following[part])
                    total += value
                    logits[part] = gradient  # which takes the place of the logits
                if grad_states is not None:  # of held-out text there is none
                    grad_states[rows] = logits @ head
                if grad_weight is not None:
                    grad_weight += logits.T @ flat[rows]
                del logits, teacher, expected  # before the next ones are made
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(None if grad_states is None else grad_states.view_as(states), grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_states, grad_weight = ctx.saved_tensors
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_output).to(ctx.weight_dtype)
        return grad_states * grad_output, grad_weight, None, None, None


def _row_slices(count: int, vocab_size: int, logits: int) -> list[slice]:
    """`count` tokens in slices, each of as many as have about `logits` logits."""
    step = max(1, logits // vocab_size)
    return [slice(start, start + step) for start in range(0, count, step)]


def _computation_dtype(states: Tensor) -> torch.dtype:
    kind = states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
    return torch.float32 if dtype == torch.float16 else dtype  # in which gradients of single tokens do not vanish


def _loss_and_gradient(
    temperature: float,
    divergence: float,
    next_token: float,
    to_logits: ToLogits,
    head_output: Tensor,
    expected: Tensor,
    next_ids: Tensor,
) -> tuple[Tensor, Tensor]:
    """What some tokens add to the loss, and its gradient at the output of the head, (tokens, vocab).

    `divergence` and `next_token` are weights of a token, and `expected` are the teacher's log-probabilities.
    """
    output = head_output.float().requires_grad_()
    with torch.enable_grad():
        attached = to_logits(output)
    logits = attached.detach()
    student = plain = log_softmax(logits, -1)
    if temperature != 1:
        student = log_softmax(logits / temperature, -1)
    probabilities = expected.exp()
    index = next_ids.clamp(min=0)[:, None]
    next_tokens = (next_ids >= 0)[:, None] * next_token
    value = torch.linalg.vecdot(probabilities, expected - student).sum() * (divergence * temperature)
    value = value - (plain.gather(1, index) * next_tokens).sum()
    if temperature == 1:
        gradient = student.exp_().mul_(next_tokens + divergence)
    else:
        gradient = plain.exp_().mul_(next_tokens).add_(student.exp_(), alpha=divergence)
    gradient.sub_(probabilities, alpha=divergence)
    gradient.scatter_add_(1, index, -next_tokens)
    if attached is not output:
        [gradient] = torch.autograd.grad(attached, output, gradient)
    return value, gradient
