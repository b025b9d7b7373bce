"""`lf-hf sweep` as one process of a launch, with answers in place of lm-eval's: run_swept.py lives|dies sweep ...

Prints each model that it judges as `method layers`. Where one dies, it is number 1 at its second model.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any
from unittest.mock import patch

from run_faults import Answers

import lf_hf_command
from lf_hf.evaluate import evaluation
from lf_hf.evaluate.points import Score

_, end, *words = sys.argv
judged: list[str] = []


class Printed(Answers):
    def scores(self, model: Any, tokenizer: Any) -> dict[str, Score]:
        report = getattr(model, "fusion_report", None)
        judged.append(f"{report.config['method'] if report else 'dense'} {model.config.num_hidden_layers}")
        print(f"judged {judged[-1]}", flush=True)
        if end == "dies" and os.environ["LOCAL_RANK"] == "1" and len(judged) == 2:
            time.sleep(5)  # so that the other one has made its part
            os.kill(os.getpid(), signal.SIGKILL)
        return super().scores(model, tokenizer)


evaluation.Evaluation = Printed  # type: ignore[misc, assignment]
patch("lf_hf.evaluate.tables.missing_plot_packages", lambda: "no pictures").start()
sys.argv[1:] = words
sys.exit(lf_hf_command.main())
