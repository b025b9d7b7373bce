"""Many fusions of one base, each evaluated, in one go that may be interrupted."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from lf_hf import pipeline
from lf_hf.config import ALGORITHM, FusionConfig
from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.evaluate.points import DENSE, RESULTS, Point, append_point, check_batch_size, read_points
from lf_hf.evaluate.tables import write_tables
from lf_hf.files.base import Base
from lf_hf.files.fused_cache import digest
from lf_hf.files.saving import checked_folder, only_writer
from lf_hf.measure import Measurements, measure
from lf_hf.model.modeling_fused_llama import FusedLlamaForCausalLM
from lf_hf.progress import progress
from lf_hf.text.calibration import load_needed

if TYPE_CHECKING:
    from lf_hf.evaluate.evaluation import Evaluation

_LLAMA_3_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}


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
    settings: dict[str, Any] | None = None,
    **kwargs: Any,
) -> list[Point]:
    """Fuse a base at several levels with several methods, and evaluate the base and each fusion.

    What is measured on the dense model is measured once. Each point is added to `results.jsonl` in `out` as soon as
    it is there, and a sweep that is run again goes on where it stopped. The tables `results.csv` and `results.md`
    and, with matplotlib, the pictures `curve.png` and `curve.svg` hold all points that were asked for.

    Parameters
    ----------
    base : str
        Folder or hub name of a Llama checkpoint.
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
        As for `FusedLlamaForCausalLM.from_pretrained_fused`.
    settings : dict, optional
        FusionConfig fields for every fusion.
    **kwargs
        As for `from_pretrained` (dtype, device_map, revision, gguf_file, ...).

    Returns
    -------
    list of Point
        The dense model first, then by level.

    Raises
    ------
    ValueError
        Before any long work, for settings, a base, calibration text or tasks that cannot be used.
    OSError
        If another process is at work in that folder, or it cannot be written.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError('A sweep evaluates with lm-eval, which is not installed; run `pip install "lf_hf[lm-eval]"`.')
    from lf_hf.evaluate.evaluation import Evaluation

    folder = checked_folder(out)
    check_evaluation(limit, num_fewshot, batch_size, metadata)
    configs = _configs(num_fusions, methods, tasks, settings)
    _check_calibration(calibration)
    opened = Base.open(base, kwargs)
    for config in configs:
        config.check_num_layers(opened.config.num_hidden_layers)
    asked: dict[str, Any] = {"limit": limit, "num_fewshot": num_fewshot, "metadata": metadata}
    evaluation = Evaluation(tasks, batch_size=batch_size, **asked)
    identity = {
        "base": _fingerprint(opened),
        "dtype": str(opened.dtype).removeprefix("torch."),
        "calibration": None if calibration is None else digest([Path(calibration)]),
        "evaluation": {"tasks": sorted(tasks), **asked},
    }
    dense_settings = {"perplexity_tokens": configs[0].perplexity_tokens}
    keys = [_key(identity, of_point) for of_point in (dense_settings, *(config.to_dict() for config in configs))]
    results = _Results(folder, opened.full_name, keys, published=is_llama_3_8b(opened.name, opened.config))
    with results.only_here():
        missing = [(key, config) for key, config in zip(keys[1:], configs, strict=True) if key not in results.done]
        dense_key = None if keys[0] in results.done else keys[0]
        if count := len(missing) + (dense_key is not None):
            made = _points(opened, configs, missing, dense_key, calibration, evaluation)
            for point in progress(made, total=count, desc="Sweep", unit="point"):
                results.add(point)
        results.write_tables()
    return results.points()


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
    return sorted(dict.fromkeys(configs), key=lambda config: config.num_fusions)


def _check_calibration(calibration: object) -> None:
    if not isinstance(calibration, str | os.PathLike | None):
        raise ValueError(f"calibration must be the path of a file, got {calibration!r:.80}.")
    if calibration is not None and not Path(calibration).is_file():
        raise ValueError(f"The calibration file {str(calibration)!r} does not exist; give a file with text.")


def _points(
    base: Base,
    configs: Sequence[FusionConfig],
    missing: Sequence[tuple[str, FusionConfig]],
    dense_key: str | None,
    calibration: str | Path | None,
    evaluation: Evaluation,
) -> Iterator[Point]:
    """Measure the dense model once, and make the points that are not there yet, one by one."""
    needs = [config for _, config in missing]
    tokenizer = base.tokenizer()
    samples = next((load_needed(config, calibration)[0] for config in needs if config.needs_similarity), None)
    text = next((load_needed(config, calibration)[1] for config in needs if config.needs_text), None)
    llama = base.load()
    pipeline.check_model(ModelDecoder(llama), configs[-1])
    measurements = measure(ModelDecoder(llama), tokenizer, configs[0], samples, text)
    if dense_key is not None:
        yield _dense_point(dense_key, llama, tokenizer, measurements, evaluation)
    del llama  # each fusion reads the base again, so that one model is in memory at a time
    for key, config in missing:
        yield _fused_point(key, base, config, tokenizer, measurements, evaluation)


