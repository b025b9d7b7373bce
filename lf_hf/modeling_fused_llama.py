"""Fused Llama models: a Llama with fewer decoder layers that can make, save and explain itself."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers import (
    AutoConfig,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import logging
from transformers.utils.hub import cached_file

from lf_hf import pipeline
from lf_hf.calibration import load_needed
from lf_hf.config import FusionConfig, unknown_name
from lf_hf.configuration_fused_llama import FusedLlamaConfig, converted_config, fused_config
from lf_hf.decoder import ModelDecoder
from lf_hf.fused_cache import fingerprints, folder_of_launch, locked, seen, why_not_reused
from lf_hf.processes import local_processes
from lf_hf.report import REPORT_NAME, FusionReport
from lf_hf.saving import check_replaceable, replaced_folder, write_companions

logger = logging.get_logger(__name__)

# Arguments of from_pretrained that say where files are; the config and the tokenizer need them too.
_HUB_ARGUMENTS = ("cache_dir", "force_download", "gguf_file", "local_files_only", "revision", "subfolder", "token")
_QUANTIZATION_ARGUMENTS = ("quantization_config", "load_in_4bit", "load_in_8bit")


class FusedLlamaModel(LlamaModel):
    """The decoder of a fused Llama, without a head. Computes what LlamaModel computes."""

    config_class = FusedLlamaConfig
    config: FusedLlamaConfig


class FusedLlamaForCausalLM(LlamaForCausalLM):
    """A Llama whose layers were fused. Computes what LlamaForCausalLM computes.

    Attributes
    ----------
    fusion_report : FusionReport or None
        What was fused and how well it went; read from the checkpoint where the model was loaded from one.
    tokenizer : PreTrainedTokenizerBase or None
        The base's tokenizer where the model was fused in this process; saved with the model.
    """

    config_class = FusedLlamaConfig
    config: FusedLlamaConfig

    def __init__(self, config: FusedLlamaConfig) -> None:
        super().__init__(config)
        self.fusion_report: FusionReport | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None

    @classmethod
    def from_pretrained_fused(
        cls,
        base: str | os.PathLike[str],
        config: FusionConfig | None = None,
        *,
        calibration: Sequence[str] | str | Path | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        measurements: pipeline.Measurements | None = None,
        fused_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> FusedLlamaForCausalLM:
        """Load a Llama and fuse its layers.

        Of several processes that a launcher started on a machine, one fuses and the others load its result.

        Parameters
        ----------
        base : str
            Hub name or folder of a Llama checkpoint.
        config : FusionConfig, optional
            Settings; FusionConfig fields in `kwargs` override it. Without it `num_fusions` is required.
        calibration : list of str or path, optional
            Calibration text, as `lf_hf.calibration.load_calibration` takes it. Default: MMLU questions, or
            for `refit` the mixture of `lf_hf.calibration.load_corpus`.
        tokenizer : optional
            The base's tokenizer, if it is not beside the base.
        measurements : Measurements, optional
            What `lf_hf.pipeline.measure` found on the same base, to fuse it several times; by default it is measured.
        fused_dir : path, optional
            Where to keep the fused model. If one is there that was made of the same base (by content), calibration
            text and settings, it is loaded; else the base is fused and saved there.
        **kwargs
            FusionConfig fields; all others go to `from_pretrained` (dtype, device_map, revision, gguf_file, ...).

        Raises
        ------
        ValueError
            Before any long work, for settings, a base or calibration text that can not be used.
        """
        settings = {name: kwargs.pop(name) for name in FusionConfig.field_names() if name in kwargs}
        for name in kwargs:
            if difflib.get_close_matches(name, FusionConfig.field_names(), n=1, cutoff=0.85):
                raise ValueError(unknown_name("argument", name, FusionConfig.field_names()))
        if config is None:
            config = FusionConfig.from_kwargs(**settings)
        elif settings:
            config = dataclasses.replace(config, **settings)
        base = os.fspath(base)
        llama_config = base_config(base, kwargs)
        config.check_num_layers(llama_config.num_hidden_layers)
        samples, text = (None, None) if measurements else load_needed(config, calibration)
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(base, **hub_arguments(kwargs))

        name = f"{base}/{kwargs['gguf_file']}" if kwargs.get("gguf_file") else base
        # Weights are read from safetensors or GGUF alone: pickled ones can run code.
        kwargs = {"use_safetensors": True} | kwargs

        def fused() -> FusedLlamaForCausalLM:
            llama = LlamaForCausalLM.from_pretrained(base, **kwargs)
            decoder = ModelDecoder(llama.eval(), keep_originals=config.refit != "none")
            report = pipeline.fuse(decoder, tokenizer, config, samples, text, base=name, measurements=measurements)
            return cls._adopt(llama, report, tokenizer)

        if fused_dir is None and local_processes() == 1:
            return fused()
        folder = folder_of_launch(name, config) if fused_dir is None else Path(fused_dir).absolute()
        dtype = kwargs.get("dtype") or "auto"
        if dtype == "auto":
            dtype = llama_config.dtype
        made_of = fingerprints(base, hub_arguments(kwargs), tokenizer, samples, text, dtype)
        with locked(folder):
            check_replaceable(folder)
            reason = why_not_reused(folder, config, made_of)
            if reason is None:
                logger.info(f"Loading what was fused before from {str(folder)!r}.")
                elsewhere = {name: value for name, value in kwargs.items() if name not in _HUB_ARGUMENTS}
                model: FusedLlamaForCausalLM = cls.from_pretrained(folder, **elsewhere)
                model.tokenizer = tokenizer
            else:
                if folder.is_dir():
                    logger.warning(f"{reason} Fusing, to replace it.")
                model = fused()
                assert model.fusion_report is not None
                model.fusion_report = dataclasses.replace(model.fusion_report, fingerprints=made_of)
                model.save_pretrained(folder)
            if fused_dir is None:
                seen(folder)
        return model

    @classmethod
    def _adopt(
        cls, llama: LlamaForCausalLM, report: FusionReport, tokenizer: PreTrainedTokenizerBase
    ) -> FusedLlamaForCausalLM:
        """Turn a stock model, whose layers are fused, into this class, keeping its modules and their hooks."""
        config = fused_config(llama.config, report)
        for module in llama.modules():
            if isinstance(getattr(module, "config", None), PreTrainedConfig):
                vars(module)["config"] = config
        # A base from GGUF is plain floats now, whatever the loader left behind.
        for name in ("hf_quantizer", "is_quantized", "quantization_method"):
            llama.__dict__.pop(name, None)
        # The decoder stays a LlamaModel, as in a model that was loaded: transformers knows what else a class can
        # return, such as hidden states, only once one of it was built.
        llama.__class__ = cls
        assert isinstance(llama, cls)
        llama.fusion_report = report
        llama.tokenizer = tokenizer
        return llama

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As for any transformers model; `fusion_report` is read from the checkpoint."""
        hub = hub_arguments(kwargs)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if pretrained_model_name_or_path is not None:
            file = cached_file(
                pretrained_model_name_or_path,
                REPORT_NAME,
                **hub,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
            model.fusion_report = None if file is None else FusionReport.load(file)
        return loaded

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *args: Any,
        as_llama: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        token: str | bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Save the model, its report, a model card and the tokenizer into a folder, all or nothing.

        Parameters
        ----------
        save_directory : path
            A folder that does not exist, is empty, or holds a fused checkpoint, which is replaced.
        as_llama : bool
            Write a plain Llama checkpoint that programs without lf_hf open.
        tokenizer : optional
            Default: the base's.
        push_to_hub, repo_id, token
            Also upload the folder; `repo_id` defaults to its name.
        **kwargs
            As for any transformers model: max_shard_size, variant, ...

        Raises
        ------
        ValueError
            If the folder holds anything else.
        OSError
            If another process is saving there, or if files can not be written.
        """
        if not kwargs.get("is_main_process", True):
            return
        with replaced_folder(Path(save_directory)) as folder:
            self.write_files(folder, *args, as_llama=as_llama, tokenizer=tokenizer, **kwargs)
        if push_to_hub:
            _upload(Path(save_directory), repo_id or Path(save_directory).name, token=token)

    def write_files(
        self,
        folder: Path,
        *args: Any,
        as_llama: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        """Write what `save_pretrained` saves into a folder that the caller looks after."""
        tokenizer = tokenizer or self.tokenizer or _tokenizer_beside(self.name_or_path)
        super().save_pretrained(folder, *args, **kwargs)
        if as_llama:
            config = converted_config(self.config, LlamaConfig)
            config.architectures = [LlamaForCausalLM.__name__]
            config.save_pretrained(folder)
        write_companions(folder, self.fusion_report, tokenizer, as_llama=as_llama)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **kwargs: Any,
    ) -> str:
        """Upload what `save_pretrained(**kwargs)` writes, model card included; returns the commit's address."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **kwargs)
            return _upload(
                folder,
                repo_id,
                commit_message=commit_message,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )

    def to_llama(self) -> LlamaForCausalLM:
        """A stock LlamaForCausalLM that shares this model's weights.

        Raises
        ------
        ValueError
            If weights are offloaded: there is nothing in memory to share.
        """
        for name, parameter in self.named_parameters():
            if parameter.device.type == "meta":
                raise ValueError(f"{name} is offloaded; use save_pretrained(as_llama=True) and load what it writes.")
        config = converted_config(self.config, LlamaConfig)
        with torch.device("meta"):
            llama = LlamaForCausalLM(config)
        llama.load_state_dict(self.state_dict(keep_vars=True), assign=True)
        llama.model.rotary_emb = LlamaRotaryEmbedding(config).to(self.device)
        llama.tie_weights()
        llama.generation_config = self.generation_config
        return llama.train(self.training)


def _upload(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    **commit: Any,
) -> str:
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **commit))


