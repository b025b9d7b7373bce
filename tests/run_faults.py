"""Kills processes that save, fuse or sweep, and prints as JSON what they left; run by test_faults.py on its own.

It forks, which is safe only where no thread of torch or of the tokenizers has started.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from conftest import make_llama, make_tokenizer
from safetensors.torch import load_file
from tqdm import tqdm

from lf_hf import FusedLlamaForCausalLM, FusionReport, fuse_checkpoint
from lf_hf.evaluate import evaluation
from lf_hf.evaluate.points import RESULTS, Score, read_points
from lf_hf.evaluate.sweep import sweep

KILLS = 4
FOREIGN = (
    *("notes.txt", "train_results.json", "tokenizer_notes.md", "tokenizers/a.txt", "tokenizer_training/corpus.txt"),
    *("chat_templates/a.jinja", "fusion_report.html", "checkpoint-7/optimizer.pt", "README.md"),
)


class Answers:
    """Stands for lm-eval, which would take most of the time."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def scores(self, model: Any, _: Any) -> dict[str, Score]:
        return {"task": Score("acc", float(model.config.num_hidden_layers), None)}


def put_foreign(folder: Path) -> None:
    """Files of a user's, with names that are like a checkpoint's, in a folder that may hold one."""
    for name in FOREIGN:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_text("mine")
        (folder / name).chmod(0o640)


def foreign(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Mode, inode and digest of each of them, and of the folder itself."""
    listing = {}
    for path in (folder, *(folder / name for name in FOREIGN)):
        if path.exists():
            content = b"" if path.is_dir() else path.read_bytes()
            listing[str(path)] = (path.stat().st_mode, path.stat().st_ino, hashlib.sha256(content).hexdigest())
    return listing


def killed(work: Callable[[], Any], seconds: float, number: signal.Signals = signal.SIGKILL) -> None:
    """Run `work` in a process that gets a signal after `seconds`."""
    pid = os.fork()
    if not pid:
        work()
        os._exit(0)
    time.sleep(seconds)
    os.kill(pid, number)
    os.waitpid(pid, 0)


def seconds(work: Callable[[], Any]) -> float:
    """How long `work` takes in a process that nothing happens to."""
    start = time.perf_counter()
    killed(work, 0, signal.SIGCONT)
    return time.perf_counter() - start


def fused_state(out: Path) -> str:
    """How many fusions a folder holds, found to be whole; a folder that opens and is not raises something."""
    if not (out / "config.json").exists():
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
        rows = len((out / "results.csv").read_text().splitlines()) - 1
        assert rows in (len(points), len(points) - 1)  # a table follows its point
    return str(len(points))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    # The usual lock of progress bars is shared with forked processes: one killed while it holds it stops them all.
    tqdm.set_lock(threading.RLock())
    base = str(folder / "base")
    make_llama().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    # Nothing runs in this process but what makes no thread, as it forks.
    patch("lf_hf.evaluate.results.missing_plot_packages", lambda: "no pictures").start()
    evaluation.Evaluation = Answers  # type: ignore[misc, assignment]
    found: collections.defaultdict[str, list[str]] = collections.defaultdict(list)
    rng = random.Random(0)
    settings: dict[str, Any] = {"method": "truncate", "perplexity_tokens": 0, "speed": False}
    models = {
        count: FusedLlamaForCausalLM.from_pretrained_fused(base, num_fusions=count, **settings) for count in (1, 2)
    }

    def write(out: Path, counts: Iterable[int]) -> None:
        for count in counts:
            if out.name == "fuse":
                fuse_checkpoint(base, out, num_fusions=count, **settings)
            elif out.name == "fused_dir":
                FusedLlamaForCausalLM.from_pretrained_fused(base, num_fusions=count, fused_dir=out, **settings)
            else:
                models[count].save_pretrained(out)

    for name in ("fresh", "foreign", "fuse", "fused_dir"):
        out = folder / name
        if name != "fresh":
            put_foreign(out)
        before = foreign(out)
        taken = seconds(lambda: write(out, [1]))  # noqa: B023
        for _ in range(KILLS):
            if name == "fresh":
                shutil.rmtree(out, ignore_errors=True)
            killed(lambda: write(out, itertools.cycle((2, 1))), rng.uniform(0, 2 * taken))  # noqa: B023
            state = fused_state(out)
            if state == "none":
                seconds(lambda: FusedLlamaForCausalLM.from_pretrained(out))  # noqa: B023
                state += f", then {fused_state(out)}"
            found[name].append(state)
            assert not before or foreign(out) == before

    arguments: dict[str, Any] = {"num_fusions": [1, 2], "methods": ["truncate"], "tasks": ["task"]}
    arguments["settings"] = {"perplexity_tokens": 100, "speed": False}
    put_foreign(folder / "whole")
    taken = seconds(lambda: sweep(base, folder / "whole", **arguments))
    whole = [{**vars(point), "seconds": None} for point in read_points(folder / "whole" / RESULTS).values()]
    out = folder / "sweep"
    put_foreign(out)
    before = foreign(out)
    for _ in range(KILLS):
        killed(lambda: sweep(base, out, **arguments), rng.uniform(0, taken))
        found[out.name].append(swept_state(out))
        assert foreign(out) == before
    seconds(lambda: sweep(base, out, **arguments))
    assert [{**vars(point), "seconds": None} for point in read_points(out / RESULTS).values()] == whole
    assert {file.name for file in out.iterdir()} == {file.name for file in (folder / "whole").iterdir()}
    print(json.dumps({"found": found, "left": sorted(path.name for path in folder.iterdir())}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
