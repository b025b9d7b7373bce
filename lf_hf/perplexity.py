"""Perplexity of a model on text that was not used to fuse it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from lf_hf.decoder import Decoder


def pack_tokens(tokenizer: PreTrainedTokenizerBase, text: str, length: int, max_tokens: int) -> list[Tensor]:
    """The first `max_tokens` tokens of a text as sequences of at most `length` tokens.

    Each sequence starts with the tokenizer's own beginning-of-sequence token if it adds one by itself. A last
    sequence of fewer than two tokens is left out.

    Returns
    -------
    list of int64 tensors of shape (tokens <= length,)
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:max_tokens]
    prefix = [token for token in tokenizer("a")["input_ids"][:1] if token == tokenizer.bos_token_id]
    step = length - len(prefix)
    pieces = [prefix + ids[start : start + step] for start in range(0, len(ids), step)]
    return [torch.tensor(piece) for piece in pieces if len(piece) > 1]


@torch.inference_mode()
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
