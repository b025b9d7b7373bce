#!/usr/bin/env python3
"""Write docs/api.md: what `import lf_hf` offers, from the docstrings.

.venv/bin/python scripts/api_reference.py
"""

from __future__ import annotations

import inspect
import re
from itertools import groupby
from pathlib import Path

import griffe
from griffe2md import render_object_docs

import lf_hf
from lf_hf.runtime.settings_base import Settings
from lf_hf.settings import METHODS

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "api.md"

HEAD = """# API reference

All that `import lf_hf` offers. `scripts/api_reference.py` writes this page from the docstrings.

A method says what a group of layers becomes, and sets these defaults; `FusionConfig` says what they mean:

{methods}

"""

# Methods shown with their class; all that a class inherits is as in transformers.
_MEMBERS = {
    "FusedLlamaForCausalLM": ["from_pretrained_fused", "save_pretrained", "push_to_hub"],
    "FusionReport": ["layers_removed_fraction", "parameters_removed_fraction", "summary", "save", "load"],
}


def reference() -> str:
    """The page's text."""
    package = griffe.load("lf_hf", search_paths=[str(ROOT)], docstring_parser="numpy", resolve_aliases=True)
    parts = []
    for name in sorted(lf_hf.__all__):
        shown, public = package[name], getattr(lf_hf, name)
        if isinstance(public, type) and issubclass(public, Settings):  # whose docstring is made when it is imported
            shown = griffe.inspect(public.__module__, docstring_parser="numpy")[name]
        parts.append(_rendered(shown, 2, public))
        parts += [_rendered(shown[method], 3, getattr(public, method)) for method in _MEMBERS.get(name, [])]
    text = re.sub(r"\[([^\]]+)\]\(#[^)]*\)", r"\1", "\n".join(parts))  # types link to pages that are not there
    text = re.sub(r" \u2013? *$", "", text, flags=re.MULTILINE)  # where there is no description
    return HEAD.format(methods=methods()) + text.rstrip() + "\n"


def methods() -> str:
    """The table of presets."""
    fields = ["selection", "alignment"]
    rows = [["method", *fields, "for"], ["---"] * (len(fields) + 2)]
    for name, method in METHODS.items():
        rows.append([f"`{name}`", *(method.preset[field] for field in fields), method.purpose])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _rendered(shown: griffe.Object | griffe.Alias, level: int, public: object) -> str:
    if shown.docstring:
        shown.docstring.value = inspect.getdoc(public) or ""  # which may have been completed at import
    sections = shown.docstring.parsed if shown.docstring else []
    for section in sections:
        if isinstance(section, griffe.DocstringSectionOtherParameters):
            section.title = "Hyper-parameters of the published method:"
        if isinstance(section, griffe.DocstringSectionParameters):
            section.value = [_joined(list(entry)) for _, entry in groupby(section.value, key=_entry)]
        if isinstance(section.value, list):
            for item in section.value:
                item.description = " ".join(item.description.split())  # one line, so that Markdown's lists hold it
    options = {
        "heading_level": level,
        "docstring_section_style": "list",
        "members": False,
        "inherited_members": False,
        "show_bases": False,
        "show_root_full_path": level > 2,
        "show_object_full_path": False,
    }
    return render_object_docs(shown, options)


def _entry(parameter: griffe.DocstringParameter) -> str:
    """What parameters that a docstring describes together have in common: their description, else their name."""
    return parameter.description or parameter.name


def _joined(entry: list[griffe.DocstringParameter]) -> griffe.DocstringParameter:
    """Parameters that share an entry as one, without a type: griffe gives that of the first to all of them."""
    together = entry[0]
    if len(entry) > 1:
        together.annotation = None
    together.name = ", ".join(parameter.name for parameter in entry).replace("*", r"\*")
    return together


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
    print(f"Wrote {PAGE.relative_to(ROOT)}.")
