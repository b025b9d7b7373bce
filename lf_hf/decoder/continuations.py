"""How a model goes on from a prompt, by the most likely token each time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.utils.generic import is_flash_attention_requested

from lf_hf.decoder.interface import Decoder


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
            device, end = hidden_states.device, longest + step
            keys, queries = torch.arange(end, device=device), torch.arange(end - tokens.shape[1], end, device=device)
            padding = padding.to(device)
            position_ids = (queries - padding[:, None]).clamp(min=0)  # (B, T)
            is_text = keys >= padding[:, None]  # (B, keys)
            mask = is_text[:, None, None] & (keys <= queries[:, None])  # (B, 1, T, keys)
            if is_flash_attention_requested(decoder.config):  # which is causal by itself
                mask = is_text
            else:
                lowest = torch.finfo(hidden_states.dtype).min
                mask = torch.zeros_like(mask, dtype=hidden_states.dtype).masked_fill(~mask, lowest)
            cos, sin = (table.to(device) for table in decoder.rotary_emb(hidden_states, position_ids))
            for layer in decoder.layers(range(decoder.num_layers)):
                # By position, as the name of the cache's parameter depends on the version of transformers.
                hidden_states = layer(hidden_states, mask, position_ids, cache, position_embeddings=(cos, sin))
            tokens = head(hidden_states[:, -1:]).argmax(-1)  # (B, 1)
            written.append(tokens)
    return list(torch.cat(written, dim=1).cpu())
