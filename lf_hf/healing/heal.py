"""heal: a fused checkpoint and its base in, a checkpoint of the same kind that is nearer to the base out."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, LlamaForCausalLM, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from lf_hf.config import FusionConfig
from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.decoder.interface import Decoder
from lf_hf.decoder.on_disk import CheckpointDecoder
from lf_hf.files.base import Base, load_tokenizer
from lf_hf.files.fused_cache import digest
from lf_hf.files.saving import check_replaceable, checked_folder, finish_save, only_writer
from lf_hf.healing.judge import Judgement, judge
from lf_hf.healing.loss import Loss
from lf_hf.healing.memory import model_bytes, training_memory
from lf_hf.healing.settings import HealSettings
from lf_hf.healing.teacher import (
    FileTeacher,
    Item,
    MemoryTeacher,
    Teacher,
    read_targets,
    stacked,
    targets_folder,
    write_targets,
)
from lf_hf.healing.text import Kind, Sequences, healing_text, hub_texts, load_kinds, save_kinds, training_order
from lf_hf.healing.training import (
    DistillationTrainer,
    make_student,
    set_batches,
    trained_state,
    training_arguments,
)
from lf_hf.measure import written_on
from lf_hf.memory import free_memory
from lf_hf.model.configuration_fused_llama import FusedLlamaConfig, converted_config
from lf_hf.model.modeling_fused_llama import FusedLlamaForCausalLM
from lf_hf.numerics import weights_digest
from lf_hf.processes import Processes
from lf_hf.report.report import (
    CHANGED_NOTE,
    CalibrationInfo,
    FusionReport,
    HealedText,
    HealingInfo,
    HealingPoint,
    PerplexityInfo,
)
from lf_hf.text.calibration import Corpus, load_corpus
from lf_hf.text.judging import PROMPTS, judging_texts, relation
from lf_hf.text.packing import pack_tokens

logger = logging.get_logger(__name__)

_JUDGING_TOKENS = 4096  # of each judging text, where the report names none
_WORK = ".lf_hf-healing"  # in OUT: the state of a training that is not done
_TRAINER_STATE = "trainer_state.json"  # what the Trainer writes last into a checkpoint
_MOST_EPOCHS = 3
_SPARE = 0.9  # of free memory: estimates leave something out
_JUDGING = "judging: "  # before a judging text's name, among kinds of text
_judging_texts = functools.cache(judging_texts)


def heal(
    fused: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | Base | None = None,
    text: Sequence[str] | str | Path | None = None,
    dataset: str | None = None,
    dataset_config: str | None = None,
    dataset_split: str = "train",
    dataset_column: str = "text",
    settings: HealSettings | None = None,
    cache: str | os.PathLike[str] | None = None,
    training_args: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> FusionReport:
    """Train a fused model, for a short time, to predict what its base predicts, and save it into another folder.

    It is transformers' `Trainer` that trains, so `accelerate launch` spreads it over devices. The state that is nearest
    to the base on text that was kept aside is what is saved; if none is nearer than what came in, that is. What a
    killed run had done is in OUT: the same call again goes on there.

    Parameters
    ----------
    fused : path
        Folder of a fused checkpoint, native or plain.
    out : path
        Where to write one of the same kind. A fused checkpoint in that folder is replaced.
    base : str or Base, optional
        Folder or hub name of the model that was fused. Default: what the report names, if that is on the hub.
    text : list of str or path, optional
        Text to heal on, as `lf_hf.text.calibration.load_corpus` takes it: best what the model will be used for.
        Default: the mixture of that function.
    dataset, dataset_config, dataset_split, dataset_column : str, optional
        A data set on the hub in place of `text`: its beginning is streamed.
    settings : HealSettings, optional
        HealSettings fields in `kwargs` override it.
    cache : path, optional
        Where to keep the base's predictions, for all healings of models that were fused from it, on the same text.
    training_args : dict, optional
        Fields of transformers' TrainingArguments: bf16, gradient_checkpointing, report_to, fsdp, deepspeed, ...
    **kwargs
        HealSettings fields; all others are for loading the base (revision, token, gguf_file, ...).

    Returns
    -------
    FusionReport
        The fused model's, with `healed` in it.

    Raises
    ------
    ValueError
        Before any long work, for settings, models or text that cannot be used, a base that is not the one that was
        fused, or too little memory.
    OSError
        If another process is at work in that folder, or if files cannot be written.
    """
    settings = heal_settings(settings, kwargs)
    folder = checked_folder(out)
    check_replaceable(folder)
    came_in = _open_fused(fused)
    opened = _open_base(base, came_in, kwargs)
    corpus = _corpus(text, settings, dataset, dataset_config, dataset_split, dataset_column)
    work = folder / _WORK
    report = _distilled(came_in, opened, corpus, settings, work, cache, dict(training_args or {}))

    def save() -> None:
        came_in.model.fusion_report = report
        came_in.model.save_pretrained(folder, as_llama=came_in.plain, tokenizer=came_in.tokenizer)
        shutil.rmtree(work, ignore_errors=True)

    Processes.of_launch().told_by_first(save)
    return report


def heal_loaded(model: FusedLlamaForCausalLM, base: Base, corpus: Corpus, config: FusionConfig) -> None:
    """Heal a model in memory, in place, as `heal` does with its defaults; `fusion_report` follows."""
    report, tokens = model.fusion_report, config.heal_tokens
    assert report is not None
    report = dataclasses.replace(report, config=report.config | {"heal_tokens": tokens})
    came_in = _Fused(model, report, plain=False, tokenizer=model.tokenizer)
    settings = HealSettings(tokens=tokens, seed=config.seed)
    with ExitStack() as stack:
        work = Processes.of_launch().told_by_first(lambda: stack.enter_context(TemporaryDirectory()))
        model.fusion_report = _distilled(came_in, base, corpus, settings, Path(work), None, {})


def _distilled(
    came_in: _Fused,
    opened: Base,
    corpus: Corpus,
    settings: HealSettings,
    work: Path,
    cache: str | os.PathLike[str] | None,
    given: dict[str, Any],
) -> FusionReport:
    """Train the model that came in, in place and in all processes; returns what its report is then."""
    start = time.monotonic()
    model = came_in.model
    length = min(settings.length, model.config.max_position_embeddings)
    settings = dataclasses.replace(settings, length=length)
    arguments = training_arguments(settings, work, given)
    processes = Processes.of_launch()
    student = make_student(model, settings, came_in.fused_layers)
    way = _choose_way(opened, student, settings, arguments, given, cache)
    with ExitStack() as stack:
        if processes.first:
            stack.enter_context(only_writer(work))
        resumed = processes.told_by_first(lambda: _state_of(work, came_in, opened, settings, corpus, arguments, given))
        lesson = _lesson(way, opened, came_in, corpus, settings, arguments, work, processes)
        before = {name: judge(model, items, lesson.teacher) for name, items in lesson.judging.items()}
        trainer = DistillationTrainer(
            teacher=lesson.teacher,
            loss=Loss(settings.temperature, settings.next_token_share),
            model=student,
            args=arguments,
            data_collator=stacked,
            train_dataset=Sequences(lesson.items, lesson.order),
            eval_dataset={name: Sequences(lesson.items, numbers) for name, numbers in lesson.held_out.items()},
        )
        trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
        del student
        arguments.eval_on_start = resumed is None
        trainer.train(resume_from_checkpoint=resumed)
        kept = _best_step(trainer)
        if kept:
            _take_over(model, trained_state(trainer, model, settings), processes)
        after = {name: judge(model, items, lesson.teacher) for name, items in lesson.judging.items()}
        seconds = time.monotonic() - start
        return _report(came_in, settings, lesson, trainer, trained, kept, before, after, corpus, seconds)


@torch.no_grad()
def _take_over(model: FusedLlamaForCausalLM, state: Mapping[str, Tensor], processes: Processes) -> None:
    """Give a model, in all processes, the weights that the first one has."""
    for name, parameter in model.named_parameters():
        if processes.first:
            parameter.copy_(state[name])
        processes.given_by_first(parameter.data)


def heal_settings(settings: HealSettings | None, kwargs: dict[str, Any]) -> HealSettings:
    """Settings with the HealSettings fields among `kwargs`, which are taken out there, in place of their own."""
    given = {name: kwargs.pop(name) for name in HealSettings.field_names() if name in kwargs}
    return dataclasses.replace(settings or HealSettings(), **given)


@dataclass(frozen=True)
class _Fused:
    """What came in. `plain` says whether it is a plain Llama's checkpoint."""

    model: FusedLlamaForCausalLM
    report: FusionReport
    plain: bool
    tokenizer: PreTrainedTokenizerBase | None

    @property
    def judging_tokens(self) -> int:
        """Of each judging text: as many as the fusion was judged by."""
        return self.report.config.get("perplexity_tokens") or _JUDGING_TOKENS

    @property
    def fused_layers(self) -> list[int]:
        """Numbers of the layers that stand for several."""
        return [number for number, group in enumerate(self.report.groups) if len(group) > 1]


