"""What a fusion will do and about what it will take, without doing it.

Pairs and sizes follow from the config and the headers of the files and are exact; weights are not read. Memory and time
are estimates from the few largest terms; `_Work.memory` and `_Work.seconds` say which.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from transformers import PreTrainedConfig

from lf_hf.checkpoint.base import SPREAD, Base, is_spread
from lf_hf.checkpoint.saving import check_replaceable, check_room
from lf_hf.checkpoint.weights import stored_dtype
from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.decoder.interface import Decoder
from lf_hf.decoder.on_disk import STATES_IN_MEMORY, CheckpointDecoder
from lf_hf.decoder.predictions import LOGITS
from lf_hf.families import check_layers
from lf_hf.fuse import check_low_memory, low_memory_device
from lf_hf.measure import PERPLEXITY_LENGTH, given_sequences, measure
from lf_hf.pipeline import STEP_TOKENS, check_model, start, state_copies
from lf_hf.refit.check_family import check_computes
from lf_hf.refit.fit import num_candidates
from lf_hf.refit.groups import (
    FINAL_TOKENS,
    FINALISTS,
    GROUP_TOKENS,
    JUDGING_LENGTH,
    JUDGING_PIECES,
    JUDGING_SETS,
    cheapest_levels,
    num_trials,
)
from lf_hf.refit.states import SHARE
from lf_hf.runtime.launch import Processes
from lf_hf.runtime.memory import PROCESS, free_memory, in_gib
from lf_hf.runtime.numerics import product_speed, slow_bfloat16_note
from lf_hf.runtime.progress import duration
from lf_hf.settings import LONGEST_GROUP, FusionConfig
from lf_hf.stages.assignment import assign
from lf_hf.text.calibration import Calibration, Corpus, load_corpus, load_needed, load_training_text
from lf_hf.text.mmlu import SUBJECTS
from lf_hf.text.sources import Samples

_CHARACTERS_PER_TOKEN = 4
_STATES_OF_A_GROUP = 11  # times those of all text that the last pass holds, for three layers that become one
_TOKENS_PER_QUESTION = 100  # of MMLU
_CHOSEN = {
    "least_influence": "the layer of least influence joins the one before it",
    "groups": "the groups of layers whose fusion changes predictions least",
}
_BYTES_TRAINED = 16  # of a parameter: itself, its gradient and two moments, in float32


@dataclass(frozen=True)
class FusionPlan:
    """What a fusion will do and take.

    `pairs` are the layers i and j of each step, numbered from 0 as in the base, or None where they are chosen while
    fusing. `parameters_*` count tied ones once; `bytes_*` are of the weights on disk (`bytes_before` is estimated where
    the base is not on this machine yet), and `dtype` is the result's. `calibration` says where text will come from.
    `memory` is about how many bytes of the memory of `device` fusing takes at its peak, and `low_memory` the same with
    low_memory=True, or None where that cannot be used. `seconds` is a range, for a machine that stays as busy as it is.
    `notes` are what a user should know, one sentence each.
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
    device: torch.device
    memory: int
    low_memory: int | None
    seconds: tuple[float, float]
    notes: list[str]

    def summary(self) -> str:
        """A few lines for people."""
        if self.pairs is None:
            pairs = f"chosen while fusing, on calibration text: {_CHOSEN[self.config.selection]}"
        else:
            pairs = ", then ".join(f"{j} into {i}" for i, j in self.pairs)
            pairs += f"; layer {self.pairs[-1][0]} then replaces {self.pairs[-1][0]} to {self.pairs[0][1]}"
        where = "" if self.device.type == "cpu" else f" on {self.device}"
        low_memory = "cannot be used here" if self.low_memory is None else in_gib(self.low_memory)
        fusions, of_each = f"{self.config.num_fusions} fusion{'s' * (self.config.num_fusions > 1)}", ""
        if self.config.within_budget:
            fusions = "as many fusions as the budget allows; all figures are of one"
            of_each = ", for each number of fusions that is tried"
        return "\n".join(
            [
                f"Plan: {self.base} with {self.config.method}, {fusions}. Nothing was done.",
                f"  layers: {_change(self.layers_before, self.layers_after)}",
                f"  pairs, layers numbered from 0 as in the base: {pairs}",
                f"  parameters: {_change(self.parameters_before, self.parameters_after)}",
                *([f"  healing: on {self.config.heal_tokens:,} tokens"] if self.config.heal_tokens else []),
                f"  bytes on disk: {_change(self.bytes_before, self.bytes_after)}, as {str(self.dtype)[6:]}",
                *(f"  calibration: {source}" for source in self.calibration),
                f"  peak memory{where}, about: {in_gib(self.memory)}; with low memory: {low_memory}",
                f"  time, if the machine stays as busy as now: {' to '.join(map(duration, self.seconds))}{of_each}",
                *(f"  note: {note}" for note in self.notes),
            ]
        )


