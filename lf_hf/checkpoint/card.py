"""The model card that goes with a fused checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable

from huggingface_hub import ModelCardData

from lf_hf.families import Family
from lf_hf.report.report import FusionReport
from lf_hf.report.rows import as_table

CARD_NAME = "README.md"
# The hub refuses a card that names no repository. A name without its owner is that of a folder.
_REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(/.+\.gguf)?", re.ASCII)
_CARD = """---
{metadata}
---

# {kind} with {layers_after} layers, fused from {layers_before}

Made from {base} by layer fusion ({method}).

{notes}{figures}
{judged}```python
{load_import}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```
{without}{written}
## How it was made

Layers are numbered from 0 as in the base; a fused layer keeps the number of its first layer.

{details}
The settings that had an effect:

| setting | value |
|---|---|
{settings}
`fusion_report.json` beside this file has the details.
"""
_JUDGED = """\
Perplexity: lower is better. Divergence: how far predictions of the next token are from the base's, KL(base || fused) in
nats a token. Agreement: how often the most likely next token is the base's. They were measured on

{}
"""
_WITHOUT = """
Without the package lf_hf, `{}` of transformers opens the same weights.
"""
_WRITTEN = """
## How it writes

What both models add to some prompts, by the most likely token each time.

| prompt | base | fused |
|---|---|---|
{}"""


def model_card(report: FusionReport, family: Family, *, plain: bool) -> str:
    """Markdown with YAML metadata: what the model is, what it was made of, how to load it, how it did."""
    repository = _REPOSITORY.fullmatch(report.base)
    metadata = ModelCardData(
        base_model=repository and repository[1],
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[family.model_type, "layer-fusion", "compressed"],
    )
    head, rows = as_table(report.rows())
    judged = "".join(f"- {_as_text(source)}.\n" for source in report.sources)
    written = markdown_rows(map(_as_lines, (text.prompt, text.dense, text.fused)) for text in report.continuations)
    ends = [(min(group), max(group)) for group in report.groups if len(group) > 1]
    details = [*(f"Layers {first}-{last} became one layer." for first, last in ends), *map(_as_text, report.details())]
    return _CARD.format(
        metadata=metadata.to_yaml(),
        kind=f"{'An' if family.title[0] in 'AEIO' else 'A'} {family.title}",
        layers_after=report.layers_after,
        layers_before=report.layers_before,
        base=as_code(report.base),
        method=as_code(report.config["method"]),
        notes="".join(f"> {_as_text(note)}\n\n" for note in report.notes),
        figures=markdown_rows(map(_as_text, cells) for cells in [head, ["---"] * len(head), *rows]),
        judged=judged and _JUDGED.format(judged),
        load_import="" if plain else "import lf_hf  # registers the architecture\n",
        without="" if plain else _WITHOUT.format(family.causal_lm.__name__),
        written=written and _WRITTEN.format(written),
        details="".join(f"- {line}\n" for line in details),
        settings=markdown_rows(map(as_code, setting) for setting in report.settings.items()),
    )


def markdown_rows(rows: Iterable[Iterable[str]]) -> str:
    """Rows of a table."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def as_code(value: object) -> str:
    """A value as inline code on one line of Markdown, where nothing in it means anything, in a table's cell either."""
    text = " ".join(str(value).split()).replace("`", "'").replace("|", "\\|")
    return f"`{text or ' '}`"


def _as_lines(value: str) -> str:
    """A text of several lines as inline code in a table's cell, indented as it was."""
    cells = []
    for line in value.expandtabs().splitlines():
        shown = "".join(c if c.isprintable() or c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in line)
        indent = "\N{NO-BREAK SPACE}" * (len(shown) - len(shown.lstrip()))
        cells.append(f"`{indent}{as_code(shown)[1:]}")
    return "<br>".join(cells) or "-"


def _as_text(value: object) -> str:
    """A value as plain text on one line of Markdown, where nothing in it means anything."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(str(value).split()))
