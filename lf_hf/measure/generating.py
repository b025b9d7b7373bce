"""Text that a model writes: sampled as calibration text, or the most likely continuation of prompts.

Many sequences take a step together, so each layer is read once a step, which makes models on disk bearable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerBase

from lf_hf.decoder.decoder import Decoder, Head
from lf_hf.decoder.demand import Need, Setup, Work, times
from lf_hf.runtime.amounts import LOGITS_IN_CACHE, WRITTEN_LENGTH, WRITTEN_TOGETHER
from lf_hf.runtime.progress import progress
from lf_hf.text.chats import CHATS, Chat, ChatForm, bos_prefix, chat_form, special_tokens

_SAMPLED = -1  # in place of a given token: one that is sampled
_BELOW_ONE = 1 - 2**-20  # keeps a point below the sum of all probabilities in spite of rounding


def text_writer(decoder: Decoder, tokenizer: PreTrainedTokenizerBase) -> tuple[Callable[..., list[Tensor]], bool]:
    """`generate` with what the tokenizer says of chats and special tokens; and whether it writes chats."""
    form = chat_form(tokenizer, decoder.config.vocab_size)
    prefix, special = bos_prefix(tokenizer), special_tokens(tokenizer)
    return partial(generate, decoder, chat=form, prefix=prefix, special=special), form is not None


@torch.no_grad()
def generate(
    decoder: Decoder,
    count: int,
    length: int,
    seed: int,
    chat: ChatForm | None = None,
    prefix: Sequence[int] = (),
    special: Sequence[int] = (),
) -> list[Tensor]:
    """`count` sequences of `length` token ids that the model writes by itself, sampled at temperature 1.

    The text follows from the seed, up to rounding, which may change a token. No sequence ends early. With a chat form
    the sequences `CHATS` are chats, in which the model writes both sides. `prefix` is the tokenizer's `bos_prefix`,
    without which a model may write nothing but loops. Neither `special` tokens are written nor those that begin, end
    or pad texts by the config.

    Raises ValueError if the model's predictions are not finite.
    """
    random = torch.Generator().manual_seed(seed)
    starts = _draw_starts(decoder.config, count, prefix, random)
    points = torch.rand(count, length - 1, generator=random)
    barred = _barred_ids(decoder.config, special)
    written: list[Tensor] = []
    for numbers in torch.arange(count).split(WRITTEN_TOGETHER):
        are_chats = [chat is not None and number in range(count)[CHATS] for number in numbers.tolist()]
        chats = {row: Chat(chat) for row, is_chat in enumerate(are_chats) if chat and is_chat}
        written += _sample_sequences(decoder, starts[numbers], points[numbers], chats, barred)
    return written


def _draw_starts(config: Any, count: int, prefix: Sequence[int], random: torch.Generator) -> Tensor:
    """The first tokens of sequences: (count, 1), or (count, 2) with a prefix.

    Half of the sequences start as all texts do, half anywhere: what a model writes most, and what it seldom does.
    """
    starts = torch.randint(config.vocab_size, (count, 1), generator=random)
    if prefix:
        starts = torch.cat([torch.full_like(starts, prefix[0]), starts], dim=1)
        starts[::2, 1] = _SAMPLED
    elif (bos := getattr(config, "bos_token_id", None)) is not None:
        starts[::2] = bos
    return starts


def _barred_ids(config: Any, special: Sequence[int]) -> Tensor:
    marks = (getattr(config, f"{name}_token_id", None) for name in ("bos", "pad"))  # which not all configs have
    named = {*special, *marks, *end_ids(config)}
    return torch.tensor(sorted(named.intersection(range(config.vocab_size))), dtype=torch.long)


def end_ids(config: Any) -> list[Any]:
    """Tokens that end a text, by the config."""
    ends = getattr(config, "eos_token_id", None)
    return ends if isinstance(ends, list) else [ends]


def _sample_sequences(
    decoder: Decoder, starts: Tensor, points: Tensor, chats: Mapping[int, Chat], barred: Tensor
) -> Tensor:
    """Sequences (count, tokens) that begin with `starts` (count, given) and are sampled by `points` (count, steps)."""
    tokens = starts[:, 0].clone()
    for row, chat in chats.items():
        tokens[row] = chat.next()
    written, cache = [tokens], DynamicCache(config=decoder.config)
    head = decoder.head()
    for position in progress(range(points.shape[1]), desc="Writing text", unit="token"):
        logits = _next_logits(decoder, head, cache, tokens[:, None])
        points, barred = points.to(logits.device), barred.to(logits.device)
        _bar_tokens(logits, barred, chats)
        tokens = _sample_tokens(logits, points[:, position])
        if position + 1 < starts.shape[1]:
            given = starts[:, position + 1].to(tokens.device)
            tokens = torch.where(given == _SAMPLED, tokens, given)
        if chats:
            rows = torch.tensor(list(chats), device=tokens.device)
            pairs = zip(chats.values(), tokens[rows].tolist(), strict=True)
            tokens[rows] = torch.tensor([chat.next(token) for chat, token in pairs], device=tokens.device)
        written.append(tokens)
    return torch.stack([step.to(tokens.device) for step in written], dim=1).cpu()


def _bar_tokens(logits: Tensor, barred: Tensor, chats: Mapping[int, Chat]) -> None:
    """Bar tokens in place in logits (count, vocab), except the end of a chat's turn where it may end."""
    if not chats:
        logits.index_fill_(1, barred, -torch.inf)
        return
    ends = [(row, chat.end, not chat.may_end) for row, chat in chats.items()]
    rows, columns, must_go_on = torch.tensor(ends, device=logits.device).T
    end_logits = logits[rows, columns].masked_fill(must_go_on.bool(), -torch.inf)
    logits.index_fill_(1, barred, -torch.inf)
    logits[rows, columns] = end_logits


