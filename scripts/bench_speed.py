#!/usr/bin/env python3
"""What fusing costs, and what a fused model saves: tables of times, memory and their ratios.

    .venv/bin/python scripts/bench_speed.py                     # everything, on .cache/smollm2/checkpoint
    .venv/bin/python scripts/bench_speed.py --random --layers 22 --hidden 2048 --mlp 5632 --tables fusing
    .venv/bin/python scripts/bench_speed.py --tables pair --pair 4096 14336 1024

  stages      stages 1 to 3 against a reference that does what the published programs do: a whole forward pass for each
              layer and sample, all activations kept, every pair of layers compared twice
  pair        all matrices of a pair of layers, against one after the other: a float32 distance matrix, scipy's solver
  price       what text, choosing, making and healing cost, against forward passes of the dense model over the same text
  fusing      time and peak memory of fusing from folder to folder, against copying the folder
  sweep       levels of methods in one sweep, against loading the base, fusing and evaluating for one after the other

What is compared runs in one go, and where memory is measured each in a process of its own. "CPU" is the processor time
of all threads, which other programs on the machine disturb less than the wall clock.
"""

from __future__ import annotations

import argparse
import gc
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from bench_quality import heal
from numpy.typing import NDArray
from random_checkpoint import add_shape, llama_config, write_checkpoint
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging

from lf_hf import FusionConfig, fuse_checkpoint
from lf_hf.checkpoint.base import Base
from lf_hf.checkpoint.classes import FusedForCausalLM, fused_class
from lf_hf.choose.choice import choose
from lf_hf.choose.methods import MAKING
from lf_hf.decoder.decoder import Decoder
from lf_hf.measure.dense import Measurements, measure
from lf_hf.pipeline import run
from lf_hf.pipeline.fusion import Texts, for_model
from lf_hf.settings import METHODS, TextSource
from lf_hf.stages import alignment
from lf_hf.stages.activations import sample_distances
from lf_hf.stages.alignment import Pair, assign, normalized_rows
from lf_hf.stages.manifold import diffusion_embedding
from lf_hf.stages.similarity import entropy, layer_similarity, mutual_information, rank_normalized
from lf_hf.text.calibration import (
    documentation_halves,
    load_calibration,
)
from lf_hf.text.packing import tokenize_samples

ROOT = Path(__file__).parent.parent
DEFAULTS = FusionConfig(num_fusions=1)
STAGES = ("perplexity", "calibration text", "choosing", "making")
Array = NDArray[np.float64]
S = TypeVar("S")
T = TypeVar("T")
Loaded = tuple[LlamaForCausalLM, list[Tensor]]  # a base in float32, and the default calibration samples as token ids
Problems = dict[str, list[Pair]]  # pairs of matrices whose rows are to be matched
Order = dict[str, NDArray[np.int64]]
Scores = tuple[dict[str, dict[str, float]], Any]  # figures of texts, and what lm-eval found


@dataclass(frozen=True)
class Cost(Generic[T]):
    """What a run gave, and what it took: seconds, and bytes that the process grew by at its peak and in all."""

    result: T
    wall: float
    cpu: float
    grown: int
    peak: int


def timed(run: Callable[[], T]) -> Cost[T]:
    """Run something here. Memory is that of Linux's resident set."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, wall, cpu = _resident("VmRSS"), time.perf_counter(), time.process_time()
    result = run()
    wall, cpu, peak = time.perf_counter() - wall, time.process_time() - cpu, _resident("VmHWM")
    return Cost(result, wall, cpu, peak - before, peak)


def timed_apart(run: Callable[[S], T], prepare: Callable[[], S]) -> Cost[T]:
    """Run something in a new process, with what `prepare` returns there, which does not count."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_prepared, run, prepare).result()


def _prepared(run: Callable[[S], T], prepare: Callable[[], S]) -> Cost[T]:
    quiet()
    with torch.no_grad():
        return timed(partial(run, prepare()))


def _resident(field: str) -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024


