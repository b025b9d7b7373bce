#!/usr/bin/env python3
"""A base and fusions of it side by side, in one table, and how each goes on from the same prompt.

The last step of scripts/quickstart. RESULTS holds what lm_eval wrote for each model, in a folder of its name; that of
the base is `dense`.

.venv/bin/python scripts/first_look.py RESULTS --base FOLDER --gguf-file FILE --fused NAME=FOLDER NAME=FOLDER
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from lf_hf import FusedLlamaForCausalLM

PROMPT = "Once upon a time there was a little girl who"
NEW_TOKENS = 20
SMOKE_TEST = "mmlu_sample"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--base", required=True)
    parser.add_argument("--gguf-file")
    parser.add_argument("--fused", nargs="+", required=True, metavar="NAME=FOLDER")
    options = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # how a GGUF file is read fastest matters to nobody here

    source = {"gguf_file": options.gguf_file} if options.gguf_file else {}
    tokenizer = AutoTokenizer.from_pretrained(options.base, **source)
    models: dict[str, Any] = {
        "dense": AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.bfloat16, **source)
    }
    for name, folder in (named.split("=", 1) for named in options.fused):
        models[name] = FusedLlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    console = Console(highlight=False, markup=False, soft_wrap=True)
    scores = {name: main_scores(options.results / name) for name in models}
    console.print(table(models, scores), soft_wrap=False)
    last = list(models)[-1]
    for judged in models[last].fusion_report.perplexities:
        of_whom = "" if judged.relation == "unseen" else f" by {last}"
        console.print(f"{judged.name}, {judged.tokens} tokens: {judged.label}{of_whom}")
    if SMOKE_TEST in scores["dense"]:
        console.print(f"accuracy: {SMOKE_TEST}, 57 questions, too few to tell models apart; chance is 0.25")

    console.print(f"\nHow each goes on from: {PROMPT}")
    for name, model in models.items():
        console.print(f"  {name:17} {continuation(model, tokenizer)}")


def table(models: dict[str, Any], scores: dict[str, dict[str, float]]) -> Table:
    """One row a model; the first is the base, whose figures the others' reports have too."""
    reports = {name: getattr(model, "fusion_report", None) for name, model in models.items()}
    report = next(report for report in reports.values() if report is not None)
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)  # 80 columns, for a log
    shown.add_column("", no_wrap=True)
    for head in ("layers", "parameters", *(f"perplexity\n{judged.name}" for judged in report.perplexities)):
        shown.add_column(head, justify="right")
    for task in scores["dense"]:
        shown.add_column("accuracy" if task == SMOKE_TEST else task, justify="right")
    for name, own in reports.items():
        if own is None:
            sizes = report.layers_before, report.parameters_before
            figures = [f"{judged.dense:.4g}" for judged in report.perplexities]
        else:
            sizes = own.layers_after, own.parameters_after
            figures = [f"{judged.fused:.4g} (x{judged.ratio:.3g})" for judged in own.perplexities]
        figures += [f"{score:.3f}" for score in scores[name].values()]
        shown.add_row(name, str(sizes[0]), f"{sizes[1] / 1e6:.1f} M", *figures)
    return shown


def main_scores(folder: Path) -> dict[str, float]:
    """The first metric of each group or task that lm_eval was asked for; of its members, where a group has none."""
    [path] = folder.rglob("results_*.json")
    written = json.loads(path.read_text(encoding="utf-8"))
    members = written.get("group_subtasks", {})
    subgroups = {name for children in members.values() for name in children}
    found: dict[str, float] = {}

    def add(name: str) -> None:
        for metric, value in written["results"].get(name, {}).items():  # "acc,none", and things that are no metrics
            if "," in metric and "_stderr" not in metric and isinstance(value, (int, float)):
                found[name] = value
                return
        for member in members.get(name, []):
            add(member)

    for name in written["results"]:
        if name not in subgroups:
            add(name)
    return found


def continuation(model: Any, tokenizer: Any) -> str:
    """The likeliest next tokens, one after the other, on one line."""
    prompt = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    words = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).split()
    return "".join(character for character in " ".join(words) if character.isprintable())


if __name__ == "__main__":
    main()
