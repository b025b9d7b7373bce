"""Chats: written out by a tokenizer's template, or by a model in the form that the template gives them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import cycle, dropwhile
from typing import Any, TypeGuard

from transformers import PreTrainedTokenizerBase

from lf_hf.runtime.errors import reason
from lf_hf.settings import Messages

CHATS = slice(2, None, 4)
"""Which of the sequences that a model writes are chats, if its tokenizer has a form for them."""

_QUESTION, _REPLY, _FOLLOW_UP = "Q1q1Q", "R1r1R", "Q2q2Q"  # stand for what is said
_MAX_PART = 64  # tokens: longer parts are instructions, and would leave no room for a chat
# Hides the clock from a template, because the text of a fusion must not depend on the day.
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{ format | replace('%d', '26') | replace('%b', 'Jul') | replace('%B', 'July')"
    " | replace('%m', '07') | replace('%Y', '2024') }}{%- endmacro +%}"
)


@dataclass(frozen=True)
class ChatForm:
    """Token ids around what is said in a chat.

    `opening` is before the first question, `asked` between a question and its reply, `replied` between a reply and the
    next question. The first token of the latter two ends the turn.
    """

    opening: list[int]
    asked: list[int]
    replied: list[int]


def chat_form(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> ChatForm | None:
    """The form of a chat by the tokenizer's template, without long instructions.

    None if there is no template, no added token ends a turn, each turn has long instructions, or a model with
    `vocab_size` embeddings lacks a token.
    """
    question = {"role": "user", "content": _QUESTION}
    chat = [question, {"role": "assistant", "content": _REPLY}, {"role": "user", "content": _FOLLOW_UP}]
    try:
        before, after = chat_text(tokenizer, [question], to_reply=True).split(_QUESTION)
        between = chat_text(tokenizer, chat).split(_REPLY)[1].split(_FOLLOW_UP)[0]
    except (ValueError, IndexError):  # also of a template that omits or repeats what is said
        return None
    parts = [part.rstrip(" ") for part in (before, after, between)]  # words bring the space before them along
    opening, asked, replied = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts)
    added = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.content.strip()}
    for part in (asked, replied):
        if not part or part[0] not in added or len(part) > _MAX_PART:
            return None
    if len(opening) > _MAX_PART:
        opening = _short_opening(tokenizer, opening, replied)
    if not opening or max(*opening, *asked, *replied) >= vocab_size:
        return None
    return ChatForm(opening, asked, replied)


def _short_opening(tokenizer: PreTrainedTokenizerBase, opening: list[int], replied: list[int]) -> list[int]:
    """An opening without instructions: what begins a text, and what begins a later question."""
    bos = [token for token in opening[:1] if token == tokenizer.bos_token_id]
    question = dropwhile(lambda token: not str(tokenizer.decode([token])).strip(), replied[1:])
    return [*bos, *question]


def is_chat(sample: object) -> TypeGuard[Messages]:
    """Whether a sample is a list of messages, each with a role and with content or tool calls."""
    return isinstance(sample, list) and bool(sample) and all(map(_is_message, sample))


def _is_message(message: object) -> bool:
    if not isinstance(message, dict) or "role" not in message:
        return False
    return message.get("content") is not None or bool(message.get("tool_calls"))


def chat_text(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, to_reply: bool = False) -> str:
    """A chat written out by the tokenizer's template, up to its end or to the beginning of a reply.

    Raises ValueError if there is no template, or if it does not take these messages.
    """
    if not tokenizer.chat_template:
        raise ValueError("the model's tokenizer has no chat template")
    try:
        template = _FIXED_DATE + tokenizer.get_chat_template()
        # In a row of a table each dictionary has the fields of all others.
        given = json.loads(json.dumps(messages, default=str), object_hook=_without_nulls)
        text = tokenizer.apply_chat_template(
            given, chat_template=template, tokenize=False, add_generation_prompt=to_reply
        )
    except Exception as error:  # of any kind, as a template is a program
        raise ValueError(f"the model's chat template does not take it ({reason(error)})") from None
    return str(text)


def _without_nulls(entries: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entries.items() if value is not None}


def bos_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-sequence token if the tokenizer puts it before each text, else nothing."""
    return [token for token in tokenizer("a")["input_ids"][:1] if token == tokenizer.bos_token_id]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that stand for no text: the beginnings and ends of texts, images, ..."""
    return [token for token in tokenizer.all_special_ids if token != tokenizer.unk_token_id]


class Chat:
    """A chat that is written token by token; its turn `may_end` once it has a token."""

    def __init__(self, form: ChatForm) -> None:
        self._template = form.opening[::-1]  # tokens that the template gives next, the last one first
        self._turns = cycle([form.asked, form.replied])
        self._turn_end = next(self._turns)
        self.may_end = False

    @property
    def end(self) -> int:
        """The token that ends the turn."""
        return self._turn_end[0]

    def next(self, sampled: int | None = None) -> int:
        """The next token: what the template gives, or else what was sampled."""
        if self._template:
            return self._template.pop()
        assert sampled is not None
        self.may_end = sampled != self.end
        if sampled == self.end:
            self._template = self._turn_end[:0:-1]
            self._turn_end = next(self._turns)
        return sampled