def quiet() -> None:
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def table(title: str, *columns: str) -> None:
    print(f"\n## {title}\n\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)


def row(*cells: object) -> None:
    print(
        "| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |", flush=True
    )


def gib(size: float) -> str:
    return f"{size / 2**30:.3f}"


# Stages 1 to 3


def load(base: str) -> Loaded:
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    length = min(DEFAULTS.sample_length, model.config.max_position_embeddings)
    return model, tokenize_samples(tokenizer, load_calibration(), length, model.config.vocab_size)


def one_pass(loaded: Loaded) -> Array:
    """The package's stages 1 to 3."""
    model, samples = loaded
    distances, _ = sample_distances(Decoder(model), samples)
    return layer_similarity(np.stack([diffusion_embedding(layer) for layer in distances]))


def pass_by_pass(loaded: Loaded) -> Array:
    """The reference."""
    model, samples = loaded
    embeddings = []
    kept = []
    for layer in range(model.config.num_hidden_layers):
        states = torch.zeros(len(samples), DEFAULTS.sample_length, model.config.hidden_size)  # (N, T, hidden)
        for n, sample in enumerate(samples):
            caught: list[Tensor] = []
            hook = model.model.layers[layer].register_forward_hook(lambda *args, to=caught: to.append(args[2]))
            model(sample[None], use_cache=False)
            hook.remove()
            states[n, : len(sample)] = caught[0][0]
        kept.append(states)
    for states in kept:
        flat = states.flatten(1)
        distances = np.zeros((len(flat), len(flat)))
        for n in range(len(flat)):
            for m in range(len(flat)):
                distances[n, m] = (flat[n].double() - flat[m].double()).norm()
        embeddings.append(rank_normalized(diffusion_embedding(distances)))
    similarity = np.empty((len(embeddings), len(embeddings)))
    for i in range(len(embeddings)):
        for j in range(len(embeddings)):
            source, target = embeddings[min(i, j)], embeddings[max(i, j)]  # the same number for both orders
            information = mutual_information(source, target, DEFAULTS.mi_neighbors, DEFAULTS.seed)
            entropies = [entropy(embedding, DEFAULTS.entropy_neighbors) for embedding in (source, target)]
            similarity[i, j] = information / math.sqrt(math.prod(entropies))
    return similarity


def stages(base: str) -> None:
    ours, reference = (timed_apart(way, partial(load, base)) for way in (one_pass, pass_by_pass))
    columns = ("", "CPU seconds", "seconds", "activation memory, GiB", "largest difference of the similarity matrix")
    table("Stages 1 to 3", *columns)
    row("reference", reference.cpu, reference.wall, gib(reference.grown), "")
    row("lf_hf", ours.cpu, ours.wall, gib(ours.grown), "")
    difference = float(np.abs(ours.result - reference.result).max())
    row("ratio", reference.cpu / ours.cpu, reference.wall / ours.wall, reference.grown / ours.grown, difference)


# Assignment


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_pair(hidden: int, mlp: int, kv: int) -> Problems:
    shapes = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
    shapes |= {"gate": (mlp, hidden), "up": (mlp, hidden), "down": (hidden, mlp)}
    return {
        name: [(random(*shape, seed=2 * n).bfloat16(), random(*shape, seed=2 * n + 1).bfloat16())]
        for n, (name, shape) in enumerate(shapes.items())
    }


def one_after_another(problems: Problems) -> Order:
    """The reference."""
    found = {}
    for name, [(weight_i, weight_j)] in problems.items():
        costs = torch.cdist(normalized_rows(weight_i), normalized_rows(weight_j))
        found[name] = linear_sum_assignment(costs.numpy())[1]
    return found


def by_scipy(problems: Problems) -> Order:
    """The package's way without lapx."""
    alignment.lapjvs = None
    return assign(problems)


def pairs(shape: Sequence[int]) -> None:
    columns = ("", "seconds", "CPU seconds", "GiB above the weights", "ratio of seconds", "relative difference of cost")
    table(f"Assignment of a pair of layers: hidden {shape[0]}, MLP {shape[1]}, KV {shape[2]}, bfloat16", *columns)
    problems = layer_pair(*shape)
    reference = timed_apart(one_after_another, partial(layer_pair, *shape))

    def total(found: Order) -> float:
        """In float64, from the weights themselves."""
        cost = 0.0
        for name, [(weight_i, weight_j)] in problems.items():
            a, b = normalized_rows(weight_i), normalized_rows(weight_j[torch.from_numpy(found[name])])
            for x, y in zip(a.split(512), b.split(512), strict=True):
                cost += float((x.double() - y.double()).norm(dim=1).sum())
        return cost

    expected = total(reference.result)
    row("one after another, scipy", reference.wall, reference.cpu, gib(reference.grown), "", "")
    for solver, way in (("scipy", by_scipy), *([("lapx", assign)] if alignment.lapjvs else [])):
        ours = timed_apart(way, partial(layer_pair, *shape))
        ratio, difference = reference.wall / ours.wall, total(ours.result) / expected - 1
        row(f"lf_hf, {solver}", ours.wall, ours.cpu, gib(ours.grown), ratio, difference)


# Fusing


def paragraphs(count: int) -> list[str]:
    return [paragraph for paragraph in documentation_halves()[0].split("\n\n") if len(paragraph) > 200][:count]


def fusing(text: list[str], base: str, out: str, **settings: Any) -> dict[str, float]:
    return fuse_checkpoint(base, out, calibration=text, perplexity_tokens=0, speed=False, **settings).seconds


def fusions(base: str, methods: Sequence[str], num_fusions: int) -> None:
    size = sum(file.stat().st_size for file in Path(base).glob("*.safetensors"))
    columns = ("", "seconds", "over copying", "CPU seconds", "peak memory, GiB", "over checkpoint", "stages")
    table(f"Fusing {num_fusions} layers of a checkpoint of {gib(size)} GiB, folder to folder", *columns)
    with tempfile.TemporaryDirectory() as scratch:
        floor = timed_apart(partial(shutil.copytree, base), partial(str, f"{scratch}/copy"))
        row("copying", floor.wall, 1, floor.cpu, gib(floor.peak), floor.peak / size, "")
        for method in methods:
            for place, placed in {"in memory": {}, "from disk": {"device_map": {"": "disk"}}}.items():
                given: dict[str, Any] = {"method": method, "num_fusions": num_fusions, **placed}
                way = partial(fusing, base=base, out=f"{scratch}/{method}", **given)
                run = timed_apart(way, partial(paragraphs, 512))
                parts = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in run.result.items())
                name = f"{method}, {place}"
                row(name, run.wall, run.wall / floor.wall, run.cpu, gib(run.peak), run.peak / size, parts)


