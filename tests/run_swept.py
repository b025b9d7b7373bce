"""`lf-hf sweep` in one of two processes that start together, with answers in place of lm-eval's.

    run_swept.py FOLDER lives|dies sweep ...

Prints each model that it judges as `method layers`, after its number in the launch; where one dies, it is number 1 at
its second model.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from run_faults import Answers

import lf_hf_command
from lf_hf.evaluate import evaluation
from lf_hf.evaluate.points import Score

folder, end, *words = sys.argv[1:]
number = os.environ.get("LOCAL_RANK")
judged: list[str] = []


class Slow(Answers):
    """So that no process makes all points before the other has begun."""

    def scores(self, model: Any, tokenizer: Any) -> dict[str, Score]:
        report = getattr(model, "fusion_report", None)
        judged.append(f"{number} {report.config['method'] if report else 'dense'} {model.config.num_hidden_layers}")
        print(judged[-1], flush=True)
        if end == "dies" and number == "1" and len(judged) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1)
        return super().scores(model, tokenizer)


evaluation.Evaluation = Slow  # type: ignore[misc, assignment]
patch("lf_hf.evaluate.tables.missing_plot_packages", lambda: "no pictures").start()
Path(folder, f"ready-{number}").touch()
while number and len(list(Path(folder).glob("ready-[01]"))) < 2:
    time.sleep(0.05)
sys.argv[1:] = words
sys.exit(lf_hf_command.main())
