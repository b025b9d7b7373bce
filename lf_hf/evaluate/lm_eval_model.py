"""`lm_eval --model fused` and `fused_llama`: lm-eval's Hugging Face backend, with fusion while a model is loaded."""

from __future__ import annotations

import difflib
import inspect
import logging
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel

from lf_hf.checkpoint import base as bases
from lf_hf.checkpoint.base import Base
from lf_hf.checkpoint.classes import fused_class
from lf_hf.checkpoint.configuration import FusedLlamaConfig
from lf_hf.evaluate.points import check_evaluation
from lf_hf.fuse import from_pretrained_fused
from lf_hf.report.report import REPORT_NAME, FusionReport, published_name
from lf_hf.runtime.launch import local_rank
from lf_hf.runtime.words import unknown_name
from lf_hf.settings import LEVELS, FusionConfig

# Below lm-eval's own logger, so that its level and format hold here too.
eval_logger = logging.getLogger("lm_eval.models.fused")
# Ways in which HFLM loads weights without passing them through from_pretrained, or changes them afterwards.
_NOT_WHILE_FUSING = ("autogptq", "delta", "gguf_file", "gptqmodel", "tp_plan")

_NOT_FUSED = (
    "{name} is a {kind!r} model that is not fused; give num_fusions=N with a base's name to fuse it while loading, or "
    "evaluate it as it is with --model hf."
)

# HFLM's own arguments, and those of them that from_pretrained takes too, as it does all others.
_HFLM_ARGUMENTS = inspect.signature(HFLM.__init__).parameters.keys()
_PLACING = ("device_map", "max_memory", "offload_folder")  # HFLM works these out by itself
_ABOUT_LOADING = {"dtype", "revision", "subfolder", "trust_remote_code"}
# What a misspelt argument may mean; from_pretrained takes more.
_KNOWN = (*FusionConfig.known, "calibration", "fused_dir", "attn_implementation", *_HFLM_ARGUMENTS)