# Price


def price(base: str, config: FusionConfig, calibration: TextSource | None) -> None:
    """What each part of a refit costs, in the order of the pipeline, and a healing if one is asked for."""
    opened = Base.open(base, {})
    tokenizer = opened.tokenizer()
    decoder = Decoder(opened.load())
    config = for_model(config, opened.config)
    samples, corpus, training_text = Texts.load([config], calibration, tokenizer)
    text = timed(partial(measure, decoder, tokenizer, config, samples, corpus))
    measured = text.result
    assert measured.text is not None
    forward = timed(partial(run_layers, decoder, measured.text.sequences))
    choosing = timed(partial(choose, decoder, config, measured))
    groups = choosing.result.groups
    making = timed(lambda: list(MAKING[config.method].make(decoder, groups, config, measured)))
    parts: dict[str, Cost[Any]] = {"forward pass": forward, "text": text, "choosing": choosing, "making": making}
    if training_text is not None:
        fused = cut_short(opened, config.num_fusions, measured)
        parts["healing"] = timed(partial(heal, fused, opened, tokenizer, training_text, config.heal_tokens))
    tokens = measured.text.source.tokens
    title = f"{config.method}, {config.num_fusions} layers fused, {tokens} tokens, selection {config.selection}"
    table(title, "", "CPU seconds", "over forward passes", "seconds", "GiB above the weights")
    for name, cost in parts.items():
        row(name, cost.cpu, cost.cpu / forward.cpu, cost.wall, gib(cost.grown))
    print(f"\nChoosing over making: {choosing.cpu / making.cpu:.2f}. Groups: {', '.join(map(str, groups))}.")


def run_layers(decoder: Decoder, sequences: Sequence[Tensor]) -> None:
    """Run sequences through all layers, without the head."""
    for _ in decoder.walk(decoder.make_batches(sequences)):
        pass


def cut_short(base: Base, num_fusions: int, measured: Measurements) -> FusedForCausalLM:
    """A model of the fused one's shape, whose healing takes as long."""
    model = base.load()
    tokenizer = base.tokenizer()
    config = FusionConfig(num_fusions, "truncate", perplexity_tokens=0)
    report = run.fuse(Decoder(model), tokenizer, config, measured, base=base.name)
    return fused_class(base.config).adopt(model, report, tokenizer)


# Sweeps

TASKS = ["mmlu_sample_anatomy"]  # a question, so that the time is that of fusing
SWEPT: dict[str, Any] = {"perplexity_tokens": 512, "calibration_tokens": 2048, "speed": False}


def swept(_: ModuleType, base: str, folder: str, levels: Sequence[int], methods: Sequence[str]) -> list[Scores]:
    from lf_hf.evaluate.sweep import sweep

    points = sweep(
        base,
        f"{folder}/out",
        num_fusions=levels,
        methods=methods,
        tasks=TASKS,
        calibration=f"{folder}/text.txt",
        settings=SWEPT,
    )
    return [(point.texts, point.scores) for point in points[1:]]


