"""Chats: written out by a tokenizer's template, and by the model itself in the template's form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, dropwhile
from typing import Any, TypeGuard

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from lf_hf.runtime.errors import reason

Messages = Sequence[Mapping[str, Any]]
"""A chat, as chat templates take it: [{"role": "user", "content": "..."}, ...]."""

CHATS = slice(2, None, 4)
"""Which of the sequences that a model writes are chats, where it has a form for them."""

logger = logging.get_logger(__name__)
_ASKS, _REPLIES, _ASKS_AGAIN = "Q1q1Q", "R1r1R", "Q2q2Q"  # in place of what is said
_LONGEST_OPENING = 64  # tokens: a longer one, of instructions, would leave no room for a chat
# Hides the clock from a template, as the text of a fusion must not depend on the day.
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{ format | replace('%d', '26') | replace('%b', 'Jul') | replace('%B', 'July')"
    " | replace('%m', '07') | replace('%Y', '2024') }}{%- endmacro +%}"
)


@dataclass(frozen=True)
class ChatForm:
    """Token ids around what is said in a chat.

    They are those before the user's first message, those from the end of a user's message to the beginning of the
    reply, and those from the end of a reply to the user's next message. The first of the latter two ends the turn.
    """

    opening: list[int]
    asked: list[int]
    replied: list[int]


def chat_form(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> ChatForm | None:
    """The form of a chat by the tokenizer's template, without long instructions.

    None without a template, where no token of its own ends a turn, or for tokens that a model with `vocab_size`
    embeddings does not have.
    """
    asks = [{"role": "user", "content": _ASKS}]
    chat = [*asks, {"role": "assistant", "content": _REPLIES}, {"role": "user", "content": _ASKS_AGAIN}]
    try:
        opening, asked = chat_text(tokenizer, asks, to_reply=True).split(_ASKS)
        replied = chat_text(tokenizer, chat).split(_REPLIES)[1].split(_ASKS_AGAIN)[0]
    except (ValueError, IndexError) as error:  # a template that leaves out or repeats what is said, too
        logger.info("The chat template cannot be used (%s).", error)
        return None
    # Words bring the space before them along.
    parts = [tokenizer(part.rstrip(" "), add_special_tokens=False)["input_ids"] for part in (opening, asked, replied)]
    of_their_own = {token for token, added in tokenizer.added_tokens_decoder.items() if added.content.strip()}
    if not (all(parts[1:]) and parts[1][0] in of_their_own and parts[2][0] in of_their_own):
        return None
    if len(parts[0]) > _LONGEST_OPENING:
        user = dropwhile(lambda token: not str(tokenizer.decode([token])).strip(), parts[2][1:])
        begins = [token for token in parts[0][:1] if token == tokenizer.bos_token_id]
        parts[0] = [*begins, *user]
    return ChatForm(*parts) if parts[0] and max(map(max, parts)) < vocab_size else None


def is_chat(sample: object) -> TypeGuard[Messages]:
    """Whether a sample is a list of messages, each of a role and with a content or, in its place, tool calls."""
    return (
        isinstance(sample, list)
        and bool(sample)
        and all(isinstance(message, dict) and "role" in message for message in sample)
        and all(message.get("content") is not None or message.get("tool_calls") for message in sample)
    )


def chat_text(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, to_reply: bool = False) -> str:
    """A chat written out by the tokenizer's template, up to its end or to the beginning of a reply.

    Raises ValueError if there is no template, or it does not take these messages.
    """
    if not tokenizer.chat_template:
        raise ValueError("the model's tokenizer has no chat template")
    # Tables have all fields of all messages.
    given = [{name: value for name, value in message.items() if value is not None} for message in messages]
    try:
        template = _FIXED_DATE + tokenizer.get_chat_template()
        text = tokenizer.apply_chat_template(
            given, chat_template=template, tokenize=False, add_generation_prompt=to_reply
        )
    except Exception as error:  # of any kind: a template is a program
        raise ValueError(f"the model's chat template does not take it ({reason(error)})") from None
    return str(text)


def first_token(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that a tokenizer puts before each text, if it does."""
    return [token for token in tokenizer("a")["input_ids"][:1] if token == tokenizer.bos_token_id]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that are no text, and stand for none: the beginnings and ends of texts, images, ..."""
    return [token for token in tokenizer.all_special_ids if token != tokenizer.unk_token_id]


class Chat:
    """A chat that is being written, token by token; its turn `may_end` once it has a token."""

    def __init__(self, form: ChatForm) -> None:
        self._given, self._turns = form.opening[::-1], cycle([form.asked, form.replied])
        self._after, self.may_end = next(self._turns), False

    @property
    def end(self) -> int:
        """The token that ends the turn."""
        return self._after[0]

    def next(self, drawn: int | None = None) -> int:
        """The next token: what the template gives, or else what was drawn."""
        if self._given:
            return self._given.pop()
        assert drawn is not None
        self.may_end = drawn != self.end
        if not self.may_end:
            self._given, self._after = self._after[:0:-1], next(self._turns)
        return drawn
