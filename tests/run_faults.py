"""Kills processes that save, fuse or sweep between two steps, and checks what they left; run by test_saving.py.

It forks, which is safe only where no thread of torch or of the tokenizers has started.
"""

import gc
import itertools
import os
import shutil
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
from conftest import make_llama, same, save_base, tensors
from tqdm import tqdm

from lf_hf import FusedLlamaForCausalLM, FusionReport, fuse_checkpoint
from lf_hf.checkpoint.saving import WORK
from lf_hf.evaluate import evaluation
from lf_hf.evaluate.points import Score
from lf_hf.evaluate.sweep import sweep
from lf_hf.evaluate.tables import RESULTS, read_points
from lf_hf.pipeline import run


class Answers:
    """Stands for lm-eval, which would take most of the time, and keeps the models that are judged."""

    judged: ClassVar[list[Any]] = []

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def scores(self, model: Any, _: Any) -> dict[str, Score]:
        self.judged.append(model)
        return {"task": Score("acc", float(model.config.num_hidden_layers), None)}


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
    """Run `work` in a process that is killed before it changes more than `step` names in `out`."""
    left = itertools.count(step, -1)

    def dying(act: Callable[..., Any]) -> Callable[..., Any]:
        def run(owner: Any, *given: Any, **named: Any) -> Any:
            in_out = any(out in place.parents for place in (owner, *given) if isinstance(place, Path))
            if in_out and not next(left):
                os.kill(os.getpid(), signal.SIGKILL)
            return act(owner, *given, **named)

        return run

    acts: dict[str, Any] = {name: dying(getattr(Path, name)) for name in ("mkdir", "replace", "unlink")}
    with patch.multiple(Path, **acts):
        return not in_process(work)


def found_in(out: Path, known: dict[Any, dict[str, Any]]) -> Any:
    """The name of the result in a folder, found to be whole; None where nothing opens."""
    if not (out / "config.json").exists():
        return None
    assert (out / "tokenizer.json").is_file() and (out / "README.md").is_file()
    FusionReport.load(out)
    return next(name for name, weights in known.items() if same(tensors(out), weights))


def replace_through_kills(base: str, folder: Path, known: dict[Any, dict[str, Any]], **settings: Any) -> None:
    """One result takes the place of another; a run that is killed loses neither, and the same command ends it."""
    out, states = folder / "replaced", list[int | None]()
    fuse, before = partial(fuse_checkpoint, base, out, overwrite=True, **settings), folder / "before"
    assert in_process(partial(fuse_checkpoint, base, before, num_fusions=2, **settings))
    for step in itertools.count():
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(before, out)
        is_killed = dies_at(step, partial(fuse, num_fusions=1), out)
        states.append(found_in(out, known))
        assert in_process(partial(fuse, num_fusions=1)) and found_in(out, known) == 1
        assert not (out / WORK).exists()
        if not is_killed:
            break
    assert states == sorted(states, key=[2, None, 1].index) and {*states} == {2, None, 1}


def points_in(out: Path) -> list[dict[str, Any]]:
    """Of a sweep, found to be whole."""
    return [{**vars(point), "seconds": None} for point in read_points(out / RESULTS).values()]


def fuse_at_once(fuse: Callable[[], Any], out: Path) -> None:
    """Of two processes that start at once one fuses, and the other waits and takes what that one made."""
    fusions, real = out.parent / "fusions", run.fuse
    fusions.mkdir()

    def slow(*given: Any, **named: Any) -> FusionReport:
        (fusions / str(os.getpid())).touch()
        time.sleep(0.5)
        return real(*given, **named)

    with patch.object(run, "fuse", slow):
        assert all(map(is_done, [start(fuse) for _ in range(2)]))
    assert len(list(fusions.iterdir())) == 1


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what was imported stays, and takes long to look through
    # The usual lock of progress bars is shared with forked processes: one killed while it holds it stops them all.
    tqdm.set_lock(threading.RLock())
    base = save_base(folder / "base", make_llama(max_position_embeddings=32))
    # Nothing runs in this process but what makes no thread, as it forks.
    patch("lf_hf.evaluate.tables.missing_plot_packages", lambda: "no pictures").start()
    evaluation.Evaluation = Answers  # type: ignore[misc, assignment]
    settings: dict[str, Any] = {"method": "truncate", "perplexity_tokens": 0, "speed": False}
    fuse = partial(FusedLlamaForCausalLM.from_pretrained_fused, base, **settings)
    known = {count: dict(fuse(num_fusions=count).state_dict()) for count in (1, 2)}
    together = folder / "together"
    fuse_at_once(partial(fuse, num_fusions=1, fused_dir=together), together)
    assert found_in(together, known) == 1
    replace_through_kills(base, folder, known, **settings)

    arguments: dict[str, Any] = {"num_fusions": [1, 2], "methods": ["truncate"], "tasks": ["task"]}
    arguments["settings"] = {"perplexity_tokens": 100, "speed": False}
    whole, out = folder / "whole", folder / "sweep"
    assert in_process(partial(sweep, base, whole, **arguments))
    points = list[Any]()
    for step in itertools.count():
        is_killed = dies_at(step, partial(sweep, base, out, **arguments), out)
        assert points_in(out)[: len(points)] == points  # none is lost
        points = points_in(out)
        if not is_killed:
            break
    assert points == points_in(whole)
    assert {file.name for file in out.iterdir()} == {file.name for file in whole.iterdir()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
