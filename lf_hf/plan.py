"""What a fusion will do and what it will take, without doing it.

Reads the config and the headers of the checkpoint's files, never the weights. Memory and time are counted from sizes,
in the order in which the pipeline works; the figures are estimates.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lf_hf.config import FusionConfig
from lf_hf.files.base import Base
from lf_hf.files.saving import check_replaceable
from lf_hf.files.weights import stored_dtype
from lf_hf.measure import PERPLEXITY_LENGTH, WRITTEN_LENGTH
from lf_hf.model.fuse_checkpoint import MAX_SHARD_BYTES, check_low_memory
from lf_hf.pipeline import STEP_TOKENS, state_copies
from lf_hf.refit.group import num_candidates
from lf_hf.refit.pair_costs import JUDGING_STRIDE
from lf_hf.refit.regression import EXACT_LIMIT, PRUNING_ROUNDS
from lf_hf.refit.states import MEMORY_LIMIT
from lf_hf.stages.activations import PADDED
from lf_hf.stages.assignment import ALIVE_BYTES, BLOCK, row_costs, solver
from lf_hf.stages.similarity import mutual_information
from lf_hf.text.calibration import Calibration, Corpus, load_corpus, load_needed
from lf_hf.text.mmlu import SUBJECTS

_PROCESS_BYTES = 3 << 28  # Python with torch and transformers, 0.5 GiB, and freed memory that the allocator keeps
_CHARACTERS_PER_TOKEN = 4
_TOKENS_PER_QUESTION = 100  # of MMLU

_LAYER_EFFICIENCY = 0.5  # of a layer on one sequence, against a plain matrix product
_WRITING_EFFICIENCY = 0.2  # of writing text token by token: 0.15 of a small model, 0.4 of products alone
_DISK_BYTES_PER_SECOND = 500e6
_PASSES = 5  # that low memory makes: checking, perplexity twice, calibrating, writing
_PROBE = 1024  # rows and columns of the problems that are timed
_ASSIGNMENT_EXPONENT = 2.2  # of how solving grows with the number of rows, measured on random rows
_CHOSEN = {
    "least_influence": "the layer of least influence joins the one before it",
    "least_divergence": "the pair whose fusion moves predictions least",
}


@dataclass(frozen=True)
class FusionPlan:
    """What a fusion will do and take.

    Attributes
    ----------
    base : str
    config : FusionConfig
    pairs : list of (int, int), or None
        Layers i and j of each step, numbered from 0 as in the original model; None where they are chosen while fusing.
    layers_before, layers_after, parameters_before, parameters_after : int
        Tied parameters count once.
    calibration : list of str
        Where the samples and the running text will come from.
    dtype : torch.dtype
        Of the result.
    bytes_before, bytes_after : int
        Of the weights on disk; estimated where the base is not on this machine yet.
    memory : int
        Bytes at the peak, fusing in memory.
    low_memory : int or None
        The same with low_memory=True; None where that cannot be used.
    seconds : dict of float
        By stage.
    speed : float
        Floating-point operations a second, on which `seconds` are based.
    notes : list of str
        What a user should know, one sentence each.
    """

    base: str
    config: FusionConfig
    pairs: list[tuple[int, int]] | None
    layers_before: int
    layers_after: int
    parameters_before: int
    parameters_after: int
    calibration: list[str]
    dtype: torch.dtype
    bytes_before: int
    bytes_after: int
    memory: int
    low_memory: int | None
    seconds: dict[str, float]
    speed: float
    notes: list[str]

    @property
    def layers_removed_fraction(self) -> float:
        """Layers removed over all layers."""
        return 1 - self.layers_after / self.layers_before

    @property
    def parameters_removed_fraction(self) -> float:
        """Parameters removed over all parameters."""
        return 1 - self.parameters_after / self.parameters_before

    def summary(self) -> str:
        """A few lines for people."""
        if self.pairs is None:
            layers = "chosen while fusing, on calibration text: " + _CHOSEN[self.config.selection]
        else:
            layers = ", then ".join(f"{j} into {i}" for i, j in self.pairs)
            first, last = self.pairs[-1][0], self.pairs[0][1]
            layers += f"; layer {first} then stands for {first} to {last}"
        low_memory = "cannot be used here" if self.low_memory is None else f"{_gib(self.low_memory)} GiB"
        total = sum(self.seconds.values())
        parts = ", ".join(f"{stage} {_duration(taken)}" for stage, taken in self.seconds.items() if taken >= 0.5)
        lines = [
            f"Plan: {self.base} with {self.config.method}, num_fusions={self.config.num_fusions}. Nothing was done.",
            f"  layers: {self.layers_before} -> {self.layers_after} (-{self.layers_removed_fraction:.1%})",
            f"  pairs, layers numbered from 0 as in the base: {layers}",
            f"  parameters: {self.parameters_before:,} -> {self.parameters_after:,} "
            f"(-{self.parameters_removed_fraction:.1%})",
            f"  bytes on disk: {self.bytes_before:,} -> {self.bytes_after:,} ({_name(self.dtype)})",
            *(f"  calibration: {source}" for source in self.calibration),
            f"  peak memory, about: {_gib(self.memory)} GiB; with low memory: {low_memory}",
            f"  time, a rough estimate: {_duration(total)} ({parts})",
            f"    counted operations at {self.speed / 1e9:.3g} GFLOP/s, which a short matrix product just reached; "
            "half or twice of it is possible.",
        ]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def plan_fusion(
    base: str | os.PathLike[str],
    config: FusionConfig,
    *,
    out: str | os.PathLike[str] | None = None,
    low_memory: bool = False,
    calibration: Sequence[str] | str | Path | None = None,
    **kwargs: Any,
) -> FusionPlan:
    """Say what `fuse_checkpoint` with these arguments would do and take.

    Parameters
    ----------
    base, config, out, low_memory, calibration
        As for `fuse_checkpoint`.
    **kwargs
        As for `from_pretrained` (revision, token, dtype, ...).

    Raises
    ------
    ValueError
        For settings, a base, calibration text or a folder that `fuse_checkpoint` would refuse before long work.
    """
    opened = Base.open(base, kwargs)
    if out is not None:
        check_replaceable(out)
    low_memory_fits = True
    try:
        check_low_memory(kwargs)
    except ValueError:
        if low_memory:
            raise
        low_memory_fits = False
    hub, llama_config, base = opened.hub, opened.config, opened.name
    config.check_num_layers(llama_config.num_hidden_layers)
    samples, text = _calibration(config, calibration)
    if not hub.get("gguf_file"):  # a GGUF file has its own, which takes seconds to read
        opened.tokenizer()

    files = opened.files()
    stored = torch.float32 if hub.get("gguf_file") or not files else stored_dtype(files[0])
    dtype = opened.dtype or cast("torch.dtype | None", llama_config.dtype) or stored
    sizes = _Sizes.of(llama_config, config, samples, text, dtype, stored)
    bytes_before = sum(file.stat().st_size for file in files) or sizes.parameters * dtype.itemsize
    parameters_after = sizes.parameters - config.num_fusions * sizes.layer
    speeds = _Speeds.measure(dtype, _device(kwargs.get("device_map")))
    seconds = _seconds(sizes, config, speeds)
    bytes_after = parameters_after * dtype.itemsize
    readings = 1
    if low_memory:  # for each pass, and for each token that is written, anew
        readings = _PASSES + (sizes.short if sizes.written else 0)
    seconds["reading and writing"] = (readings * bytes_before + bytes_after) / _DISK_BYTES_PER_SECOND
    layers = llama_config.num_hidden_layers
    plan = FusionPlan(
        base=f"{base}/{hub['gguf_file']}" if hub.get("gguf_file") else base,
        config=config,
        pairs=[(layers - 2 - n, layers - 1 - n) for n in range(config.num_fusions)]
        if config.selection == "last"
        else None,
        layers_before=layers,
        layers_after=layers - config.num_fusions,
        parameters_before=sizes.parameters,
        parameters_after=parameters_after,
        calibration=[part for part in (samples and samples.source, text and text.full_source) if part],
        dtype=dtype,
        bytes_before=bytes_before,
        bytes_after=bytes_after,
        memory=_peak(sizes, config, low_memory=False),
        low_memory=_peak(sizes, config, low_memory=True) if low_memory_fits else None,
        seconds=seconds,
        speed=speeds.of_layers,
        notes=[],
    )
    if not files:
        plan.notes.append(f"The base is not on this machine yet; about {_gib(bytes_before)} GiB will be downloaded.")
    plan.notes.extend(_shortages(plan, low_memory, out))
    return plan


def _shortages(plan: FusionPlan, low_memory: bool, out: str | os.PathLike[str] | None) -> Iterator[str]:
    needed = plan.low_memory if low_memory and plan.low_memory is not None else plan.memory
    available = psutil.virtual_memory().available
    if needed > available:
        yield f"{_gib(available)} GiB of memory are free now, less than the {_gib(needed)} GiB that this may take."
    if out is not None:
        folder = next(parent for parent in Path(out).absolute().parents if parent.is_dir())
        free = shutil.disk_usage(folder).free
        if plan.bytes_after > free:
            yield f"{_gib(free)} GiB are free on the disk of {str(out)!r}, which needs {_gib(plan.bytes_after)} GiB."


def _calibration(
    config: FusionConfig, calibration: Sequence[str] | str | Path | None
) -> tuple[Calibration | None, Corpus | None]:
    """As `load_needed`, without asking the hub for the default samples: so many empty texts stand for them."""
    if calibration is not None:
        return load_needed(config, calibration)
    samples = None
    if config.needs_similarity:
        config.check_num_samples(len(SUBJECTS) * config.samples_per_subject)
        question = "x" * _TOKENS_PER_QUESTION * _CHARACTERS_PER_TOKEN
        count = len(SUBJECTS) * config.samples_per_subject
        samples = Calibration([question] * count, f"{count} MMLU questions, from the hub or from lm-eval")
    return samples, load_corpus() if config.needs_text else None


@dataclass(frozen=True)
class _Sizes:
    """Sizes that memory and time follow from: of the model, in numbers, and of the text, in tokens."""

    layers: int
    hidden: int
    mlp: int
    query: int
    key_value: int
    kv_heads: int
    vocab: int
    layer: int  # parameters of a layer
    parameters: int
    itemsize: int
    converted: int  # bytes of a number in the file, where it is loaded as another type
    samples: int
    sample_tokens: int
    longest: int
    judging: int
    text: int
    written: int
    length: int
    short: int  # tokens of a text that the model writes
    groups: tuple[int, ...]  # original layers in each fused layer

    @classmethod
    def of(
        cls,
        llama: LlamaConfig,
        config: FusionConfig,
        samples: Calibration | None,
        text: Corpus | None,
        dtype: torch.dtype,
        stored: torch.dtype,
    ) -> _Sizes:
        with torch.device("meta"):
            layer = sum(parameter.numel() for parameter in LlamaDecoderLayer(llama, layer_idx=0).parameters())
        head_dim = llama.head_dim or llama.hidden_size // llama.num_attention_heads
        kv_heads = llama.num_key_value_heads or llama.num_attention_heads
        tables = llama.vocab_size * llama.hidden_size * (1 if llama.tie_word_embeddings else 2)
        lengths = [min(_num_tokens(sample), config.sample_length) for sample in samples.texts] if samples else [0]
        length = min(config.calibration_length, llama.max_position_embeddings)
        short = min(WRITTEN_LENGTH, length)
        tokens = written = 0
        if text is not None:
            share = text.generated_share
            given = min(sum(map(_num_tokens, text.parts)), int(config.calibration_tokens * (1 - share)))
            written = int(given * share / (1 - share)) // short * short
            tokens = given + written
        return cls(
            layers=llama.num_hidden_layers,
            hidden=llama.hidden_size,
            mlp=llama.intermediate_size,
            query=llama.num_attention_heads * head_dim,
            key_value=kv_heads * head_dim,
            kv_heads=kv_heads,
            vocab=llama.vocab_size,
            layer=layer,
            parameters=tables + llama.hidden_size + layer * llama.num_hidden_layers,
            itemsize=dtype.itemsize,
            converted=0 if dtype == stored else stored.itemsize,
            samples=len(lengths),
            sample_tokens=sum(lengths),
            longest=max(lengths),
            judging=config.perplexity_tokens // PERPLEXITY_LENGTH * PERPLEXITY_LENGTH,
            text=tokens,
            written=written,
            length=length,
            short=short,
            groups=_groups(config),
        )

    @property
    def matrix(self) -> int:
        """Numbers in a layer's largest matrix."""
        return self.hidden * max(self.mlp, self.query)