def _open_fused(fused: str | os.PathLike[str]) -> _Fused:
    folder = checked_folder(fused)
    finish_save(folder)
    report = FusionReport.load(folder)
    config = AutoConfig.from_pretrained(folder)
    plain = config.model_type == "llama"
    if plain:
        config = converted_config(config, FusedLlamaConfig)
    model = FusedLlamaForCausalLM.from_pretrained(folder, config=config, dtype="auto")
    if len(model.model.layers) != report.layers_after:
        raise ValueError(
            f"{str(fused)!r} has {len(model.model.layers)} layers, but its report says {report.layers_after}; give the "
            "folder of a fused checkpoint."
        )
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    return _Fused(model, report, plain, load_tokenizer(str(folder), {}) if has_tokenizer else None)


def _open_base(base: str | os.PathLike[str] | Base | None, came_in: _Fused, kwargs: dict[str, Any]) -> Base:
    """The base, checked to have the fused model's vocabulary; its weights are not read."""
    if base is None:
        if "/" not in came_in.report.base:
            raise ValueError(f"The report names the base {came_in.report.base!r} only; say where it is with base=.")
        base = came_in.report.base
    opened = base if isinstance(base, Base) else Base.open(base, kwargs)
    sizes = opened.config.vocab_size, came_in.model.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{opened.full_name!r} has {sizes[0]} embeddings, and the fused model {sizes[1]}; give the base "
            "that it was fused from."
        )
    if came_in.tokenizer is not None and came_in.tokenizer.get_vocab() != opened.tokenizer().get_vocab():
        raise ValueError(
            f"The tokenizer of {opened.full_name!r} has other tokens than the fused model's; give the base that it was "
            "fused from."
        )
    return opened


