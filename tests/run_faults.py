"""Kills processes that save, fuse or sweep, and checks what they left; run by test_saving.py on its own.

It forks, which is safe only where no thread of torch or of the tokenizers has started.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from conftest import save_base, tensors
from tqdm import tqdm

from lf_hf import FusedLlamaForCausalLM, FusionReport, fuse_checkpoint
from lf_hf.evaluate import evaluation
from lf_hf.evaluate.points import RESULTS, Score, read_points
from lf_hf.evaluate.sweep import sweep

KILLS = 4
FOREIGN = (
    *("notes.txt", "train_results.json", "tokenizer_notes.md", "tokenizers/a.txt", "tokenizer_training/corpus.txt"),
    *("chat_templates/a.jinja", "fusion_report.html", "checkpoint-7/optimizer.pt", "README.md", "training_args.bin"),
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


def foreign(folder: Path) -> list[tuple[int, int, bytes]]:
    """Mode, inode and content of each of them, and of the folder itself."""
    paths = [folder, *(folder / name for name in FOREIGN)]
    contents = [path.read_bytes() if path.is_file() else b"" for path in paths]
    return [(path.stat().st_mode, path.stat().st_ino, held) for path, held in zip(paths, contents, strict=True)]


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


def write_on(write: Callable[[int], Any]) -> None:
    for count in itertools.cycle((2, 1)):
        write(count)


def num_fusions_in(out: Path) -> int | None:
    """Of what is in a folder, found to be whole; None where nothing opens."""
    if not (out / "config.json").exists():
        return None
    report = FusionReport.load(out)
    count: int = report.config["num_fusions"]
    layers = {name.split(".")[2] for name in tensors(out) if name.startswith("model.layers.")}
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert len(layers) == config["num_hidden_layers"] == report.layers_after == 5 - count
    assert (out / "tokenizer.json").is_file() and (out / "README.md").is_file()
    return count


def points_in(out: Path) -> list[dict[str, Any]]:
    """Of a sweep, found to be whole."""
    points = [{**vars(point), "seconds": None} for point in read_points(out / RESULTS).values()]
    if (out / "results.csv").exists():
        rows = len((out / "results.csv").read_text().splitlines()) - 1
        assert rows in (len(points), len(points) - 1)  # a table follows its point
    return points


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    # The usual lock of progress bars is shared with forked processes: one killed while it holds it stops them all.
    tqdm.set_lock(threading.RLock())
    base, rng = save_base(folder / "base"), random.Random(0)
    # Nothing runs in this process but what makes no thread, as it forks.
    patch("lf_hf.evaluate.results.missing_plot_packages", lambda: "no pictures").start()
    evaluation.Evaluation = Answers  # type: ignore[misc, assignment]
    settings: dict[str, Any] = {"method": "truncate", "perplexity_tokens": 0, "speed": False}
    fuse = partial(FusedLlamaForCausalLM.from_pretrained_fused, base, **settings)
    models = {count: fuse(num_fusions=count) for count in (1, 2)}
    ways: dict[str, Callable[[int], Any]] = {
        "save": lambda count: models[count].save_pretrained(folder / "save"),
        "fuse": lambda count: fuse_checkpoint(base, folder / "fuse", num_fusions=count, **settings),
        "fused_dir": lambda count: fuse(num_fusions=count, fused_dir=folder / "fused_dir"),
    }
    for name, write in ways.items():
        out = folder / name
        put_foreign(out)
        before = foreign(out)
        taken = seconds(partial(write, 1))
        for _ in range(KILLS):
            killed(partial(write_on, write), rng.uniform(0, 2 * taken))
            if num_fusions_in(out) is None:  # the next load finishes the move
                seconds(partial(FusedLlamaForCausalLM.from_pretrained, out))
            assert num_fusions_in(out) in (1, 2) and foreign(out) == before

    fresh = folder / "fresh"
    taken = seconds(partial(models[1].save_pretrained, fresh))
    for _ in range(KILLS):
        shutil.rmtree(fresh, ignore_errors=True)
        killed(partial(write_on, lambda count: models[count].save_pretrained(fresh)), rng.uniform(0, 2 * taken))
        if num_fusions_in(fresh) is None and fresh.exists():
            seconds(partial(FusedLlamaForCausalLM.from_pretrained, fresh))
        assert num_fusions_in(fresh) in (None, 1, 2)  # what opens is whole; it may be that nothing was saved yet

    arguments: dict[str, Any] = {"num_fusions": [1, 2], "methods": ["truncate"], "tasks": ["task"]}
    arguments["settings"] = {"perplexity_tokens": 100, "speed": False}
    whole, out = folder / "whole", folder / "sweep"
    put_foreign(whole)
    taken = seconds(partial(sweep, base, whole, **arguments))
    put_foreign(out)
    before, points = foreign(out), list[Any]()
    for _ in range(KILLS):
        killed(partial(sweep, base, out, **arguments), rng.uniform(0, taken))
        assert points_in(out)[: len(points)] == points and foreign(out) == before  # none is lost
        points = points_in(out)
    assert points
    seconds(partial(sweep, base, out, **arguments))
    assert points_in(out) == points_in(whole)
    assert {file.name for file in out.iterdir()} == {file.name for file in whole.iterdir()}
    assert {path.name for path in folder.iterdir()} - {"fresh"} == {"base", "whole", "sweep", *ways}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