def plan_fusion(
    base: str | os.PathLike[str],
    config: FusionConfig,
    *,
    out: str | os.PathLike[str] | None = None,
    low_memory: bool = False,
    calibration: Samples | None = None,
    **kwargs: Any,
) -> FusionPlan:
    """Say what `fuse_checkpoint` with these arguments would do and take.

    Parameters
    ----------
    base, config, out, low_memory, calibration
        As for `fuse_checkpoint`.
    **kwargs
        As for `from_pretrained` (revision, token, dtype, device_map, ...).

    Raises
    ------
    ValueError
        For settings, a base, calibration text or a folder that `fuse_checkpoint` would refuse before long work.
    OSError
        If the disk of `out` has no room for the result.
    """
    replaces = out is not None and check_replaceable(out, os.fspath(base))
    if low_memory:
        check_low_memory(config)
    low_memory_fits = not config.heal_tokens
    try:
        low_memory_device(kwargs)
    except ValueError:
        if low_memory:
            raise
        low_memory_fits = False
    opened = Base.open(base, kwargs)
    layers, fused = opened.config.num_hidden_layers, config.num_fusions or 1
    check_layers(config, opened.config)
    samples, text = _calibration(config, calibration, opened)
    if config.heal_tokens:
        from lf_hf.healing.heal import check_can_heal  # imports the Trainer, which takes seconds

        check_can_heal(
            opened, opened.tokenizer(), load_training_text(calibration, config.heal_tokens, opened.tokenizer), config
        )
    if not opened.hub.get("gguf_file"):  # which has a tokenizer of its own, that takes seconds to read
        tokenizer = opened.tokenizer()
        if text is not None:
            given_sequences(opened.config, tokenizer, text, config)
    if out is not None:
        check_disk(opened, config, out)
    check_computes(opened.config)

    work = _Work.of(opened, config, samples, text)
    bytes_before = sum(file.stat().st_size for file in opened.files())
    devices = _devices(kwargs.get("device_map"))
    memory, reduced = (work.memory(devices[0], low_memory=low) for low in (False, True))
    seconds = work.seconds(devices[0])
    needed, free = reduced if low_memory else memory, sum(map(free_memory, devices))
    download = work.parameters * work.dtype.itemsize
    notes = {
        f"{str(out)!r} holds a fused model, which would be replaced.": replaces,
        f"The base is not on this machine yet; about {in_gib(download)} will be downloaded.": not bytes_before,
        slow_bfloat16_note(work.dtype, devices[0]): True,
        f"{in_gib(free)} of memory are free now, less than the {in_gib(needed)} that this may take.": needed > free,
    }
    return FusionPlan(
        base=opened.full_name,
        config=config,
        pairs=[(layers - 2 - n, layers - 1 - n) for n in range(fused)] if config.selection == "last" else None,
        layers_before=layers,
        layers_after=layers - fused,
        parameters_before=work.parameters,
        parameters_after=work.parameters_after,
        calibration=[part for part in (samples and samples.source, text and text.full_source) if part],
        dtype=work.dtype,
        bytes_before=bytes_before or download,
        bytes_after=work.parameters_after * work.dtype.itemsize,
        device=devices[0],
        memory=memory,
        low_memory=reduced if low_memory_fits else None,
        seconds=(seconds / 2, seconds * 2),
        notes=[note for note, applies in notes.items() if note and applies],
    )


