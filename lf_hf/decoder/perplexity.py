"""Perplexity of a model on texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from lf_hf.decoder.interface import Decoder
from lf_hf.decoder.predictions import batched, final_states, predictions


def perplexity(decoder: Decoder, texts: Mapping[str, Sequence[Tensor]], desc: str = "Perplexity") -> dict[str, float]:
    """exp of the mean negative log-likelihood a predicted token, in nats, of each text; all texts go through together.

    Parameters
    ----------
    decoder : Decoder
        Each of its processes runs a share of each text.
    texts : mapping from names to sequences of int64 tensors of shape (tokens T,)
        Texts without sequences are left out.
    """
    ids = batched(decoder, texts)
    found = predictions(decoder, ids, final_states(decoder, ids, desc))
    return {name: of_text.perplexity for name, of_text in found.items()}
