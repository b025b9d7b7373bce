"""Many fusions of one base, each evaluated, by one process, in one go that may be interrupted."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from importlib.util import find_spec
from itertools import chain, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lf_hf import pipeline
from lf_hf.checkpoint.base import Base
from lf_hf.checkpoint.classes import FusedForCausalLM, fused_class
from lf_hf.checkpoint.identity import files_digest, identity, identity_key, text_digest
from lf_hf.checkpoint.saving import WORK, checked_folder, write_whole
from lf_hf.evaluate.points import DENSE, HEALED, Point, check_evaluation
from lf_hf.evaluate.results import Results
from lf_hf.healing.teacher import TRAINING
from lf_hf.inputs.fusion import Texts, for_model
from lf_hf.inputs.healing import HealInputs
from lf_hf.inputs.planning import check_text_to_heal, plan_run
from lf_hf.measure.dense import measure
from lf_hf.report.figures import dense_figures
from lf_hf.report.report import versions
from lf_hf.runtime.launch import local_processes
from lf_hf.runtime.progress import progress
from lf_hf.settings import FusionConfig
from lf_hf.text.calibration import Corpus, load_corpus
from lf_hf.text.sources import TextSource

if TYPE_CHECKING:
    from lf_hf.evaluate.evaluation import Evaluation

_Keys = dict[str, FusionConfig | None]  # of points: of the dense model, None, and of the fusions
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
        If that folder cannot be written.
    """
    if find_spec("lm_eval") is None:
        raise ValueError("Sweeps evaluate with lm-eval; run `pip install '.[lm-eval]'` in lf_hf's checkout.")
    if local_processes() > 1:
        raise ValueError("A sweep is one process; start it without a launcher.")
    from lf_hf.evaluate.evaluation import Evaluation

    check_evaluation(limit, batch_size or 1)
    folder = checked_folder(out)
    opened = Base.open(base, kwargs)
    configs = _configs(opened.config, num_fusions, methods, tasks, settings or {})
    asked: dict[str, Any] = {"limit": limit, "num_fewshot": num_fewshot, "metadata": metadata}
    evaluation = Evaluation(tasks, batch_size=batch_size, **asked)
    tokenizer = opened.tokenizer()
    healed = next((config.heal_tokens for config in configs if config.heal_tokens), None)
    to_heal = healed and load_corpus(calibration, max_tokens=healed, to_train=True, tokenizer=tokenizer)
    texts = Texts.load(configs, calibration, tokenizer)
    maker = _Maker(opened, tokenizer, configs, texts, to_heal or None, evaluation)
    maker.check_healing()
    asked |= {"tasks": sorted(tasks), "limit": limit and float(limit)}  # a command line gives 20.0 for 20
    keys = maker.keys(json.dumps(asked, sort_keys=True))
    results = Results(folder, opened.name, list(keys))
    maker.make(keys, results)
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
        config = for_model(FusionConfig.from_kwargs(**settings | {"num_fusions": level, "method": method}), base)
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
    to_heal: Corpus | None
    evaluation: Evaluation
    _work: TemporaryDirectory[str] = field(default_factory=TemporaryDirectory)  # for what healings need of the base

    def check_healing(self) -> None:
        """Raise ValueError if healed points cannot be made here."""
        if self.to_heal is None:
            return
        # The fusion whose healing takes most has the most layers left.
        most = min((config for config in self.configs if config.heal_tokens), key=lambda config: config.num_fusions)
        plan = plan_run(self.base, most, None, healing=most.healing).healing
        assert plan is not None
        check_text_to_heal(self.tokenizer, self.to_heal, plan.settings, self.base)

    def keys(self, evaluation: str) -> _Keys:
        """What identifies the results of each model."""
        base = files_digest(self.base)
        others = {"dtype": self.base.dtype, "evaluation": evaluation}
        judged = {"perplexity_tokens": self.configs[0].perplexity_tokens}
        keys: _Keys = {identity_key(identity(base, judged, "", **others))[:_KEY]: None}
        for config in self.configs:
            used = [*self.texts.used_by(config), self.to_heal if config.heal_tokens else None]
            texts = chain(*(text.texts for text in used if text))
            text = text_digest(texts, self.tokenizer)
            made_of = identity(base, config.in_effect(), text, **others)
            keys[identity_key(made_of)[:_KEY]] = config
        return keys

    def make(self, keys: _Keys, results: Results) -> None:
        """Make the points that are missing."""
        missing = results.missing()
        if missing:
            most = max(self.configs, key=lambda config: (config.fits, config.num_fusions))
            self._decoder = self.base.open_decoder(plan_run(self.base, most, None))
            self._measure([config for config in map(keys.get, missing) if config])
        fuse = lru_cache(maxsize=1)(self._fuse)  # points that differ in healing alone follow each other
        for key in progress(missing, desc="Sweep", unit="point"):
            config = keys[key]
            if config is None:
                results.add(self._dense_point(key))
            else:
                results.add(self._fused_point(key, config, fuse(config.unhealed)))
        results.complete()

    def _measure(self, configs: Sequence[FusionConfig]) -> None:
        """Measure on the base what these fusions need."""
        measured = measure(self._decoder, self.tokenizer, self.configs[0], *self.texts.used_by(*configs))
        measured.kept.averages = {}  # for higher levels to go on from
        self._measured = measured

    def _fuse(self, config: FusionConfig) -> FusedForCausalLM:
        """A fusion of a copy of the base, which shares its tensors."""
        decoder, model_class = self._decoder.copy(), fused_class(self.base.config)
        return pipeline.fuse_measured(self.base, decoder, self.tokenizer, config, self._measured, model_class)

    def _heal(self, model: FusedForCausalLM, config: FusionConfig) -> FusedForCausalLM:
        """A fused model, healed where that is asked for; what is measured on the base for it serves all points."""
        asked_for = {"method": config.method, "heal_tokens": config.heal_tokens}
        model.remember(replace(model.report, config=model.report.config | asked_for))
        if self.to_heal is None or config.healing is None:
            return model
        folder = Path(self._work.name)
        for name in (pipeline.FUSED, TRAINING):
            shutil.rmtree(folder / WORK / name, ignore_errors=True)
        fused = write_whole(folder, pipeline.FUSED, partial(model.save_pretrained, plain=True))
        return pipeline.heal_fused(
            HealInputs.of(fused, self.base, self.tokenizer, self.to_heal, config.healing), folder
        )

    def _dense_point(self, key: str) -> Point:
        speedups = {"prefill": 1.0, "decoding": 1.0} if self.configs[0].speed else {}
        texts = {text.name: dense_figures(text.dense) for text in self._measured.judged}
        return self._evaluate(key, DENSE, self._decoder.model, texts, speedups)

    def _fused_point(self, key: str, config: FusionConfig, model: FusedForCausalLM) -> Point:
        model = self._heal(model, config)
        report, method = model.report, config.method
        if config.heal_tokens and method != "healed":
            method += HEALED
        speed = report.speed
        speedups = {"prefill": speed.prefill.ratio, "decoding": speed.decoding.ratio} if speed else {}
        texts = {text.name: text.figures for text in report.perplexities}
        point = self._evaluate(key, method, model, texts, speedups)
        point.seconds["fusing"] = sum(report.seconds.values()) - sum(self._measured.seconds.values())
        sources = dict.fromkeys(text.source for text in self.texts.used_by(config) if text)
        return replace(point, config=report.config, notes=report.all_notes, calibration="; ".join(sources))

    def _evaluate(
        self,
        key: str,
        method: str,
        model: PreTrainedModel,
        texts: dict[str, dict[str, float]],
        speedups: dict[str, float],
    ) -> Point:
        """The point of a model, with its sizes and scores."""
        start = time.perf_counter()
        scores = self.evaluation.scores(model, self.tokenizer)
        seconds = time.perf_counter() - start
        layers = model.config.get_text_config().num_hidden_layers
        dense_layers = self.base.text_config.num_hidden_layers
        parameters = model.num_parameters()
        return Point(
            key,
            method,
            num_fusions=dense_layers - layers,
            layers=layers,
            parameters=parameters,
            layers_removed_fraction=(dense_layers - layers) / dense_layers,
            parameters_removed_fraction=1 - parameters / self._decoder.model.num_parameters(),
            scores=scores,
            seconds={"evaluating": seconds},
            versions=versions(),
            texts=texts,
            speedups=speedups,
        )
