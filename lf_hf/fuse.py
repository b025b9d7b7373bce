"""Fusing from one checkpoint folder into another, in memory or layer by layer."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from lf_hf.checkpoint.base import SPREAD, Base, check_device, hub_arguments
from lf_hf.checkpoint.classes import FusionInputs, checked_tokenizer, from_pretrained_fused, fused_class
from lf_hf.checkpoint.companions import is_plain, write_companions
from lf_hf.checkpoint.configuration import fused_config, plain_config
from lf_hf.checkpoint.saving import check_replaceable, checked_folder, only_writer, replaced_files
from lf_hf.decoder.on_disk import CheckpointDecoder
from lf_hf.families import check_layers
from lf_hf.report.report import FusionReport
from lf_hf.runtime.launch import Processes
from lf_hf.settings import FusionConfig, fusion_settings
from lf_hf.text.calibration import load_needed
from lf_hf.text.readers import Samples

MAX_SHARD_BYTES = 500_000_000
"""Size of an output file, about."""


def fuse_checkpoint(
    base: str | os.PathLike[str] | Base,
    out: str | os.PathLike[str],
    config: FusionConfig | None = None,
    *,
    low_memory: bool = True,
    plain: bool | None = None,
    as_llama: bool | None = None,
    calibration: Samples | None = None,
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
        FusionConfig fields; all others as for `from_pretrained` (revision, token, dtype, device_map, ...). With
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
    if not isinstance(max_shard_bytes, int) or max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be an integer of at least 1, got {max_shard_bytes!r:.80}.")
    as_plain = is_plain(plain, as_llama)
    check_replaceable(out, base.name if isinstance(base, Base) else str(base))
    target = checked_folder(out)
    processes = Processes.of_launch()
    if not low_memory:
        with _written_once(target, processes, own_tokenizer=tokenizer is not None) as folder:
            model = from_pretrained_fused(base, config, calibration=calibration, tokenizer=tokenizer, **kwargs)
            if processes.is_main:
                model.write_files(folder, plain=as_plain, max_shard_size=max_shard_bytes)
        assert model.fusion_report is not None
        return model.fusion_report

    config = fusion_settings(config, kwargs)
    check_low_memory(config)
    device = low_memory_device(base.loading if isinstance(base, Base) else kwargs)
    opened = base if isinstance(base, Base) else Base.open(base, kwargs)
    check_layers(config, opened.config)
    used_tokenizer = checked_tokenizer(tokenizer)
    samples, text = load_needed(config, calibration, lambda: used_tokenizer or opened.tokenizer())
    used_tokenizer = used_tokenizer or opened.tokenizer()
    inputs = FusionInputs(opened, config, used_tokenizer, samples, text)
    generation = _generation_config(opened)
    with _written_once(target, processes, own_tokenizer=tokenizer is not None) as folder:
        return _fuse_on_disk(
            inputs, generation, folder, device, processes, plain=as_plain, max_shard_bytes=max_shard_bytes
        )


def check_low_memory(config: FusionConfig) -> None:
    """Raise ValueError for settings that need the whole model in memory."""
    if config.heal_tokens:
        raise ValueError(
            f"heal_tokens={config.heal_tokens} cannot be used with low_memory=True; give low_memory=False, or fuse "
            "without it, and heal the result with lf_hf.heal."
        )


@contextmanager
def _written_once(target: Path, processes: Processes, *, own_tokenizer: bool) -> Iterator[Path]:
    """A folder whose files become those of `target`, for the first process to write; the others wait until it is."""
    with ExitStack() as stack:

        def begin() -> Path:
            stack.enter_context(only_writer(target))
            return stack.enter_context(replaced_files(target, own_tokenizer=own_tokenizer))

        yield processes.broadcast_object(begin)
    processes.all_gather_object(None)


def _fuse_on_disk(
    inputs: FusionInputs,
    generation: GenerationConfig,
    folder: Path,
    device: torch.device,
    processes: Processes,
    *,
    plain: bool,
    max_shard_bytes: int,
) -> FusionReport:
    """Fuse layer by layer, and write all files of the fused checkpoint into a folder."""
    from lf_hf import pipeline  # imports scipy and scikit-learn, which loading does not need

    inputs.check_text()
    base = inputs.base
    place = folder.parent if folder.parent.is_dir() else None  # not where machines share no disk
    with tempfile.TemporaryDirectory(dir=place) as scratch:
        decoder = CheckpointDecoder(
            base.weights_folder(), base.new_config(), Path(scratch), dtype=base.dtype, device=device
        )
        decoder.processes = processes
        report = pipeline.fuse(
            decoder, inputs.tokenizer, inputs.config, inputs.samples, inputs.text, base=base.full_name
        )
        processes.all_gather_object(
            None
        )  # the first one's folder, which the scratch folders are in, goes when it is done
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


def low_memory_device(loading: Mapping[str, Any]) -> torch.device:
    """The device that from_pretrained's arguments name for layers that are read one at a time.

    Raises ValueError where only fusing in memory can do what is asked, or there is no such device.
    """
    given = {name for name, value in loading.items() if value is not None}
    unknown = given - hub_arguments(loading).keys() - {"dtype", "trust_remote_code", "device_map"}
    if unknown or loading.get("gguf_file"):
        raise ValueError(
            f"{', '.join(sorted(unknown)) or 'gguf_file'} cannot be used with low_memory=True; use low_memory=False."
        )
    device_map = loading.get("device_map")
    if device_map is None:
        return torch.device("cpu")
    if not isinstance(device_map, str | int | torch.device) or device_map in (*SPREAD, "meta", torch.device("meta")):
        raise ValueError(
            f"With low_memory=True layers are read onto one device, so device_map cannot be {device_map!r:.80}; give "
            "cpu, cuda or cuda:1, or use low_memory=False."
        )
    check_device(device_map)
    return torch.device(device_map)


def _generation_config(base: Base) -> GenerationConfig:
    """The base's settings for generation; older checkpoints have them in config.json. Checked to be writable."""
    try:
        try:
            found = GenerationConfig.from_pretrained(base.name, **base.hub)
        except OSError:
            of_model: dict[str, Any] = {"config_file_name": CONFIG_NAME, "_from_model_config": True}
            found = GenerationConfig.from_pretrained(base.name, **base.hub, **of_model)
        with tempfile.TemporaryDirectory() as folder, suppress(OSError):  # not all that can be read can be saved
            found.save_pretrained(folder)
    except Exception as error:  # of any kind: of files that hold what they should not
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"The generation settings of {base.name!r} cannot be used ({reason:.300}); repair them."
        ) from None
    return found
