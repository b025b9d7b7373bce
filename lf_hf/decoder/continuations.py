"""How a model goes on from a prompt, by the most likely token each time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from lf_hf.decoder.interface import CachedStep, Decoder


@torch.no_grad()
def continuations(decoder: Decoder, prompts: Sequence[Tensor], count: int) -> list[Tensor]:
    """The next `count` token ids of each prompt, of shape (tokens T_i,). None of them ends early.

    All prompts take a step together, so that each layer is used once a step: `count` times in all.
    """
    longest = max(map(len, prompts))
    padding = torch.tensor([longest - len(prompt) for prompt in prompts])
    tokens = torch.stack([pad(prompt, (longest - len(prompt), 0)) for prompt in prompts])  # (B, T), then (B, 1)
    written, cache = list[Tensor](), DynamicCache()
    with decoder.kept_at_hand(), decoder.head() as head:
        for step in range(count):
            [hidden_states] = decoder.embed([tokens])  # (B, T, hidden)
            device = hidden_states.device
            padding = padding.to(device)
            queries = torch.arange(longest + step - tokens.shape[1], longest + step, device=device)
            position_ids = (queries - padding[:, None]).clamp(min=0)  # (B, T)
            following = CachedStep(decoder, hidden_states, position_ids, cache, padding)
            for layer in decoder.layers(range(decoder.num_layers)):
                hidden_states = following.run(layer, hidden_states)
            tokens = head(hidden_states[:, -1:]).argmax(-1)  # (B, 1)
            written.append(tokens)
    return list(torch.cat(written, dim=1).cpu())
