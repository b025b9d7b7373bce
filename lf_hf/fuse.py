"""The public ways to fuse: load and fuse, keep the result in a folder for later runs, fuse one folder into another."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationMixin, LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerBase
from transformers.utils import logging

from lf_hf.checkpoint.base import SPREAD, Base, is_spread
from lf_hf.checkpoint.classes import FusedForCausalLM, Model, fused_class
from lf_hf.checkpoint.configuration import FusedLlamaConfig, register_peft
from lf_hf.checkpoint.identity import why_not_reused
from lf_hf.checkpoint.saving import check_replaceable, checked_folder, only_writer, replaced_files
from lf_hf.decoder.decoder import Decoder
from lf_hf.healing.inputs import WORK
from lf_hf.inputs import FusionInputs
from lf_hf.measure.speed import with_speed
from lf_hf.models import model_class as stock_class
from lf_hf.report.report import REPORT_NAME, FusionReport
from lf_hf.runtime.launch import Processes, compute_once, local_rank, own_device
from lf_hf.settings import FusionConfig
from lf_hf.text.calibration import default_source
from lf_hf.text.sources import TextSource

logger = logging.get_logger(__name__)
MAX_SHARD_BYTES = 500_000_000
"""Size of an output file, about."""
_FUSED = "fused"  # in the hidden folder of a healing: the model that it starts from


class FusedLlamaForCausalLM(FusedForCausalLM, LlamaForCausalLM, GenerationMixin):
    """A Llama whose layers were fused. Computes what LlamaForCausalLM computes.

    `fusion_report` says what was fused and how well it went, where that is known; `tokenizer` is the base's, where the
    model was fused in this process.
    """

    native = True
    config_class = FusedLlamaConfig
    config: FusedLlamaConfig

    def __init__(self, config: FusedLlamaConfig) -> None:
        super().__init__(config)
        register_peft()

    @classmethod
    def from_pretrained_fused(
        cls: type[Model], base: str | os.PathLike[str] | Base, config: FusionConfig | None = None, **kwargs: Any
    ) -> Model:
        """Load a Llama and fuse its layers: `lf_hf.from_pretrained_fused` for this class, with the same arguments.

        Raises ValueError as that function does; also for a base of another family.
        """
        model: Any = from_pretrained_fused(base, config, model_class=cls, **kwargs)
        return model

    def remember(self, report: FusionReport) -> None:
        """Take a report as this model's, and as its config's."""
        super().remember(report)
        self.config.fusion = {
            "base": report.base,
            "config": report.config,
            "pairs": [list(pair) for pair in report.pairs],
            "ratios": [ratio for layer in report.fused_layers for ratio in layer.ratios],
            "versions": report.versions,
        }
        register_peft()


class FusedLlamaModel(LlamaModel):
    """A Llama without a head whose layers were fused. Computes what LlamaModel computes."""

    config_class = FusedLlamaConfig
    config: FusedLlamaConfig


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
        Where to keep the fused model, as a plain checkpoint. If one is there that was made of the same base (by
        content), calibration text and settings, it is loaded; else the base is fused and saved there, once on each
        machine.
    model_class : class, optional
        A class derived from FusedLlamaForCausalLM, which the result is to be of.
    **kwargs
        FusionConfig fields. All others go to `from_pretrained` (dtype, device_map, revision, gguf_file, ...).

    Returns
    -------
    FusedForCausalLM
        A FusedLlamaForCausalLM, or of another family transformers' own class. Either has `fusion_report`, and its
        `save_pretrained` writes report and model card beside the weights.

    Raises
    ------
    ValueError
        Before any long work, for settings, a base or calibration text that cannot be used.
    """
    folder = None if fused_dir is None else checked_folder(fused_dir)
    config = FusionConfig.taken_from(kwargs, config)
    opened = Base.open(base, kwargs)
    if model_class is None:
        is_llama = opened.config.model_type == LlamaConfig.model_type
        model_class = FusedLlamaForCausalLM if is_llama else fused_class(opened.config)
    if not issubclass(model_class, stock_class(opened.config)):
        kind = opened.config.model_type
        raise ValueError(f"{opened.full_name!r} is a {kind!r} model; fuse it with lf_hf.from_pretrained_fused.")
    inputs = FusionInputs.open(opened, config, calibration, tokenizer)
    if folder is not None:
        return _kept_or_made(model_class, inputs, folder)
    inputs.check()
    return _make(model_class, inputs)


