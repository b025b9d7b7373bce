"""The model card that goes with a fused checkpoint."""

from __future__ import annotations

import os
import re

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # missing from its __all__

from lf_hf.families import Family
from lf_hf.report.records import HealingInfo
from lf_hf.report.report import FusionReport
from lf_hf.report.rows import as_table

CARD_NAME = "README.md"
_HOW_JUDGED = """\
Perplexity: lower is better. Divergence: how far predictions of the next token are from the base's, KL(base || fused) in
nats a token. Agreement: how often the most likely next token is the base's. They were measured on"""
_WRITTEN = """
## How it writes

What both models add to some prompts, by the most likely token each time.

| prompt | base | fused |
|---|---|---|
{}
"""


def model_card(report: FusionReport, family: Family, *, plain: bool) -> str:
    """Markdown with YAML metadata: what the model is, what it was made of, how to load it, how it did."""
    repository = _repository(report.base)
    data = ModelCardData(
        base_model=repository,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[family.model_type, "layer-fusion", "compressed"],
    )
    load_import = "" if plain else "import lf_hf  # registers the architecture\n"
    without = f"\nWithout the package lf_hf, `{family.causal_lm.__name__}` of transformers opens the same weights.\n"
    head, rows = as_table(report.rows())
    figures = "".join(f"| {' | '.join(map(_as_text, cells))} |\n" for cells in [head, ["---"] * len(head), *rows])
    judges = "".join(f"- {_as_text(source)}.\n" for source in report.sources)
    made_with = "".join(
        f"- Calibrated on {_as_text(info.source)}: {info.samples} samples, {info.tokens} tokens.\n"
        for info in report.calibration
    )
    if report.budget is not None:
        made_with += f"- Budget: {_as_text(report.budget.summary())}\n"
    made_with += "\n" if made_with else ""
    written = "\n".join(
        f"| {_as_lines(continuation.prompt)} | {_as_lines(continuation.dense)} | {_as_lines(continuation.fused)} |"
        for continuation in report.continuations
    )
    kind = f"{'An' if family.title[0] in 'AEIO' else 'A'} {family.title}"
    notes = "".join(f"> {_as_text(note)}\n\n" for note in report.notes)
    settings = "\n".join(f"| {as_code(name)} | {as_code(value)} |" for name, value in report.settings.items())
    return f"""---
{data.to_yaml()}
---

# {kind} with {report.layers_after} layers, fused from {report.layers_before}

Made from {as_code(report.base if repository else os.path.basename(os.path.normpath(report.base)))} by layer fusion
({as_code(report.config["method"])}).

{notes}{figures}
{_HOW_JUDGED if judges else ""}

{judges}
```python
{load_import}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```
{"" if plain else without}{_WRITTEN.format(written) if written else ""}
## Fused layers

Layers are numbered from 0 as in the base; a fused layer keeps the number of its first layer.

{_fused_layers(report)}
{_healed(report.healed) if report.healed else ""}## Settings

{made_with}The settings that had an effect:

| setting | value |
|---|---|
{settings}

`fusion_report.json` beside this file has the details.
"""


def _fused_layers(report: FusionReport) -> str:
    """What became one layer, then the steps."""
    ends = [(min(group), max(group)) for group in report.groups if len(group) > 1]
    lines = [*(f"- Layers {first}-{last} became one layer." for first, last in ends), ""]
    averaged = any(step.ratio_j for step in report.steps)
    lines.append(f"| layer i | layer j |{' averaged |' if averaged else ''}\n|---|---|{'---|' if averaged else ''}")
    for step in report.steps:
        shares = f" {step.ratio_i:.4f} : {step.ratio_j:.4f} |" if averaged else ""
        lines.append(f"| {step.pair[0]} | {step.pair[1]} |{shares}")
    return "\n".join(lines) + "\n"


def _healed(healed: HealingInfo) -> str:
    curve = "\n".join(
        f"| {point.step} | {', '.join(f'{_as_text(name)} {value:.3f}' for name, value in point.divergences.items())} |"
        for point in healed.curve
    )
    settings = ", ".join(f"{name} {value}" for name, value in healed.settings.items())
    return f"""## Healed

After the fusion the model was trained to predict what its base predicts. {_as_text(healed.summary())}
Settings: {_as_text(settings)}. The base's predictions were {_as_text(healed.teacher)}.

Divergence from the base on text that was not trained on, in nats a token:

| step | divergence |
|---|---|
{curve}

"""


def _repository(base: str) -> str | None:
    """The hub's repository that a base is from; None for a folder, as the hub refuses a card that names no repository.

    A name without its owner is that of a folder, see `lf_hf.report.report.FusionReport`.
    """
    if base.endswith(".gguf"):  # the repository and a file in it
        base = "/".join(base.split("/")[:-1][:2])
    try:
        validate_repo_id(base)
    except HFValidationError:
        return None
    return base if "/" in base else None


def as_code(value: object) -> str:
    """A value as inline code on one line of Markdown, where nothing in it means anything, in a table's cell either."""
    text = " ".join(str(value).split()).replace("`", "'").replace("|", "\\|")
    return f"`{text or ' '}`"


def _shown(letter: str) -> str:
    return letter if letter.isprintable() or letter.isspace() else "\N{REPLACEMENT CHARACTER}"


def _as_lines(value: str) -> str:
    """A text of several lines as inline code in a table's cell, indented as it was."""
    cells = []
    for line in value.expandtabs().splitlines():
        shown = "".join(_shown(letter) for letter in line)
        indent = "\N{NO-BREAK SPACE}" * (len(shown) - len(shown.lstrip()))
        cells.append(f"`{indent}{as_code(shown)[1:]}")
    return "<br>".join(cells) or "-"


def _as_text(value: object) -> str:
    """A value as plain text on one line of Markdown, where nothing in it means anything."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(str(value).split()))
