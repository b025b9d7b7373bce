"""The public ways to fuse: load and fuse, keep the result in a folder for later runs, fuse one folder into another."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, logging

from lf_hf.checkpoint.base import HUB_ARGUMENTS, SPREAD, Base, is_spread, optional_file
from lf_hf.checkpoint.classes import FusedForCausalLM, checked_tokenizer, fused_class
from lf_hf.checkpoint.companions import write_companions
from lf_hf.checkpoint.configuration import fused_config, plain_config
from lf_hf.checkpoint.fused_cache import fingerprints, why_not_reused
from lf_hf.checkpoint.saving import check_replaceable, checked_folder, only_writer, replaced_files
from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.decoder.interface import Decoder
from lf_hf.decoder.on_disk import CheckpointDecoder
from lf_hf.families import check_layers
from lf_hf.report.report import REPORT_NAME, FusionReport
from lf_hf.runtime.errors import explained
from lf_hf.runtime.launch import ALONE, Processes, local_rank
from lf_hf.settings import FusionConfig
from lf_hf.speed import with_speed
from lf_hf.text.calibration import CalibrationSamples, Corpus, load_needed, load_training_text
from lf_hf.text.packing import check_enough
from lf_hf.text.sources import TextSource

logger = logging.get_logger(__name__)
MAX_SHARD_BYTES = 500_000_000
"""Size of an output file, about."""


@dataclass(frozen=True)
class FusionInputs:
    """All that a fusion is made of; text is read when it is first needed.

    `calibration` is what the user gave, and `tokenizer` the base's unless the user gave one.
    """

    base: Base
    config: FusionConfig
    calibration: TextSource | None
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def open(
        cls, base: Base, config: FusionConfig, calibration: TextSource | None, tokenizer: PreTrainedTokenizerBase | None
    ) -> FusionInputs:
        """Check that the settings suit the base, and read its tokenizer."""
        check_layers(config, base.config)
        return cls(base, config, calibration, checked_tokenizer(tokenizer) or base.tokenizer())

    @cached_property
    def samples_and_text(self) -> tuple[CalibrationSamples | None, Corpus | None]:
        """What a method compares layers on, and what it fits them to."""
        return load_needed(self.config, self.calibration, self.tokenizer)

    @cached_property
    def to_heal(self) -> Corpus | None:
        """The text of the healing that follows, if one does."""
        tokens = self.config.heal_tokens
        return load_training_text(self.calibration, tokens, self.tokenizer) if tokens else None

    def check(self) -> None:
        """Raise ValueError, before weights are read, if there is too little text, or too little memory to heal."""
        _, text = self.samples_and_text
        if text is not None:
            length = min(self.config.calibration_length, self.base.config.max_position_embeddings)
            check_enough(self.tokenizer, text, length, self.base.config.vocab_size)
        if self.to_heal is not None:
            from lf_hf.healing.heal import check_can_heal  # imports the Trainer, which takes seconds

            check_can_heal(self.base, self.tokenizer, self.to_heal, self.config)

    def fingerprints(self) -> dict[str, str]:
        """What tells this fusion from others with the same settings."""
        texts = None
        if self.calibration is not None:
            samples, text = self.samples_and_text
            texts = samples.texts if samples else []
            texts = [*texts, *(part for corpus in (text, self.to_heal) if corpus for part in corpus.parts.values())]
        return fingerprints(self.base, self.tokenizer, texts)

    def fuse(self, decoder: Decoder) -> FusionReport:
        """Fuse the base's layers, in place."""
        from lf_hf import pipeline  # imports scipy and scikit-learn, which loading does not need

        return pipeline.fuse(decoder, self.tokenizer, self.config, *self.samples_and_text, base=self.base.full_name)


def from_pretrained_fused(
    base: str | os.PathLike[str] | Base,
    config: FusionConfig | None = None,
    *,
    calibration: TextSource | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    fused_dir: str | os.PathLike[str] | None = None,
    model_class: type[FusedForCausalLM] | None = None,
    **kwargs: Any,
) -> FusedForCausalLM:
    """Load a model of any family that can be fused, and fuse its layers.

    Processes that a launcher started share the work, and each of them gets the result: all must call this.

    Parameters
    ----------
    base : str or Base
        Hub name or folder of a checkpoint, or one that `lf_hf.checkpoint.base.Base.open` has opened.
    config : FusionConfig, optional
        Settings; FusionConfig fields in `kwargs` override it. Without it `num_fusions` or a budget is required.
    calibration : list of str or chats, or path, optional
        Calibration text, as `lf_hf.text.calibration.load_calibration` takes it, and what is healed on where
        `heal_tokens` asks for that. Default: MMLU questions, or for `refit` and healing the text of
        `lf_hf.text.calibration.load_corpus`.
    tokenizer : optional
        The base's tokenizer, if it is not beside the base.
    fused_dir : path, optional
        Where to keep the fused model. If one is there that was made of the same base (by content), calibration text
        and settings, it is loaded; else the base is fused and saved there, once on each machine.
    model_class : class, optional
        What the result is to be. Default: the class for the base's family.
    **kwargs
        FusionConfig fields. All others go to `from_pretrained` (dtype, device_map, revision, gguf_file, ...).

    Returns
    -------
    FusedForCausalLM
        A FusedLlamaForCausalLM, a FusedQwen3ForCausalLM, ...

    Raises
    ------
    ValueError
        Before any long work, for settings, a base or calibration text that cannot be used.
    """
    kept_in = None if fused_dir is None else checked_folder(fused_dir)
    config = FusionConfig.taken_from(kwargs, config)
    opened = Base.open(base, kwargs)
    of_family = fused_class(opened.config)
    model_class = model_class or of_family
    if model_class.family is not of_family.family:
        raise ValueError(
            f"{opened.full_name!r} is a {opened.config.model_type!r} model, so it is fused with {of_family.__name__}, "
            f"not with {model_class.__name__}; or use lf_hf.from_pretrained_fused, which finds the class itself."
        )
    inputs = FusionInputs.open(opened, config, calibration, tokenizer)
    if kept_in is not None:
        return _load_or_fuse(model_class, inputs, kept_in)
    inputs.check()
    return _load_and_fuse(model_class, inputs)