def base_config(base: str, kwargs: dict[str, Any]) -> LlamaConfig:
    """Config of the model to fuse, checked to be a Llama in plain floats."""
    if os.path.isdir(base) and not kwargs.get("gguf_file"):
        subfolder = kwargs.get("subfolder", "")
        if not os.path.isfile(os.path.join(base, subfolder, "config.json")):
            raise ValueError(
                f"{base!r} holds no model: config.json is missing (for a GGUF file name it with gguf_file=)."
            )
    if kwargs.get("gguf_file") and importlib.util.find_spec("gguf") is None:
        raise ValueError("Reading a GGUF file needs the gguf package; run `pip install 'lf_hf[gguf]'`.")
    for name in _QUANTIZATION_ARGUMENTS:
        if kwargs.get(name):
            raise ValueError(f"{name} can not be used while fusing; fuse in bfloat16, save, and quantise the result.")
    try:
        config = AutoConfig.from_pretrained(base, **hub_arguments(kwargs))
    except OSError as error:
        raise ValueError(f"No config of a model can be read for {base!r}: {' '.join(str(error).split())}") from None
    if config.model_type == FusedLlamaConfig.model_type:
        raise ValueError(f"{base!r} is fused already; fuse its base with a larger num_fusions instead.")
    if not isinstance(config, LlamaConfig) or config.model_type != LlamaConfig.model_type:
        raise ValueError(f"{base!r} is a {config.model_type!r} model; only Llama models (model_type 'llama') fuse.")
    if getattr(config, "quantization_config", None) and not kwargs.get("gguf_file"):
        raise ValueError(f"{base!r} is quantised; fuse the original floating-point checkpoint instead.")
    if getattr(config, "is_heterogeneous", False):
        raise ValueError(f"{base!r} has layers of different kinds (per_layer_config); only layers of one kind fuse.")
    return config


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of from_pretrained's arguments that say where files are."""
    return {name: kwargs[name] for name in _HUB_ARGUMENTS if kwargs.get(name) is not None}


def _tokenizer_beside(name_or_path: str | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer in the folder that a model was loaded from, if there is one."""
    if not name_or_path or not os.path.isfile(os.path.join(name_or_path, "tokenizer_config.json")):
        return None
    return AutoTokenizer.from_pretrained(name_or_path)
