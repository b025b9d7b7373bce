#!/usr/bin/env python3
"""What fusing and healing a model of Llama-3-8B's shape take on one GPU: a table and a JSON file, in eight minutes.

    ./scripts/bench_gpu                                                  # installs what it needs first
    .venv/bin/python scripts/bench_gpu.py --tiny --device cpu            # whether it runs

The checkpoint is random: what it says is noise, but time and memory are those of its shape. Each case runs in a process
of its own, so that peaks of memory are its own, and its row is written when it ends. When time is up, the case that
runs is stopped, and those after it are left out. Memory of the host has the pages of files that are mapped in it.

Why the time suffices for 32 layers, 4096 wide, an MLP of 14336 and 16384 tokens, by an estimate for an H100 with 400e12
operations a second in bfloat16, 40 % of its peak, 40e12 in float32, and 3e9 bytes a second from files:

  checkpoint       16e9 bytes to write: 30 s. Reading them and importing takes 15 s in each case after it
  text             the model writes half of it, all 64 sequences together, in 127 steps of some 30 ms: 5 s
  choosing         a rough fit of two layers takes less than 12e12 operations in float32, as it is solved in its tokens,
                   and the text behind it some 40e12 in bfloat16: .5 s. 57 pairs and triples are fitted, and 8 sets of
                   3 to 6 groups: 40 to 50 s. From files each set reads 11e9 bytes more, so layers are chosen by
                   influence there, in 5 s, unless --selection says otherwise
  making           a group's selection among 17920 channels and its solution take 30e12 in float32; its training, 8
                   passes over one layer, takes 170e12 in bfloat16 and 64 steps of AdamW: 3 s. 12 to 20 s
  from files       45e9 bytes to read and 14e9 to write besides: 30 s
  speed            10 s
  healing          a step of 2048 tokens takes 4 operations for each weight of the student, whose adapters are trained,
                   and 2 for each of its base: 92e12, .3 s. With looks at held-out text and states that are kept: 20 s

That is 30 s, 40 for the tests, 65 and 75 for refits from files, 35, 95 and 130 for those in memory: 470 s.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import torch
from bench_speed import gib, quiet, row, table
from random_checkpoint import add_shape, llama_config, write_checkpoint
from transformers import LlamaConfig, TrainerCallback

from lf_hf import HealSettings, from_pretrained_fused, fuse_checkpoint
from lf_hf.checkpoint.base import Base
from lf_hf.decoder.decoder import Decoder
from lf_hf.healing.teacher import STATES, Teacher
from lf_hf.healing.trainer import make_student, make_trainer, training_arguments
from lf_hf.measure import speed
from lf_hf.text.calibration import BUNDLED

ROOT = Path(__file__).parent.parent
LLAMA_3_8B = {"layers": 32, "hidden": 4096, "mlp": 14336, "heads": 32, "kv_heads": 8, "vocab": 128256}
TINY = {"layers": 5, "hidden": 32, "mlp": 64, "heads": 4, "kv_heads": 2, "vocab": 512, "positions": 32}
TINY_WORK = {"dtype": "float32", "tokens": 1024, "fusions": [1, 2], "steps": 3}
# Operations a second in bfloat16, without sparsity, by a part of the device's name; the first that fits counts.
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
PARTS = {"text": "calibration text", "choosing": "choosing", "making": "making"}
MEMORY = "allocated", "reserved", "host"
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


def refit(base: str, device: str, tokens: int, num_fusions: int, selection: str | None) -> Figures:
    """Fuse in memory, where speed is measured too, or with a `selection` layer by layer from and into files."""
    given: dict[str, Any] = {"num_fusions": num_fusions, "method": "refit", "calibration": BUNDLED}
    given |= {"calibration_tokens": tokens, "perplexity_tokens": 0, "device_map": device}
    if selection is None:
        report = from_pretrained_fused(base, **given).fusion_report
        assert report is not None
    else:
        with tempfile.TemporaryDirectory(dir=Path(base).parent) as out:
            report = fuse_checkpoint(base, out, low_memory=True, speed=False, selection=selection, **given)
    figures: Figures = {part: report.seconds[name] for part, name in PARTS.items()}
    figures |= {"groups": [sorted(group) for group in report.groups], "tokens": report.calibration[0].tokens}
    if report.speed is not None:
        rates = {"prefill": report.speed.prefill, "decoding": report.speed.decoding}
        figures["speed"] = {name: [rate.dense, rate.fused] for name, rate in rates.items()}
        words = [f"{name} {rate.dense:,.0f} to {rate.fused:,.0f}" for name, rate in rates.items()]
        figures["found"] = f"{', '.join(words)} tokens a second"
    return figures


class StepSeconds(TrainerCallback):
    """How long each step of a training takes, without what is between them."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = self._now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(self._now() - self._start)

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def healing(base: str, device: str, num_fusions: int, steps: int) -> Figures:
    """Train adapters of a model that is so many layers shorter on its base's predictions, as `heal` does."""
    settings = HealSettings(tokens=steps * HealSettings().batch_tokens, train="lora", learning_rate=1e-4)
    opened = Base.open(base, {"device_map": device})
    model: Any = opened.load().requires_grad_(False)
    shorter = Decoder(model).copy()
    shorter.join((shorter.num_layers - num_fusions - 1, shorter.num_layers - 1), {})
    with tempfile.TemporaryDirectory() as folder:
        training_args = {"bf16": model.dtype == torch.bfloat16}
        arguments = training_arguments(settings, Path(folder, "work"), training_args)
        student = make_student(shorter, settings, [], arguments)
        trainer, watch = make_trainer(student, Teacher(), settings, arguments), StepSeconds()
        generator = torch.Generator().manual_seed(0)
        shape = settings.sequences, settings.length
        ids = torch.randint(model.config.vocab_size, shape, generator=generator)
        states = torch.zeros(settings.length, model.config.hidden_size, dtype=torch.bfloat16)
        items = [{"input_ids": sequence, STATES: states} for sequence in ids]
        trainer.train_dataset, trainer.eval_dataset = items, {"held out": items[:1]}
        trainer.add_callback(watch)
        trainer.train()
    seconds = statistics.median(watch.seconds[1:])  # the first step prepares kernels and memory
    # Adapters need no gradient of the weights beside them: 2 operations forward and 2 back for each weight and token.
    operations = (4 * weights_used(shorter.model) + 2 * model.lm_head.weight.numel()) * settings.batch * settings.length
    rate, tokens = operations / seconds, settings.batch * settings.length / seconds
    found = f"{tokens:,.0f} tokens a second, {rate / 1e12:.3g} TFLOP/s"
    peak = peak_rate(device)
    if peak is not None:
        found += f", {rate / peak:.0%} of {peak / 1e12:.0f}"
    return {"tokens_per_second": tokens, "flops": rate, "peak_flops": peak, "step": seconds, "found": found}


