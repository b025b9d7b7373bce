"""The texts that judge a fused model, and how they relate to what it was fitted on."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import make_texts, make_tokenizer

from lf_hf.text.calibration import load_calibration, load_corpus, load_training_text
from lf_hf.text.judging import JudgingText, judging_sequences, judging_texts, relation
from lf_hf.text.mmlu import bundled_questions

DOCS, REASONING = judging_texts()


def paragraphs(text: str) -> set[str]:
    """Those long enough not to be in two texts by chance."""
    return {part.strip() for part in re.split(r"\n\s*\n", text) if len(part.strip()) >= 60}


def test_two_kinds_of_text_enough_of_each_share_no_paragraph_with_default_text_or_questions() -> None:
    assert (DOCS.name, REASONING.name) == ("docs", "reasoning")
    assert min(len(paragraphs(judging.text)) for judging in (DOCS, REASONING)) > 50
    assert all(judging.source and len(judging.text) > 40_000 for judging in (DOCS, REASONING))  # some 10,000 tokens
    questions = [question.question for questions in bundled_questions().values() for question in questions]
    others = ["\n\n".join(texts) for texts in (load_corpus().parts.values(), load_calibration().texts, questions)]
    assert not paragraphs(DOCS.text) & paragraphs(REASONING.text)
    for judging in (DOCS, REASONING):
        assert not [part for part in paragraphs(judging.text) if any(part in other for other in others)]
        assert not [text for text in questions if len(text) >= 60 and text in judging.text]


@pytest.mark.parametrize("judging", [DOCS, REASONING], ids=lambda judging: judging.name)
def test_relation_says_what_was_fitted(judging: JudgingText) -> None:
    own = " ".join(make_texts(400))
    assert relation(judging, []) == relation(judging, [own], ["my text"]) == "unseen"
    corpora = load_corpus(), load_training_text([own], 8192)
    assert {relation(judging, corpus.parts.values(), corpus.parts) for corpus in corpora} == {
        "kin" if judging is DOCS else "unseen"
    }
    half = judging.text[len(judging.text) // 4 : len(judging.text) * 3 // 4]
    for corpus in corpora:
        assert relation(judging, [own, own + "\n\n" + half], corpus.parts) == "seen"


@pytest.mark.parametrize(("tokens", "longest", "shape"), [(300, 1024, (1, 300)), (2000, 256, (7, 256)), (1, 8, (1, 2))])
def test_models_are_judged_on_sequences_of_one_length(tokens: int, longest: int, shape: tuple[int, int]) -> None:
    sequences = judging_sequences(make_tokenizer(), tokens, longest)
    assert {name: torch.stack(of_text).shape for name, of_text in sequences.items()} == {
        "docs": shape,
        "reasoning": shape,
    }