def _make(model_class: type[FusedForCausalLM], inputs: FusionInputs, folder: Path | None = None) -> Any:
    """Fuse the base in memory, and heal the result where that is asked for.

    With `folder`, where the result goes, the fused model and the states of its healing are in a hidden folder there
    until the caller removes it: after an interruption the same call goes on from them.
    """
    if inputs.to_heal is None:
        return _fuse_in_memory(model_class, inputs)
    from lf_hf.healing.heal import heal_loaded  # imports the Trainer, which takes seconds

    work = None
    if folder is None:
        model = _fuse_in_memory(model_class, inputs.unhealed)
    else:
        work, made_of = folder / WORK, inputs.unhealed.identity()
        reason = compute_once(lambda: any(work.glob("checkpoint-*")) and why_not_reused(work / _FUSED, made_of))
        if reason:
            advice = f"give its command again, or remove {str(work)!r} to begin anew"
            raise ValueError(f"{reason} Its healing was cut short; {advice}.")
        model = _kept_or_made(model_class, inputs.unhealed, work / _FUSED)
        model.name_or_path = model.config._name_or_path = ""  # it is not to be found there for long
        model._opened_in = None
        if inputs.calibration is None:  # an interrupted healing goes on with the default text that it began with
            inputs = dataclasses.replace(inputs, calibration=_earlier_default(work / _FUSED))
    assert inputs.to_heal is not None
    heal_loaded(model, inputs.base, inputs.to_heal, inputs.config, work)
    return model


def _fuse_in_memory(model_class: type[FusedForCausalLM], inputs: FusionInputs) -> Any:
    """Load the base, and fuse its layers."""
    loaded = inputs.base.load()
    decoder = Decoder(loaded)
    if decoder.on_disk:
        decoder.states = "disk"
        decoder.scratch = inputs.base.loading.get("offload_folder")
    # Where each process spreads its model, and with it its states, over devices, each fuses by itself.
    if not is_spread(inputs.base.loading.get("device_map")):
        decoder.processes = Processes.of_launch()
    report = inputs.fuse(decoder)
    model = model_class.adopt(loaded, with_speed(report, loaded, inputs.base.config), inputs.tokenizer)
    model.processor_files = inputs.base.processor_files()
    return model


def _kept_or_made(model_class: type[FusedForCausalLM], inputs: FusionInputs, folder: Path) -> FusedForCausalLM:
    """Load what one of several runs fused and kept in a folder, or fuse it and keep it there.

    The first run to lock the folder fuses, and the others wait for it. A launch is one run, even where its processes
    do not share the work: what they read, and what heals, they do together.
    """
    processes, made_of = Processes.of_launch(), inputs.identity()

    def reason_to_fuse() -> str | None:
        reasons = processes.all_gather_object(why_not_reused(folder, made_of))  # of each machine's folder
        return next(filter(None, reasons), None)

    with ExitStack() as stack:
        if reason_to_fuse():
            check_replaceable(folder, inputs.base.name, remade=True)
            processes.broadcast_object(lambda: bool(stack.enter_context(only_writer(folder, wait=True))))
            if reason := reason_to_fuse():  # checked again under the lock
                if (folder / REPORT_NAME).is_file():
                    logger.warning(f"{reason} Fusing, to replace it.")
                if inputs.calibration is None:
                    inputs = dataclasses.replace(inputs, calibration=_earlier_default(folder))
                inputs.check(folder)
                model = _make(model_class, inputs, folder)
                model.fusion_report = dataclasses.replace(model.fusion_report, fingerprints=made_of)
                processes.broadcast_object(lambda: _keep(model, folder))
                model.is_found_at(str(folder))
                on_another_machine = not processes.is_main and local_rank() == 0
                if on_another_machine and why_not_reused(folder, made_of):
                    with only_writer(folder, wait=True):
                        _keep(model, folder)
                return model
    model = model_class.from_pretrained(folder, **inputs.base.loading_fused())
    model.tokenizer = inputs.tokenizer
    if inputs.calibration is None and model.fusion_report.calibration:  # others, where the hub answers otherwise now
        sources = ", ".join(info.source for info in model.fusion_report.calibration)
        logger.warning(f"Loaded from {str(folder)!r} what was fused before, on {sources}.")
    if reason_to_fuse():  # replaced while it was read, by a run with other settings
        del model
        return _kept_or_made(model_class, inputs, folder)
    return model


