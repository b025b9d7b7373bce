"""Perplexity of a model on texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lf_hf.decoder.interface import Decoder
from lf_hf.progress import progress


@torch.no_grad()
def perplexity(decoder: Decoder, texts: Mapping[str, Sequence[Tensor]], desc: str = "Perplexity") -> dict[str, float]:
    """exp of the mean negative log-likelihood a predicted token, in nats, of each text; all texts go through together.

    Parameters
    ----------
    decoder : Decoder
    texts : mapping from names to sequences of int64 tensors of shape (tokens T,)
        Texts without sequences are left out.
    """
    sequences = [(name, sequence) for name, of_text in texts.items() for sequence in of_text]
    if not sequences:
        return {}
    walk = decoder.walk([sequence for _, sequence in sequences])
    for states in progress(walk, total=decoder.num_layers, desc=desc, unit="layer"):
        last = states
    totals, counts = dict.fromkeys(texts, 0.0), dict.fromkeys(texts, 0)
    with decoder.head() as head:
        for (name, sequence), state in zip(sequences, last, strict=True):
            logits = head(state)[0, :-1].float()  # (tokens - 1, vocab)
            targets = sequence[1:].to(logits.device)
            totals[name] += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            counts[name] += len(targets)
    # A model that fusion broke can exceed what a float holds.
    means = {name: totals[name] / count for name, count in counts.items() if count}
    return {name: float(torch.tensor(mean, dtype=torch.float64).exp()) for name, mean in means.items()}