def _dense_point(
    key: str,
    llama: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    measurements: Measurements,
    evaluation: Evaluation,
) -> Point:
    start = time.perf_counter()
    scores = evaluation.scores(llama, tokenizer)
    return Point(
        key=key,
        method=DENSE,
        num_fusions=0,
        layers=llama.config.num_hidden_layers,
        parameters=llama.num_parameters(),
        layers_removed_fraction=0.0,
        parameters_removed_fraction=0.0,
        perplexities={judged.name: judged.dense for judged in measurements.judged},
        scores=scores,
        config=None,
        notes=[],
        seconds={"evaluating": time.perf_counter() - start},
        versions=pipeline.versions(),
        divergences={judged.name: 0.0 for judged in measurements.judged},
        agreements={judged.name: 1.0 for judged in measurements.judged},
    )


def _fused_point(
    key: str,
    base: Base,
    config: FusionConfig,
    tokenizer: PreTrainedTokenizerBase,
    measurements: Measurements,
    evaluation: Evaluation,
) -> Point:
    start = time.perf_counter()
    model = FusedLlamaForCausalLM.from_pretrained_fused(base, config, tokenizer=tokenizer, measurements=measurements)
    fused = time.perf_counter()
    scores = evaluation.scores(model, tokenizer)
    report = model.fusion_report
    assert report is not None
    return Point(
        key=key,
        method=config.method,
        num_fusions=config.num_fusions,
        layers=report.layers_after,
        parameters=report.parameters_after,
        layers_removed_fraction=report.layers_removed_fraction,
        parameters_removed_fraction=report.parameters_removed_fraction,
        perplexities={judged.name: judged.fused for judged in report.perplexities},
        scores=scores,
        config=config.to_dict(),
        notes=report.notes,
        seconds={"fusing": fused - start, "evaluating": time.perf_counter() - fused},
        versions=report.versions,
        divergences={text.name: text.divergence for text in report.perplexities if text.divergence is not None},
        agreements={text.name: text.agreement for text in report.perplexities if text.agreement is not None},
    )


class _Results:
    """A sweep's folder: the points that are there, and the tables made of those that were asked for."""

    def __init__(self, folder: Path, base: str, keys: Sequence[str], *, published: bool) -> None:
        self.folder, self._base, self._keys, self._published = folder, base, keys, published
        self.done = read_points(folder / RESULTS)

    @contextlib.contextmanager
    def only_here(self) -> Iterator[None]:
        """Keep other sweeps out of the folder."""
        with contextlib.ExitStack() as stack:
            with _writing(self.folder):
                stack.enter_context(only_writer(self.folder))
            yield

    def points(self) -> list[Point]:
        """Those that were asked for, the dense model first, then by level."""
        return [self.done[key] for key in self._keys if key in self.done]

    def add(self, point: Point) -> None:
        """Keep a point, at once."""
        self.done[point.key] = point
        with _writing(self.folder):
            append_point(self.folder / RESULTS, point)
        self.write_tables()

    def write_tables(self) -> None:
        with _writing(self.folder):
            write_tables(self.folder, self.points(), self._base, published=self._published)


def check_evaluation(limit: object, num_fewshot: object, batch_size: object, metadata: object) -> None:
    """Raise ValueError unless these are what `sweep` takes."""
    if limit is not None and (not isinstance(limit, int | float) or not 0 < limit < math.inf):
        raise ValueError(f"limit must be a number of questions, or their share below 1, got {limit!r:.80}.")
    if num_fewshot is not None and (not isinstance(num_fewshot, int) or num_fewshot < 0):
        raise ValueError(f"num_fewshot must be an integer of at least 0, got {num_fewshot!r:.80}.")
    check_batch_size(batch_size)
    if not isinstance(metadata, dict | None):
        raise ValueError(f"metadata must be a dict, such as {{'mmlu_dir': 'DIR'}}, got {metadata!r:.80}.")


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Raise errors of writing again, with the folder's name and what to do."""
    try:
        yield
    except BlockingIOError:
        raise
    except OSError as error:
        raise OSError(
            f"The results in {str(folder)!r} cannot be written ({error}); solve that and run the sweep again, which "
            "goes on where it stopped."
        ) from error


def is_llama_3_8b(base: str, config: LlamaConfig) -> bool:
    """Whether a base is the model that `PUBLISHED` is about: its shape, and not tuned for instructions."""
    shape = all(getattr(config, name) == value for name, value in _LLAMA_3_8B.items())
    return shape and "instruct" not in base.lower()


def _key(identity: dict[str, Any], settings: dict[str, Any]) -> str:
    text = json.dumps(identity | {"settings": settings, "algorithm": ALGORITHM}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _fingerprint(base: Base) -> str:
    """A base's commit on the hub, or a digest of its files."""
    commit: str | None = getattr(base.config, "_commit_hash", None)
    if commit is not None and not os.path.isdir(base.name):
        return f"{base.name}@{commit}"
    return digest([*([] if base.hub.get("gguf_file") else [Path(base.name, "config.json")]), *base.files()])
