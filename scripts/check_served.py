#!/usr/bin/env python3
"""Fused models in vLLM: do they open, do they write what transformers writes, and how many tokens a second?

Speeds are medians of alternating runs, and what stands in brackets is the median of the ratios to the base's, run by
run. `./scripts/check_served BASE FUSED ...` installs what this needs and starts it.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
from vllm import LLM, SamplingParams

PROMPTS = (
    "The first snow of the year fell on a Tuesday. By noon the whole village was",
    "A baker fills 4 trays with 6 rolls each and sells 9 of the rolls. So there are",
    "def mean(numbers):\n    total = 0\n    for number in numbers:",
)
WRITTEN = 32  # tokens after each of these prompts, for the comparison with transformers
ROUNDS = 3


class Load(NamedTuple):
    """What is timed: how many prompts at a time, of how many tokens, and how many tokens are written after each."""

    batch: int
    read: int
    written: int

    @property
    def name(self) -> str:
        return f"{'decoding' if self.written > 1 else 'prefill'}, batch {self.batch}"

    @property
    def tokens(self) -> int:
        return self.batch * (self.written if self.written > 1 else self.read)


LOADS = (Load(1, 128, 1), Load(16, 128, 1), Load(1, 8, 64), Load(16, 8, 64))


class Served(NamedTuple):
    """A model in vLLM, and of the tokens that transformers writes, how many vLLM writes before the first other one."""

    engine: LLM
    layers: int
    agreement: str


def main() -> None:
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    base, *fused = sys.argv[1:]
    table = Table("", "layers", "as transformers", *(load.name for load in LOADS))
    served: dict[str, Served] = {}
    for folder in (base, *fused):
        try:
            served[folder] = serve(folder)
            print(f"{folder}: {served[folder].agreement} tokens as transformers writes them", file=sys.stderr)
        except Exception as error:  # vLLM has no type of its own for a model that it does not take
            if folder == base:
                sys.exit(f"vLLM does not run {base} on this machine: {first_line(error)}")
            table.add_row(Path(folder).name, "", f"does not open: {first_line(error)}")
    speeds = measure(served)
    for folder, model in served.items():
        cells = [cell(speeds[folder, load], speeds[base, load]) for load in LOADS]
        table.add_row(Path(folder).name, str(model.layers), model.agreement, *cells)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def serve(folder: str) -> Served:
    """Open a model in vLLM, in the dtype of its checkpoint, and compare what it writes with transformers."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    prompts = [tokenizer(prompt, return_tensors="pt") for prompt in PROMPTS]
    lengths = {"min_new_tokens": WRITTEN, "max_new_tokens": WRITTEN}
    expected = [model.generate(**prompt, **lengths, do_sample=False)[0].tolist() for prompt in prompts]
    engine = LLM(
        folder,
        dtype=str(model.dtype).removeprefix("torch."),
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=1024,
        max_num_seqs=max(load.batch for load in LOADS),
    )
    read = [prompt["input_ids"][0].tolist() for prompt in prompts]
    pairs = zip(write(engine, read, WRITTEN), read, expected, strict=True)
    same = sum(agreeing(tokens, whole[len(start) :]) for tokens, start, whole in pairs)
    return Served(engine, model.config.get_text_config().num_hidden_layers, f"{same} of {WRITTEN * len(PROMPTS)}")


def agreeing(tokens: list[int], expected: list[int]) -> int:
    """How many tokens come before the first that differs."""
    differing = (place for place, pair in enumerate(zip(tokens, expected, strict=True)) if pair[0] != pair[1])
    return next(differing, len(expected))


def write(engine: LLM, prompts: list[list[int]], count: int) -> list[list[int]]:
    """The likeliest `count` tokens after each prompt, none of which ends the text."""
    how = SamplingParams(temperature=0, min_tokens=count, max_tokens=count)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], how, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def measure(served: dict[str, Served]) -> dict[tuple[str, Load], list[float]]:
    """Tokens a second of each model under each load, in runs that alternate between models."""
    speeds: dict[tuple[str, Load], list[float]] = {(folder, load): [] for folder in served for load in LOADS}
    for number in range(ROUNDS + 1):
        for load in LOADS:
            prompts = [[1 + (7 * row + 3 * place) % 200 for place in range(load.read)] for row in range(load.batch)]
            for folder, model in served.items():
                start = time.perf_counter()
                write(model.engine, prompts, load.written)
                if number > 0:  # the first round warms up
                    speeds[folder, load].append(load.tokens / (time.perf_counter() - start))
    return speeds


def cell(speeds: list[float], of_base: list[float]) -> str:
    ratio = statistics.median(ours / theirs for ours, theirs in zip(speeds, of_base, strict=True))
    return f"{statistics.median(speeds):.1f} (x {ratio:.2f})"


if __name__ == "__main__":
    main()
