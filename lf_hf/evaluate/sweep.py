"""Many fusions of one base, each evaluated, by one process, in one go that may be interrupted."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lf_hf.checkpoint.base import Base
from lf_hf.checkpoint.classes import FusedForCausalLM, fused_class
from lf_hf.checkpoint.saving import TRAINING, WORK, checked_folder, locked_folder, write_whole
from lf_hf.evaluate.points import DENSE, HEALED, Point, check_evaluation
from lf_hf.evaluate.tables import Results
from lf_hf.measure.dense import measure
from lf_hf.pipeline import run
from lf_hf.pipeline.fusion import Texts, for_model
from lf_hf.pipeline.healing import HealInputs
from lf_hf.pipeline.identity import files_digest, identity, identity_key
from lf_hf.pipeline.planning import following, open_decoder, plan_run
from lf_hf.report.figures import dense_figures
from lf_hf.report.report import versions
from lf_hf.runtime.launch import local_processes
from lf_hf.runtime.progress import progress
from lf_hf.settings import FusionConfig, TextSource

if TYPE_CHECKING:
    from lf_hf.evaluate.evaluation import Evaluation

_Keys = dict[FusionConfig | None, str]  # of points: of the dense model, None, and of the fusions
_KEY = 16  # characters of a point's key


def sweep(
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    num_fusions: Sequence[int],
    methods: Sequence[str],
    tasks: Sequence[str],
    limit: float | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str | None = None,
    metadata: dict[str, Any] | None = None,
    calibration: TextSource | None = None,
    settings: dict[str, Any] | None = None,
    **kwargs: Any,
) -> list[Point]:
    """Fuse a base at several levels with several methods, and evaluate the base and each fusion.

    The base is read and measured once. Each point is added to `results.jsonl` in `out` as soon as it is there, and a
    sweep that is run again goes on where it stopped. The tables in `results.md` and, with matplotlib, the
    pictures `curve.png` and `curve.svg` hold all points that were asked for.

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
        As for lm-eval. By default batches are as large as a GPU holds, and single on the CPU.
    settings : dict, optional
        FusionConfig fields for every fusion.
    **kwargs
        As for `from_pretrained` (dtype, device_map, revision, ...).

    Returns the dense model's point first, then the others by level.

    Raises
    ------
    ValueError
        Before any long work, for settings, a base, calibration text or tasks that cannot be used.
    OSError
        If another process is at work in that folder, or if it cannot be written.
    """
    if find_spec("lm_eval") is None:
        raise ValueError("Sweeps evaluate with lm-eval; run `pip install '.[lm-eval]'` in lf_hf's checkout.")
    if local_processes() > 1:
        raise ValueError("A sweep is one process; start it without a launcher.")
    from lf_hf.evaluate.evaluation import Evaluation

    check_evaluation(limit, batch_size or 1)
    folder = checked_folder(out)
    opened = Base.open(base, kwargs)
    if folder == opened.folder:
        raise ValueError(f"{str(folder)!r} is the base; choose another folder for the results.")
    configs = _configs(opened.config, num_fusions, methods, tasks, settings or {})
    asked: dict[str, Any] = {"limit": limit, "num_fewshot": num_fewshot, "metadata": metadata}
    evaluation = Evaluation(tasks, batch_size=batch_size, **asked)
    tokenizer = opened.tokenizer()
    texts = Texts.load(configs, calibration, tokenizer)
    work = folder / WORK / "sweep"
    maker = _Maker(opened, tokenizer, configs, texts, evaluation, work)
    maker.check_healing()
    asked |= {"tasks": sorted(tasks), "limit": limit and float(limit)}  # a command line gives 20.0 for 20
    keys = maker.keys(json.dumps(asked, sort_keys=True))
    with locked_folder(folder):
        results = Results(folder, opened.name, list(keys.values()))
        there = {point.key for point in results.points()}
        missing = {config: key for config, key in keys.items() if key not in there}
        shutil.rmtree(work, ignore_errors=True)  # of a sweep that was killed
        try:
            for point in progress(maker.points(missing), total=len(missing), desc="Sweep", unit="point"):
                results.add(point)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        results.complete()
    return results.points()


def _configs(
    base: PretrainedConfig,
    num_fusions: Sequence[int],
    methods: Sequence[str],
    tasks: Sequence[str],
    settings: dict[str, Any],
) -> list[FusionConfig]:
    """The fusions that were asked for, in the order of making: method by method, level by level, healed ones last.

    The base is measured once, so all get as much calibration text as the one that takes most.
    """
    for name, values in {"num_fusions": num_fusions, "methods": methods, "tasks": tasks}.items():
        if not values or not isinstance(values, Sequence) or isinstance(values, str):
            raise ValueError(f"{name} must be a list with one entry at least, got {values!r:.80}.")
    configs = []
    for method, level in product(methods, num_fusions):
        config = for_model(FusionConfig(**settings | {"num_fusions": level, "method": method}), base)
        if method != "healed":
            configs.append(replace(config, heal_tokens=0))
        configs.append(config)
    if with_text := [config.calibration_tokens for config in configs if config.needs_text]:
        configs = [replace(config, calibration_tokens=max(with_text)) for config in configs]
    fused = [config.unhealed.method for config in configs]

    def order(config: FusionConfig) -> tuple[int, ...]:
        return fused.index(config.unhealed.method), config.num_fusions, config.heal_tokens

    return sorted(dict.fromkeys(configs), key=order)


@dataclass
class _Maker:
    """Makes points one after the other, from one base that is read and measured once."""

    base: Base
    tokenizer: PreTrainedTokenizerBase
    configs: list[FusionConfig]
    texts: Texts
    evaluation: Evaluation
    work: Path  # folder for what is fused, until it is healed

    @property
    def healing(self) -> Path:
        """Folder in which fusions are healed one after the other; what is measured on the base for it serves all."""
        return self.work / "healing"

    def check_healing(self) -> None:
        """Raise ValueError if healed points cannot be made here."""
        if self.texts.to_heal is None:
            return
        # The fusion whose healing takes most has the most layers left.
        most = min((config for config in self.configs if config.heal_tokens), key=lambda config: config.num_fusions)
        text = self.tokenizer, self.texts.to_heal
        plan_run(self.base, most, self.healing, healing=most.healing, text=text)

    def keys(self, evaluation: str) -> _Keys:
        """What identifies the results of each model."""
        base = files_digest(self.base)
        others = {"dtype": self.base.dtype, "evaluation": evaluation}
        judged = {"perplexity_tokens": self.configs[0].perplexity_tokens}
        keys: _Keys = {None: identity_key(identity(base, judged, "", **others))[:_KEY]}
        for config in self.configs:
            text = self.texts.used_by(config).digest(self.tokenizer)
            made_of = identity(base, config.in_effect(), text, **others)
            keys[config] = identity_key(made_of)[:_KEY]
        return keys

    def points(self, missing: _Keys) -> Iterator[Point]:
        """Make points: first all that need the dense model, which is gone when the first fusion is healed."""
        if missing:
            yield from self._fused_points(missing)
        for config, key in missing.items():
            if config is not None and config.heal_tokens:
                yield self._healed_point(key, config)

    def _fused_points(self, missing: _Keys) -> Iterator[Point]:
        """The points of the dense model and of fusions that are not healed; what is to be healed is written."""
        fusions = [config for config in missing if config is not None]
        most = max(self.configs, key=lambda config: (config.fits, config.num_fusions))
        plan = replace(plan_run(self.base, most, None), minutes=None)  # those of one fusion
        with following(plan):
            decoder, (samples, text, _) = open_decoder(self.base, plan), self.texts.used_by(*fusions)
            measured = measure(decoder, self.tokenizer, self.configs[0], samples, text)
            measured.kept.averages = {}  # for higher levels to go on from
            self._parameters, self._seconds = measured.parameters, sum(measured.seconds.values())
            if None in missing:
                speedups = {"prefill": 1.0, "decoding": 1.0} if self.configs[0].speed else {}
                figures = {text.name: dense_figures(text.dense) for text in measured.judged}
                yield self._point(missing[None], DENSE, decoder.model, texts=figures, speedups=speedups)
            for fusion in dict.fromkeys(config.unhealed for config in fusions):
                copy, model_class = decoder.copy(), fused_class(self.base.config)  # which shares its tensors
                model = run.fuse_measured(self.base, copy, self.tokenizer, fusion, measured, model_class)
                for config in (config for config in fusions if config.unhealed == fusion):
                    if config.heal_tokens:
                        model.remember(replace(model.report, config=config.to_dict()))
                        write_whole(self.work, missing[config], partial(model.save_pretrained, plain=True))
                    else:
                        yield self._fused_point(missing[config], config, model)

    def _healed_point(self, key: str, config: FusionConfig) -> Point:
        """The point of a healed fusion, of which nothing stays on the disk."""
        assert self.texts.to_heal is not None and config.healing is not None
        fused = self.work / WORK / key
        inputs = HealInputs.of(fused, self.base, self.tokenizer, self.texts.to_heal, config.healing)
        point = self._fused_point(key, config, run.heal_fused(inputs, self.healing))
        for made in (fused, self.healing / WORK / TRAINING):
            shutil.rmtree(made)
        return point

    def _fused_point(self, key: str, config: FusionConfig, model: FusedForCausalLM) -> Point:
        report, method = model.report, config.method
        if config.heal_tokens and method != "healed":
            method += HEALED
        speed = report.speed
        samples, text, _ = self.texts.used_by(config)
        point = self._point(
            key,
            method,
            model,
            texts={text.name: text.figures for text in report.perplexities},
            speedups={"prefill": speed.prefill.ratio, "decoding": speed.decoding.ratio} if speed else {},
            config=report.config,
            notes=report.all_notes,
            calibration="; ".join(dict.fromkeys(used.source for used in (samples, text) if used)),
        )
        point.seconds["fusing"] = sum(report.seconds.values()) - self._seconds
        return point

    def _point(self, key: str, method: str, model: PreTrainedModel, **known: Any) -> Point:
        """The point of a model of which so much is known, with its sizes and scores."""
        start = time.perf_counter()
        scores = self.evaluation.scores(model, self.tokenizer)
        seconds = {"evaluating": time.perf_counter() - start}
        dense_layers, layers = (
            config.get_text_config().num_hidden_layers for config in (self.base.config, model.config)
        )
        parameters = model.num_parameters()
        return Point(
            key,
            method,
            num_fusions=dense_layers - layers,
            layers=layers,
            parameters=parameters,
            layers_removed_fraction=(dense_layers - layers) / dense_layers,
            parameters_removed_fraction=1 - parameters / self._parameters,
            scores=scores,
            seconds=seconds,
            versions=versions(),
            **known,
        )
