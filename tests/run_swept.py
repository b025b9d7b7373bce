"""`lf-hf sweep` as one process of a launch, with answers in place of lm-eval's: run_swept.py sweep ..."""

from __future__ import annotations

import os
import sys
from typing import Any
from unittest.mock import patch

from run_faults import Answers

import lf_hf_command
from lf_hf.evaluate import evaluation
from lf_hf.evaluate.points import Score


class Printed(Answers):
    def scores(self, model: Any, tokenizer: Any) -> dict[str, Score]:
        report = getattr(model, "fusion_report", None)
        name = f"{report.config['method'] if report else 'dense'} {model.config.num_hidden_layers}"
        print(f"judged {name} in process {os.environ['LOCAL_RANK']}", flush=True)
        return super().scores(model, tokenizer)


evaluation.Evaluation = Printed  # type: ignore[misc, assignment]
patch("lf_hf.evaluate.results.missing_plot_packages", lambda: "no pictures").start()
sys.exit(lf_hf_command.main())
