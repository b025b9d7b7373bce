"""Kills processes that save, and prints as JSON what they left; run by test_saving.py in a process of its own.

It forks, which is safe only where no thread of torch or of the tokenizers has started.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from conftest import make_llama, make_texts, make_tokenizer
from tqdm import tqdm

from lf_hf import FusedLlamaForCausalLM, FusionReport
from lf_hf.files import locks, saving

State = dict[str, bytes]

# The usual lock of progress bars is shared with forked processes: one that is killed while it holds it stops them all.
tqdm.set_lock(threading.RLock())


def files(folder: Path) -> State:
    """A checkpoint's files; `others` are not among them."""
    if not folder.exists():
        return {}
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name not in ("notes.txt", "runs")}


def put_others(folder: Path) -> None:
    """Something of the user's beside a checkpoint."""
    (folder / "runs").mkdir()
    for file in others(folder):
        file.write_text("mine")


def others(folder: Path) -> list[Path]:
    return [folder / "notes.txt", folder / "runs" / "log"]


def killed(work: Callable[[], Any], seconds: float, number: signal.Signals = signal.SIGKILL) -> None:
    """Run `work` in a process that gets a signal after `seconds`."""
    pid = os.fork()
    if not pid:
        with contextlib.suppress(KeyboardInterrupt):
            work()
        os._exit(0)
    time.sleep(seconds)
    os.kill(pid, number)
    os.waitpid(pid, 0)


def stopped_at_line(work: Callable[[], Any], line: int, number: signal.Signals = signal.SIGKILL) -> bool:
    """Run `work` in a process that gets a signal before the `line`-th line of saving; false if it ended before."""
    pid = os.fork()
    if not pid:
        count = itertools.count(1)

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            if frame.f_code.co_filename not in (saving.__file__, locks.__file__):
                return None
            if event == "line" and next(count) == line:
                os.kill(os.getpid(), number)
            return trace

        sys.settrace(trace)
        try:
            work()
        except KeyboardInterrupt:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] != 0


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what runs in the background ignore it
    make_llama().save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    models: list[FusedLlamaForCausalLM] = []
    for count in (1, 2):
        settings: dict[str, Any] = {"num_fusions": count, "perplexity_tokens": 0, "calibration": make_texts()}
        models.append(FusedLlamaForCausalLM.from_pretrained_fused(str(folder / "base"), **settings))
    wholes = []
    for number, model in enumerate(models):
        model.save_pretrained(folder / f"whole{number}", max_shard_size="50KB")
        wholes.append(files(folder / f"whole{number}"))
    found: collections.defaultdict[str, list[str]] = collections.defaultdict(list)

    def state(out: Path) -> str:
        left = files(out)
        return ["old", "new"][wholes.index(left)] if left in wholes else f"{sorted(left)}"

    def save_again_and_again(out: Path) -> None:
        for model in itertools.cycle(models):
            model.save_pretrained(out, max_shard_size="50KB")

    def save_first(out: Path) -> None:
        """Also shows that the user's files are there again, wherever a killed process has left them."""
        models[0].save_pretrained(out, max_shard_size="50KB")
        kept.append(all(file.read_text() == "mine" for file in others(out)))

    kept: list[bool] = []
    out = folder / "out"
    models[0].save_pretrained(out, max_shard_size="50KB")
    put_others(out)
    rng = random.Random(0)
    for _ in range(25):
        killed(lambda: save_again_and_again(out), rng.uniform(0.01, 0.15))
        found["kill"].append(state(out))
    save_first(out)

    for name, number in (
        ("kill at a line", signal.SIGKILL),
        ("interrupt at a line", signal.SIGINT),
        ("kill at a line without exchange", signal.SIGKILL),
    ):
        if name.endswith("without exchange"):
            saving._exchange = lambda *_: False
        out = folder / name
        models[0].save_pretrained(out)
        put_others(out)
        for line in itertools.count(1):
            save_first(out)

            def save() -> None:
                models[1].save_pretrained(out, max_shard_size="50KB")  # noqa: B023

            stopped = stopped_at_line(save, line, number)
            if not out.exists():  # between two renames; the next writer undoes the first, and is killed too
                stopped_at_line(save, 30)
            found[name].append(state(out))
            if not stopped:
                break
        save_first(out)
        FusionReport.load(out)
    print(json.dumps({"found": found, "kept": kept, "left": sorted(path.name for path in folder.iterdir())}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
