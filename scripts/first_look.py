#!/usr/bin/env python3
"""A base and fusions of it side by side, in one table, and how each continues the same prompt.

The last step of scripts/quickstart. RESULTS holds what lm_eval wrote for each model, in a folder of its name; that of
the base is `dense`. All figures come from there and from the reports of the fused models.

.venv/bin/python scripts/first_look.py RESULTS --fused NAME=FOLDER NAME=FOLDER
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from lf_hf import FusionReport
from lf_hf.report.rows import Row, shown

FEW_QUESTIONS = 100  # with fewer, scores do not tell models apart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--fused", nargs="+", required=True, metavar="NAME=FOLDER")
    options = parser.parse_args()
    folders = dict(named.split("=", 1) for named in options.fused)
    reports = {name: FusionReport.load(folder) for name, folder in folders.items()}
    scores = {name: main_scores(options.results / name) for name in ("dense", *reports)}

    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(table(reports, scores), soft_wrap=False)
    for judged in list(reports.values())[-1].perplexities:
        console.print(f"{judged.name}, {judged.tokens} tokens: {judged.text}")
    for task, (_, questions) in scores["dense"].items():
        if questions < FEW_QUESTIONS:
            console.print(f"{task}: {questions} questions, too few to tell models apart")
    for continuations in [*zip(*(report.continuations for report in reports.values()), strict=True)][:1]:
        console.print(f"\n{on_one_line(continuations[0].prompt)} ...")
        texts = [continuations[0].dense, *(continuation.fused for continuation in continuations)]
        for name, text in zip(("dense", *reports), texts, strict=True):
            console.print(f"  {name:17} {on_one_line(text)}")


def table(reports: dict[str, FusionReport], scores: dict[str, dict[str, tuple[float, int]]]) -> Table:
    """One column a model, the base's first; the rows are those of a report, then one for each task."""
    shown_table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)  # 80 columns, for a log
    shown_table.add_column("", no_wrap=True)
    for name in ("dense", *reports):
        shown_table.add_column(name, justify="right", no_wrap=True)
    for rows in zip(*(report.rows() for report in reports.values()), strict=True):
        if rows[0].kind == "rate":  # of runs of their own: only ratios compare
            name = rows[0].name.partition(",")[0]
            shown_table.add_row(f"speed of {name}", "x 1", *(factor(row) for row in rows))
            continue
        fused = [f"{shown(row.kind, row.values[1])} {factor(row)}".strip() for row in rows]
        shown_table.add_row(rows[0].name, shown(rows[0].kind, rows[0].values[0]), *fused)
    for task in scores["dense"]:
        accuracies = [tasks[task][0] for tasks in scores.values()]
        shown_table.add_row(task, *(f"{accuracy:.3f}" for accuracy in accuracies))
    return shown_table


def factor(row: Row) -> str:
    """How many times the base's perplexity or speed it is, without its spread."""
    times = " ".join(row.change.split()[:2])
    return {"rate": times, "perplexity": f"({times})"}.get(row.kind, "")


def main_scores(folder: Path) -> dict[str, tuple[float, int]]:
    """The first metric of each group or task that lm_eval was asked for, and its number of questions.

    Where a group has no metric, its members stand for it.
    """
    [path] = folder.rglob("results_*.json")
    written = json.loads(path.read_text(encoding="utf-8"))
    members = written.get("group_subtasks", {})
    samples = written.get("n-samples", {})
    subgroups = {name for children in members.values() for name in children}
    scores: dict[str, tuple[float, int]] = {}

    def questions(name: str) -> int:
        own = samples.get(name, {}).get("effective", 0)
        return int(own or sum(questions(member) for member in members.get(name, [])))

    def add(name: str) -> None:
        for metric, value in written["results"].get(name, {}).items():  # "acc,none", and things that are no metrics
            if "," in metric and "_stderr" not in metric and isinstance(value, (int, float)):
                scores[name] = value, questions(name)
                return
        for member in members.get(name, []):
            add(member)

    for name in written["results"]:
        if name not in subgroups:
            add(name)
    return scores


def on_one_line(text: str) -> str:
    return "".join(character for character in " ".join(text.split()) if character.isprintable())


if __name__ == "__main__":
    main()
