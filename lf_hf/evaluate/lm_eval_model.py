"""`lm_eval --model fused` and `fused_llama`: lm-eval's Hugging Face backend, with fusion while a model is loaded."""

from __future__ import annotations

import difflib
import inspect
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedConfig, PreTrainedModel

from lf_hf import FusionConfig, from_pretrained_fused
from lf_hf.checkpoint.base import Base, checked_dtype, load_tokenizer, reading_tokenizer
from lf_hf.checkpoint.configuration import FUSED
from lf_hf.checkpoint.saving import finish_save
from lf_hf.evaluate.points import check_evaluation
from lf_hf.runtime.fields import unknown_name
from lf_hf.runtime.launch import local_rank
from lf_hf.settings import LEVELS

# Below lm-eval's own logger, so that its level and format hold here too.
eval_logger = logging.getLogger("lm_eval.models.fused")
# Ways in which HFLM loads weights without passing them through from_pretrained, or changes them afterwards.
_NOT_WHILE_FUSING = ("autogptq", "delta", "gptqmodel", "tp_plan")

# HFLM's own arguments, and those of them that from_pretrained takes too, as it does all others.
_HFLM_ARGUMENTS = inspect.signature(HFLM.__init__).parameters
_ABOUT_LOADING = ("dtype", "gguf_file", "revision", "subfolder", "trust_remote_code")
# What a misspelt argument may mean; from_pretrained takes more.
_KNOWN = (*FusionConfig.known, "attn_implementation", "calibration", "fused_dir", *_HFLM_ARGUMENTS)


