"""The model card that goes with a fused checkpoint; its words are in card.md."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader
from transformers import PretrainedConfig
from yaml import YAMLError

from lf_hf.families.models import auto_class, is_wrapper, model_class
from lf_hf.report.figures import FIGURES
from lf_hf.report.report import FusionReport
from lf_hf.report.rows import as_table

CARD_NAME = "README.md"
# The hub refuses a card that names no repository. A name without its owner is that of a folder.
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
# Of the hub's adapter, merge (of several models), quantized and finetune: new weights made from those of one model.
_RELATION = "finetune"
_LICENSE = ("license", "license_name", "license_link")


def model_card(report: FusionReport, config: PretrainedConfig, *, plain: bool) -> str:
    """Markdown with YAML metadata: what the model is, how it does, how to load it, and how to make it again."""
    environment = Environment(
        loader=PackageLoader("lf_hf.checkpoint", "."), trim_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"code": as_code, "text": _as_text, "lines": _as_lines}
    head, rows = as_table(report.rows())
    stock_class = model_class(config).__name__
    return environment.get_template("card.md").render(
        report=report,
        plain=plain,
        title=stock_class.partition("For")[0],
        stock_class=stock_class,
        auto_class=auto_class(config),
        reader="AutoProcessor" if is_wrapper(config) else "AutoTokenizer",
        metadata=_metadata(report, config).to_yaml(),
        head=head,
        rows=rows,
        meanings=[figure.meaning for figure in FIGURES],
        commands=_commands(report),
    )


def base_license(card: str) -> dict[str, str]:
    """What the base's model card, a file, says of its licence."""
    with suppress(OSError, ValueError, YAMLError):
        values = ModelCard.load(card).data.to_dict()
        return {name: values[name] for name in _LICENSE if isinstance(values.get(name), str)}
    return {}


def _metadata(report: FusionReport, config: PretrainedConfig) -> ModelCardData:
    values: dict[str, Any] = {name: value for name, value in report.license.items() if name in _LICENSE}
    if _REPOSITORY.fullmatch(report.base):
        values |= {"base_model": report.base, "base_model_relation": _RELATION}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text" if is_wrapper(config) else "text-generation",
        tags=[config.model_type.removeprefix("fused_"), "layer-fusion", "depth-pruning"],
        **values,
    )


def _commands(report: FusionReport) -> str:
    """The commands that make the model again."""
    options = report.options | {"dtype": report.dtype and report.dtype.removeprefix("torch.")}
    base = f"./{report.base}" if report.base.startswith("-") else report.base  # no option, but a folder of that name
    opening = {"revision": report.revision}
    commands = [_command(["lf-hf", "fuse", base, "out"], options | opening)]
    healings = report.healed.all if report.healed else []
    if "heal_tokens" in report.settings:
        del healings[:1]  # which is a part of the first command
    folder = "out"
    for healed in healings:
        words = ["lf-hf", "heal", folder, folder := f"{folder}-healed"]
        for name, value in healed.training_args.items():
            words += ["--arg", f"{name}={value}"]
        commands.append(_command(words, {"base": base} | opening | healed.settings))
    return "\n".join(commands)


def _command(words: list[str], options: Mapping[str, Any]) -> str:
    """A command with these options, but for those that are None or empty."""
    for name, value in options.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif value not in (None, ""):
            words += [f"--{option}", str(value)]
    return " ".join(shlex.join(words).split())


def as_code(value: object) -> str:
    """A value as inline code on one line of Markdown, where nothing in it means anything, in a table's cell either."""
    text = " ".join(str(value).split())
    text = text.replace("`", "'").replace("|", "\\|")
    return f"`{text or ' '}`"


def _as_lines(value: str) -> str:
    """A text of several lines as inline code in a table's cell, indented as it was."""
    cells = []
    for line in value.expandtabs().splitlines():
        shown = "".join(c if c.isprintable() or c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in line)
        indent = "\N{NO-BREAK SPACE}" * (len(shown) - len(shown.lstrip()))
        code = as_code(shown).removeprefix("`")
        cells.append(f"`{indent}{code}")
    return "<br>".join(cells) or "-"


def _as_text(value: object) -> str:
    """A value as plain text on one line of Markdown, where nothing in it means anything."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", text)
