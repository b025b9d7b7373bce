"""The text of a healing: what is trained on, what is held out, and what the base writes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import make_texts, make_tokenizer

from lf_hf.healing.text import HELD_OUT, WRITTEN, WRITTEN_CHATS, healing_text, training_order
from lf_hf.settings import WRITTEN_LENGTH, WRITTEN_TOGETHER, HealSettings
from lf_hf.text.calibration import QUESTIONS, Corpus
from lf_hf.text.chats import CHATS
from lf_hf.text.packing import pack_tokens

TEXT = "\n\n".join(make_texts(3000, seed=3))
CORPUS = Corpus({"a text": TEXT}, 0.25)
SETTINGS = HealSettings(tokens=4096, length=32, batch_tokens=256)


def write(count: int, length: int, seed: int) -> list[torch.Tensor]:
    return list(torch.randint(300, (count, length), generator=torch.Generator().manual_seed(seed)))


def test_what_is_kept_aside_is_not_trained_on_and_the_base_writes_its_share() -> None:
    kinds = healing_text(make_tokenizer(), CORPUS, SETTINGS, 320, write)
    assert [kind.name for kind in kinds] == ["a text", WRITTEN]
    assert [(len(kind.training), len(kind.held_out)) for kind in kinds] == [(96, HELD_OUT), (32, HELD_OUT)]
    assert all(sequence.shape == (32,) for kind in kinds for sequence in (*kind.training, *kind.held_out))
    # All of it once, from its beginning to its end.
    places = {tuple(part.tolist()): n for n, part in enumerate(pack_tokens(make_tokenizer(), TEXT, 32, 1 << 30))}
    found = sorted(places[tuple(sequence.tolist())] for sequence in (*kinds[0].training, *kinds[0].held_out))
    assert len(set(found)) == 100 and found[0] == 0 and found[-1] > 0.95 * len(places)


@pytest.mark.parametrize("length", [32, 160])
def test_what_the_base_writes_is_made_of_short_pieces_and_chats_are_a_kind_of_their_own(length: int) -> None:
    assert WRITTEN_TOGETHER % CHATS.step == 0  # so that they keep their places

    def write_both(count: int, length: int, seed: int) -> list[torch.Tensor]:
        assert length <= WRITTEN_LENGTH
        return [torch.full((length,), int(n in range(count)[CHATS])) for n in range(count)]

    settings = HealSettings(tokens=36 * length, length=length, batch_tokens=4 * length)
    kinds = healing_text(make_tokenizer(), CORPUS, settings, 320, write_both, chats=True)
    assert [kind.name for kind in kinds] == ["a text", WRITTEN, WRITTEN_CHATS]
    assert [(len(kind.training), len(kind.held_out)) for kind in kinds[1:]] == [(7, HELD_OUT), (2, 2)]
    for number, kind in enumerate(kinds[1:]):
        assert all(sequence.tolist() == [number] * length for sequence in (*kind.training, *kind.held_out))


@pytest.mark.parametrize(("share", "kept"), [(0.25, {"a text", WRITTEN}), (0.0, {"a text", QUESTIONS})])
def test_questions_are_kept_aside_only_where_there_is_no_other_text(share: float, kept: set[str]) -> None:
    """Each is there in two forms, so the other one would be trained on."""
    corpus = Corpus({name: "\n".join(make_texts(400, seed=len(name))) for name in ("a text", QUESTIONS)}, share)
    kinds = healing_text(make_tokenizer(), corpus, SETTINGS, 320, write)
    assert {kind.name for kind in kinds if kind.held_out} == kept
    assert all(kind.training for kind in kinds)


def test_every_sequence_is_used_before_any_is_used_again() -> None:
    settings = HealSettings(tokens=32 * 32, length=32, batch_tokens=160)
    order = training_order(10, settings)
    assert sorted(Counter(order).values()) == [3] * 10 and sorted(order[:10]) == list(range(10))
    assert order[:10] != order[10:20] and order != training_order(10, replace(settings, seed=2))
