#!/usr/bin/env python3
"""Fused models as drafts for their base: tokens a second of the base alone and with each draft, in alternating runs.

In assisted generation a draft proposes some tokens, and the base keeps those that it would have written itself. The
accepted share a says how many of those are kept. With one proposal a time it pays where a is more than the draft's cost
over the base's.

.venv/bin/python scripts/bench_drafts.py BASE DRAFT DRAFT ...
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from lf_hf.text.judging import PROMPTS


class Run(NamedTuple):
    """Seconds, passes through the base, and tokens that a draft proposed."""

    seconds: float
    passes: int
    proposed: int


def load(path: str, device: str) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    return model.to(device).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("drafts", nargs="+", help="models that were fused from it")
    parser.add_argument(
        "--proposals", type=int, nargs="+", default=[1, 3], help="tokens that a draft proposes at a time"
    )
    parser.add_argument("--tokens", type=int, default=64, help="written after each of three prompts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    base = load(options.base, options.device)
    drafts = [load(path, options.device) for path in options.drafts]
    prompts = [tokenizer(prompt, return_tensors="pt").to(options.device) for prompt in PROMPTS]
    ways = list(itertools.product(drafts, options.proposals))
    base_runs: list[Run] = []
    draft_runs: list[list[Run]] = []
    for number in range(options.rounds + 1):
        base_run = run(base, None, 0, prompts, options.tokens)
        round_runs = [run(base, draft, count, prompts, options.tokens) for draft, count in ways]
        if number > 0:  # the first round warms up
            base_runs.append(base_run)
            draft_runs.append(round_runs)

    table = Table("layers", "proposals", "accepted", "tokens a second", "over the base alone")
    written = len(prompts) * options.tokens
    speed = written / statistics.median(run.seconds for run in base_runs)
    table.add_row(str(base.config.num_hidden_layers), "", "", f"{speed:.1f}", "1")
    for (draft, count), runs in zip(ways, zip(*draft_runs, strict=True), strict=True):
        speed = written / statistics.median(run.seconds for run in runs)
        ratios = sorted(alone.seconds / run.seconds for alone, run in zip(base_runs, runs, strict=True))
        accepted = (written - runs[0].passes) / runs[0].proposed
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        layers = draft.config.num_hidden_layers
        table.add_row(str(layers), str(count), f"{accepted:.2f}", f"{speed:.1f}", spread)
    Console().print(table)


@torch.no_grad()
def run(base: Any, draft: Any, count: int, prompts: list[Any], tokens: int) -> Run:
    """Write after each prompt, the likeliest token each time."""
    passes = {base: 0, draft: 0}

    def counted(model: Any, *_: Any) -> None:
        passes[model] += 1

    assisted: dict[str, Any] = {}
    if draft is not None:
        draft.generation_config.update(
            num_assistant_tokens=count, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
        )
        assisted["assistant_model"] = draft
    hooks = [model.register_forward_pre_hook(counted) for model in passes if model is not None]
    start = time.perf_counter()
    for prompt in prompts:
        base.generate(
            **prompt, **assisted, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
    seconds = time.perf_counter() - start
    for hook in hooks:
        hook.remove()
    return Run(seconds, passes[base], passes[draft])


if __name__ == "__main__":
    main()