def _check_base(opened: Base, came_in: _Fused, decoder: Decoder) -> None:
    """Raise ValueError if the base is not the one that was fused, as far as the report can tell."""
    report = came_in.report
    wrong = False
    if report.base_digest is not None:
        wrong = weights_digest(decoder.named_parameters()) not in (None, report.base_digest)
    elif report.fingerprints is not None:
        wrong = digest(opened.content_files()) != report.fingerprints["base"]
    if wrong:
        raise ValueError(
            f"{opened.full_name!r} is not the base that this model was fused from, which was {report.base!r}: its "
            "weights are others; give that one."
        )


def _corpus(
    text: Sequence[str] | str | Path | None,
    settings: HealSettings,
    dataset: str | None,
    config: str | None,
    split: str,
    column: str,
) -> Corpus:
    if dataset is None:
        return load_corpus(text, max_tokens=settings.tokens)
    if text is not None:
        raise ValueError("text and dataset exclude each other; give one of them.")
    corpus = load_corpus(hub_texts(dataset, config, split, column, settings.tokens), max_tokens=settings.tokens)
    names = [f"{dataset} ({split})", *corpus.names[1:]]
    return dataclasses.replace(corpus, source=", ".join(names))


def _state_of(
    work: Path,
    came_in: _Fused,
    opened: Base,
    settings: HealSettings,
    corpus: Corpus,
    arguments: TrainingArguments,
    given: Mapping[str, Any],
) -> str | None:
    """The checkpoint of a run of the same healing that was cut short, if any; what another one left is removed."""
    identity = {
        "settings": settings.to_dict(),
        "fused": weights_digest(came_in.model.named_parameters()),
        "base": opened.full_name,
        "text": _digest_of(corpus),
        "processes": arguments.world_size,
        "training_args": {name: str(value) for name, value in given.items()},
    }
    note = work / "healing.json"
    if not note.is_file() or json.loads(note.read_text(encoding="utf-8")) != identity:
        for path in work.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif not path.name.endswith(".lock"):
                path.unlink()
        note.write_text(json.dumps(identity), encoding="utf-8")
    for checkpoint in work.glob("checkpoint-*"):
        if not (checkpoint / _TRAINER_STATE).is_file():  # cut short while it was written
            shutil.rmtree(checkpoint)
    found: str | None = get_last_checkpoint(str(work))
    if found:
        logger.warning(f"Going on from {found!r}, where an earlier run of the same healing stopped.")
    return found


