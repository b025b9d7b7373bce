"""Many fusions of one base, each evaluated, by one process or several, in one go that may be interrupted."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from importlib.util import find_spec
from itertools import groupby, product
from typing import TYPE_CHECKING, Any, cast

from transformers import PreTrainedModel

from lf_hf import pipeline
from lf_hf.checkpoint.base import Base
from lf_hf.checkpoint.classes import FusedForCausalLM, fused_class
from lf_hf.checkpoint.fused_cache import base_fingerprint
from lf_hf.checkpoint.saving import checked_folder
from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.evaluate.points import DENSE, HEALED, Point, check_evaluation
from lf_hf.evaluate.results import Results
from lf_hf.families import check_layers
from lf_hf.measure import Measurements, measure
from lf_hf.runtime.launch import Processes, own_device
from lf_hf.runtime.progress import progress
from lf_hf.settings import ALGORITHM, FusionConfig
from lf_hf.speed import with_speed
from lf_hf.steps import Fusion, start
from lf_hf.text.calibration import load_needed, load_training_text
from lf_hf.text.sources import TextSource

if TYPE_CHECKING:
    from lf_hf.evaluate.evaluation import Evaluation


def sweep(
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    num_fusions: Sequence[int],
    methods: Sequence[str],
    tasks: Sequence[str],
    limit: float | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = 1,
    metadata: dict[str, Any] | None = None,
    calibration: TextSource | None = None,
    heal_cache: str | os.PathLike[str] | None = None,
    settings: dict[str, Any] | None = None,
    **kwargs: Any,
) -> list[Point]:
    """Fuse a base at several levels with several methods, and evaluate the base and each fusion.

    The base is read and measured once, and a level goes on from the pairs of the one below. Each point is added to
    `results.jsonl` in `out` as soon as it is there, and a sweep that is run again goes on where it stopped. Of the
    processes of a launch each makes a part of the points, on one machine or on several that share the folder. The
    tables `results.csv` and `results.md` and, with matplotlib, the pictures `curve.png` and `curve.svg` hold all points
    that were asked for.

    Parameters
    ----------
    base, calibration
        As for `lf_hf.from_pretrained_fused`.
    out : path
        Folder of the results.
    num_fusions : sequence of int
        Levels: how many times two layers become one.
    methods, tasks : sequences of str
        Tasks are lm-eval's tasks, groups or tags; this project's own are known.
    limit, num_fewshot, batch_size, metadata
        As for lm-eval.
    heal_cache : path, optional
        Where the base's predictions are kept for all healed points, as `cache` of `lf_hf.heal`.
    settings : dict, optional
        FusionConfig fields for every fusion.
    **kwargs
        As for `from_pretrained` (dtype, device_map, revision, gguf_file, ...). In a launch with a process for each
        GPU, device_map="cuda" is each one's own.

    Returns
    -------
    list of Point
        The dense model first, then by level.

    Raises
    ------
    ValueError
        Before any long work, for settings, a base, calibration text or tasks that cannot be used.
    OSError
        If that folder cannot be written.
    """
    if find_spec("lm_eval") is None:
        raise ValueError("Sweeps evaluate with lm-eval; run `pip install '.[lm-eval]'` in lf_hf's checkout.")
    from lf_hf.evaluate.evaluation import Evaluation

    check_evaluation(limit, batch_size)
    folder, configs = checked_folder(out), _configs(num_fusions, methods, tasks, settings)
    opened = Base.open(base, kwargs | {"device_map": own_device(kwargs.get("device_map"))})
    for config in configs:
        check_layers(config, opened.config)
    asked: dict[str, Any] = {"limit": limit, "num_fewshot": num_fewshot, "metadata": metadata}
    maker = _Maker(opened, configs, calibration, heal_cache, Evaluation(tasks, batch_size=batch_size, **asked))
    keys = maker.keys(asked | {"tasks": sorted(tasks)})
    results = Results(folder, opened.full_name, [*keys])
    maker.make(keys, results)
    return results.points()


def _configs(
    num_fusions: Sequence[int], methods: Sequence[str], tasks: Sequence[str], settings: dict[str, Any] | None
) -> list[FusionConfig]:
    """The fusions that were asked for, by level; what is healed stands beside what is not.

    The base is measured once, so all get as much calibration text as the one that takes most.
    """
    for name, values in {"num_fusions": num_fusions, "methods": methods, "tasks": tasks}.items():
        if not values or not isinstance(values, Sequence) or isinstance(values, str):
            raise ValueError(f"{name} must be a list with one entry at least, got {values!r:.80}.")
    configs = []
    for level, method in product(num_fusions, methods):
        config = FusionConfig.from_kwargs(**{**(settings or {}), "num_fusions": level, "method": method})
        configs += [config] if method == "healed" else [replace(config, heal_tokens=0), config]
    tokens = max(config.calibration_tokens for config in configs)
    configs = [replace(config, calibration_tokens=tokens) for config in configs]
    return sorted(dict.fromkeys(configs), key=lambda config: config.num_fusions)


def _unhealed(config: FusionConfig) -> FusionConfig:
    """The same without a healing."""
    return replace(config, method="refit" if config.method == "healed" else config.method, heal_tokens=0)


class _Maker:
    """Makes points one after the other, where it can from the pairs that it fused before."""

    def __init__(
        self,
        base: Base,
        configs: Sequence[FusionConfig],
        calibration: TextSource | None,
        heal_cache: str | os.PathLike[str] | None,
        evaluation: Evaluation,
    ) -> None:
        self._base, self._configs, self._heal_cache, self._evaluation = base, configs, heal_cache, evaluation
        self._processes, self._tokenizer = Processes.of_launch(), base.tokenizer()
        self._samples = self._text = self._to_heal = None
        for config in configs:
            if (config.needs_similarity and not self._samples) or (config.needs_text and not self._text):
                samples, text = load_needed(config, calibration, self._tokenizer)
                self._samples, self._text = self._samples or samples, self._text or text
        healed = next((config for config in configs if config.heal_tokens), None)  # of the lowest level: takes most
        if healed:
            if self._processes.world_size > 1:
                raise ValueError(
                    "heal_tokens cannot be used where processes share a sweep's points; start it as one process."
                )
            from lf_hf.healing.heal import check_can_heal  # imports the Trainer, which takes seconds

            self._to_heal = load_training_text(calibration, healed.heal_tokens, self._tokenizer)
            check_can_heal(base, self._tokenizer, self._to_heal, healed, cache=heal_cache)
        elif heal_cache is not None:
            raise ValueError("heal_cache is for healed points, and there are none; give heal_tokens too.")

    def keys(self, evaluation: Mapping[str, Any]) -> dict[str, FusionConfig | None]:
        """The dense model, None, and the fusions, by what identifies their results."""
        identity = {
            "base": base_fingerprint(self._base),
            "dtype": str(self._base.dtype).removeprefix("torch."),
            "evaluation": evaluation,
            "algorithm": ALGORITHM,
        }
        keys: dict[str, FusionConfig | None] = {}
        for config in (None, *self._configs):
            made_of: dict[str, Any] = {"perplexity_tokens": self._configs[0].perplexity_tokens}
            if config is not None:
                samples = self._samples.texts if self._samples and config.needs_similarity else None
                text = list(self._text.parts.values()) if self._text and config.needs_text else None
                to_heal = list(self._to_heal.parts.values()) if self._to_heal and config.heal_tokens else None
                # What learns from a cache is not quite what learns from the base beside it.
                cached = self._heal_cache is not None and to_heal is not None
                made_of = {"settings": config.to_dict(), "texts": [samples, text, to_heal], "heal_cache": cached}
            content = json.dumps(identity | made_of, sort_keys=True)
            keys[hashlib.sha256(content.encode()).hexdigest()[:16]] = config
        return keys

    def make(self, keys: Mapping[str, FusionConfig | None], results: Results) -> None:
        """Make this process's part of the points that are missing; ends when all processes have made theirs."""
        missing = self._processes.broadcast_object(results.missing)
        methods = list(dict.fromkeys(_unhealed(config).method for config in keys.values() if config))

        def order(key: str) -> tuple[int, ...]:
            """The dense model, then method by method, as levels share steps; of a level what is healed comes last."""
            if (config := keys[key]) is None:
                return (-1,)
            return methods.index(_unhealed(config).method), config.num_fusions, config.heal_tokens

        missing.sort(key=order)
        rank, count = self._processes.rank, self._processes.world_size
        mine = {key: keys[key] for key in missing[len(missing) * rank // count : len(missing) * (rank + 1) // count]}
        wanted = [config for config in mine.values() if config]
        self._samples = self._samples if any(config.needs_similarity for config in wanted) else None
        self._text = self._text if any(config.needs_text for config in wanted) else None
        with closing(self._points(mine)) as points:
            for point in progress(points, total=len(mine), desc="Sweep", unit="point"):
                results.add(point)
        self._processes.all_gather_object(None)
        if self._processes.is_main:
            results.complete()

    def _points(self, keys: Mapping[str, FusionConfig | None]) -> Generator[Point, None, None]:
        """The points of some keys. A level goes on from the one below, except where each has groups of its own."""

        def begins(point: tuple[str, FusionConfig]) -> tuple[str, int]:
            config = _unhealed(point[1])
            return config.method, config.num_fusions if config.selection == "groups" else 1

        for key in [key for key, config in keys.items() if config is None]:
            yield self._point(key, None, self._dense[0])
        for _, together in groupby(((key, config) for key, config in keys.items() if config), begins):
            levels, (dense, measured) = [*together], self._dense
            decoder = ModelDecoder(dense).copy()
            with start(decoder, _unhealed(levels[0][1]), measured) as fusion:
                for level, points in groupby(levels, lambda point: point[1].num_fusions):
                    pipeline.fuse_pairs(fusion, level)
                    model = self._finished(fusion)
                    for key, config in points:
                        self._heal(model, config)
                        yield self._point(key, config, model)

    def _point(self, key: str, config: FusionConfig | None, model: PreTrainedModel) -> Point:
        dense, measured = self._dense
        start = time.perf_counter()
        scores = self._evaluation.scores(model, self._tokenizer)
        seconds = {"evaluating": time.perf_counter() - start}
        method, report, texts = DENSE, None, [(text.name, text.dense, 0.0, 1.0) for text in measured.judged]
        timed = self._configs[0].speed and self._processes.world_size == 1
        speedups = {"prefill": 1.0, "decoding": 1.0} if timed else {}
        if config is not None:
            report = cast(FusedForCausalLM, model).fusion_report
            assert report is not None
            method = config.method + (HEALED if config.heal_tokens and config.method != "healed" else "")
            texts = [(text.name, text.fused, text.divergence, text.agreement) for text in report.perplexities]
            speedups = {name: getattr(report.speed, name).ratio for name in speedups} if report.speed else {}
            seconds["fusing"] = sum(report.seconds.values()) - sum(measured.seconds.values())
        layers, of_base = model.config.num_hidden_layers, dense.config.num_hidden_layers
        return Point(
            key=key,
            method=method,
            num_fusions=of_base - layers,
            layers=layers,
            parameters=model.num_parameters(),
            layers_removed_fraction=(of_base - layers) / of_base,
            parameters_removed_fraction=1 - model.num_parameters() / dense.num_parameters(),
            perplexities={name: perplexity for name, perplexity, _, _ in texts},
            divergences={name: divergence for name, _, divergence, _ in texts},
            agreements={name: agreement for name, *_, agreement in texts},
            speedups=speedups,
            scores=scores,
            config=report.config if report else None,
            notes=report.notes if report else [],
            seconds=seconds,
            versions=pipeline.versions(),
        )

    @cached_property
    def _dense(self) -> tuple[PreTrainedModel, Measurements]:
        """The base, and what is measured on it."""
        model, config = self._base.load(), self._configs[0]
        decoder = ModelDecoder(model)
        pipeline.check_model(decoder, config)
        return model, measure(decoder, self._tokenizer, config, self._samples, self._text)

    def _finished(self, fusion: Fusion) -> FusedForCausalLM:
        """A copy of what is fused so far after its last pass."""
        decoder = cast(ModelDecoder, fusion.decoder.copy())
        names: dict[str, Any] = {"base": self._base.full_name, "parameters": self._dense[0].num_parameters()}
        fusion = replace(fusion, decoder=decoder)
        report = with_speed(pipeline.finish(fusion, self._tokenizer, **names), decoder.model)
        return fused_class(self._base.config).adopt(decoder.model, report, self._tokenizer)

    def _heal(self, model: FusedForCausalLM, config: FusionConfig) -> None:
        """Heal a model in place where that is asked for, once: methods that differ in nothing else share it."""
        report = model.fusion_report
        assert report is not None
        model.fusion_report = replace(report, config=report.config | {"method": config.method})
        if self._to_heal and config.heal_tokens and not report.healed:
            from lf_hf.healing.heal import heal_loaded

            heal_loaded(model, self._base, self._to_heal, config, cache=self._heal_cache)