def _num_tokens(text: str) -> int:
    return max(1, len(text) // _CHARACTERS_PER_TOKEN)


def _groups(config: FusionConfig) -> tuple[int, ...]:
    """How many original layers each fused layer stands for; where they are chosen while fusing, a guess."""
    if config.selection == "last":
        return (config.num_fusions + 1,)
    widest = 1 + math.ceil(config.num_fusions / 3)  # 3 of 10 were seen at one place
    full, rest = divmod(config.num_fusions, widest - 1)
    return (widest,) * full + ((rest + 1,) if rest else ())


# Memory


def _peak(sizes: _Sizes, config: FusionConfig, *, low_memory: bool) -> int:
    """Bytes at the peak: what is there all the time, and the most that a phase adds."""
    resident = _PROCESS_BYTES
    if not low_memory:
        resident += sizes.parameters * sizes.itemsize
        if config.refit != "none":  # the originals of what changes are kept
            resident += len(sizes.groups) * sizes.layer * sizes.itemsize
    return resident + max(_phases(sizes, config, low_memory))


def _phases(sizes: _Sizes, config: FusionConfig, low_memory: bool) -> Iterator[int]:
    """What each phase of the work holds at a time, in bytes, besides what is there all the time."""
    layer = sizes.layer * sizes.itemsize if low_memory else 0
    table = sizes.vocab * sizes.hidden * sizes.itemsize if low_memory else 0
    state = sizes.hidden * sizes.itemsize  # of a token
    longest = max(sizes.longest, sizes.length, PERPLEXITY_LENGTH)
    running = longest * (3 * sizes.mlp + 6 * sizes.hidden) * sizes.itemsize  # a layer, on one sequence
    # What is read from a file is there twice, until the file is closed.
    yield 2 * table if low_memory else sizes.parameters * sizes.converted
    if sizes.judging:
        logits = PERPLEXITY_LENGTH * sizes.vocab * (sizes.itemsize + 8)  # and the same in float32, twice
        yield sizes.judging * state + max(2 * layer + running, 2 * table, table + logits)
    if config.needs_similarity:
        padded = min(8 * PADDED, 8 * sizes.samples * sizes.longest * sizes.hidden)
        yield 2 * sizes.sample_tokens * state + layer + max(layer, padded, running)
    if config.merge == "average":
        rows = _costs_alive(sizes, config.alignment) + 8 * sizes.matrix + 4 * BLOCK  # both matrices in float32
        aligned = {"none": 0, "rows": sizes.matrix, "neurons": sizes.layer}[config.alignment]
        averaged = (sizes.layer + aligned) * sizes.itemsize  # the result, and what layer j is in another order
        yield 2 * layer + max(averaged, rows if config.alignment != "none" else 0)
    if config.needs_text:
        kept = min(MEMORY_LIMIT, min(sizes.text, STEP_TOKENS) * state * state_copies(config, sizes.layers))
        yield kept + 2 * layer + running
        if sizes.written:
            cache = 2 * sizes.layers * sizes.key_value * sizes.itemsize  # of a token
            yield sizes.written * cache + sizes.written // sizes.short * 16 * sizes.vocab + 2 * table + layer
        if config.fits:
            yield kept + _fitting(sizes, config, 2, layer)
        if config.refit != "none":
            widest = max(sizes.groups)
            yield min(MEMORY_LIMIT, sizes.text * state * (2 * widest + 5)) + _fitting(sizes, config, widest, layer)
    if low_memory:
        yield (
            min(MAX_SHARD_BYTES, sizes.parameters * sizes.itemsize) + 2 * table
        )  # a shard to write, and what comes next


def _costs_alive(sizes: _Sizes, alignment: str) -> int:
    """Bytes of cost matrices that are there at a time."""
    itemsize = np.dtype(solver()[0]).itemsize
    costs = [rows * rows * itemsize for rows in _assigned_rows(sizes, alignment)]
    return min(sum(costs), max(ALIVE_BYTES, *costs, 0))


def _assigned_rows(sizes: _Sizes, alignment: str) -> list[int]:
    """Rows of each assignment problem of a pair; heads are few."""
    if alignment == "rows":
        return [sizes.mlp] * 2 + [sizes.hidden] * 2 + [sizes.query] + [sizes.key_value] * 2
    return [sizes.mlp] if alignment == "neurons" else []


def _fitting(sizes: _Sizes, config: FusionConfig, count: int, layer: int) -> int:
    """Bytes that fitting one layer to a group of `count` holds, the group's own layers of `layer` bytes included."""
    members = count if config.merge == "select" else 1
    attention = _regression(sizes, members * sizes.query) if config.refit == "projections" else 0
    channel = 3 * sizes.hidden * sizes.itemsize
    inputs = num_candidates(members * sizes.mlp, sizes.mlp)
    maps = 4 * members * sizes.hidden**2 if config.refit == "projections" else 0
    stacking = count * layer + maps + members * sizes.mlp * channel + 8 * sizes.matrix
    kept = 0 if config.merge == "select" else count * layer
    return max(count * layer + maps + attention, stacking, kept + inputs * channel + _regression(sizes, inputs))


def _regression(sizes: _Sizes, inputs: int) -> int:
    """Bytes of a regression with so many inputs, while some are eliminated."""
    exact = 8 if inputs <= EXACT_LIMIT else 4
    return (4 + exact) * inputs**2 + sizes.hidden * inputs * (4 + sizes.itemsize + exact)


# Time


@dataclass(frozen=True)
class _Speeds:
    """Floating-point operations a second of a product in the model's dtype, in float32 and in float64."""

    of_layers: float
    single: float
    double: float

    @classmethod
    def measure(cls, dtype: torch.dtype, device: torch.device) -> _Speeds:
        fitting = torch.device("cpu") if device.type == "mps" else device  # which has no float64
        double = _product_speed(torch.float64, fitting)
        return cls(_product_speed(dtype, device), _product_speed(torch.float32, fitting), double)


def _product_speed(dtype: torch.dtype, device: torch.device) -> float:
    matrix = torch.ones(_PROBE // 2, _PROBE, dtype=torch.float32, device=device).to(dtype)

    def run() -> float:
        start = time.perf_counter()
        (matrix @ matrix.T)[0, 0].item()
        return time.perf_counter() - start

    return 2 * len(matrix) ** 2 * _PROBE / min(run() for _ in range(4))


def _seconds(sizes: _Sizes, config: FusionConfig, speeds: _Speeds) -> dict[str, float]:
    """Seconds of each stage, under the names that the report uses."""
    running = speeds.of_layers * _LAYER_EFFICIENCY

    def passes(tokens: float, layers: float, length: int = sizes.length) -> float:
        return 2 * tokens * layers * (sizes.layer + 2 * length * sizes.query) / running

    seconds: dict[str, float] = {}
    heads = sizes.judging * sizes.vocab * sizes.hidden / running
    layers_judged = 2 * sizes.layers - config.num_fusions  # before and after fusing
    seconds["perplexity"] = passes(sizes.judging, layers_judged, PERPLEXITY_LENGTH) + 4 * heads
    if config.needs_similarity:
        count = sizes.samples
        gram = 2 * count**2 * sizes.longest * sizes.hidden / speeds.double
        seconds["activations"] = passes(sizes.sample_tokens, sizes.layers, sizes.longest) + sizes.layers * gram
        seconds["manifold"] = sizes.layers * 20 * count**3 / speeds.double
        seconds["similarity"] = sizes.layers * (sizes.layers + 1) / 2 * _similarity_seconds(count, config)
    steps = config.num_fusions * _assignment_seconds(sizes, config.alignment, speeds)
    if config.needs_text:
        seconds["calibration text"] = 2 * sizes.written * sizes.parameters / (speeds.of_layers * _WRITING_EFFICIENCY)
        tokens = min(sizes.text, STEP_TOKENS)
        again = 1 if config.selection == "last" else sizes.layers / 2  # layers that a step runs anew
        steps += passes(tokens, sizes.layers + config.num_fusions * again)
        if config.fits:
            steps += config.num_fusions * (passes(tokens, 2) + _fit_seconds(sizes, config, speeds, tokens, 2))
        if config.selection == "least_divergence":
            tried = sizes.layers - 3 + 2 * (config.num_fusions - 1)
            judging = tokens // JUDGING_STRIDE
            fitting = tokens - judging // 2
            steps += tried * (passes(judging, sizes.layers / 2) + 2 * judging * sizes.vocab * sizes.hidden / running)
            if config.fits:
                fit = _fit_seconds(sizes, config, speeds, fitting, 2, by_size=True)
                steps += tried * (passes(fitting, 2) + fit)
    seconds["alignment and fusion"] = steps
    if config.refit != "none":
        fits = sum(_fit_seconds(sizes, config, speeds, sizes.text, group) for group in sizes.groups)
        seconds["refit"] = passes(sizes.text, 2 * sizes.layers) + fits
    return seconds


def _similarity_seconds(samples: int, config: FusionConfig) -> float:
    """Of one pair of layers, measured."""
    random = np.random.default_rng(0)
    one, other = random.random((2, samples, config.embedding_dim))
    start = time.perf_counter()
    mutual_information(one, other, config.mi_neighbors, config.seed)
    return time.perf_counter() - start


def _assignment_seconds(sizes: _Sizes, alignment: str, speeds: _Speeds) -> float:
    """Of one pair of layers: measured on a small problem, which is scaled to the sizes at hand."""
    problems = _assigned_rows(sizes, alignment)
    if not problems:
        return 0.0
    dtype, solve = solver()
    random = torch.Generator().manual_seed(0)
    costs = row_costs(
        (torch.randn(_PROBE, 64, generator=random), torch.randn(_PROBE, 64, generator=random)), dtype=dtype
    )
    start = time.perf_counter()
    solve(costs)
    probed = time.perf_counter() - start
    solving = [probed * (rows / _PROBE) ** _ASSIGNMENT_EXPONENT for rows in problems]
    threads = min(torch.get_num_threads(), len(problems))
    products = sum(2 * rows**2 * sizes.hidden for rows in problems) / speeds.single
    return max(max(solving), sum(solving) / threads) + products


def _fit_seconds(
    sizes: _Sizes, config: FusionConfig, speeds: _Speeds, tokens: int, group: int, *, by_size: bool = False
) -> float:
    """Of fitting one layer to a group of layers on so many tokens."""
    count = group if config.merge == "select" else 1
    inputs = sizes.mlp if by_size else num_candidates(count * sizes.mlp, sizes.mlp)
    seconds = _regression_seconds(sizes, speeds, tokens, inputs, sizes.mlp, PRUNING_ROUNDS if inputs > sizes.mlp else 0)
    seconds += 4 * tokens * count * sizes.mlp * sizes.hidden * 2 / (speeds.of_layers * _LAYER_EFFICIENCY)
    if config.refit == "projections":
        rounds = count - 1 if by_size else (count - 1) * sizes.kv_heads
        seconds += _regression_seconds(sizes, speeds, tokens, count * sizes.query, sizes.query, rounds)
        seconds += 2 * count * _regression_seconds(sizes, speeds, tokens, sizes.hidden, sizes.hidden, 0)
    return seconds


def _regression_seconds(sizes: _Sizes, speeds: _Speeds, tokens: int, inputs: int, keep: int, rounds: int) -> float:
    """Of taking the sums, eliminating inputs in some rounds, and solving for the rest."""
    seconds = 2 * tokens * inputs * (inputs + sizes.hidden) / speeds.single
    for step in range(rounds):
        left = keep + (inputs - keep) * (rounds - step) / rounds
        seconds += left**2 * (left + 2 * sizes.hidden) / (speeds.double if left <= EXACT_LIMIT else speeds.single)
    return seconds + keep**2 * (keep / 3 + 4 * sizes.hidden) / speeds.single


def _device(device_map: Any) -> torch.device:
    """Where layers run, as from_pretrained's `device_map` says."""
    if device_map is None or isinstance(device_map, dict):
        return torch.device("cpu")
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device_map)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
