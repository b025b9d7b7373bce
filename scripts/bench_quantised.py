#!/usr/bin/env python3
"""Fewer bits beside fewer layers: a model and fusions of it in llama.cpp, one table and one picture in OUT.

    ./scripts/bench_quantised OUT BASE [FUSED ...] --text wiki.txt --mmlu mmlu_dir

Everything is measured by llama.cpp's own tools on one thread, and relative to BASE in 16 bits. OUT keeps what they
write (gigabytes) and say: what stands there is not measured again.
  types  what most of the file is in: llama.cpp takes others than the name says where rows are no multiple of 256
  prefill, decoding  128 and 32 tokens, one sequence: the median of --rounds, each of which times all files in turn;
        the ratio is to BASE in the same round, with the quartiles
  text, reasoning  --text, and worked questions that lm-eval ships: perplexity as a ratio, and divergence (KL) in nats
  quiz  MMLU questions (the original CSV release, --mmlu) as cloze: choices are scored by log-likelihood a token. `diff`
        is against BASE, question by question, with its standard error
A point of the picture is filled where no other is better in both directions.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import struct
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench_quality import read_questions
from mend_gguf import mend

from lf_hf.report.pictures import COLORS, panels
from lf_hf.text.judging import judging_texts
from lf_hf.text.mmlu import Question

BASE_TYPES = ("F16", "Q8_0", "Q6_K", "Q4_K_M", "Q3_K_S", "Q2_K")
FUSED_TYPES = ("F16", "Q8_0", "Q4_K_M")
LENGTH = 512  # tokens of a sequence; the second half is judged
SPEEDS = {"prefill": ("-p", "128", "-n", "0"), "decoding": ("-p", "0", "-n", "32")}


@dataclass
class Quantised:
    """One file, and what was measured of it."""

    model: str
    layers: int
    type: str
    file: Path
    bits: float = 16.0  # a weight
    contents: str = "F16"
    speeds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in SPEEDS})  # tokens a second
    ratios: dict[str, float] = field(default_factory=dict)  # of perplexities, by text
    divergences: dict[str, float] = field(default_factory=dict)  # nats a token, by text
    correct: list[bool] = field(default_factory=list)  # by question

    @property
    def mib(self) -> float:
        return self.file.stat().st_size / 2**20

    def run(self, step: str, *command: str | Path) -> str:
        """What a program says, which is kept, and not asked for again."""
        log = self.file.parent / "logs" / f"{self.file.stem}.{step}"
        if not log.exists():
            print(f"{log.name} ...", file=sys.stderr, flush=True)
            ended = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
            )
            if ended.returncode:
                raise SystemExit(f"{ended.stdout[-2000:]}\n{command[0]} failed with exit code {ended.returncode}.")
            log.write_text(ended.stdout, encoding="utf-8")
        return log.read_text(encoding="utf-8")


def convert(out: Path, converter: Path, model: Path, types: Sequence[str]) -> list[Quantised]:
    """A model's files of some types, the first of which is F16; of a fused model they are made of a mended one."""
    layers = json.loads((model / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    whole, *others = (Quantised(model.name, layers, kind, out / f"{model.name}-{kind}.gguf") for kind in types)
    whole.run("convert", sys.executable, converter, model, "--outtype", "f16", "--outfile", whole.file)
    if types == FUSED_TYPES:
        mend(model, whole.file)
    for made in others:
        said = made.run("quantize", "llama-quantize", whole.file, made.file, made.type, "1")
        made.bits = found(r"quant size .*\(([0-9.]+) BPW\)", said)
        sizes: defaultdict[str, float] = defaultdict(float)  # MiB
        for name, mib in re.findall(r"converting to (\w+) .*-> *([0-9.]+) MiB", said):
            sizes[name.upper()] += float(mib)
        made.contents = ", ".join(
            f"{name} {sizes[name] / made.mib:.0%}" for name in sorted(sizes, key=sizes.__getitem__)[:-3:-1]
        )
    return [whole, *others]


def judge(files: Sequence[Quantised], name: str, text: Path, chunks: int) -> None:
    """Perplexities and divergences on a text; the first file is what the others are compared with."""
    dense, *others = files
    shape = ("-c", str(LENGTH), "-b", str(LENGTH), "--chunks", str(chunks), "--threads", "1")
    kept = ("--kl-divergence-base", text.with_suffix(".logits"))
    said = dense.run(name, "llama-perplexity", "-m", dense.file, "-f", text, *shape, *kept)
    print(f"{dense.file.stem}: perplexity on {name} {found(r'Final estimate: PPL = ([0-9.]+)', said):.4g}")
    dense.ratios[name], dense.divergences[name] = 1.0, 0.0
    for made in others:
        said = made.run(name, "llama-perplexity", "-m", made.file, "--kl-divergence", *shape, *kept)
        made.ratios[name] = found(r"Mean PPL\(Q\)/PPL\(base\) *: *([0-9.]+)", said)
        made.divergences[name] = found(r"Mean +KLD: *(-?[0-9.]+)", said)


def found(pattern: str, said: str) -> float:
    match = re.search(pattern, said)
    if match is None:
        raise SystemExit(f"A tool of llama.cpp does not say {pattern}:\n{said[-2000:]}")
    return float(match[1])


def pack(questions: Sequence[Question]) -> bytes:
    """Questions in the form that llama-perplexity reads: their number and offsets, then each with labelled choices."""

    def text(value: str) -> bytes:
        encoded = value.encode()
        return struct.pack("<I", len(encoded)) + encoded

    packed = []
    for question in questions:
        count = len(question.choices)
        choices = b"".join(text(choice.strip()) for choice in question.choices)
        labels = struct.pack(f"<{count}i", *(number == question.answer for number in range(count)))
        prompt = text(f"Question: {question.question.strip()}\nAnswer:")
        packed.append(prompt + struct.pack("<I", count) + choices + labels + struct.pack("<I", 0))
    offsets = [sum(map(len, packed[:number])) for number in range(len(packed))]
    return struct.pack(f"<{len(packed) + 1}I", len(packed), *offsets) + b"".join(packed)


def ask(files: Sequence[Quantised], questions: Path) -> None:
    """Which questions each file answers."""
    for made in files:
        quiz = ("--multiple-choice", "-bf", questions, "-np", "16", "-c", "64", "--threads", "1")
        said = made.run("quiz", "llama-perplexity", "-m", made.file, *quiz)
        percents = [float(percent) for percent in re.findall(r"^\d+\t([0-9.]+)$", said, flags=re.MULTILINE)]
        right = [0, *(round(percent * number / 100) for number, percent in enumerate(percents, 1))]
        made.correct = [after > before for before, after in itertools.pairwise(right)]


def time_in_turn(files: Sequence[Quantised], rounds: int) -> None:
    for number in range(rounds):
        for made in files:
            for name, amount in SPEEDS.items():
                timed = ("-m", made.file, "-t", "1", "-r", "1", *amount, "-o", "json")
                said = made.run(f"{name}.{number}", "llama-bench", *timed)
                made.speeds[name].append(found(r'"avg_ts": ([0-9.]+)', said))


def times(values: Sequence[float], of: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of the ratios, round by round."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(values, of, strict=True)], n=4)
    return low, middle, high


def row(made: Quantised, dense: Quantised) -> str:
    cells = [str(made.layers), made.type, f"{made.bits:.1f}", made.contents, f"{made.mib:.0f}"]
    for name, values in made.speeds.items():
        low, middle, high = times(values, dense.speeds[name])
        spread = "" if made is dense else f" ({middle:.2f}, {low:.2f}-{high:.2f})"
        cells.append(f"{statistics.median(values):.3g}{spread}")
    cells += [f"{ratio:.3f}" for ratio in made.ratios.values()]
    cells += [f"{divergence:.4f}" for divergence in made.divergences.values()]
    changes = [int(a) - int(b) for a, b in zip(made.correct, dense.correct, strict=True)]
    error = statistics.stdev(changes) / len(changes) ** 0.5
    cells.append(f"{statistics.mean(made.correct):.3f} ({statistics.mean(changes):+.3f} ± {error:.3f})")
    return f"| {' | '.join(cells)} |"


def draw(files: Sequence[Quantised], text: str, path: Path) -> None:
    """Divergence over decoding speed and over size: a line a model, a point a type."""
    figure, axes = panels(6.4, 2, sharey=True)
    worse = [made.divergences[text] for made in files]
    speeds = [times(made.speeds["decoding"], files[0].speeds["decoding"])[1] for made in files]
    colors = dict(zip(dict.fromkeys(made.model for made in files), COLORS, strict=False))
    sides = {"decoding, times that of the dense model in 16 bits": speeds, "MiB": [-made.mib for made in files]}
    for axis, (label, better) in zip(axes, sides.items(), strict=True):
        axis.set(xlabel=label, ylabel=f"divergence, {text} (nats)")
        axis.set_yscale("symlog", linthresh=0.01)
        for model, color in colors.items():
            spots = sorted((abs(x), y) for made, x, y in zip(files, better, worse, strict=True) if made.model == model)
            axis.plot(*zip(*spots, strict=True), color=color, alpha=0.4, label=model)
        for made, x, y in zip(files, better, worse, strict=True):
            beaten = any(other > x and cost < y for other, cost in zip(better, worse, strict=True))
            axis.plot(abs(x), y, "o", color=colors[made.model], fillstyle="none" if beaten else "full")
            axis.annotate(made.type, (abs(x), y), xytext=(4, 4), textcoords="offset points", fontsize=7)
        axis.grid(alpha=0.25)
        axis.margins(x=0.12)
    axes[0].legend(ncols=3, fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    figure.savefig(path)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for files, logs, table.md and quantised.png")
    parser.add_argument("base", type=Path, help="folder of the dense model")
    parser.add_argument("fused", type=Path, nargs="*", help="folders of models made of it")
    parser.add_argument("--text", type=Path, required=True, help="a file that nothing was fitted to")
    parser.add_argument("--mmlu", type=Path, required=True, help="folder of the MMLU CSV release")
    parser.add_argument("--chunks", type=int, default=16, help=f"sequences of {LENGTH} tokens of each text")
    parser.add_argument("--questions", type=int, default=600, help="of the quiz, at most")
    parser.add_argument("--rounds", type=int, default=7, help="of timing, 2 or more")
    parser.add_argument("--llama", type=Path, required=True, help=argparse.SUPPRESS)  # its source
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    (options.out / "logs").mkdir(parents=True, exist_ok=True)
    converter = options.llama / "convert_hf_to_gguf.py"
    files = convert(options.out, converter, options.base, BASE_TYPES)
    for model in options.fused:
        files += convert(options.out, converter, model, FUSED_TYPES)
    texts = {judging.name: judging.text for judging in judging_texts() if judging.name == "reasoning"}
    texts = {"text": options.text.read_text(encoding="utf-8"), **texts}
    for name, text in texts.items():
        source = options.out / f"{name}.txt"
        source.write_text(text, encoding="utf-8")
        judge(files, name, source, options.chunks)
    questions = options.out / "quiz.bin"
    questions.write_bytes(pack(read_questions(options.mmlu, options.questions)))
    ask(files, questions)
    time_in_turn(files, options.rounds)
    heads = [
        "layers",
        "type",
        "bits",
        "types",
        "MiB",
        *SPEEDS,
        *texts,
        *(f"KL, {name}" for name in texts),
        "quiz (diff)",
    ]
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *(row(made, files[0]) for made in files)]
    table = "\n".join(rows)
    (options.out / "table.md").write_text(f"{table}\n", encoding="utf-8")
    print(table)
    draw(files, "text", options.out / "quantised.png")


if __name__ == "__main__":
    main()
