"""What a model predicts on texts: how well, and how far from what the dense model predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div, nll_loss

from lf_hf.decoder.interface import Decoder
from lf_hf.runtime.numerics import in_float64
from lf_hf.runtime.progress import progress

LOGITS = 1 << 23
"""How many logits of a model are there at a time, about: of a large vocabulary, those of few tokens."""

Batches = Mapping[str, Sequence[Tensor]]
"""Of each text, by its name: token ids of shape (sequences B, tokens T), or states of shape (B, T, hidden)."""


@dataclass(frozen=True)
class Predictions:
    """A model's predictions of each token of a text from those before it.

    `perplexity` is exp of the mean negative log-likelihood. Against the dense model's predictions, `divergence` is the
    mean of KL(dense || model) in nats a token, and `agreement` the share of tokens at which both have the same most
    likely token. The dense model is at 0 and 1.
    """

    perplexity: float
    divergence: float = 0.0
    agreement: float = 1.0


def batched(decoder: Decoder, texts: Mapping[str, Sequence[Tensor]]) -> dict[str, list[Tensor]]:
    """This process's share of each text, sequences of token ids of shape (tokens T,), as batches."""
    return {name: decoder.batches(decoder.processes.shard(sequences)) for name, sequences in texts.items()}


@torch.no_grad()
def final_states(decoder: Decoder, ids: Batches, desc: str) -> dict[str, list[Tensor]]:
    """States before the final norm; all texts go through the layers together."""
    batches = [batch for of_text in ids.values() for batch in of_text]
    last: Sequence[Tensor] = []
    if batches:
        for states in progress(decoder.walk(batches), total=decoder.num_layers, desc=desc, unit="layer"):
            last = states
    found = iter(last)
    return {name: [next(found) for _ in of_text] for name, of_text in ids.items()}


@torch.no_grad()
def predictions(
    decoder: Decoder, ids: Batches, states: Batches, dense: Batches | None = None, base: Decoder | None = None
) -> dict[str, Predictions]:
    """Predictions of each text that has tokens, from final states, and from the dense model's to compare with.

    Each process gives its share of the text, and gets what all of them find. `base` is the dense model where it may
    have another final norm or head than the decoder's; fusing changes neither.
    """
    if not ids:
        return {}
    with ExitStack() as stack:
        head = stack.enter_context(decoder.head())
        of_base = head if base is None else stack.enter_context(base.head())
        sums = [
            prediction_sums(
                (head, of_base),
                zip(states[name], of_text, [None] * len(of_text) if dense is None else dense[name], strict=True),
                max(1, LOGITS // decoder.config.vocab_size),
            )
            for name, of_text in ids.items()
        ]
    device = max(sums, key=lambda of_text: of_text.device.type != "cpu").device  # a text without batches has none
    of_all = iter(decoder.processes.all_reduce_sums(torch.cat([of_text.to(device) for of_text in sums])))
    return {
        # A model that fusion broke can exceed what a float holds.
        name: Predictions(float(torch.tensor(loss / count, dtype=torch.float64).exp()), apart / count, agreed / count)
        for name, count, loss, apart, agreed in zip(ids, of_all, of_all, of_all, of_all, strict=True)
        if count
    }


def prediction_sums(
    heads: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]],
    batches: Iterable[tuple[Tensor, Tensor, Tensor | None]],
    rows: int,
) -> Tensor:
    """Sums over predicted tokens, on the head's device.

    Parameters
    ----------
    heads : pair of callables
        The model's and the dense model's, from states (1, tokens, hidden) to logits (1, tokens, vocab).
    batches : iterable of tuples
        Final states of shape (sequences B, tokens T, hidden), token ids (B, T), and the dense model's states; None for
        these where the model is the dense one.
    rows : int
        Tokens whose predictions are there at a time.

    Returns
    -------
    float64 tensor of shape (4,)
        How many tokens were predicted; negative log-likelihoods and divergences, in nats; and how many times the most
        likely token was the dense model's.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    for states, ids, dense in batches:
        targets = ids[:, 1:].flatten().to(states.device).split(rows)
        expected = _rows(states if dense is None else dense.to(states.device), rows)
        for part, wanted, compared in zip(_rows(states, rows), targets, expected, strict=True):
            logits = heads[0](part)[0].float()  # (tokens, vocab)
            found = logits.log_softmax(-1)
            loss = nll_loss(found, wanted.to(found.device), reduction="none")  # (tokens,), as all that follows
            count = torch.ones_like(loss)
            apart, agreed = torch.zeros_like(loss), count
            if dense is not None:
                of_dense = heads[1](compared)[0].float()
                agreed = logits.argmax(-1) == of_dense.argmax(-1)
                apart = kl_div(found, of_dense.log_softmax(-1), reduction="none", log_target=True).sum(-1)
            of_rows = in_float64(torch.stack([count, loss, apart, agreed.to(loss)]))  # (4, tokens)
            sums = sums.to(of_rows.device) + of_rows.sum(-1)
    return sums


def _rows(states: Tensor, rows: int) -> tuple[Tensor, ...]:
    """States that predict a token, some at a time: (sequences B, tokens T, hidden) as parts of (1, rows, hidden)."""
    return states[:, :-1].flatten(0, 1)[None].split(rows, dim=1)
