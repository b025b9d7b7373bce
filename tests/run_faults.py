"""Kills processes that save, fuse, heal or sweep between two steps, and checks what they left; run by test_saving.py.

It forks, which is safe only where no thread of torch or of the tokenizers has started.
"""

from __future__ import annotations

import gc
import itertools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from conftest import ON_DISK, make_llama, make_texts, same, save_base, tensors
from tqdm import tqdm
from transformers import Trainer

from lf_hf import FusedLlamaForCausalLM, FusionReport, fuse_checkpoint, pipeline
from lf_hf.checkpoint.saving import WORK
from lf_hf.evaluate import evaluation
from lf_hf.evaluate.points import RESULTS, Score, read_points
from lf_hf.evaluate.sweep import sweep

FOREIGN = (
    *("notes.txt", "train_results.json", "tokenizer_notes.md", "tokenizers/a.txt", "tokenizer_training/corpus.txt"),
    *("chat_templates/a.jinja", "fusion_report.html", "checkpoint-7/optimizer.pt", "README.md", "training_args.bin"),
)


class Answers:
    """Stands for lm-eval, which would take most of the time, and keeps the models that are judged."""

    judged: ClassVar[list[Any]] = []

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def scores(self, model: Any, _: Any) -> dict[str, Score]:
        self.judged.append(model)
        return {"task": Score("acc", float(model.config.num_hidden_layers), None)}


def put_foreign(folder: Path) -> None:
    """Files of a user's, with names that are like a checkpoint's, in a folder of the user's that may hold one."""
    for name in FOREIGN:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_text("mine")
        (folder / name).chmod(0o640)
    folder.chmod(0o2775)


def foreign(folder: Path) -> list[tuple[tuple[int, ...], bytes]]:
    """Mode, inode, owners and content of each of them, and of the folder itself."""
    paths = [folder, *(folder / name for name in FOREIGN)]
    contents = [path.read_bytes() if path.is_file() else b"" for path in paths]
    kept = [(at.st_mode, at.st_ino, at.st_uid, at.st_gid) for at in map(Path.stat, paths)]
    return list(zip(kept, contents, strict=True))


def start(work: Callable[[], Any]) -> int:
    """Begin `work` in a process of its own, whose number this is."""
    pid = os.fork()
    if not pid:
        try:
            work()
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    return pid


