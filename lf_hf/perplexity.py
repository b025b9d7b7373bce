"""Perplexity of a model on text that was not used to fuse it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.utils import logging

from lf_hf.decoder import Decoder


@torch.no_grad()
def perplexity(decoder: Decoder, sequences: Sequence[Tensor], desc: str = "Perplexity") -> float:
    """exp of the mean negative log-likelihood a predicted token, in nats, over sequences of token ids."""
    total, count = 0.0, 0
    for states in logging.tqdm(decoder.walk(sequences), total=decoder.num_layers, desc=desc, unit="layer"):
        last = states
    with decoder.head() as head:
        for sequence, state in zip(sequences, last, strict=True):
            logits = head(state)[0, :-1].float()  # (tokens - 1, vocab)
            targets = sequence[1:].to(logits.device)
            total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            count += len(targets)
    # A model that fusion broke can exceed what a float holds.
    return float(torch.tensor(total / count, dtype=torch.float64).exp())