def _earlier_default(folder: Path) -> str | None:
    """The default text that what is in a folder was fused on, so that the next fusion keeps to it."""
    try:
        report = FusionReport.load(folder)
    except ValueError:  # none is there, or none that can be read
        return None
    return default_source(info.source for info in report.calibration)


def _keep(model: FusedForCausalLM, folder: Path) -> None:
    with replaced_files(folder) as new:
        model.write_files(new, plain=True)
    _remove_states(folder, model.fusion_report)


def _remove_states(folder: Path, report: FusionReport | None) -> None:
    """Remove what a healing that is done would have gone on from; that of another one stays."""
    if report is not None and report.healed is not None:
        shutil.rmtree(folder / WORK, ignore_errors=True)


def fuse_checkpoint(
    base: str | os.PathLike[str] | Base,
    out: str | os.PathLike[str],
    config: FusionConfig | None = None,
    *,
    low_memory: bool = False,
    calibration: TextSource | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    **kwargs: Any,
) -> FusionReport:
    """Fuse a checkpoint into another folder, as a plain checkpoint of the base's own architecture.

    Processes that a launcher started share the work, and the first one writes: all must call this. Where a healing was
    cut short, the same call goes on with it.

    Parameters
    ----------
    base : str or Base
        Folder or hub name of a checkpoint, or one that is open.
    out : path
        Where to write. A fused checkpoint in that folder is replaced; what lf_hf did not write stays.
    config, calibration, tokenizer
        As for `from_pretrained_fused`.
    low_memory : bool
        Leave all weights on disk, and hold two layers at a time instead of the model, or for a refit the layers of one
        group. On the CPU the tensors written are the same, bit for bit. Where `device_map` is another device, layers
        are read onto it one at a time, each while the one before it is used, and all is computed there.
    max_shard_bytes : int
        Size of an output file, about; with `low_memory` also what is held in memory while writing.
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
    target, processes = checked_folder(out), Processes.of_launch()
    config = FusionConfig.taken_from(kwargs, config)
    opened = Base.open(base, kwargs)
    check_replaceable(out, opened.name)
    device = low_memory_device(config, opened.loading) if low_memory else None
    inputs = FusionInputs.open(opened, config, calibration, tokenizer)
    inputs.check(target, low_memory=low_memory)
    with ExitStack() as stack:

        def begin() -> Path:
            stack.enter_context(only_writer(target))
            return stack.enter_context(replaced_files(target, own_tokenizer=tokenizer is not None))

        folder = processes.broadcast_object(begin)
        if device is not None:
            place = folder.parent if folder.parent.is_dir() else None  # not where machines share no disk
            scratch = stack.enter_context(tempfile.TemporaryDirectory(dir=place))
            inputs = inputs.of(opened.on_disk(device, Path(scratch)))
        model = _make(fused_class(opened.config), inputs, target)
        report = model.fusion_report
        processes.all_gather_object(None)  # the scratch folders are in the first one's folder, which goes at the end
        if processes.is_main:
            model.write_files(folder, plain=True, max_shard_size=max_shard_bytes)
    # The others wait until the files are in their places.
    processes.all_gather_object(None)
    if local_rank() == 0:
        _remove_states(target, report)
    return report


def low_memory_device(config: FusionConfig, loading: Mapping[str, Any]) -> torch.device:
    """The device for layers that are read one at a time. Raises ValueError where only fusing in memory can be done."""
    if config.heal_tokens:
        raise ValueError(
            f"heal_tokens={config.heal_tokens} cannot be used with low_memory=True, as healing trains the whole model; "
            "give heal_tokens=0 and heal the result with lf_hf.heal."
        )
    device_map = loading.get("device_map")
    refused = [name for name in ("max_memory", "offload_folder") if loading.get(name) is not None]
    if isinstance(device_map, dict) or device_map in SPREAD:
        refused.append(f"device_map={device_map!r:.80}")
    if refused:
        raise ValueError(
            f"{', '.join(refused)} cannot be used with low_memory=True, which leaves all weights on disk, for one "
            "device such as cuda:1; leave that out, or low_memory."
        )
    return torch.device("cpu" if device_map is None else own_device(device_map))