def one_by_one(
    lm_eval: ModuleType, base: str, folder: str, levels: Sequence[int], methods: Sequence[str]
) -> list[Scores]:
    """The reference: what is measured on the base is measured once, and all else is done for each point."""
    evaluation, opened = lm_eval.Evaluation(TASKS), Base.open(base, {})
    configs = [for_model(FusionConfig(level, method, **SWEPT), opened.config) for level in levels for method in methods]
    tokenizer, dense = opened.tokenizer(), opened.load()
    samples, text, _ = Texts.load(configs, f"{folder}/text.txt", tokenizer)
    measured = measure(Decoder(dense), tokenizer, configs[0], samples, text)
    evaluation.scores(dense, tokenizer)
    del dense
    found = []
    for config in configs:
        model = opened.load()
        decoder = Decoder(model)
        report = run.fuse(decoder, tokenizer, config, measured, base=base)
        found.append(
            ({judged.name: judged.figures for judged in report.perplexities}, evaluation.scores(model, tokenizer))
        )
    return found


def sweeps(base: str, levels: Sequence[int], methods: Sequence[str]) -> None:
    columns = ("", "seconds", "ratio", "CPU seconds", "ratio", "peak memory, GiB", "same figures and scores")
    table(f"Sweep of {', '.join(methods)} at {', '.join(map(str, levels))}", *columns)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "text.txt").write_text("\n\n".join(paragraphs(64)), encoding="utf-8")
        given: dict[str, Any] = {"base": base, "folder": folder, "levels": levels, "methods": methods}
        lm_eval = partial(import_module, "lf_hf.evaluate.evaluation")  # whose import does not count
        reference, ours = (timed_apart(partial(way, **given), lm_eval) for way in (one_by_one, swept))
    row("one by one", reference.wall, 1, reference.cpu, 1, gib(reference.peak), "")
    ratios = reference.wall / ours.wall, reference.cpu / ours.cpu
    same = reference.result == ours.result
    row("sweep", ours.wall, ratios[0], ours.cpu, ratios[1], gib(ours.peak), same)


@contextmanager
def checkpoint(options: argparse.Namespace) -> Iterator[str]:
    """A folder with a base: the given one, or a random one."""
    if not options.random:
        yield options.base
        return
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), llama_config(options))
        yield folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("stages", "pair", "price", "fusing", "sweep")
    parser.add_argument("--tables", nargs="+", choices=names, default=names)
    parser.add_argument(
        "--base", default=str(ROOT / ".cache" / "smollm2" / "checkpoint"), help="folder of a checkpoint"
    )
    parser.add_argument("--random", action="store_true", help="instead, a random checkpoint of this shape:")
    add_shape(parser)
    shape = ("HIDDEN", "MLP", "KV")
    parser.add_argument("--pair", type=int, nargs=3, default=[1024, 3584, 256], metavar=shape, help="for pair")
    parser.add_argument(
        "--method", default="refit", choices=[name for name, method in METHODS.items() if method.fits], help="for price"
    )
    parser.add_argument("--selection", choices=["last", "least_influence", "groups"], help="for price")
    parser.add_argument("--text", type=Path, help="for price: a file to calibrate on, in place of the default texts")
    parser.add_argument("--text-tokens", type=int, default=16384, help="for price")
    parser.add_argument("--methods", nargs="+", default=["truncate", "mka", "neural_alignment", "refit"])
    parser.add_argument("--num-fusions", type=int, default=4, help="for price and fusing")
    parser.add_argument("--fusions", type=int, nargs="+", default=[1, 4, 10, 15], help="for sweep")
    parser.add_argument("--sweep-methods", nargs="+", default=["neural_alignment", "refit"])
    options = parser.parse_args()
    quiet()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; base: ", end="")
    print("random weights" if options.random else options.base)
    if "pair" in options.tables:
        pairs(options.pair)
    if options.tables == ["pair"]:
        return
    with checkpoint(options) as base:
        given = base if options.random else options.base
        if "stages" in options.tables:
            stages(base)
        if "price" in options.tables:
            config = FusionConfig(
                options.num_fusions,
                options.method,
                selection=options.selection,
                calibration_tokens=options.text_tokens,
                perplexity_tokens=0,
            )
            price(given, config, options.text)
        if "fusing" in options.tables:
            fusions(base, options.methods, options.num_fusions)
        if "sweep" in options.tables:
            sweeps(given, options.fusions, options.sweep_methods)


if __name__ == "__main__":
    main()
