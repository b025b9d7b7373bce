"""What people are shown of a fusion: what the model card lists, and that other people's words are text there."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders import Page, make_report
from huggingface_hub import ModelCard

from lf_hf import FusionConfig, FusionReport
from lf_hf.checkpoint.card import model_card
from lf_hf.evaluate.tables import markdown
from lf_hf.families import FAMILIES
from lf_hf.report.page import write_page
from lf_hf.report.records import CalibrationInfo, Continuation, PerplexityInfo
from lf_hf.report.report import CHANGED_NOTE

HOSTILE = (
    "<script>alert('x')</script> `code` | cell\n---\nkey: [a, *b, !!python/object:c]\n# title $\\frac$ &amp; \"q\""
)


def a_report(method: str = "refit", **values: Any) -> FusionReport:
    fields: dict[str, Any] = {"base": "owner/model", "config": FusionConfig(num_fusions=1, method=method).to_dict()}
    fields["calibration"] = [CalibrationInfo("some text", 20, 4096)]
    fields["perplexities"] = [PerplexityInfo("docs", "some documentation", 4000, 10.0, 12.5, "seen", 0.25, 0.875)]
    return make_report(**fields | values)


def card_of(report: FusionReport, *, plain: bool = False) -> str:
    return model_card(report, FAMILIES["llama"], plain=plain)


@pytest.mark.parametrize("method", ["neural_alignment", "mka", "truncate", "refit"])
def test_settings_without_effect_are_not_listed(method: str) -> None:
    _, _, card = card_of(a_report(method)).partition("The settings that")
    listed = dict(re.findall(r"^\| `(.*)` \| `(.*)` \|$", card, re.M))
    assert listed == {name: str(value) for name, value in FusionConfig(1, method).in_effect().items()}
    assert ("kernel_scale" in listed) == (method in ("neural_alignment", "mka"))
    assert ("calibration_tokens" in listed) == (method == "refit")


def test_figures_say_what_they_are_of() -> None:
    card = card_of(a_report(continuations=[Continuation("def f():", "\n    a | b", "")]))
    for words in (
        "| perplexity, docs | 10 | 12.5 | x 1.25 |\n| divergence, docs | 0 | 0.25 |  |\n",
        "| agreement, docs | 100.0% | 87.5% | -12.5% |",
        "- docs: 4,000 tokens of some documentation; part of it was fitted on.",
        "- calibration: some text (20 samples, 4096 tokens)",
        "| layers | 32 | 28 | -12.5% |",
        "| `def f():` | ` `<br>`\xa0\xa0\xa0\xa0a \\| b` | - |",
    ):
        assert words in card
    without = card_of(a_report(perplexities=[], calibration=[]))
    assert "erplexity, " not in without and "calibration:" not in without


def test_figures_of_a_model_that_was_changed_come_after_a_note() -> None:
    report = a_report(weights_digest="one")
    card = card_of(report.of_weights("another"), plain=True)
    assert card.index(f"> {CHANGED_NOTE}") < card.index("| perplexity, docs |")
    assert CHANGED_NOTE not in card_of(report.of_weights("one"), plain=True)


@pytest.mark.parametrize("base", ["owner/model", "owner/model/file.gguf", "/home/me/model", "model"])
def test_a_folder_is_no_repository(base: str) -> None:
    card = card_of(a_report(base=base))
    repository = "owner/model" if base.startswith("owner/") else None
    assert yaml.safe_load(card.split("---\n")[1]).get("base_model") == repository
    assert "/home" not in card and "model" in card


@pytest.fixture
def hostile_report() -> FusionReport:
    report = make_report(
        base=HOSTILE,
        config={"method": HOSTILE, "num_fusions": HOSTILE, HOSTILE: HOSTILE},
        calibration=[CalibrationInfo(HOSTILE, 57, 5000)],
        perplexities=[PerplexityInfo(HOSTILE, HOSTILE, 4000, 6.0, 30.0, "kin", 0.5, 0.5)],
        continuations=[Continuation(HOSTILE, f"\t{HOSTILE}\x00\x1b[2J", "")],
        seconds={HOSTILE: 1.0},
        versions={HOSTILE: HOSTILE},
        notes=[HOSTILE],
        sample_labels=[HOSTILE],
    )
    first = dataclasses.replace(report.steps[0], matches={HOSTILE: report.steps[0].matches["mlp.up_proj"]})
    return dataclasses.replace(report, steps=[first, *report.steps[1:]])


def test_the_page_shows_hostile_text_as_text(hostile_report: FusionReport, tmp_path: Path) -> None:
    write_page(hostile_report, tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.text.count("<script>alert('x')</script>") >= 11
    known = "html head meta title style body main h1 h2 p div span b pre section details summary img table tr th td"
    assert {tag for tag, _ in page.tags} <= set(known.split())
    assert not any(name.startswith("on") or name == "href" for _, attributes in page.tags for name in attributes)


def test_cards_and_tables_show_hostile_text_as_text(hostile_report: FusionReport) -> None:
    """Outside of code there are line breaks and nothing hostile, and every table row has its head's number of cells."""
    texts = [markdown([], HOSTILE)]
    for plain in (True, False):
        card = card_of(hostile_report, plain=plain)
        metadata, body = card.removeprefix("---\n").split("\n---\n", 1)
        assert set(yaml.safe_load(metadata)) == {"library_name", "pipeline_tag", "tags"}  # the base is no repository
        assert ModelCard(card).content == card and all(c.isprintable() or c in "\n\xa0" for c in card)
        texts.append(body)
    for text in texts:
        rows: list[int] = []
        for line in text.splitlines():
            outside = re.sub(r"`[^`]*`", "", re.sub(r"\\.", "", line)).replace("<br>", "")
            assert "<" not in outside and not outside.startswith(("key:", "# title"))
            cells = len(re.findall(r"(?<!\\)\|", line))
            assert not rows or not cells or cells == rows[-1]
            rows = [*rows, cells] if cells else []
