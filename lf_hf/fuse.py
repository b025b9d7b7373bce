"""The public ways to fuse: load and fuse, keep the result in a folder for later runs, fuse one folder into another."""

from __future__ import annotations

import dataclasses
import os
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import GenerationMixin, LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerBase
from transformers.utils import logging

from lf_hf.checkpoint.base import Base
from lf_hf.checkpoint.classes import FusedForCausalLM, Model
from lf_hf.checkpoint.configuration import FusedLlamaConfig, register_peft
from lf_hf.checkpoint.saving import checked_folder
from lf_hf.pipeline.fusion import FusionInputs
from lf_hf.pipeline.healing import HealInputs
from lf_hf.pipeline.identity import JUDGING, why_not_reused
from lf_hf.report.report import REPORT_NAME, FusionReport
from lf_hf.runtime.launch import compute_once, num_processes
from lf_hf.settings import FusionConfig, HealSettings, TextSource

logger = logging.get_logger(__name__)


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

    Of processes that a launcher started the first one fuses into `fused_dir`, all of them heal where that is asked for,
    and each loads the result: all must call this.

    Parameters
    ----------
    base : str or Base
        Hub name or folder of a checkpoint, or one that `lf_hf.checkpoint.base.Base.open` has opened.
    config : FusionConfig, optional
        Settings; FusionConfig fields in `kwargs` override it. Without it `num_fusions` or a budget is required.
    calibration : list of str or chats, or path, optional
        Calibration text, as `lf_hf.text.calibration.load_calibration` takes it, and what is healed on where
        `heal_tokens` asks for that. Default: MMLU questions, or for `refit` and healing the bundled mixture of
        `lf_hf.text.calibration.load_corpus`.
    tokenizer : optional
        The base's tokenizer, if it is not beside the base.
    fused_dir : path, optional
        Where to keep the fused model, as a plain checkpoint. If one is there that was made of the same base (by
        content), calibration text and settings, it is loaded; else the base is fused and saved there, also in place of
        another result of lf_hf that is as it was written.
    model_class : class, optional
        A class derived from FusedLlamaForCausalLM, which the result is to be of.
    **kwargs
        FusionConfig fields. All others go to `from_pretrained` (dtype, device_map, revision, ...).

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
    inputs = FusionInputs.open(base, config, calibration, tokenizer, kwargs, model_class=model_class)
    if model_class is None and inputs.base.config.model_type == LlamaConfig.model_type:
        inputs = dataclasses.replace(inputs, model_class=FusedLlamaForCausalLM)
    if folder is not None:
        return _kept_in(folder, inputs)
    if num_processes() > 1:
        raise ValueError("One process of a launch fuses, and the others load what it made: give fused_dir, where to.")
    from lf_hf.pipeline import planning, run  # import scipy, which loading does not need

    if inputs.config.healing is None:
        return run.fuse_base(inputs, planning.fusion_plan(inputs))
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(TemporaryDirectory(ignore_cleanup_errors=True)))
        device = run.make_result(inputs, scratch, overwrite=False)
        is_on_card = device is not None and device.type != "cpu"
        model = inputs.load_made(scratch, device if is_on_card else None)
        weakref.finalize(model, stack.pop_all().close)  # where weights may lie
    model.name_or_path = model.config._name_or_path = ""
    return model


def _kept_in(folder: Path, inputs: FusionInputs) -> FusedForCausalLM:
    """Load what one of several runs fused and kept in a folder, or fuse it and keep it there."""
    from lf_hf.pipeline import planning, run

    reason = compute_once(lambda: why_not_reused(folder, inputs.identity))
    if reason is not None:
        if (folder / REPORT_NAME).is_file():
            logger.warning(f"{reason} Fusing, to replace it.")
        run.make_result(inputs, folder, overwrite=True, wait=True)
    plan = planning.plan_run(inputs.base, FusionConfig(1, "truncate", perplexity_tokens=0), None)
    model = inputs.load_made(folder, plan.placing)
    report, asked = model.report, inputs.config.to_dict()
    judged_with = [f"{name}={report.config[name]}" for name in JUDGING if report.config[name] != asked[name]]
    if judged_with:
        logger.warning(f"{str(folder)!r} was judged with {' and '.join(judged_with)}; its report keeps those figures.")
    return model