FusedForCausalLM._fuse = from_pretrained_fused


def _load_and_fuse(model_class: type[FusedForCausalLM], inputs: FusionInputs) -> Any:
    """Load the base and fuse it in memory: a model of the class, with its report."""
    loaded = inputs.base.load()
    # Where each process spreads its model, and with it its states, over devices, each fuses by itself.
    processes = ALONE if is_spread(inputs.base.loading.get("device_map")) else Processes.of_launch()
    report = inputs.fuse(ModelDecoder(loaded, processes=processes))
    model = model_class.adopt(loaded, with_speed(report, loaded), inputs.tokenizer)
    if inputs.to_heal is not None:
        from lf_hf.healing.heal import heal_loaded  # imports the Trainer, which takes seconds

        heal_loaded(model, inputs.base, inputs.to_heal, inputs.config)
    return model


def _load_or_fuse(model_class: type[FusedForCausalLM], inputs: FusionInputs, folder: Path) -> FusedForCausalLM:
    """Load what one of several runs fused and kept in a folder, or fuse it and keep it there.

    The first run to lock the folder fuses, and the others wait for it. A launch is one run, even where its processes
    do not share the work: what they read, and what heals, they do together.
    """
    base, processes, made_of = inputs.base, Processes.of_launch(), inputs.fingerprints()

    def reason_to_fuse() -> str | None:
        of_each_machine = processes.all_gather_object(why_not_reused(folder, inputs.config, made_of))
        return next(filter(None, of_each_machine), None)

    def write(model: FusedForCausalLM) -> None:
        with replaced_files(folder) as new:
            model.write_files(new)

    with ExitStack() as stack:
        if reason_to_fuse():
            check_replaceable(folder, base.name, remade=True)
            processes.broadcast_object(lambda: bool(stack.enter_context(only_writer(folder, wait=True))))
            if reason := reason_to_fuse():  # checked again under the lock
                if (folder / REPORT_NAME).is_file():
                    logger.warning(f"{reason} Fusing, to replace it.")
                inputs.check()
                model = _load_and_fuse(model_class, inputs)
                model.fusion_report = dataclasses.replace(model.fusion_report, fingerprints=made_of)
                processes.broadcast_object(lambda: write(model))
                on_another_machine = not processes.is_main and local_rank() == 0
                if on_another_machine and why_not_reused(folder, inputs.config, made_of):
                    with only_writer(folder, wait=True):
                        write(model)
                return model
    model = model_class.from_pretrained(folder, **base.loading_fused())
    sources = [info.source for info in model.fusion_report.calibration] if model.fusion_report else []
    logger.info(f"Loaded from {str(folder)!r} what was fused before, on {', '.join(sources) or 'no text'}.")
    model.tokenizer = inputs.tokenizer
    if reason_to_fuse():  # replaced while it was read, by a run with other settings
        del model
        return _load_or_fuse(model_class, inputs, folder)
    return model


