"""What judges a model beside its dense one: perplexity and divergence on texts, and what both write."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lf_hf.decoder.decoder import Decoder
from lf_hf.decoder.demand import Need, Setup
from lf_hf.measure.generating import continue_prompts, end_ids, written
from lf_hf.measure.predictions import final_states, logits_bytes, predictions
from lf_hf.report.data import Continuation, PerplexityInfo
from lf_hf.runtime.amounts import PERPLEXITY_LENGTH
from lf_hf.text.chats import chat_form, chat_text
from lf_hf.text.judging import PROMPTS, QUESTION, judging_sequences, judging_texts
from lf_hf.text.packing import check_ids

_TEXTS = 2  # that judge
CONTINUED_LENGTH = 24  # tokens that are added to a prompt
LONGEST_PROMPT = 1024  # tokens: a template with longer instructions would take all memory


@dataclass(frozen=True)
class Judged:
    """A text that predictions are measured on, and what the dense model predicts there."""

    name: str
    source: str
    ids: list[Tensor]  # batches of token ids of shape (sequences B, tokens T)
    tokens: int
    states: list[Tensor]  # the dense model's `final_states` of each batch, (B, T, hidden), in the machine's memory
    dense: float  # its perplexity


def judge_dense(decoder: Decoder, tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[Judged]:
    """The judging texts as sequences, some `tokens` tokens of each, with the dense model's perplexity on them."""
    if tokens == 0:
        return []
    sequences = judging_sequences(tokenizer, tokens, min(PERPLEXITY_LENGTH, decoder.config.max_position_embeddings))
    check_ids(itertools.chain(*sequences.values()), decoder.config.vocab_size)
    sources = {text.name: text.source for text in judging_texts()}
    return predict_texts(decoder, sequences, sources)


def predict_texts(decoder: Decoder, texts: Mapping[str, Sequence[Tensor]], sources: Mapping[str, str]) -> list[Judged]:
    """What the dense model predicts on texts: sequences of shape (tokens T,) by name. Empty texts are left out."""
    ids = {name: decoder.make_batches(sequences) for name, sequences in texts.items()}
    states = final_states(decoder, ids, "Perplexity before fusing")
    judged = []
    for name, figures in predictions(decoder, ids, states).items():
        in_memory = [state.cpu() for state in states[name]]
        size = sum(map(len, texts[name]))
        judged.append(Judged(name, sources[name], ids[name], size, in_memory, figures["perplexity"]))
    return judged


def write_continuations(decoder: Decoder, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """What the model adds to each of `PROMPTS`, and to `QUESTION` if its tokenizer has chats, up to its end."""
    vocab_size = decoder.config.vocab_size
    prompts = {prompt: tokenizer(prompt)["input_ids"] for prompt in PROMPTS}
    if not all(prompts.values()):
        return {}
    check_ids(map(torch.tensor, prompts.values()), vocab_size)
    with suppress(ValueError):  # without a template, or with one that takes no question alone
        chat = chat_text(tokenizer, [{"role": "user", "content": QUESTION}], to_reply=True)
        ids = tokenizer(chat, add_special_tokens=False)["input_ids"]
        # A template may be there that the model knows nothing of.
        if 0 < len(ids) <= LONGEST_PROMPT and max(ids) < vocab_size:
            prompts[f"In the chat template: {QUESTION}"] = ids
    stop = {tokenizer.eos_token_id, *end_ids(decoder.config)}
    if form := chat_form(tokenizer, vocab_size):
        stop.add(form.replied[0])
    added = continue_prompts(decoder, [torch.tensor(ids) for ids in prompts.values()], CONTINUED_LENGTH)
    texts = {}
    for (prompt, ids), following in zip(prompts.items(), added, strict=True):
        kept = list(itertools.takewhile(lambda token: token not in stop, following.tolist()))
        # Many tokenizers take a space off the beginning of what they decode.
        before, whole = (str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in (ids, [*ids, *kept]))
        texts[prompt] = whole[len(before) :]
    return texts


def judge(decoder: Decoder, judged: Sequence[Judged], dense_head: Tensor | None = None) -> list[PerplexityInfo]:
    """Figures of a model beside the dense one, whose head (vocab, hidden) may be another, on each judging text."""
    ids = {text.name: text.ids for text in judged}
    states = final_states(decoder, ids, "Judging")
    found = predictions(decoder, ids, states, {text.name: text.states for text in judged}, dense_head)
    return [PerplexityInfo(text.name, text.source, text.tokens, text.dense, found[text.name]) for text in judged]


def compare_continuations(
    decoder: Decoder, tokenizer: PreTrainedTokenizerBase, dense: Mapping[str, str]
) -> list[Continuation]:
    """How the fused model goes on from each prompt, beside the dense one, where that is known."""
    if not dense:
        return []
    fused = write_continuations(decoder, tokenizer)
    return [Continuation(prompt, text, fused[prompt]) for prompt, text in dense.items() if prompt in fused]


def judging(setup: Setup, tokens: int, fusions: int, models: int) -> Need:
    """What it takes to judge a model on so many tokens of each text, and to have it continue prompts.

    `models`: 1 for the dense one, and 2 for a fused one, beside the dense one's final states.
    """
    inside = setup.running(PERPLEXITY_LENGTH, tokens)
    inside += logits_bytes(setup, setup.batch(PERPLEXITY_LENGTH, tokens), models)
    judged = _TEXTS * tokens
    work = setup.forward(judged, setup.shape.layers - fusions) + setup.head(judged, models)
    if tokens and not setup.on_disk:
        work += written(setup, len(PROMPTS) + 1, CONTINUED_LENGTH).work  # and a question
    return Need(inside, models * setup.states(judged), work)