def _digest_of(corpus: Corpus) -> str:
    return hashlib.sha256(json.dumps([corpus.parts, corpus.generated_share]).encode()).hexdigest()


@dataclass(frozen=True)
class _Way:
    """How the base's predictions are had: `said` to people; `folder` for files of them, and `in_memory` the base."""

    said: str
    folder: Path | None
    in_memory: bool


def _choose_way(
    opened: Base,
    student: torch.nn.Module,
    settings: HealSettings,
    arguments: TrainingArguments,
    given: Mapping[str, Any],
    cache: str | os.PathLike[str] | None,
) -> _Way:
    """Decide by free memory, and split steps into batches that fit. Raises ValueError if nothing fits."""
    size = 2 if arguments.bf16 or arguments.fp16 else 4
    config = getattr(student, "config", opened.config)
    memory = training_memory(config, student, settings.length, size)
    device = arguments.device
    free = int(free_memory(device) * _SPARE)
    there = sum(p.numel() * p.element_size() for p in student.parameters()) if device.type == "cpu" else 0
    sharded = arguments.fsdp or arguments.deepspeed or os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"
    fixed = memory.fixed // (arguments.world_size if sharded else 1) - there
    of_base = model_bytes(opened.config, size)
    one = memory.sequence
    if cache is None and fixed + one + of_base <= free:
        way = _Way("computed by the base, which is in memory beside the student", None, True)
        free -= of_base
    elif fixed + one <= free:
        in_memory = of_base <= free
        how = "in memory" if in_memory else "read layer by layer"
        place = Path(cache) if cache is not None else Path(arguments.output_dir or ".")
        said = f"the {settings.top_k} most likely ones of each token, written to disk by the base, {how}"
        way = _Way(said, place, in_memory)
    else:
        needs = f"{(fixed + one) / 1e9:.1f} GB for train={settings.train!r}"
        advice = "take train='lora', or training_args={'gradient_checkpointing': True} with a shorter length"
        if settings.train == "lora":
            advice = "take a device with more, several of them with FSDP, or a shorter length"
        raise ValueError(
            f"{free / 1e9:.1f} GB are free, but training takes {needs}, even with the base's predictions on disk; "
            f"{advice}."
        )
    logger.info(f"The base's predictions: {way.said}.")
    set_batches(arguments, settings.batch, int((free - fixed) // one), given)
    return way


@dataclass(frozen=True)
class _Lesson:
    """All sequences, and what is done with which: `order` are the numbers of those to train on, one after the other.

    `held_out` has numbers by kind of text, and `judging` items by judging text.
    """

    teacher: Teacher
    said: str
    kinds: list[CalibrationInfo]
    items: Sequence[Item]
    order: list[int]
    epochs: float
    held_out: dict[str, list[int]]
    judging: dict[str, list[Item]]


def _lesson(
    way: _Way,
    opened: Base,
    came_in: _Fused,
    corpus: Corpus,
    settings: HealSettings,
    arguments: TrainingArguments,
    work: Path,
    processes: Processes,
) -> _Lesson:
    """The text and the base's predictions of it, on the way that was chosen."""
    if way.folder is None:
        llama = _loaded_base(opened, came_in, arguments)
        kinds = processes.told_by_first(
            lambda: _kinds(ModelDecoder(llama), opened, came_in, corpus, settings, work / "text.safetensors")
        )
        sequences = [sequence for kind in kinds for sequence in (*kind.training, *kind.held_out)]
        parts = [(kind.name, len(kind.training), len(kind.held_out)) for kind in kinds]
        return _arranged(
            MemoryTeacher(llama), way.said, [{"input_ids": sequence} for sequence in sequences], parts, settings
        )
    made_of = {
        "base": came_in.report.base_digest or digest(opened.content_files()),
        "text": _digest_of(corpus),
        "settings": {
            name: getattr(settings, name)
            for name in ("tokens", "length", "batch_tokens", "written_share", "temperature", "top_k", "seed")
        },
        "judging_tokens": came_in.judging_tokens,
        "dtype": "bfloat16" if arguments.bf16 else str(came_in.model.dtype),
    }
    folder = targets_folder(way.folder, **made_of)
    processes.told_by_first(lambda: _write(folder, way, opened, came_in, corpus, settings, arguments))
    return _arranged(FileTeacher(), way.said, *read_targets(folder), settings)


def _loaded_base(opened: Base, came_in: _Fused, arguments: TrainingArguments) -> LlamaForCausalLM:
    llama = dataclasses.replace(opened, loading={**opened.loading, "dtype": came_in.model.dtype}).load()
    _check_base(opened, came_in, ModelDecoder(llama))
    dtype = torch.bfloat16 if arguments.bf16 else llama.dtype
    moved: LlamaForCausalLM = llama.to(device=arguments.device, dtype=dtype)  # type: ignore[call-arg]
    return moved


def _write(
    folder: Path,
    way: _Way,
    opened: Base,
    came_in: _Fused,
    corpus: Corpus,
    settings: HealSettings,
    arguments: TrainingArguments,
) -> None:
    """Write the base's predictions, unless they are there."""
    if folder.is_dir():
        return
    with TemporaryDirectory() as scratch:
        if way.in_memory:
            decoder: Decoder = ModelDecoder(_loaded_base(opened, came_in, arguments))
        else:
            decoder = CheckpointDecoder(
                opened.weights_folder(),
                opened.new_config(),
                Path(scratch),
                dtype=came_in.model.dtype,
                device=arguments.device,
            )
            _check_base(opened, came_in, decoder)
            if corpus.generated_share and settings.written_share is None:  # each token would read all of the weights
                corpus = dataclasses.replace(corpus, generated_share=0.0)
        kinds = _kinds(decoder, opened, came_in, corpus, settings, None)
        write_targets(decoder, kinds, folder, top_k=settings.top_k, temperature=settings.temperature, note={})


def _kinds(
    decoder: Decoder, opened: Base, came_in: _Fused, corpus: Corpus, settings: HealSettings, file: Path | None
) -> list[Kind]:
    """All kinds of text, judging texts among them; in `file` for a run that is cut short."""
    if file is not None and file.is_file():
        return load_kinds(file)
    tokenizer = opened.tokenizer()

    def write(count: int, length: int, seed: int) -> list[Tensor]:
        return decoder.generate(count, length, seed)

    kinds = healing_text(tokenizer, corpus, settings, decoder.config.vocab_size, write)
    for judging in _judging_texts():
        packed = pack_tokens(tokenizer, judging.text, settings.length, came_in.judging_tokens)
        kinds.append(Kind(_JUDGING + judging.name, [], [part for part in packed if len(part) == settings.length]))
    if file is not None:
        save_kinds(kinds, file)
    return kinds


def _arranged(
    teacher: Teacher, said: str, items: Sequence[Item], parts: Sequence[tuple[str, int, int]], settings: HealSettings
) -> _Lesson:
    training: list[int] = []
    held_out: dict[str, list[int]] = {}
    judging: dict[str, list[Item]] = {}
    kinds = []
    place = 0
    for name, count, aside in parts:
        training += range(place, place + count)
        kept = range(place + count, place + count + aside)
        place += count + aside
        if name.startswith(_JUDGING):
            judging |= {name.removeprefix(_JUDGING): [items[number] for number in kept]} if aside else {}
        elif aside:
            held_out[name] = list(kept)
        if count:
            kinds.append(CalibrationInfo(name, count, count * settings.length))
    total = settings.steps * settings.batch
    order = training_order(len(training), total, settings.seed)
    epochs = total / len(training)
    if epochs > _MOST_EPOCHS:
        logger.warning(_epochs_note(epochs))
    return _Lesson(teacher, said, kinds, items, [training[number] for number in order], epochs, held_out, judging)


def _epochs_note(epochs: float) -> str:
    return (
        f"Healing goes {epochs:.1f} times through its text: more text, or fewer tokens, gives a better model for the "
        "same time."
    )


def _best_step(trainer: DistillationTrainer) -> int:
    """The step whose state is the nearest to the base on held-out text; 0 is what came in."""
    curve = trainer.curve()
    means = {step: sum(found.values()) / len(found) for step, found in curve.items()}
    best = trainer.state.best_global_step or 0
    value = means.get(best, math.inf)
    return best if math.isfinite(value) and value < means.get(0, math.inf) else 0


def _report(
    came_in: _Fused,
    settings: HealSettings,
    lesson: _Lesson,
    trainer: DistillationTrainer,
    trained: int,
    kept: int,
    before: Mapping[str, Judgement],
    after: Mapping[str, Judgement],
    corpus: Corpus,
    seconds: float,
) -> FusionReport:
    """The fused model's report, of what it has become."""
    report = came_in.report
    curve = trainer.curve()
    healed = HealingInfo(
        settings=settings.to_dict(),
        text=lesson.kinds,
        epochs=lesson.epochs,
        trained=trained,
        steps=trainer.state.global_step,
        kept=kept,
        teacher=lesson.said,
        curve=[HealingPoint(step, found) for step, found in sorted(curve.items())],
        judged=[
            HealedText(
                name,
                sum(len(item["input_ids"]) for item in lesson.judging[name]),
                before[name].perplexity,
                found.perplexity,
                before[name].divergence,
                found.divergence,
                before[name].agreement,
                found.agreement,
            )
            for name, found in after.items()
        ],
        seconds=seconds,
    )
    notes = [note for note in report.notes if note != CHANGED_NOTE and not note.startswith("Perplexity went ")]
    if trainer.diverged is not None:
        step, rate = trainer.diverged
        notes.append(
            f"The loss of healing was not finite at step {step}, at a learning rate of {rate:.3g}, so the state of "
            f"step {kept} is kept; a lower learning_rate goes further."
        )
    if not kept:
        notes.append(
            "Healing did not bring the model nearer to its base on text that was kept aside, so its weights are what "
            "they were before; take more tokens or a lower learning_rate."
        )
    if lesson.epochs > _MOST_EPOCHS:
        notes.append(_epochs_note(lesson.epochs))
    for note in notes[len(report.notes) :]:
        logger.warning(note)
    texts = {judging.name: judging for judging in _judging_texts()}
    perplexities = []
    for info in report.perplexities:
        if info.name in after and info.name in texts:
            near = relation(texts[info.name], corpus.parts, by_default=corpus.by_default)
            order = ("seen", "kin", "unseen")
            perplexities.append(
                PerplexityInfo(
                    name=info.name,
                    text=info.text,
                    tokens=sum(len(item["input_ids"]) for item in lesson.judging[info.name]),
                    dense=after[info.name].dense,
                    fused=after[info.name].perplexity,
                    relation=min(near, info.relation, key=order.index),
                    divergence=after[info.name].divergence,
                    agreement=after[info.name].agreement,
                )
            )
    continuations = report.continuations
    if came_in.tokenizer is not None and [text.prompt for text in continuations] == list(PROMPTS):
        texts_now = written_on(ModelDecoder(came_in.model), came_in.tokenizer)
        continuations = [
            dataclasses.replace(text, fused=now) for text, now in zip(continuations, texts_now, strict=True)
        ]
    return dataclasses.replace(
        report,
        continuations=continuations,
        perplexities=perplexities or report.perplexities,
        notes=notes,
        seconds=report.seconds | {"healing": seconds},
        weights_digest=weights_digest(came_in.model.named_parameters()),
        fingerprints=None,
        healed=healed,
    )