@dataclass(frozen=True)
class PlannedLevel:
    """The groups, each its first and last layer, that cost least for a number of fusions: `divergence` nats a token."""

    num_fusions: int
    divergence: float
    groups: tuple[tuple[int, int], ...]


def cost_curve(
    base: str | os.PathLike[str],
    *,
    low_memory: bool = False,
    calibration: Samples | None = None,
    settings: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> list[PlannedLevel]:
    """Measure what groups of layers cost by themselves, and say for each number of fusions which are cheapest together.

    Nothing is fused or written. Costs are added up: what a fusion costs as a whole is often somewhat more.

    Parameters
    ----------
    base, low_memory, calibration, **kwargs
        As for `fuse_checkpoint`.
    settings : mapping, optional
        FusionConfig fields; method="refit" if there is none.

    Raises
    ------
    ValueError
        For settings, a base or calibration text that cannot be used.
    """
    fixed = {"num_fusions": 1, "selection": "groups", "perplexity_tokens": 0}
    config = FusionConfig.from_kwargs(**{"method": "refit", **(settings or {}), **fixed})
    processes = Processes.of_launch()  # each of which has a device of its own
    device = low_memory_device(kwargs) if low_memory else None
    opened = Base.open(base, kwargs)
    config.check_num_layers(opened.config.num_hidden_layers)
    samples, text = load_needed(config, calibration, opened.tokenizer)
    tokenizer = opened.tokenizer()
    with TemporaryDirectory() as scratch:
        decoder: Decoder
        if device is None:
            decoder = ModelDecoder(opened.load())
        else:
            decoder = CheckpointDecoder(
                opened.weights_folder(), opened.new_config(), Path(scratch), dtype=opened.dtype, device=device
            )
        if not is_spread(kwargs.get("device_map")):
            decoder.processes = processes
        check_model(decoder, config)
        with start(decoder, config, measure(decoder, tokenizer, config, samples, text)) as fusion:
            assert fusion.table is not None
            levels = cheapest_levels(fusion.table.by_group, config.most_fusions(decoder.num_layers))
    if not levels:
        raise ValueError(
            "No group of layers can be computed with in this dtype; use one of wider range, such as bfloat16."
        )
    return [PlannedLevel(count, cost, groups) for count, (cost, groups) in enumerate(levels, 1)]


def check_disk(base: Base, config: FusionConfig, out: str | os.PathLike[str]) -> None:
    """Raise OSError if the disk of `out` has no room for the weights of `base` fused as `config` says.

    A fused model that is there keeps its room until the new one is whole.
    """
    work = _Work.of(base, config)
    check_room(out, work.parameters_after * work.dtype.itemsize, "the fused model takes")


def _calibration(
    config: FusionConfig, calibration: Samples | None, base: Base
) -> tuple[Calibration | None, Corpus | None]:
    """As `load_needed`, without asking the hub for the default samples: as many texts of their usual length."""
    if calibration is not None:
        return load_needed(config, calibration, base.tokenizer)
    samples = None
    if config.needs_similarity:
        count = len(SUBJECTS) * config.samples_per_subject
        config.check_num_samples(count)
        question = "x" * _TOKENS_PER_QUESTION * _CHARACTERS_PER_TOKEN
        samples = Calibration([question] * count, f"{count} MMLU questions, from the hub or from lm-eval")
    return samples, load_corpus() if config.needs_text else None


@dataclass(frozen=True)
class _Work:
    """A fusion in numbers: `layer`, `table` and `parameters` count parameters, the last four count tokens of text."""

    llama: PreTrainedConfig
    config: FusionConfig
    dtype: torch.dtype
    layer: int
    table: int
    parameters: int
    judging: int
    samples: int
    text: float
    written: float

    @classmethod
    def of(
        cls, base: Base, config: FusionConfig, samples: Calibration | None = None, text: Corpus | None = None
    ) -> _Work:
        llama, files = base.config, base.files()
        stored = torch.float32 if base.hub.get("gguf_file") or not files else stored_dtype(files[0])
        with torch.device("meta"):
            layer = sum(weights.numel() for weights in base.family.decoder_layer(llama, layer_idx=0).parameters())
        table = llama.vocab_size * llama.hidden_size
        tables = table if llama.tie_word_embeddings else 2 * table
        given = written = 0.0
        if text is not None:
            given = min(sum(map(_num_tokens, text.parts)), config.calibration_tokens * (1 - text.generated_share))
            written = given * text.generated_share / (1 - text.generated_share)
        return cls(
            llama=llama,
            config=config,
            dtype=base.dtype or cast("torch.dtype | None", llama.dtype) or stored,
            layer=layer,
            table=table,
            parameters=tables + llama.hidden_size + layer * llama.num_hidden_layers,
            judging=2 * config.perplexity_tokens,  # there are two texts
            samples=sum(min(_num_tokens(sample), config.sample_length) for sample in samples.texts) if samples else 0,
            text=given + written,
            written=written,
        )

    @property
    def parameters_after(self) -> int:
        return self.parameters - self.fused * self.layer

    @property
    def fused(self) -> int:
        """How many fusions there are; one where a budget says how many."""
        return self.config.num_fusions or 1

    @property
    def candidates(self) -> int:
        """MLP channels that a fit chooses from."""
        return num_candidates(2 * self.llama.intermediate_size, self.llama.intermediate_size)

    def memory(self, device: torch.device, *, low_memory: bool) -> int:
        """Bytes at the peak: the process, the weights, and the most that one phase needs beside them.

        Activations of a sequence are small beside these. States of running text count where they would be kept there.
        """
        size, hidden, mlp = self.dtype.itemsize, self.llama.hidden_size, self.llama.intermediate_size
        # Two layers, or those of a group, and on a device the next one, which is read meanwhile.
        held = LONGEST_GROUP + 1 if self.config.selection == "groups" else 2
        weights = (held + (device.type != "cpu")) * self.layer + self.table
        if not low_memory:
            originals = self.fused if self.config.refit != "none" else 0  # of layers that change, at most
            weights = self.parameters + originals * self.layer
        process = 0 if device.type == "cuda" else PROCESS
        phases = [2 * self.samples * hidden * size]  # states of all samples before and after a layer
        if self.judging:
            # Predictions of some tokens, six times in float32, and final states of all, the dense model's too.
            phases.append(
                24 * min(LOGITS, PERPLEXITY_LENGTH * self.llama.vocab_size) + 2 * self.judging * hidden * size
            )
        if self.config.alignment != "none" and device.type == "cpu":
            phases.append(12 * mlp**2 + 8 * hidden * mlp)  # cost matrices and what they are of; never on a GPU
        if self.config.fits:  # Gram squares of all candidates, in float32 and once more, and their weights
            step = min(self.text, STEP_TOKENS)
            tokens = max(_STATES_OF_A_GROUP * self.text, state_copies(self.config, self.llama.num_hidden_layers) * step)
            states = int(tokens) * hidden * size
            fit = 8 * self.candidates**2 + 2 * self.layer * size + (3 * size + 8) * self.candidates * hidden
            room = STATES_IN_MEMORY if low_memory and device.type == "cpu" else free_memory(device) // SHARE
            phases.append(fit + (states if states < room else 0))
        if self.config.heal_tokens:  # and a copy to compute in
            phases.append((_BYTES_TRAINED + 2) * self.parameters_after)
        return process + weights * size + max(phases)

    def seconds(self, device: torch.device) -> float:
        """Operations over the speed of this machine now: of text through layers, of fits; and matching of rows."""
        speed, single = (product_speed(dtype, device) for dtype in (self.dtype, torch.float32))
        config, layers, fused = self.config, self.llama.num_hidden_layers, self.fused
        step = min(self.text, STEP_TOKENS)

        def fit(tokens: float) -> float:  # sums of squares over tokens, and solving with them
            return 2 * tokens * self.candidates * (self.candidates + self.llama.hidden_size) + 4 * self.candidates**3

        passes = self.judging * (2 * layers - fused) + (self.samples + step + 3 * self.written) * layers
        passes += fused * step * layers / 2  # above a pair
        fits = fused * fit(step) if config.fits else 0.0
        if config.refit != "none":
            passes += 2 * self.text * layers
            fits += fused * fit(self.text)
        groups = trials = 0
        if config.selection == "groups":
            groups, trials = (LONGEST_GROUP - 1) * layers, num_trials(fused)
            passes += min(self.text, FINAL_TOKENS) * layers
        finalists = min(FINALISTS, trials)
        sets = trials + finalists
        of_groups, of_sets = groups * JUDGING_PIECES * JUDGING_LENGTH, sets * JUDGING_SETS * config.calibration_length
        judged = of_groups + of_sets  # half of it through the head
        passes += (of_groups / 2 + of_sets) * layers
        if config.fits:  # of 3.5 layers as they come, and of as many channels as are kept
            mlp, hidden = self.llama.intermediate_size, self.llama.hidden_size
            for tokens, singles, wholes in ((GROUP_TOKENS, groups, trials), (FINAL_TOKENS, 0, finalists)):
                seen = min(self.text, tokens)
                passes += (singles * 3.5 + wholes * layers) * seen
                fits += (singles + wholes * fused / 2) * (2 * seen * mlp * (mlp + hidden) + 4 * mlp**3)
        run = 2 * passes * self.layer + (6 * self.judging + judged) * self.table
        run += config.heal_tokens * (
            6 * self.parameters_after + 2 * self.parameters
        )  # forwards and backwards; the base
        return 2 * run / speed + fits / single + self._matching()  # layers reach about half of the speed of a product

    def _matching(self) -> float:
        """Seconds of all assignments: a small one is timed, and they grow with about that power of their rows."""
        mlp, hidden, fused = self.llama.intermediate_size, self.llama.hidden_size, self.fused
        problems = {"none": [], "rows": [mlp] * 2 + [hidden] * 3, "neurons": [mlp]}[self.config.alignment]
        if not problems:
            return 0.0
        rows = torch.randn(2, 1024, 64, generator=torch.Generator().manual_seed(0))
        start = time.perf_counter()
        assign({"probe": [(rows[0], rows[1])]})
        probed = time.perf_counter() - start
        return fused * sum(probed * (count / 1024) ** 2.2 for count in problems)


def _num_tokens(text: str) -> int:
    return max(1, len(text) // _CHARACTERS_PER_TOKEN)


def _devices(device_map: Any) -> list[torch.device]:
    """Where layers run, as from_pretrained's `device_map` says."""
    if device_map in SPREAD:
        places: list[Any] = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    else:
        places = (
            list(device_map.values()) if isinstance(device_map, dict) else ["cpu" if device_map is None else device_map]
        )
    return [torch.device(place) for place in dict.fromkeys(places) if place != "disk"] or [torch.device("cpu")]


def _change(before: int, after: int) -> str:
    return f"{before:,} -> {after:,} ({after / before - 1:+.1%})"
