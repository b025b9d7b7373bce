"""Many fusions of one base, each evaluated, by one process or several, in one go that may be interrupted."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from lf_hf import pipeline
from lf_hf.checkpoint.base import Base
from lf_hf.checkpoint.classes import FusedForCausalLM, fused_class
from lf_hf.checkpoint.fused_cache import base_fingerprint, digest
from lf_hf.checkpoint.saving import checked_folder
from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.evaluate.points import DENSE, HEALED, Point, check_batch_size
from lf_hf.evaluate.results import Results
from lf_hf.families import check_layers
from lf_hf.measure import Measurements, measure
from lf_hf.runtime.launch import Processes, local_rank, own_device
from lf_hf.runtime.progress import progress
from lf_hf.settings import ALGORITHM, FusionConfig
from lf_hf.text.calibration import load_needed, load_training_text

if TYPE_CHECKING:
    from lf_hf.evaluate.evaluation import Evaluation

logger = logging.get_logger(__name__)
_LLAMA_3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
}


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
    calibration: str | Path | None = None,
    heal_cache: str | os.PathLike[str] | None = None,
    settings: dict[str, Any] | None = None,
    **kwargs: Any,
) -> list[Point]:
    """Fuse a base at several levels with several methods, and evaluate the base and each fusion.

    The base is read and measured once, and a level goes on from the pairs of the one below. Each point is added to
    `results.jsonl` in `out` as soon as it is there, and a sweep that is run again goes on where it stopped. Several
    processes may run the same sweep at once, on one machine or on several that share the folder: each makes points
    that no other is at, and returns when all are there. The tables `results.csv` and `results.md` and, with matplotlib,
    the pictures `curve.png` and `curve.svg` hold all points that were asked for.

    Parameters
    ----------
    base : str
        Folder or hub name of a checkpoint.
    out : path
        Folder of the results.
    num_fusions : sequence of int
        Levels: how many times two layers become one.
    methods : sequence of str
    tasks : sequence of str
        lm-eval tasks, groups or tags; this project's own are known.
    limit : float, optional
        As for lm-eval: questions of a task, or their share below 1.
    num_fewshot, batch_size, metadata
        As for lm-eval.
    calibration : path, optional
        As for `lf_hf.from_pretrained_fused`.
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
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "A sweep evaluates with lm-eval, which is not installed; run `pip install '.[lm-eval]'` in lf_hf's "
            "checkout."
        )
    from lf_hf.evaluate.evaluation import Evaluation

    folder = checked_folder(out)
    check_evaluation(limit, num_fewshot, batch_size, metadata)
    configs = _configs(num_fusions, methods, tasks, settings)
    if heal_cache is not None and not any(config.heal_tokens for config in configs):
        raise ValueError("heal_cache is for healed points, and there are none; give heal_tokens too.")
    _check_calibration(calibration)
    opened = Base.open(base, kwargs | {"device_map": own_device(kwargs.get("device_map"))})
    for config in configs:
        check_layers(config, opened.config)
        if config.heal_tokens and Processes.of_launch().world_size > 1:
            raise ValueError(
                "heal_tokens cannot be used where processes share a sweep's points; start it as one process."
            )
    asked: dict[str, Any] = {"limit": limit, "num_fewshot": num_fewshot, "metadata": metadata}
    evaluation = Evaluation(tasks, batch_size=batch_size, **asked)
    for config in configs:
        if config.heal_tokens:
            from lf_hf.healing.heal import check_can_heal

            corpus = load_training_text(calibration, config.heal_tokens, opened.tokenizer)
            check_can_heal(opened, opened.tokenizer(), corpus, config, cache=heal_cache)
            break  # the lowest level, which takes most
    identity = {
        "base": base_fingerprint(opened),
        "dtype": str(opened.dtype).removeprefix("torch."),
        "calibration": digest([Path(calibration)]) if calibration and Path(calibration).is_file() else calibration,
        "evaluation": {"tasks": sorted(tasks), **asked},
    }
    dense_settings = {"perplexity_tokens": configs[0].perplexity_tokens}
    keys = [_key(identity, dense_settings)]
    for config in configs:  # what learns from the cache is not quite what learns from the base beside it
        cached = {"heal_cache": True} if heal_cache is not None and config.heal_tokens else {}
        keys.append(_key(identity | cached, config.to_dict()))
    results = Results(folder, opened.full_name, keys, published=is_llama_3_8b(opened.name, opened.config))
    of_keys = dict(zip(keys[1:], configs, strict=True))
    with results.open(), _telling_what_is_missing(results, of_keys):
        if missing := results.missing:
            needs = [of_keys[key] for key in missing if key in of_keys]
            with (
                progress(total=len(missing), desc="Sweep", unit="point") as bar,
                _Maker(opened, keys[0], of_keys, needs, calibration, heal_cache, evaluation) as maker,
            ):
                while True:
                    with results.next_point(maker.choose) as key:
                        if key is None:
                            break
                        results.add(maker.point(key))
                    bar.update()
        results.write_tables()
    return results.points


