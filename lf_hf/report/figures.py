"""The figures of a model's predictions of a text, a row each: reports, pages, sweeps and budgets read `FIGURES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lf_hf.runtime.numerics import kl_divergence


@dataclass(frozen=True)
class Figure:
    """A figure of a model's predictions of each token of a text from the tokens before it, beside the dense model's.

    Attributes
    ----------
    name, label : str
        Its key in reports and results, and its name in tables.
    meaning : str
        A sentence for people.
    form, change : str
        How a value is written, as `format` has it, and how it is compared with the base's: as "times", as "percent",
        or not at all.
    per_token : callable
        A value for each token, float32 of shape (tokens T,), from log-probabilities (T, vocab) of the model and of the
        dense one, and the ids of the tokens (T,). The figure is `of_mean` of its mean.
    dense : float or None
        The dense model's by definition; None where it has to be measured.
    limit : str
        The setting that limits what is lost of it: of "times" the ratio to the base's, else the figure itself.
    """

    name: str
    label: str
    meaning: str
    form: str
    change: str
    higher_is_better: bool
    per_token: Callable[[Tensor, Tensor, Tensor], Tensor]
    of_mean: Callable[[float], float] = float
    dense: float | None = None
    limit: str = ""


def _loss(log_probs: Tensor, _: Tensor, next_ids: Tensor) -> Tensor:
    return -log_probs.gather(-1, next_ids[:, None])[:, 0]


def _exp(loss: float) -> float:
    return torch.tensor(loss, dtype=torch.float64).exp().item()  # inf where no float is large enough


def _divergence(log_probs: Tensor, dense: Tensor, _: Tensor) -> Tensor:
    return kl_divergence(dense, log_probs)


def _agreement(log_probs: Tensor, dense: Tensor, _: Tensor) -> Tensor:
    return (log_probs.max(-1).indices == dense.max(-1).indices).to(log_probs)  # faster than argmax


FIGURES = (
    Figure(
        "perplexity",
        "perplexity",
        "Perplexity: the number of equally likely next tokens that a model is as unsure between, so lower is better.",
        ".4g",
        "times",
        higher_is_better=False,
        per_token=_loss,
        of_mean=_exp,
        limit="max_perplexity_ratio",
    ),
    Figure(
        "divergence",
        "divergence",
        "Divergence: how far predictions of the next token are from the base's, KL(base || fused) in nats a token.",
        ".4g",
        "none",
        higher_is_better=False,
        per_token=_divergence,
        dense=0.0,
        limit="max_divergence",
    ),
    Figure(
        "agreement",
        "agreement",
        "Agreement: how often the most likely next token is the base's.",
        ".1%",
        "percent",
        higher_is_better=True,
        per_token=_agreement,
        dense=1.0,
    ),
)
"""In the order of tables."""


def dense_figures(perplexity: float) -> dict[str, float]:
    """The dense model's figures of a text, by name."""
    return {figure.name: perplexity if figure.dense is None else figure.dense for figure in FIGURES}
