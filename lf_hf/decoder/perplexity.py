"""Perplexity of a model on texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lf_hf.decoder.interface import Decoder
from lf_hf.numerics import in_float64
from lf_hf.progress import progress

_ROWS = 512  # tokens whose predictions are there at a time


@torch.no_grad()
def perplexity(decoder: Decoder, texts: Mapping[str, Sequence[Tensor]], desc: str = "Perplexity") -> dict[str, float]:
    """exp of the mean negative log-likelihood a predicted token, in nats, of each text; all texts go through together.

    Parameters
    ----------
    decoder : Decoder
        Each of its processes runs a share of each text.
    texts : mapping from names to sequences of int64 tensors of shape (tokens T,)
        Texts without sequences are left out.
    """
    texts = {name: sequences for name, sequences in texts.items() if sequences}
    if not texts:
        return {}
    batches = [
        (number, batch)
        for number, sequences in enumerate(texts.values())
        for batch in decoder.batches(decoder.processes.share(sequences))
    ]
    walk = decoder.walk([batch for _, batch in batches])
    for states in progress(walk, total=decoder.num_layers, desc=desc, unit="layer"):
        last = states
    sums = torch.zeros(len(texts), 2, dtype=torch.float64)  # of negative log-likelihoods, and of tokens
    with decoder.head() as head:
        for (number, batch), state in zip(batches, last, strict=True):
            targets = batch[:, 1:].to(state.device).flatten()
            for rows, wanted in zip(state[:, :-1].flatten(0, 1).split(_ROWS), targets.split(_ROWS), strict=True):
                logits = head(rows[None])[0].float()  # (tokens, vocab)
                loss = torch.nn.functional.cross_entropy(logits, wanted.to(logits.device), reduction="sum")
                of_rows = in_float64(torch.stack([loss, torch.full_like(loss, len(wanted))]))
                sums = sums.to(of_rows.device)
                sums[number] += of_rows
    found = iter(decoder.processes.summed(sums.flatten()))
    means = {name: total / count for name, total, count in zip(texts, found, found, strict=True) if count}
    # A model that fusion broke can exceed what a float holds.
    return {name: float(torch.tensor(mean, dtype=torch.float64).exp()) for name, mean in means.items()}