@register_model("fused")
class FusedLM(HFLM):
    """A fused model: a base that is fused while it is loaded, or a checkpoint that was saved fused.

    All else, from batching to data-parallel runs, is HFLM's.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel | None = None,
        *,
        num_fusions: int | str | None = None,
        calibration: str | None = None,
        fused_dir: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Initialize a FusedLM instance.

        Args:
            pretrained: With ``num_fusions``, the base to fuse: hub name or local path of a checkpoint.
                Without, a fused checkpoint that ``save_pretrained`` or ``lf-hf fuse`` wrote, or such a model itself.
            num_fusions: How many times two layers become one, 1 to L - 1 for a base of L layers. Instead of it,
                ``max_divergence`` or ``max_perplexity_ratio`` may say what the fusions may cost.
            calibration: Path of calibration text (.txt, .jsonl, .csv or .parquet), or a data set on the hub
                (``NAME[:CONFIG[:SPLIT[:COLUMN]]]``). Default: MMLU questions that are not in its test split; for
                ``refit`` general text from the hub or, without one or with ``bundled``, what is installed.
            fused_dir: Folder to keep the fused model in: loaded if it was made of the same base, calibration text and
                settings, else fused and saved there.
            **kwargs: All other fields of ``lf_hf.FusionConfig``, whose defaults and ranges are documented there. And
                every argument of HFLM: ``dtype``, ``device``, ``batch_size``, ``parallelize``, ``gguf_file``,
                ``peft``, ...

        Raises:
            ValueError: Before the model is loaded, for settings out of range, a base, adapter or calibration text that
                cannot be used, a checkpoint that is not fused although ``num_fusions`` is missing, a misspelt
                argument, or one of HFLM's that fusing excludes.
        """
        if pretrained is None:
            raise ValueError(
                "pretrained is missing; give pretrained=NAME, a base to fuse (with num_fusions) or a fused checkpoint."
            )
        for name in kwargs:
            if name not in _KNOWN and difflib.get_close_matches(name, _KNOWN, n=1, cutoff=0.85):
                raise ValueError(unknown_name("argument", name, _KNOWN))
        checked_dtype(kwargs.get("dtype"))
        check_evaluation(None, kwargs.get("batch_size", 1))
        if kwargs.get("peft"):  # PEFT's own sentence about an adapter that cannot be read
            from peft import PeftConfig

            PeftConfig.from_pretrained(kwargs["peft"], revision=kwargs.get("revision"))
        if kwargs.get("parallelize") and not torch.accelerator.is_available():
            eval_logger.warning("parallelize=True has no effect: there is no GPU here.")
            kwargs |= {"parallelize": False, "device": "cpu"}  # HFLM would put all layers on disk
        if num_fusions is not None:
            kwargs["num_fusions"] = num_fusions
        own = {"calibration": calibration, "fused_dir": fused_dir}
        self._own: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
        self.fusion_config: FusionConfig | None = None
        if any(level in kwargs for level in LEVELS):
            self.fusion_config = FusionConfig.taken_from(kwargs, None)
            for name in _NOT_WHILE_FUSING:
                if kwargs.get(name):
                    raise ValueError(
                        f"{name}={kwargs[name]} cannot be combined with fusing; fuse and save the model first, then "
                        "evaluate the saved one."
                    )
            loading = {k: v for k, v in kwargs.items() if k in _ABOUT_LOADING or k not in _HFLM_ARGUMENTS}
            self._base = Base.open(cast(str, pretrained), loading)  # which refuses a model
        elif given := [name for name in (*FusionConfig.known, *self._own) if name in kwargs | self._own]:
            raise ValueError(
                f"{', '.join(given)} without num_fusions has no effect; add num_fusions=N, or a budget "
                f"({' or '.join(LEVELS[1:])}), to fuse while loading."
            )
        elif not isinstance(pretrained, str):
            self._check_fused("`pretrained`", pretrained.config)
        # HFLM calls _get_config, _create_tokenizer and _create_model, in this order. It would look up a model type that
        # stock transformers does not know, and warn, if `backend` were not given.
        super().__init__(pretrained, **{"backend": "causal"} | kwargs)

    def _get_config(self, pretrained: str, **kwargs: Any) -> None:
        if self.fusion_config is not None:
            self._config = self._base.config
        else:
            finish_save(Path(pretrained, kwargs.get("subfolder") or ""))
            super()._get_config(pretrained, **kwargs)
            self._check_fused(repr(pretrained), self._config)

    def _check_fused(self, name: str, config: PreTrainedConfig) -> None:
        if not config.model_type.startswith(FUSED):
            raise ValueError(
                f"{name} is a {config.model_type!r} model that is not fused; give num_fusions=N with a base's name to "
                "fuse it while loading, or evaluate it as it is with --model hf."
            )

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, **kwargs: Any) -> None:
        with reading_tokenizer(str(tokenizer or pretrained)):
            super()._create_tokenizer(pretrained, tokenizer, **kwargs)
        if self.fusion_config is not None:
            # add_bos_token and the like are about the evaluation; a model is fused and saved with its own tokenizer.
            where = dict(self._base.loading) | ({"gguf_file": None} if tokenizer else {})
            named = tokenizer is None or isinstance(tokenizer, str)
            self._base_tokenizer = load_tokenizer(tokenizer or pretrained, where) if named else tokenizer

    def _create_model(self, pretrained: str, **kwargs: Any) -> None:
        if self.fusion_config is not None:  # HFLM loads a model, places it and adds an adapter by this
            self.AUTO_MODEL_CLASS = SimpleNamespace(from_pretrained=self._load_and_fuse)
        super()._create_model(pretrained, **kwargs)
        report = self._model.fusion_report
        self._config = self._model.config  # until here the base's, with all its layers
        if report is not None and local_rank() == 0:
            eval_logger.info(report.summary())

    def _load_and_fuse(self, _: str, **loading: Any) -> PreTrainedModel:
        """The base, placed where HFLM says, and fused."""
        names = ("device_map", "max_memory", "offload_folder")
        placing = {name: loading[name] for name in names if name in loading}
        return from_pretrained_fused(
            replace(self._base, loading=dict(self._base.loading) | placing),
            self.fusion_config,
            tokenizer=self._base_tokenizer,
            **self._own,
        )

    def get_model_info(self) -> dict[str, Any]:
        """Add what was fused to HFLM's model information, which lm-eval writes into its results."""
        info: dict[str, Any] = super().get_model_info()
        report = self.model.fusion_report
        if report is not None:
            values = report.to_dict()
            fractions = ("layers_removed_fraction", "parameters_removed_fraction")
            same = ("config", *fractions, "calibration", "perplexities", "speed", "notes")
            info["fusion"] = {name: values[name] for name in same} | {
                "pairs": [list(step.pair) for step in report.steps],
                "ratios": [[step.ratio_i, step.ratio_j] for step in report.steps],
                "layers": [report.layers_before, report.layers_after],
                "parameters": [report.parameters_before, report.parameters_after],
                "summary": report.summary(),
            }
        return info


@register_model("fused_llama")
class FusedLlamaLM(FusedLM):
    """FusedLM under its older name."""