@register_model("fused", "fused_llama")
class FusedLM(HFLM):
    """A fused model: a base that is fused while it is loaded, or a checkpoint that was saved fused.

    All else, from batching to data-parallel runs, is HFLM's.
    """

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        """Initialize a FusedLM instance.

        Args:
            pretrained: With ``num_fusions``, the base to fuse: hub name or local path of a checkpoint.
                Without, a fused checkpoint that ``save_pretrained`` or ``lf-hf fuse`` wrote, or such a model itself.
            **kwargs: ``calibration`` and ``fused_dir`` as for ``lf_hf.from_pretrained_fused``, all fields of
                ``lf_hf.FusionConfig``, and every argument of HFLM: ``dtype``, ``device``, ``batch_size``,
                ``parallelize``, ``peft``, ... ``max_memory_per_gpu`` and ``max_cpu_memory`` limit what is used, and
                spread the model.

        Raises:
            ValueError: Before the model is loaded, for settings out of range, a base, adapter or calibration text that
                cannot be used, a checkpoint that is not fused although ``num_fusions`` is missing, a misspelt
                argument, or one of HFLM's that fusing excludes.
        """
        if pretrained is None:
            raise ValueError("pretrained is missing; give pretrained=NAME, a base to fuse or a fused checkpoint.")
        if isinstance(pretrained, os.PathLike):
            pretrained = os.fspath(pretrained)
        _check_arguments(kwargs)
        self._adapter, self._revision = kwargs.get("peft"), kwargs.get("revision")
        if kwargs.keys() & {"max_cpu_memory", "max_memory_per_gpu"}:  # of which HFLM else takes no notice
            kwargs["parallelize"] = True
        if kwargs.get("parallelize") and not torch.accelerator.is_available():
            kwargs["device"] = "cpu"
            if kwargs.get("max_cpu_memory") is None:
                eval_logger.warning("parallelize=True has no effect: there is no GPU here.")
                kwargs["parallelize"] = False  # HFLM would put all layers on disk
        given = {name: kwargs.pop(name, None) for name in (*FusionConfig.known, "calibration", "fused_dir")}
        fusing = {name: value for name, value in given.items() if value is not None}
        self.fusion_config: FusionConfig | None = None
        if any(level in fusing for level in LEVELS):
            self._prepare_fusion(pretrained, fusing, kwargs)
        elif fusing:
            raise ValueError(
                f"{', '.join(fusing)} without num_fusions has no effect; add num_fusions=N, or instead "
                f"{' or '.join(LEVELS[1:])}, to fuse while loading."
            )
        elif not isinstance(pretrained, str) and not hasattr(pretrained, "fusion_report"):
            raise ValueError(_NOT_FUSED.format(name="`pretrained`", kind=pretrained.config.model_type))
        elif tokenizer := getattr(pretrained, "tokenizer", None):
            kwargs.setdefault("tokenizer", tokenizer)
        # HFLM calls _get_config, _create_tokenizer and _create_model, in this order. It would look up a model type that
        # stock transformers does not know, and warn, if `backend` were not given.
        super().__init__(pretrained, **{"backend": "causal"} | kwargs)

    def _prepare_fusion(self, base: Any, fusing: dict[str, Any], arguments: dict[str, Any]) -> None:
        """Check the settings and open the base."""
        self._fusing = {name: fusing.pop(name) for name in ("calibration", "fused_dir") if name in fusing}
        self.fusion_config = FusionConfig.taken_from(fusing | arguments, None)
        for name in _NOT_WHILE_FUSING:
            if arguments.get(name):
                raise ValueError(
                    f"{name}={arguments[name]} cannot be combined with fusing; fuse and save the model first, then "
                    "evaluate the saved one."
                )
        others = _HFLM_ARGUMENTS - _ABOUT_LOADING
        loading = {name: value for name, value in arguments.items() if name not in others}
        self._base = Base.open(base, loading)  # which refuses a model

    def _get_config(self, pretrained: str, **kwargs: Any) -> None:
        if self.fusion_config is not None:
            self._config = self._base.config
            self._check_adapter(self._base.name)
            return
        hub = bases.hub_arguments(kwargs)
        config = bases.read_config(pretrained, hub)
        report = bases.optional_file(pretrained, REPORT_NAME, hub)
        if not isinstance(config, FusedLlamaConfig) and not report:
            raise ValueError(_NOT_FUSED.format(name=repr(pretrained), kind=config.model_type))
        base = ""
        with suppress(ValueError):  # damaged, of which loading warns
            base = FusionReport.load(report).base if report else ""
        self._check_adapter(base)
        super()._get_config(pretrained, **kwargs)

    def _check_adapter(self, base: str) -> None:
        """Raise ValueError, in PEFT's own words, if the adapter cannot be read, and if it was trained on the base."""
        if not self._adapter:
            return
        from peft import PeftConfig

        trained_on = PeftConfig.from_pretrained(self._adapter, revision=self._revision).base_model_name_or_path or ""
        is_fused = Path(trained_on, REPORT_NAME).is_file()
        if base and published_name(trained_on) == published_name(base) and not is_fused:
            raise ValueError(
                f"peft={self._adapter!r} was trained on {trained_on!r}, the base, whose layers have other numbers; "
                "merge it into the base and fuse that, or train one on the fused model."
            )

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, **kwargs: Any) -> None:
        with bases.reading_tokenizer(str(tokenizer or pretrained)):
            super()._create_tokenizer(pretrained, tokenizer, **kwargs)
        # add_bos_token and the like are about the evaluation; a model is fused and saved with its own tokenizer.
        if self.fusion_config is not None and isinstance(tokenizer, str):
            tokenizer = bases.load_tokenizer(tokenizer, self._base.loading)
        self._base_tokenizer = tokenizer  # None for that beside the base

    def _create_model(self, pretrained: str, **kwargs: Any) -> None:
        # HFLM loads a model, places it and adds an adapter by this.
        if self.fusion_config is not None:
            self.AUTO_MODEL_CLASS: Any = SimpleNamespace(from_pretrained=self._load_and_fuse)
        elif not isinstance(self._config, FusedLlamaConfig):  # which AutoModelForCausalLM opens with its report
            self.AUTO_MODEL_CLASS = fused_class(self._config)
        super()._create_model(pretrained, **kwargs)
        report = self._model.fusion_report
        self._config = self._model.config  # until here the base's, with all its layers
        if report is not None and local_rank() == 0:
            eval_logger.info(report.summary())

    def _load_and_fuse(self, _: str, **loading: Any) -> PreTrainedModel:
        """The base, placed where HFLM says, and fused."""
        placing = {name: loading[name] for name in _PLACING if name in loading}
        base = replace(self._base, loading={**self._base.loading, **placing})
        return from_pretrained_fused(base, self.fusion_config, tokenizer=self._base_tokenizer, **self._fusing)

    def get_model_info(self) -> dict[str, Any]:
        """Add the report to HFLM's model information, which lm-eval writes into its results."""
        info: dict[str, Any] = super().get_model_info()
        report = self.model.fusion_report
        return info if report is None else info | {"fusion": report.to_dict()}


def _check_arguments(arguments: dict[str, Any]) -> None:
    """Raise ValueError for a misspelt argument, or a value that loading would fail on."""
    for name in arguments:
        if name not in _KNOWN and difflib.get_close_matches(name, _KNOWN, n=1, cutoff=0.85):
            raise ValueError(unknown_name("argument", name, _KNOWN))
    bases.checked_dtype(arguments.get("dtype"))
    check_evaluation(None, arguments.get("batch_size", 1))
