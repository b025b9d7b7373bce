"""Text that a model writes, layer by layer: sampled as calibration text, or the most likely continuation of prompts.

All sequences take a step together, so each layer is used once a step, which is what makes models on disk bearable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from lf_hf.decoder.interface import Decoder
from lf_hf.runtime.progress import progress
from lf_hf.text.chats import CHATS, Chat, ChatForm

_IN_CACHE = 1 << 18  # about how many logits the CPU works on at a time, in float32
_DRAWN = -1  # in place of a given token: one that is drawn
_BELOW_ONE = 1 - 2**-20  # so that rounding leaves a number that is drawn below the sum of all probabilities


@torch.no_grad()
def generate(
    decoder: Decoder,
    count: int,
    length: int,
    seed: int,
    chat: ChatForm | None = None,
    first: Sequence[int] = (),
    special: Sequence[int] = (),
) -> list[Tensor]:
    """`count` sequences of `length` token ids that the model writes by itself, sampled at temperature 1.

    Each process writes a share of them. No sequence ends early. The text follows from the seed, whichever process
    writes it. With a chat form the sequences `CHATS` begin as chats, in which the model writes both sides. `first` is
    the token that the tokenizer puts before each text, if it does: without it a model may write nothing but loops.
    `special` tokens are not written, nor those that begin, end or pad texts by the config.

    Raises ValueError if the model's predictions are not finite.
    """
    config, random = decoder.config, torch.Generator().manual_seed(seed)
    # Half of them start as all texts do, half anywhere: both what a model writes most and what it seldom does.
    starts = torch.randint(config.vocab_size, (count, 1), generator=random)
    if first:
        starts = torch.cat([torch.full_like(starts, first[0]), starts], dim=1)
        starts[::2, 1] = _DRAWN
    elif config.bos_token_id is not None:
        starts[::2] = config.bos_token_id
    drawn = torch.rand(count, length - 1, generator=random)
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    named = {*special, config.bos_token_id, config.pad_token_id, *ends}
    barred = sorted(token for token in named if token is not None and 0 <= token < config.vocab_size)
    mine = decoder.processes.shard(range(count))
    are_chats = range(count)[CHATS]
    chats = {row: Chat(chat) for row, n in enumerate(mine) if chat and n in are_chats}
    written = list(_sampled(decoder, starts[mine], drawn[mine], chats, barred)) if mine else []
    shares = decoder.processes.all_gather_object(written)
    return [shares[n % len(shares)][n // len(shares)] for n in range(count)]


def _sampled(
    decoder: Decoder, starts: Tensor, drawn: Tensor, chats: Mapping[int, Chat], barred: Sequence[int]
) -> Tensor:
    """Sequences that begin with `starts` (count, given) and go on as `drawn` (count, steps), uniform in 0..1, decides.

    A token is written where the number drawn falls into its part of the cumulated probabilities.
    """
    tokens = starts[:, 0].clone()
    for row, chat in chats.items():
        tokens[row] = chat.next()
    written, cache = [tokens], DynamicCache()
    with decoder.kept_at_hand(), decoder.head() as head:
        for position in progress(range(drawn.shape[1]), desc="Writing text", unit="token"):
            logits = _next_logits(decoder, head, cache, tokens[:, None])
            rows, ends = list(chats), [chat.end for chat in chats.values()]
            may_not_end = torch.tensor([not chat.may_end for chat in chats.values()], dtype=torch.bool)
            end_logits = logits[rows, ends].masked_fill(may_not_end.to(logits.device), -torch.inf)
            logits[:, barred] = -torch.inf
            logits[rows, ends] = end_logits
            drawn = drawn.to(logits.device)
            rows_at_once = max(1, _IN_CACHE // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
            sampled = []
            for part, point in zip(logits.split(rows_at_once), drawn[:, position].split(rows_at_once), strict=True):
                cumulated = part.float().softmax(-1).cumsum(-1)
                if not torch.isfinite(cumulated[:, -1]).all():  # some logit was NaN or inf
                    raise ValueError(
                        "The dense model's predictions contain NaN or inf, so it can write no calibration text; use a "
                        "dtype of wider range."
                    )
                points = point[:, None] * cumulated[:, -1:] * _BELOW_ONE
                sampled.append(torch.searchsorted(cumulated, points, right=True)[:, 0])
            tokens = torch.cat(sampled)
            if position + 1 < starts.shape[1]:
                given = starts[:, position + 1].to(tokens.device)
                tokens = torch.where(given == _DRAWN, tokens, given)
            for (row, chat), token in zip(chats.items(), tokens[rows].tolist(), strict=True):
                tokens[row] = chat.next(token)
            written.append(tokens)
    return torch.stack([tokens.to(written[-1].device) for tokens in written], dim=1).cpu()


@torch.no_grad()
def continuations(decoder: Decoder, prompts: Sequence[Tensor], count: int) -> list[Tensor]:
    """The next `count` token ids of each prompt (tokens T_i,), the most likely one each time. None ends early."""
    longest = max(map(len, prompts))
    padding = torch.tensor([longest - len(prompt) for prompt in prompts])
    tokens = torch.stack([pad(prompt, (longest - len(prompt), 0)) for prompt in prompts])  # (B, T), then (B, 1)
    written, cache = list[Tensor](), DynamicCache()
    with decoder.kept_at_hand(), decoder.head() as head:
        for _ in range(count):
            tokens = _next_logits(decoder, head, cache, tokens, padding).argmax(-1, keepdim=True)
            written.append(tokens)
    return list(torch.cat(written, dim=1).cpu())


def _next_logits(
    decoder: Decoder,
    head: Callable[[Tensor], Tensor],
    cache: DynamicCache,
    tokens: Tensor,
    padding: Tensor | None = None,
) -> Tensor:
    """Logits (sequences B, vocab) of what follows `tokens` (B, T), which themselves follow those in the cache.

    `padding` (B,) is how many tokens of each sequence come before its text, where any do.
    """
    [states] = decoder.embed([tokens])  # (B, T, hidden)
    first, before, end = states, cache.get_seq_length(), cache.get_seq_length() + tokens.shape[1]
    places = torch.arange(before, end, device=states.device).expand(tokens.shape)
    if padding is not None:
        padding = padding.to(states.device)
        places = (places - padding[:, None]).clamp(min=0)
    inputs: dict[Any, tuple[Tensor | None, tuple[Tensor, Tensor]]] = {}
    for layer in decoder.layers(range(decoder.num_layers)):
        kind = tuple(decoder.family.layer_kind(layer).values())
        if kind not in inputs:
            inputs[kind] = decoder.mask(first, layer, end, padding), decoder.rotary(first, places, layer)
        mask, embeddings = inputs[kind]
        states = layer(
            states,
            attention_mask=mask,
            position_ids=places,
            position_embeddings=embeddings,
            **{decoder.family.cache_argument: cache},
        )
    return head(states[:, -1:])[:, 0]