def fuse_checkpoint(
    base: str | os.PathLike[str] | Base,
    out: str | os.PathLike[str],
    config: FusionConfig | None = None,
    *,
    overwrite: bool = False,
    calibration: TextSource | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **kwargs: Any,
) -> FusionReport:
    """Fuse a checkpoint into another folder, as a plain checkpoint of the base's own architecture, and heal it.

    Of processes that a launcher started the first one fuses, and all of them heal: all must call this. Where a run was
    cut short, the same call goes on with it.

    Parameters
    ----------
    base : str or Base
        Folder or hub name of a checkpoint, or one that is open.
    out : path
        Where to write: a folder that is new or empty, or with `overwrite` one that holds a result of lf_hf as it was
        written. While it runs, all that it keeps on a disk lies in a hidden folder there.
    config, calibration, tokenizer
        As for `from_pretrained_fused`; but the default method is "healed".
    overwrite : bool
        Whether the result may take the place of another one, or of a run that was cut short.
    **kwargs
        FusionConfig fields. All others are as for `from_pretrained` (revision, token, dtype, device_map, ...).
        `max_memory` limits what is used, as "cpu=2GiB" or {0: "20GiB", "cpu": "30GiB"}: the weights that do not fit
        lie on disk, and on the CPU the tensors written are the same, bit for bit.

    Returns
    -------
    FusionReport

    Raises
    ------
    ValueError
        For settings, a base, a device or calibration text that cannot be used, or a folder that holds something else.
    OSError
        If another process is at work there, or if files cannot be written.
    """
    from lf_hf.pipeline import run

    folder = checked_folder(out)
    if config is None:
        kwargs = {"method": "healed"} | kwargs
    inputs = FusionInputs.open(base, config, calibration, tokenizer, kwargs)
    run.make_result(inputs, folder, overwrite=overwrite)
    return compute_once(lambda: FusionReport.load(folder))


def heal(
    fused: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    base: str | os.PathLike[str] | Base | None = None,
    text: TextSource | None = None,
    settings: HealSettings | None = None,
    training_args: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> FusionReport:
    """Train a fused model, for a short time, to predict what its base predicts, and save it into another folder.

    The base is read first, for its final states of the text, and is gone when the training begins. It is transformers'
    `Trainer` that trains, so `accelerate launch` spreads it over devices. The state that is nearest to the base on
    held-out text is saved, or the fused model if none is nearer. The states of a run that was killed are in OUT: the
    same call again goes on there.

    Parameters
    ----------
    fused : path
        Folder of a fused checkpoint.
    out : path
        Where to write a plain checkpoint, as for `fuse_checkpoint`, as is `overwrite`.
    base : str or Base, optional
        Folder or hub name of the model that was fused. Default: what the report names, if that is on the hub.
    text : list of str or chats, or path, optional
        Text to heal on, as `lf_hf.text.calibration.load_corpus` takes it: best what the model will be used for.
        Default: the bundled mixture.
    settings : HealSettings, optional
        HealSettings fields in `kwargs` override it.
    training_args : dict, optional
        Fields of transformers' TrainingArguments: bf16, gradient_checkpointing, report_to, fsdp, deepspeed, ...
    **kwargs
        HealSettings fields. All others are for loading the base (revision, token, device_map, ...).

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
    from lf_hf.pipeline import run

    folder = checked_folder(out)
    inputs = HealInputs.open(fused, base, text, settings, training_args, kwargs)
    run.heal_result(inputs, folder, overwrite=overwrite)
    return compute_once(lambda: FusionReport.load(folder))