def weights_used(model: Any) -> int:
    """Weights that each token is multiplied by: all but the embeddings, of which it reads one row."""
    return sum(weight.numel() for name, weight in model.named_parameters() if "embed_tokens" not in name)


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
        figures["allocated"] = torch.cuda.max_memory_allocated(device)
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
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    if is_late:
        return {"failed": "stopped, as time was up", "seconds": seconds}
    return {"failed": f"ended with {process.exitcode}"} if answer.empty() else answer.get()


def _answer(case: Case, device: str, answer: SimpleQueue[Figures]) -> None:
    os.setsid()
    quiet()
    answer.put(measured(case, device))


def run_all(cases: dict[str, Case], options: argparse.Namespace) -> list[Figures]:
    """Measure one case after the other, and write a row of the table and the JSON file after each."""
    settings = {name: str(value) for name, value in vars(options).items()} | {"torch": torch.__version__}
    memory_columns = [f"{kind}, GiB" for kind in MEMORY]
    table(f"{options.layers} layers, {options.tokens} tokens", "case", "seconds", *PARTS, *memory_columns, "")
    start, rows = time.perf_counter(), list[Figures]()
    for name, case in cases.items():
        left = options.seconds - (time.perf_counter() - start)
        if options.tiny:
            figures = measured(case, options.device)
        elif left > 0:
            figures = measured_apart(case, options.device, left)
        else:
            figures = {"failed": "not begun, as time was up"}
        rows.append({"case": name, **figures})
        seconds = [figures.get(part, "") for part in ("seconds", *PARTS)]
        memory = [gib(figures[kind]) if kind in figures else "" for kind in MEMORY]
        row(name, *seconds, *memory, figures.get("found", figures.get("failed", "")))
        written = json.dumps({"settings": settings, "rows": rows}, indent=1)
        options.out.write_text(written + "\n", encoding="utf-8")
    return rows


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("bench_gpu.json"), help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=480, help="for all")
    parser.add_argument("--tokens", type=int, default=16384, help="of calibration text")
    parser.add_argument("--fusions", type=int, nargs=2, default=[4, 8])
    selections = ("least_influence", "groups")
    parser.add_argument("--selection", choices=selections, default=selections[0], help="of refits from files")
    parser.add_argument("--steps", type=int, default=16, help="of the healing, two at least")
    parser.add_argument("--skip-tests", action="store_true", help="leave out the suite's tests on the card")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and little text, all in one process")
    add_shape(parser)
    parser.set_defaults(**LLAMA_3_8B, positions=8192)
    if parser.parse_known_args(arguments)[0].tiny:
        parser.set_defaults(**TINY, **TINY_WORK)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    quiet()
    if options.tiny:
        speed.SECONDS = 0.0
    few, many = options.fusions
    with tempfile.TemporaryDirectory() as folder:
        base, device = f"{folder}/base", options.device
        fuse = partial(refit, base, device, options.tokens)
        cases: dict[str, Case] = {"checkpoint": partial(write_base, base, llama_config(options), device)}
        if not options.skip_tests:
            cases["tests"] = marked_tests
        cases[f"refit {few}, in memory"] = partial(fuse, few, None)
        cases[f"refit {few}, from files"] = partial(fuse, few, options.selection)
        cases[f"healing {few}"] = partial(healing, base, device, few, options.steps)
        cases[f"refit {many}, from files"] = partial(fuse, many, options.selection)
        cases[f"refit {many}, in memory"] = partial(fuse, many, None)
        rows = run_all(cases, options)
    sys.exit(any("failed" in figures for figures in rows))


if __name__ == "__main__":
    main()