def _sample_tokens(logits: Tensor, points: Tensor) -> Tensor:
    """Tokens (count,) in whose part of the cumulated probabilities the points lie, which are uniform in 0..1."""
    rows = len(logits)
    if logits.device.type == "cpu":
        rows = max(1, LOGITS_IN_CACHE // logits.shape[1])
    sampled = []
    for part, point in zip(logits.split(rows), points.split(rows), strict=True):
        cumulated = part.float().softmax(-1).cumsum(-1)
        total = cumulated[:, -1:]
        if not torch.isfinite(total).all():  # a logit was NaN or inf
            raise ValueError(
                "The dense model's predictions contain NaN or inf, so it can write no calibration text; use a dtype of "
                "wider range."
            )
        place = point[:, None] * total * _BELOW_ONE
        sampled.append(torch.searchsorted(cumulated, place, right=True)[:, 0])
    return torch.cat(sampled)


def continue_prompts(decoder: Decoder, prompts: Sequence[Tensor], count: int) -> list[Tensor]:
    """The next `count` token ids of each prompt (tokens T_i,), the most likely one each time. None ends early."""
    is_text = [torch.ones_like(prompt) for prompt in prompts]
    tokens, mask = (
        pad_sequence(list(rows), batch_first=True, padding_side="left").to(decoder.device)
        for rows in (prompts, is_text)
    )
    model = decoder.copy().model  # as some models keep what they have generated
    model.generation_config = GenerationConfig()  # which has no end, and no penalties
    greedy: dict[str, Any] = {"do_sample": False, "max_new_tokens": count}
    if getattr(decoder.config, "output_router_logits", False):  # for training; with a cache transformers fails on it
        greedy["output_router_logits"] = False
    # Other processes of a launch wait meanwhile, and take no part.
    written = model.generate(tokens, attention_mask=mask, synced_gpus=False, **greedy)
    return list(written[:, tokens.shape[1] :].cpu())


def _next_logits(decoder: Decoder, head: Head, cache: DynamicCache, tokens: Tensor) -> Tensor:
    """Logits (sequences B, vocab) of what follows `tokens` (B, 1), which themselves follow those in the cache."""
    [states] = decoder.embed([tokens])  # (B, 1, hidden)
    past = cache.get_seq_length()
    cached = {decoder.family.cache_argument: cache}
    for layer in decoder.layers(range(decoder.num_layers)):
        states = layer(states, **decoder.layer_inputs(states, layer, past), **cached)
    return head(states)[:, 0]


def writing(setup: Setup, tokens: float) -> Need:
    """What it takes to write so many tokens by `generate`."""
    rows = int(tokens) // WRITTEN_LENGTH
    together = written(setup, min(rows, WRITTEN_TOGETHER), WRITTEN_LENGTH)
    return replace(together, work=times(together.work, max(1, rows / WRITTEN_TOGETHER)))


def written(setup: Setup, rows: int, steps: int) -> Need:
    """Of text that a model writes, `rows` sequences together: the cache, logits, and a softmax in float32."""
    shape = setup.shape
    of_layer = rows * steps * 2 * shape.keys * shape.size
    cache = of_layer * (shape.layers + 1)  # one of them beside what it grows to
    logits = rows * shape.vocab * (shape.size + 12 * setup.on_card)  # float32, softmax and its sums
    work = setup.forward(rows * steps, shape.layers) + setup.head(rows * steps)
    work += Work(calls=steps * shape.layers, bytes=of_layer * shape.layers * steps // 2)  # written anew each step
    work += Work(bytes=steps * shape.bytes * setup.on_disk)  # read for each token
    return Need(cache + logits, 0, work)
