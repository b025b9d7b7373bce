#!/usr/bin/env python3
"""Fused models as drafts for their base: tokens a second of the base alone and with each draft, in alternating runs.

In assisted generation a draft proposes some tokens, and the base keeps those that it would have written itself. The
accepted share a says how many of those are kept. With one proposal a time it pays where a is more than the draft's cost
over the base's.

.venv/bin/python scripts/bench_drafts.py BASE DRAFT DRAFT ...
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import lf_hf  # noqa: F401  registers the classes of fused models
from lf_hf.text.judging import PROMPTS

Run = tuple[float, int, int]
"""Seconds, passes through the base, and tokens that a draft proposed."""


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
    base, *drafts = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(options.device).eval()
        for path in (options.base, *options.drafts)
    )
    prompts = [tokenizer(prompt, return_tensors="pt").to(options.device) for prompt in PROMPTS]
    ways: list[tuple[Any, int]] = [(None, 0), *((draft, count) for draft in drafts for count in options.proposals)]
    runs: list[list[Run]] = []
    for number in range(options.rounds + 1):  # the first one warms up
        of_round = [run(base, draft, count, prompts, options.tokens) for draft, count in ways]
        if number:
            runs.append(of_round)

    table = Table("layers", "proposals", "accepted", "tokens a second", "over the base alone")
    written = len(prompts) * options.tokens
    for (draft, count), of_way in zip(ways, zip(*runs, strict=True), strict=True):
        layers = (draft or base).config.num_hidden_layers
        alone = [seconds for (seconds, _, _), *_ in runs]
        seconds, passes, proposed = zip(*of_way, strict=True)
        ratios = sorted(of_base / own for of_base, own in zip(alone, seconds, strict=True))
        accepted = f"{(written - passes[0]) / proposed[0]:.2f}" if draft else ""
        speed = f"{written / statistics.median(seconds):.1f}"
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})" if draft else "1"
        table.add_row(str(layers), str(count or ""), accepted, speed, spread)
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
    return seconds, passes[base], passes[draft]


if __name__ == "__main__":
    main()