def fuse_checkpoint(
    base: str | os.PathLike[str] | Base,
    out: str | os.PathLike[str],
    config: FusionConfig | None = None,
    *,
    low_memory: bool = True,
    plain: bool | None = None,
    as_llama: bool | None = None,
    calibration: TextSource | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    **kwargs: Any,
) -> FusionReport:
    """Fuse a checkpoint into another folder.

    Processes that a launcher started share the work, and the first one writes: all must call this.

    Parameters
    ----------
    base : str or Base
        Folder or hub name of a checkpoint in safetensors files, or one that is open.
    out : path
        Where to write. A fused checkpoint in that folder is replaced; what lf_hf did not write stays.
    config, calibration, tokenizer
        As for `from_pretrained_fused`.
    low_memory : bool
        Hold two layers at a time instead of the model, or for a refit the layers of one group. On the CPU the tensors
        written are the same, bit for bit. Where `device_map` is another device, layers are read onto it one at a time,
        each while the one before it is used, and all is computed there.
    plain : bool, optional
        Write a plain checkpoint, of the base's own architecture, that programs without lf_hf open. Default: no.
    as_llama : bool, optional
        Another name of `plain`.
    max_shard_bytes : int
        Size of an output file, about; also what is held in memory while writing.
    **kwargs
        FusionConfig fields. All others are as for `from_pretrained` (revision, token, dtype, device_map, ...). With
        `low_memory` device_map is one device, such as "cuda" or "cuda:1"; default: the CPU.

    Returns
    -------
    FusionReport

    Raises
    ------
    ValueError
        For settings, a base, a device or calibration text that cannot be used, or a folder that holds another model.
    OSError
        If another process is saving there, or if files cannot be written.
    """
    plain, target = bool(plain or as_llama), checked_folder(out)
    config = FusionConfig.taken_from(kwargs, config)
    opened = Base.open(base, kwargs)
    check_replaceable(out, opened.name)
    if low_memory:
        device, generation = low_memory_device(config, opened.loading), _generation_config(opened)
        if config.speed:
            logger.warning_once("Speed is not measured with low_memory=True, where layers are read from files.")
    inputs, processes = FusionInputs.open(opened, config, calibration, tokenizer), Processes.of_launch()
    inputs.check()
    with ExitStack() as stack:

        def begin() -> Path:
            stack.enter_context(only_writer(target))
            return stack.enter_context(replaced_files(target, own_tokenizer=tokenizer is not None))

        folder = processes.broadcast_object(begin)
        if low_memory:
            report = _fuse_on_disk(inputs, generation, folder, device, plain=plain, max_shard_bytes=max_shard_bytes)
        else:
            model = _load_and_fuse(fused_class(opened.config), inputs)
            report = model.fusion_report
            if processes.is_main:
                model.write_files(folder, plain=plain, max_shard_size=max_shard_bytes)
    processes.all_gather_object(None)  # the others wait until the files are in their places
    return report


def _fuse_on_disk(
    inputs: FusionInputs,
    generation: GenerationConfig,
    folder: Path,
    device: torch.device,
    *,
    plain: bool,
    max_shard_bytes: int,
) -> FusionReport:
    """Fuse layer by layer, and write all files of the fused checkpoint into a folder."""
    base, processes = inputs.base, Processes.of_launch()
    place = folder.parent if folder.parent.is_dir() else None  # not where machines share no disk
    with tempfile.TemporaryDirectory(dir=place) as scratch:
        decoder = CheckpointDecoder(
            base.weights_folder(), base.new_config(), Path(scratch), dtype=base.dtype, device=device
        )
        decoder.processes = processes
        report = inputs.fuse(decoder)
        processes.all_gather_object(None)  # the scratch folders are in the first one's folder, which goes at the end
        if not processes.is_main:
            return report
        decoder.write(folder, max_shard_bytes)
        written = plain_config(decoder.config) if plain else fused_config(decoder.config, report)
        written.dtype = decoder.dtype
        written.architectures = [(base.family.causal_lm if plain else fused_class(base.config)).__name__]
        written.save_pretrained(folder)
        generation.save_pretrained(folder)
        write_companions(folder, written, report, inputs.tokenizer, plain=plain)
    return report


def low_memory_device(config: FusionConfig, loading: Mapping[str, Any]) -> torch.device:
    """The device for layers that are read one at a time. Raises ValueError where only fusing in memory can be done."""
    if config.heal_tokens:
        asked = "method='healed'" if config.method == "healed" else f"heal_tokens={config.heal_tokens}"
        raise ValueError(
            f"{asked} cannot be used with low_memory=True, as it trains the whole model; give low_memory=False, or "
            "heal_tokens=0 and heal the result with lf_hf.heal."
        )
    device_map, usable = loading.get("device_map"), {*HUB_ARGUMENTS, "dtype", "trust_remote_code", "device_map"}
    refused = [name for name, value in loading.items() if value is not None and name not in usable - {"gguf_file"}]
    if isinstance(device_map, dict) or device_map in SPREAD:
        refused.append(f"device_map={device_map!r:.80}")
    if refused:
        raise ValueError(
            f"{', '.join(refused)} cannot be used with low_memory=True, which reads safetensors files onto one device, "
            "such as cpu or cuda:1; use low_memory=False."
        )
    return torch.device("cpu" if device_map is None else device_map)


def _generation_config(base: Base) -> GenerationConfig:
    """The base's settings for generation; older checkpoints have them in config.json. Checked to be writable."""
    with explained(f"The generation settings of {base.name!r} cannot be used", "repair them"):
        older: dict[str, Any] = {"config_file_name": CONFIG_NAME, "_from_model_config": True}
        has_own = optional_file(base.name, GENERATION_CONFIG_NAME, base.hub)
        config = GenerationConfig.from_pretrained(base.name, **base.hub, **({} if has_own else older))
        config.validate(strict=True)  # as saving does; not all that can be read can be saved
    return config
