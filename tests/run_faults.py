"""Kills processes that fuse or sweep, and prints as JSON what they left; run by test_faults.py in a process of its own.

It forks, which is safe only where no thread of torch or of the tokenizers has started.
"""

from __future__ import annotations

import collections
import csv
import itertools
import json
import random
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from conftest import make_llama, make_tokenizer
from safetensors.torch import load_file
from saving_faults import killed

from lf_hf import FusedLlamaForCausalLM, FusionReport, fuse_checkpoint
from lf_hf.evaluate import evaluation, tables
from lf_hf.evaluate.points import RESULTS, Score, read_points
from lf_hf.evaluate.sweep import sweep

KILLS = 8


class Answers:
    """Stands for lm-eval, which would take most of the time."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def scores(self, model: Any, _: Any) -> dict[str, Score]:
        return {"task": Score("acc", float(model.config.num_hidden_layers), None)}


def fused_state(out: Path) -> str:
    """How many fusions a folder holds, found to be whole; a folder that is not raises something."""
    if not out.exists():
        return "none"
    report = FusionReport.load(out)
    layers = {name.split(".")[2] for name in load_file(out / "model.safetensors") if name.startswith("model.layers.")}
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert len(layers) == config["num_hidden_layers"] == report.layers_after == 5 - report.config["num_fusions"]
    assert (out / "tokenizer.json").is_file() and (out / "README.md").is_file()
    return str(report.config["num_fusions"])


def swept_state(out: Path) -> str:
    """How many points a sweep's folder holds, found to be whole."""
    points = read_points(out / RESULTS)
    if (out / "results.csv").exists():
        with (out / "results.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["perplexity, docs"] for row in rows] == [
            str(point.perplexities["docs"]) for point in points.values()
        ][: len(rows)]
        assert len(rows) in (len(points), len(points) - 1)  # a table follows its point
    return str(len(points))


def seconds(work: Callable[[], Any]) -> float:
    """How long `work` takes in a process that nothing happens to."""
    start = time.perf_counter()
    killed(work, 0, signal.SIGCONT)
    return time.perf_counter() - start


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    base = str(folder / "base")
    make_llama().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    # Nothing runs in this process but what makes no thread, as it forks.
    vars(tables)["missing_plot_packages"] = lambda: "no pictures"
    evaluation.Evaluation = Answers  # type: ignore[misc, assignment]
    found: collections.defaultdict[str, list[str]] = collections.defaultdict(list)
    rng = random.Random(0)
    settings: dict[str, Any] = {"method": "truncate", "perplexity_tokens": 0}

    def fuse_to(out: Path, counts: Iterable[int]) -> None:
        for count in counts:
            if out.name == "fused_dir":
                FusedLlamaForCausalLM.from_pretrained_fused(base, num_fusions=count, fused_dir=out, **settings)
            else:
                fuse_checkpoint(base, out, num_fusions=count, **settings)

    for name in ("fuse", "fused_dir"):
        taken = seconds(lambda: fuse_to(folder / name, [1]))  # noqa: B023
        for _ in range(KILLS):
            killed(lambda: fuse_to(folder / name, itertools.cycle((2, 1))), rng.uniform(0, 2 * taken))  # noqa: B023
            found[name].append(fused_state(folder / name))

    arguments: dict[str, Any] = {"num_fusions": [1, 2, 3, 4], "methods": ["truncate"], "tasks": ["task"]}
    arguments["settings"] = {"perplexity_tokens": 100}
    taken = seconds(lambda: sweep(base, folder / "whole", **arguments))
    for number in (signal.SIGKILL, signal.SIGINT):
        out = folder / f"sweep {number.name}"
        for _ in range(KILLS):
            killed(lambda: sweep(base, out, **arguments), rng.uniform(0, taken / 2), number)  # noqa: B023
            found[out.name].append(swept_state(out))
        seconds(lambda: sweep(base, out, **arguments))  # noqa: B023
        one, other = (read_points(file / RESULTS) for file in (out, folder / "whole"))
        assert [{**vars(p), "seconds": None} for p in one.values()] == [
            {**vars(p), "seconds": None} for p in other.values()
        ]
        assert {file.name for file in out.iterdir()} - {".lock"} == {file.name for file in (folder / "whole").iterdir()}
    print(json.dumps({"found": found, "left": sorted(path.name for path in folder.iterdir())}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