@contextmanager
def _telling_what_is_missing(results: Results, configs: Mapping[str, FusionConfig]) -> Iterator[None]:
    try:
        yield
    except BaseException as error:  # of any kind, such as KeyboardInterrupt
        results.look()
        missing = [configs.get(key) for key in results.missing]
        names = ", ".join(f"{config.method} at {config.num_fusions}" if config else DENSE for config in missing)
        reason = f" ({' '.join(str(error).split())})" if local_rank() else ""  # which the command leaves to the first
        if names:
            logger.warning(f"Not there yet: {names}{reason}; run the sweep again, which goes on where it stopped.")
        raise


def _configs(
    num_fusions: Sequence[int], methods: Sequence[str], tasks: Sequence[str], settings: dict[str, Any] | None
) -> list[FusionConfig]:
    """The fusions that were asked for, by level. Raises ValueError for anything that is no list or no setting."""
    for name, values in (("num_fusions", num_fusions), ("methods", methods), ("tasks", tasks)):
        if not isinstance(values, Sequence) or isinstance(values, str):
            raise ValueError(f"{name} must be a list, got {values!r:.80}.")
        if not values:
            raise ValueError(f"{name} is empty; give at least one.")
    if not isinstance(settings, dict | None):
        raise ValueError(f"settings must be a dict of FusionConfig fields, got {settings!r:.80}.")
    configs = [
        FusionConfig.from_kwargs(**{**(settings or {}), "num_fusions": level, "method": method})
        for level in num_fusions
        for method in methods
    ]
    # What is healed stands beside what is not.
    configs = [config for healed in configs for config in (replace(healed, heal_tokens=0), healed)]
    return sorted(dict.fromkeys(configs), key=lambda config: config.num_fusions)


def _check_calibration(calibration: object) -> None:
    if not isinstance(calibration, str | os.PathLike | None):
        raise ValueError(f"calibration must be the path of a file or the name of a data set, got {calibration!r:.80}.")


