#!/usr/bin/env python3
"""What fusing and healing a model of Llama-3-8B's shape take on one GPU, beside the plan: a table and a JSON file.

    ./scripts/bench_gpu                                                  # installs what it needs first
    .venv/bin/python scripts/bench_gpu.py --small --device cpu           # whether it runs

The checkpoint is random: what it says is noise, but time and memory are those of its shape. `refit` and `healed`, with
what the plan trains, run on all of the card and on a part of it. Each case runs in a process of its own, so that peaks
of memory are its own, and its row is written when it ends. When time is up, the case that runs is stopped, and those
after it are left out.

Each phase has seconds / those of the plan, thousands of tokens a second, and the share of the card's peak in bfloat16
that its products reach; solutions in float64 do not count. The plan's seconds of measuring for a fusion that heals hold
the base's final states, which nothing times. Memory is what was reserved on the card, and taken on the host with the
pages of mapped files, each / what the plan says. Temporary files (TMPDIR) need 62 GiB.

Why eight minutes suffice for 32 layers, 4096 wide, an MLP of 14336, 16384 tokens to fit and 65536 to heal on, by an
estimate for an H100 with 400e12 operations a second in bfloat16, 40 % of its peak, 40e12 in float32, and 3e9 bytes a
second from files:

  checkpoint       16e9 bytes to write: 30 s. Reading them and importing takes 15 s in each case after it
  text             the model writes half of it, all 64 sequences together, in 127 steps of some 30 ms: 5 s
  choosing         57 pairs and triples and 8 sets of up to 4 groups, each a rough fit and the text behind it: 40 to 50
                   s. Only in the first case; in the others layers are chosen by influence, in 5 s
  making           a group's selection among 17920 channels and its solution take 30e12 in float32; its training, 8
                   passes over one layer, takes 170e12 in bfloat16 and 64 steps of AdamW: 3 s. 12 to 20 s
  healing          a step of 2048 tokens takes 6 operations for each weight that it trains and 4 for each other one: .2
                   s. With the base's final states, looks at held-out text and states that are kept: 30 s
  saving           14e9 bytes: 30 s. Speed: 10 s

That is 30 s, 40 for the tests, 120 for the first case, 70 for a refit on a part of the card, 100 and 110 for healing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import torch
from bench_speed import gib, quiet, row, table
from random_checkpoint import add_shape, llama_config, write_checkpoint
from transformers import LlamaConfig

from lf_hf import FusionConfig, fuse_checkpoint
from lf_hf.measure import speed
from lf_hf.pipeline.fusion import FusionInputs
from lf_hf.pipeline.planning import fusion_plan
from lf_hf.plan.plan import Plan

ROOT = Path(__file__).parent.parent
LLAMA_3_8B = {"layers": 32, "hidden": 4096, "mlp": 14336, "heads": 32, "kv_heads": 8, "vocab": 128256}
SMALL = {"layers": 5, "hidden": 32, "mlp": 64, "heads": 4, "kv_heads": 2, "vocab": 512, "positions": 32}
SMALL_WORK = {"dtype": "float32", "tokens": 1024, "heal_tokens": 2048, "fusions": 1}
# Operations a second in bfloat16, without sparsity, by a part of the device's name; the first that fits counts.
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
PHASES = {
    "measure": "calibration text",
    "choose": "choosing",
    "make": "making",
    "heal": "healing",
}
"""Of a plan, and what a report calls them."""

Figures = dict[str, Any]
Case = Callable[[], Figures]


def write_base(folder: str, config: LlamaConfig, device: str) -> Figures:
    write_checkpoint(Path(folder), config, device=device)
    size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    return {"bytes": size, "found": f"{gib(size)} GiB"}


def marked_tests() -> Figures:
    """The tests of the suite that run on the card."""
    files = [str(file) for file in sorted(ROOT.glob("tests/**/test_*.py")) if "mark.card" in file.read_text("utf-8")]
    pytest = [sys.executable, "-m", "pytest", "-m", "card", "-p", "no:cacheprovider", "-q", *files]
    done = subprocess.run(pytest, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout, file=sys.stderr)
    if done.returncode:
        raise RuntimeError(f"pytest ended with {done.returncode}")
    return {"found": done.stdout.splitlines()[-1].strip("= ")}


def fused(base: str, options: argparse.Namespace, method: str, selection: str, places: str | None) -> Figures:
    """Fuse by a plan for some places, as --max-memory names them; all that is free by default."""
    given: dict[str, Any] = {"num_fusions": options.fusions, "method": method, "selection": selection}
    given |= {"calibration_tokens": options.tokens, "perplexity_tokens": 0}
    if method == "healed":
        given["heal_tokens"] = options.heal_tokens
    where = {"device_map": options.device, "max_memory": places}
    plan = fusion_plan(FusionInputs.open(base, FusionConfig(**given), None, None, dict(where)))
    with tempfile.TemporaryDirectory(dir=Path(base).parent) as out:
        report = fuse_checkpoint(base, out, **given, **where)
    figures: Figures = {"groups": [sorted(group) for group in report.groups], "planned": plan.peak}
    tokens = {"heal": given.get("heal_tokens", 0)}
    for phase, name in PHASES.items():
        if seconds := report.seconds.get(name):
            some = tokens.get(phase, options.tokens)
            figures[phase] = of_phase(plan, phase, some, seconds, peak_rate(options.device))
    found = [plan.healing.why] if plan.healing is not None else []
    if report.speed is not None:
        rates = {"prefill": report.speed.prefill, "decoding": report.speed.decoding}
        figures["speed"] = {name: [rate.dense, rate.fused] for name, rate in rates.items()}
        found += [f"{name} {rate.dense:,.0f} to {rate.fused:,.0f} tokens a second" for name, rate in rates.items()]
    return figures | {"found": "; ".join(found)}


def of_phase(plan: Plan, phase: str, tokens: int, seconds: float, peak: float | None) -> Figures:
    """How long a phase took, and was to take; what that is in tokens and operations a second."""
    planned = 60 * plan.minutes[phase] if plan.minutes else 0.0
    work = plan.work[phase]
    figures = {"seconds": seconds, "planned": planned, "tokens_per_second": tokens / seconds}
    figures["flops"] = (work["layer"] + work["head"] + work["product"]) / seconds
    shown = f"{seconds:.3g} / {planned:.3g} s, {tokens / seconds / 1000:.3g}k/s"
    return figures | {"shown": f"{shown}, {figures['flops'] / peak:.0%}" if peak else shown}


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device


def peak_rate(device: str) -> float | None:
    name = device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def measured(case: Case, device: str) -> Figures:
    """What a case found, its seconds, and the most bytes that this process and its memory on the device took so far."""
    start = time.perf_counter()
    try:
        figures = case()
    except Exception as error:  # of any kind: the other cases are to run
        traceback.print_exc()
        figures = {"failed": f"{type(error).__name__}: {error}"}
    figures |= {"seconds": time.perf_counter() - start, "host": getrusage(RUSAGE_SELF).ru_maxrss * 1024}
    if torch.device(device).type == "cuda":
        figures["device"] = device_name(device)
        figures["reserved"] = torch.cuda.max_memory_reserved(device)
    return figures


def measured_apart(case: Case, device: str, seconds: float) -> Figures:
    """The same in a new process, which is stopped after some seconds with all that it has started."""
    context = get_context("spawn")
    answer = context.SimpleQueue()
    process = context.Process(target=_answer, args=(case, device, answer))
    process.start()
    try:
        process.join(max(0.0, seconds))
    finally:
        is_late = process.is_alive()
        if is_late and process.pid is not None:
            with suppress(ProcessLookupError):  # it has no group of its own yet
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
        process.join()
    if is_late:
        return {"failed": "stopped, as time was up", "seconds": seconds}
    return {"failed": f"ended with {process.exitcode}", "seconds": 0.0} if answer.empty() else answer.get()


def _answer(case: Case, device: str, answer: SimpleQueue[Figures]) -> None:
    os.setsid()
    quiet()
    answer.put(measured(case, device))


def run_all(cases: dict[str, Case], options: argparse.Namespace) -> list[Figures]:
    """Measure one case after the other, and write a row of the table and the JSON file after each."""
    settings = {name: str(value) for name, value in vars(options).items()} | {"torch": torch.__version__}
    title = f"{options.layers} layers, {options.fusions} fused on {options.tokens} tokens"
    table(title, "case", "seconds", *PHASES, "card, GiB", "host, GiB", "")
    start, rows = time.perf_counter(), list[Figures]()
    for name, case in cases.items():
        left = options.seconds - (time.perf_counter() - start)
        if options.small:
            figures = measured(case, options.device)
        elif left > 0:
            figures = measured_apart(case, options.device, left)
        else:
            figures = {"failed": "not begun, as time was up", "seconds": 0.0}
        rows.append({"case": name, **figures})
        phases = [figures[phase]["shown"] if phase in figures else "" for phase in PHASES]
        memory = [memory_cell(figures, "reserved", "cuda"), memory_cell(figures, "host", "cpu")]
        row(name, figures["seconds"], *phases, *memory, figures.get("found", figures.get("failed", "")))
        written = json.dumps({"settings": settings, "rows": rows}, indent=1)
        options.out.write_text(written + "\n", encoding="utf-8")
    return rows


def memory_cell(figures: Figures, kind: str, place: str) -> str:
    """Bytes that were taken / those that the plan says of a place, if it says any."""
    planned = [size for name, size in figures.get("planned", {}).items() if name.startswith(place)]
    return " / ".join(gib(size) for size in [figures.get(kind), *planned] if size is not None)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("bench_gpu.json"), help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=480, help="for all")
    parser.add_argument("--tokens", type=int, default=16384, help="of calibration text")
    parser.add_argument("--heal-tokens", type=int, default=65536)
    parser.add_argument("--fusions", type=int, default=4)
    parser.add_argument("--part", help="of the machine, as --max-memory names it; by default a card of 24 GB")
    parser.add_argument("--skip-tests", action="store_true", help="leave out the suite's tests on the card")
    parser.add_argument("--small", action="store_true", help="a tiny model and little text, all in one process")
    add_shape(parser)
    parser.set_defaults(**LLAMA_3_8B, positions=8192)
    if parser.parse_known_args(arguments)[0].small:
        parser.set_defaults(**SMALL, **SMALL_WORK)
    options = parser.parse_args(arguments)
    options.part = options.part or ("cpu=4GiB" if options.device == "cpu" else "cuda:0=24GB,cpu=64GiB")
    return options


def main() -> None:
    options = parse()
    quiet()
    if options.small:
        speed.SECONDS = 0.0
    with tempfile.TemporaryDirectory() as folder:
        base, part = f"{folder}/base", options.part
        fuse = partial(fused, base, options)
        drawn_on = "cpu" if options.small else options.device
        cases: dict[str, Case] = {"checkpoint": partial(write_base, base, llama_config(options), drawn_on)}
        if not options.skip_tests:
            cases["tests"] = marked_tests
        cases["refit, groups"] = partial(fuse, "refit", "groups", None)
        cases[f"refit, {part}"] = partial(fuse, "refit", "least_influence", part)
        cases["healed"] = partial(fuse, "healed", "least_influence", None)
        cases[f"healed, {part}"] = partial(fuse, "healed", "least_influence", part)
        rows = run_all(cases, options)
    sys.exit(any("failed" in figures for figures in rows))


if __name__ == "__main__":
    main()