def is_done(pid: int) -> bool:
    """Wait for such a process; whether it came to its end, and was not killed."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code == 0


def in_process(work: Callable[[], Any]) -> bool:
    return is_done(start(work))


def dies_at(step: int, work: Callable[[], Any], out: Path) -> bool:
    """Run `work` in a process that is killed before it takes more than `step` steps: it changes names in `out`, or
    trains."""
    left = itertools.count(step, -1)

    def dying(act: Callable[..., Any]) -> Callable[..., Any]:
        def run(owner: Any, *given: Any, **named: Any) -> Any:
            in_out = any(out in place.parents for place in (owner, *given) if isinstance(place, Path))
            if (in_out or isinstance(owner, Trainer)) and not next(left):
                os.kill(os.getpid(), signal.SIGKILL)
            return act(owner, *given, **named)

        return run

    acts: dict[str, Any] = {name: dying(getattr(Path, name)) for name in ("mkdir", "replace", "unlink")}
    with patch.multiple(Path, **acts), patch.object(Trainer, "training_step", dying(Trainer.training_step)):
        return not in_process(work)


def num_fusions_in(out: Path) -> int | None:
    """Of what is in a folder, found to be whole; None where nothing opens."""
    if not (out / "config.json").exists():
        return None
    count: int = FusionReport.load(out).config["num_fusions"]
    assert same(tensors(out), tensors(out.parent / f"whole {count}"))
    assert (out / "tokenizer.json").is_file() and (out / "README.md").is_file()
    return count


def heal_through_kills(base: str, folder: Path, **settings: Any) -> None:
    """A fusion that heals, killed at ten moments or more: what it leaves opens, and the same command ends it."""
    given = settings | {"num_fusions": 1, "heal_tokens": 4096, "calibration": make_texts(200)}
    whole, states, resumed = folder / "whole healed", list[str | None](), False
    assert in_process(partial(fuse_checkpoint, base, whole, **given))
    known = {"fused": tensors(folder / "whole 1"), "healed": tensors(whole)}
    for step in itertools.count(2, 3):
        out = folder / f"healed {step}"
        command = partial(fuse_checkpoint, base, out, **given)
        is_killed = dies_at(step, command, out)
        if any(out.glob(".lf_hf-saving/complete")):
            assert in_process(partial(FusedLlamaForCausalLM.from_pretrained, out))  # which finishes the move
        there = tensors(out) if (out / "config.json").exists() else {}
        states.append(next((name for name, weights in known.items() if same(there, weights)), None))
        assert states[-1] is not None or not there
        resumed |= states[-1] == "fused" and any((out / WORK).glob("checkpoint-*"))
        if states[-1] != "healed" or (out / WORK).exists():  # else all that was left to do is to let go of the folder
            assert in_process(command) and same(tensors(out), known["healed"])
            assert {file.name for file in out.iterdir()} == {file.name for file in whole.iterdir()}
        if not is_killed:
            break
    assert len(states) > 10 and states == sorted(states, key=[None, "fused", "healed"].index)
    assert resumed  # from a state of the training


def points_in(out: Path) -> list[dict[str, Any]]:
    """Of a sweep, found to be whole."""
    points = [{**vars(point), "seconds": None} for point in read_points(out / RESULTS).values()]
    if (out / "results.csv").exists():
        rows = len((out / "results.csv").read_text().splitlines()) - 1
        assert rows in (len(points), len(points) - 1)  # a table follows its point
    return points


def fuse_at_once(fuse: Callable[[], Any], out: Path) -> None:
    """Of two processes that start at once one fuses, and the other waits and takes what that one made."""
    fusions, real = out.parent / "fusions", pipeline.fuse
    fusions.mkdir()

    def slow(*given: Any, **named: Any) -> FusionReport:
        (fusions / str(os.getpid())).touch()
        time.sleep(0.5)
        return real(*given, **named)

    with patch.object(pipeline, "fuse", slow):
        assert all(map(is_done, [start(fuse) for _ in range(2)]))
    assert len(list(fusions.iterdir())) == 1 and num_fusions_in(out) == 1


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what was imported stays, and takes long to look through
    # The usual lock of progress bars is shared with forked processes: one killed while it holds it stops them all.
    tqdm.set_lock(threading.RLock())
    base = save_base(folder / "base", make_llama(max_position_embeddings=32))
    # Nothing runs in this process but what makes no thread, as it forks.
    patch("lf_hf.evaluate.results.missing_plot_packages", lambda: "no pictures").start()
    evaluation.Evaluation = Answers  # type: ignore[misc, assignment]
    settings: dict[str, Any] = {"method": "truncate", "perplexity_tokens": 0, "speed": False}
    fuse = partial(FusedLlamaForCausalLM.from_pretrained_fused, base, **settings)
    models = {count: fuse(num_fusions=count) for count in (1, 2)}
    for count, model in models.items():
        model.save_pretrained(folder / f"whole {count}")
    together = folder / "together"
    fuse_at_once(partial(fuse, num_fusions=1, fused_dir=together), together)

    heal_through_kills(base, folder, **settings)

    shards = {1: "1GB", 2: "20KB"}
    # Every how many steps the writing of 1 fusion in place of 2 is cut off, and how it is written.
    ways: dict[str, tuple[int, Callable[[Path, int], Any]]] = {
        "save": (1, lambda out, count: models[count].save_pretrained(out, max_shard_size=shards[count])),
        "fuse": (7, lambda out, count: fuse_checkpoint(base, out, num_fusions=count, **settings, **ON_DISK)),
        "fused_dir": (7, lambda out, count: fuse(num_fusions=count, fused_dir=out)),
    }
    for name, (every, write) in ways.items():
        out, states = folder / name, list[int | None]()
        put_foreign(out)
        before = foreign(out)
        for step in itertools.count(0, every):
            assert in_process(partial(write, out, 2))
            is_killed = dies_at(step, partial(write, out, 1), out)
            states.append(num_fusions_in(out))
            assert in_process(partial(FusedLlamaForCausalLM.from_pretrained, out))  # which finishes the move
            assert num_fusions_in(out) in ((1, 2) if states[-1] == 2 else (1,))
            assert foreign(out) == before and not list(out.glob(".lf_hf-saving"))
            if not is_killed:
                break
        assert states == sorted(states, key=[2, None, 1].index) and states[0] == 2 and states[-1] == 1
        assert None in states or every > 1

    arguments: dict[str, Any] = {"num_fusions": [1, 2], "methods": ["truncate"], "tasks": ["task"]}
    arguments["settings"] = {"perplexity_tokens": 100, "speed": False}
    whole, out = folder / "whole", folder / "sweep"
    put_foreign(whole)
    assert in_process(partial(sweep, base, whole, **arguments))
    put_foreign(out)
    before, points = foreign(out), list[Any]()
    for step in itertools.count():
        is_killed = dies_at(step, partial(sweep, base, out, **arguments), out)
        assert points_in(out)[: len(points)] == points and foreign(out) == before  # none is lost
        points = points_in(out)
        if not is_killed:
            break
    assert points == points_in(whole)
    assert {file.name for file in out.iterdir()} == {file.name for file in whole.iterdir()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