@dataclass(frozen=True)
class _Dense:
    """The base, with what is measured on it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    parameters: int
    measurements: Measurements


class _Maker:
    """Makes points in a `with` block, where it can from what it made before.

    Parameters
    ----------
    base : Base
    dense_key : str
    configs : mapping from str to FusionConfig
        The fusions by their keys, from low levels to high ones.
    needs : sequence of FusionConfig
        Those whose measurements and calibration text may be needed.
    calibration, heal_cache, evaluation
    """

    def __init__(
        self,
        base: Base,
        dense_key: str,
        configs: Mapping[str, FusionConfig],
        needs: Sequence[FusionConfig],
        calibration: str | Path | None,
        heal_cache: str | os.PathLike[str] | None,
        evaluation: Evaluation,
    ) -> None:
        self._base, self._dense_key, self._configs, self._needs = base, dense_key, configs, needs
        self._calibration, self._heal_cache, self._evaluation = calibration, heal_cache, evaluation
        self._held: tuple[ModelDecoder, pipeline.Fusion] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> _Maker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def choose(self, free: Sequence[str], taken: Sequence[str]) -> str:
        """The key of the point to make next, of those that no other process is at; `taken` are those that one is at.

        The dense model comes first; then the next level of the method that this process is at, which goes on from the
        last one; then the lowest level of a method that no process is at. Processes that are left over start at the
        highest level of any.
        """
        if self._dense_key in free:
            return self._dense_key
        for key in free:
            if self._goes_on(self._configs[key]):
                return key
        others = {self._configs[key].method for key in taken if key in self._configs}
        return next((key for key in free if self._configs[key].method not in others), free[-1])

    def point(self, key: str) -> Point:
        dense = self._dense
        if key == self._dense_key:
            return _dense_point(key, dense, self._evaluation)
        decoder, fusion = self._fused_to(self._configs[key])
        decoder = decoder.copy()  # which the last pass changes
        report = pipeline.finish(
            fusion, decoder, dense.tokenizer, base=self._base.full_name, parameters=dense.parameters
        )
        model = fused_class(self._base.config).adopt(decoder.model, report, dense.tokenizer)
        if tokens := self._configs[key].heal_tokens:
            from lf_hf.healing.heal import heal_loaded

            corpus = load_training_text(self._calibration, tokens, self._base.tokenizer)
            heal_loaded(model, self._base, corpus, self._configs[key], cache=self._heal_cache)
        return _fused_point(key, model, dense, self._evaluation)

    @cached_property
    def _dense(self) -> _Dense:
        tokenizer, needs = self._base.tokenizer(), self._needs
        samples = next(
            (
                load_needed(config, self._calibration, lambda: tokenizer)[0]
                for config in needs
                if config.needs_similarity
            ),
            None,
        )
        text = next(
            (load_needed(config, self._calibration, lambda: tokenizer)[1] for config in needs if config.needs_text),
            None,
        )
        model = self._base.load()
        config = next(iter(self._configs.values()))
        parameters = pipeline.check_model(ModelDecoder(model), config)
        return _Dense(model, tokenizer, parameters, measure(ModelDecoder(model), tokenizer, config, samples, text))

    def _goes_on(self, config: FusionConfig) -> bool:
        """Whether the steps that this process has made are the first ones of a fusion."""
        if self._held is None:
            return False
        fusion = self._held[1]
        if config.selection == "groups" and config.num_fusions != fusion.config.num_fusions:
            return False  # the best groups of one level need not be parts of those of the next
        return fusion.config.method == config.method and len(fusion.steps) <= config.num_fusions

    def _fused_to(self, config: FusionConfig) -> tuple[ModelDecoder, pipeline.Fusion]:
        if self._held is None or not self._goes_on(config):
            self._held = None
            self._stack.close()
            decoder = ModelDecoder(self._dense.model, keep_originals=config.refit != "none").copy()
            config, measurements = replace(config, heal_tokens=0), self._dense.measurements
            self._held = decoder, self._stack.enter_context(pipeline.start(decoder, config, measurements))
        pipeline.fuse_pairs(self._held[1], config.num_fusions)
        return self._held


def _dense_point(key: str, dense: _Dense, evaluation: Evaluation) -> Point:
    start = time.perf_counter()
    scores = evaluation.scores(dense.model, dense.tokenizer)
    return Point(
        key=key,
        method=DENSE,
        num_fusions=0,
        layers=dense.model.config.num_hidden_layers,
        parameters=dense.parameters,
        layers_removed_fraction=0.0,
        parameters_removed_fraction=0.0,
        perplexities={judged.name: judged.dense for judged in dense.measurements.judged},
        scores=scores,
        config=None,
        notes=[],
        seconds={"evaluating": time.perf_counter() - start},
        versions=pipeline.versions(),
        divergences={judged.name: 0.0 for judged in dense.measurements.judged},
        agreements={judged.name: 1.0 for judged in dense.measurements.judged},
    )


def _fused_point(key: str, model: FusedForCausalLM, dense: _Dense, evaluation: Evaluation) -> Point:
    start = time.perf_counter()
    scores = evaluation.scores(model, dense.tokenizer)
    report = model.fusion_report
    assert report is not None
    return Point(
        key=key,
        method=report.config["method"] + (HEALED if report.healed else ""),
        num_fusions=len(report.steps),
        layers=report.layers_after,
        parameters=report.parameters_after,
        layers_removed_fraction=report.layers_removed_fraction,
        parameters_removed_fraction=report.parameters_removed_fraction,
        perplexities={judged.name: judged.fused for judged in report.perplexities},
        scores=scores,
        config=report.config,
        notes=report.notes,
        seconds={
            "fusing": sum(report.seconds.values()) - sum(dense.measurements.seconds.values()),
            "evaluating": time.perf_counter() - start,
        },
        versions=report.versions,
        divergences={text.name: text.divergence for text in report.perplexities if text.divergence is not None},
        agreements={text.name: text.agreement for text in report.perplexities if text.agreement is not None},
    )


def check_evaluation(limit: object, num_fewshot: object, batch_size: object, metadata: object) -> None:
    """Raise ValueError unless these are what `sweep` takes."""
    fits = isinstance(limit, int | float) and 0 < limit < math.inf and (limit < 1 or limit % 1 == 0)
    if limit is not None and not fits:
        raise ValueError(f"limit must be a number of questions, whole, or their share below 1, got {limit!r:.80}.")
    if num_fewshot is not None and (not isinstance(num_fewshot, int) or num_fewshot < 0):
        raise ValueError(f"num_fewshot must be an integer of at least 0, got {num_fewshot!r:.80}.")
    check_batch_size(batch_size)
    if not isinstance(metadata, dict | None):
        raise ValueError(f"metadata must be a dict, such as {{'mmlu_dir': 'DIR'}}, got {metadata!r:.80}.")


def is_llama_3_8b(base: str, config: PreTrainedConfig) -> bool:
    """Whether a base is the model that `PUBLISHED` is about: its shape, and not tuned for instructions."""
    shape = all(getattr(config, name) == value for name, value in _LLAMA_3_8B.items())
    return shape and "instruct" not in base.lower()


def _key(identity: dict[str, Any], settings: dict[str, Any]) -> str:
    text = json.dumps(identity | {"settings": settings, "algorithm": ALGORITHM}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
