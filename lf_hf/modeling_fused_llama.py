"""Fused Llama models: a Llama with fewer decoder layers that can make, save and explain itself."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import StrictDataclassError
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
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging
from transformers.utils.hub import cached_file

from lf_hf import pipeline
from lf_hf.calibration import load_needed
from lf_hf.config import FusionConfig, unknown_name
from lf_hf.configuration_fused_llama import FusedLlamaConfig, converted_config, fused_config
from lf_hf.decoder import ModelDecoder
from lf_hf.fused_cache import fingerprints, folder_of_launch, only_fuser, seen, why_not_reused
from lf_hf.processes import local_processes
from lf_hf.report import REPORT_NAME, FusionReport
from lf_hf.saving import check_replaceable, replaced_folder, write_companions
from lf_hf.weights import (
    check_complete,
    check_inside,
    shard_names,
    tensor_files,
    weights_folder,
    with_variant,
)

logger = logging.get_logger(__name__)

# Arguments of from_pretrained that say where files are; the config and the tokenizer need them too.
_HUB_ARGUMENTS = ("cache_dir", "force_download", "gguf_file", "local_files_only", "revision", "subfolder", "token")
# Those, and what else is true of a base only, and not of what it is fused to.
_OF_THE_BASE = (*_HUB_ARGUMENTS, "output_loading_info", "use_safetensors", "variant")
_SHORTEST_CONTEXT = 16  # tokens, the shortest calibration_length
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
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
        config = fusion_settings(config, kwargs)
        if "torch_dtype" in kwargs:  # its older name
            kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
        kwargs["dtype"] = checked_dtype(kwargs.get("dtype")) or "auto"
        base = checked_base(base)
        check_device(kwargs.get("device_map"))
        llama_config = base_config(base, kwargs)
        config.check_num_layers(llama_config.num_hidden_layers)
        samples, text = (None, None) if measurements else load_needed(config, calibration)
        if tokenizer is None:
            tokenizer = load_tokenizer(base, kwargs)
        elif not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError(f"tokenizer must be a loaded tokenizer, got {tokenizer!r:.80}.")

        name = f"{base}/{kwargs['gguf_file']}" if kwargs.get("gguf_file") else base

        def fused() -> FusedLlamaForCausalLM:
            llama = load_llama(base, kwargs)
            decoder = ModelDecoder(llama, keep_originals=config.refit != "none")
            report = pipeline.fuse(decoder, tokenizer, config, samples, text, base=name, measurements=measurements)
            return cls._adopt(llama, report, tokenizer)

        if fused_dir is None and local_processes() == 1:
            return fused()
        folder = folder_of_launch(name, config) if fused_dir is None else Path(fused_dir).absolute()
        dtype = llama_config.dtype if kwargs["dtype"] == "auto" else kwargs["dtype"]
        pickled = kwargs.get("use_safetensors") is False
        made_of = fingerprints(base, hub_arguments(kwargs), tokenizer, samples, text, dtype, pickled=pickled)
        with only_fuser(folder):
            check_replaceable(folder)
            reason = why_not_reused(folder, config, made_of)
            if reason is None:
                logger.info(f"Loading what was fused before from {str(folder)!r}.")
                elsewhere = {name: value for name, value in kwargs.items() if name not in _OF_THE_BASE}
                model: FusedLlamaForCausalLM = cls.from_pretrained(folder, **elsewhere)
                model.tokenizer = tokenizer
            else:
                if folder.is_dir():
                    logger.warning(f"{reason} Fusing, to replace it.")
                model = fused()
                assert model.fusion_report is not None
                model.fusion_report = dataclasses.replace(model.fusion_report, fingerprints=made_of)
                with replaced_folder(folder) as written:
                    model.write_files(written)  # whichever rank this is
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
        llama.name_or_path = config._name_or_path
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
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True  # pickled weights can run code
        own_files = pretrained_model_name_or_path is not None and kwargs.get("state_dict") is None
        if own_files and kwargs["use_safetensors"] and not hub.get("gguf_file"):
            check_names(os.fspath(pretrained_model_name_or_path), hub, kwargs.get("variant"))
        try:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except StrictDataclassError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"The config of {pretrained_model_name_or_path!r} is of no Llama: {reason:.300}") from None
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if not isinstance(model.config.fusion, dict | None):
            raise ValueError(
                f"fusion in the config of {pretrained_model_name_or_path!r} must be an object or null, got "
                f"{model.config.fusion!r:.80}; save the model again."
            )
        if pretrained_model_name_or_path is not None:
            file = optional_file(os.fspath(pretrained_model_name_or_path), REPORT_NAME, hub)
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
            A folder that does not exist, holds no files, or holds a fused checkpoint, which is replaced. What else
            is beside that stays.
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
        others = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not kwargs.get("is_main_process", True) or (others and torch.distributed.get_rank() > 0):
            return
        with replaced_folder(Path(save_directory)) as folder:
            self.write_files(folder, *args, as_llama=as_llama, tokenizer=tokenizer, **kwargs)
        if not self.name_or_path:  # of a model that was fused here; adapters trained on it name it
            self.name_or_path = self.config._name_or_path = os.fspath(save_directory)
        if push_to_hub:
            _upload(Path(save_directory), repo_id or Path(save_directory).name, token=token)

    def should_save_on_this_rank(self, is_main_process: bool) -> bool:
        """What transformers asks before it writes weights; `save_pretrained` has decided before."""
        return is_main_process

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
            name = self.name_or_path or repo_id
            self.save_pretrained(folder, **kwargs)
            self.name_or_path = self.config._name_or_path = name
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


def checked_base(base: str | os.PathLike[str]) -> str:
    """A base's name as a string. Raises ValueError if it can not be one."""
    if not isinstance(base, (str, os.PathLike)) or not os.fspath(base):
        raise ValueError(f"base must be the folder or hub name of a Llama checkpoint, got {base!r:.80}.")
    return os.fspath(base)


def checked_dtype(dtype: object) -> torch.dtype | None:
    """The dtype that a user means, None for the base's own. Raises ValueError for one that layers do not compute in."""
    if dtype is None or dtype == "auto":
        return None
    for known in _DTYPES:
        if dtype in (known, str(known), str(known).removeprefix("torch.")):
            return known
    names = ", ".join(str(known).removeprefix("torch.") for known in _DTYPES)
    raise ValueError(f"dtype must be auto, {names}, got {dtype!r:.80}.")


def check_device(device_map: object) -> None:
    """Raise ValueError if a device map is a string that names no device of this machine."""
    if not isinstance(device_map, str) or device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return
    try:
        torch.empty(0, device=device_map)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"The device {device_map!r} can not be used ({reason:.200}); take cpu or auto.") from None


def fusion_settings(config: FusionConfig | None, kwargs: dict[str, Any]) -> FusionConfig:
    """A config with the FusionConfig fields among `kwargs`, which are taken out there, in place of its own.

    Raises
    ------
    ValueError
        For values that are not allowed, and for other names in `kwargs` that look like a misspelt field.
    """
    if not isinstance(config, FusionConfig | None):
        raise ValueError(f"config must be a FusionConfig, got {config!r:.80}; give its fields as keyword arguments.")
    settings = {name: kwargs.pop(name) for name in FusionConfig.field_names() if name in kwargs}
    for name in kwargs:
        if difflib.get_close_matches(name, FusionConfig.field_names(), n=1, cutoff=0.85):
            raise ValueError(unknown_name("argument", name, FusionConfig.field_names()))
    return FusionConfig.from_kwargs(**settings) if config is None else dataclasses.replace(config, **settings)


def base_config(base: str, kwargs: dict[str, Any]) -> LlamaConfig:
    """Config of the model to fuse, checked to be a Llama in plain floats."""
    gguf_file = kwargs.get("gguf_file")
    hub = hub_arguments(kwargs)
    if os.path.isdir(base) and not gguf_file:
        folder = Path(base, kwargs.get("subfolder") or "")
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{base!r} holds no model: config.json is missing (for a GGUF file name it with gguf_file=)."
            )
        check_inside(folder)
    if gguf_file and importlib.util.find_spec("gguf") is None:
        raise ValueError("Reading a GGUF file needs the gguf package; run `pip install 'lf_hf[gguf]'`.")
    for name in _QUANTIZATION_ARGUMENTS:
        if kwargs.get(name):
            raise ValueError(f"{name} can not be used while fusing; fuse in bfloat16, save, and quantise the result.")
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=bool(kwargs.get("trust_remote_code")), **hub)
    except Exception as error:  # of any kind, where a config holds what it should not
        reason = " ".join(str(error).split())
        raise ValueError(f"No config of a Llama can be read for {base!r}: {reason:.400}") from None
    if config.model_type == FusedLlamaConfig.model_type:
        raise ValueError(f"{base!r} is fused already; fuse its base with a larger num_fusions instead.")
    if not isinstance(config, LlamaConfig) or config.model_type != LlamaConfig.model_type:
        raise ValueError(f"{base!r} is a {config.model_type!r} model; only Llama models (model_type 'llama') fuse.")
    if getattr(config, "quantization_config", None) and not gguf_file:
        raise ValueError(f"{base!r} is quantised; fuse the original floating-point checkpoint instead.")
    if getattr(config, "is_heterogeneous", False):
        raise ValueError(f"{base!r} has layers of different kinds (per_layer_config); only layers of one kind fuse.")
    if getattr(config, "transformers_weights", None):
        raise ValueError(
            f"The config of {base!r} names its file of weights, {config.transformers_weights!r:.80} "
            f"(transformers_weights); rename that to {SAFE_WEIGHTS_NAME} and remove the entry."
        )
    if config.max_position_embeddings < _SHORTEST_CONTEXT:
        raise ValueError(
            f"The config of {base!r} has max_position_embeddings={config.max_position_embeddings}, but a Llama takes "
            f"{_SHORTEST_CONTEXT} tokens or more; repair the config."
        )
    if not gguf_file and optional_file(base, "adapter_config.json", hub):
        raise ValueError(f"{base!r} is an adapter, not a model; merge it into its base, and fuse that.")
    return config


def load_tokenizer(base: str, kwargs: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer beside a base. Raises ValueError if there is none that can be read."""
    remote_code = bool(kwargs.get("trust_remote_code"))
    with reading_tokenizer(base):
        return AutoTokenizer.from_pretrained(base, trust_remote_code=remote_code, **hub_arguments(kwargs))


@contextmanager
def reading_tokenizer(base: str) -> Iterator[None]:
    """Say in one sentence that there is no tokenizer that can be read, whatever the error."""
    try:
        yield
    except Exception as error:  # the tokenizers library has no class of its own for some
        reason = " ".join(str(error).split())
        raise ValueError(f"No tokenizer can be read for {base!r} ({reason:.300}); put the base's own there.") from None


def load_llama(base: str, kwargs: dict[str, Any]) -> LlamaForCausalLM:
    """A base's model, checked to be whole. `kwargs` are from_pretrained's.

    Raises
    ------
    ValueError
        If its files of weights are not whole or not what its config describes, or if they are pickled, which can run
        code, and the user did not ask for it with use_safetensors=False.
    """
    variant = kwargs.get("variant")
    kwargs = {name: value for name, value in kwargs.items() if name not in ("state_dict", "ignore_mismatched_sizes")}
    if not kwargs.get("gguf_file") and kwargs.get("use_safetensors") is not False:
        kwargs["use_safetensors"] = True
        tensor_files(weights_folder(base, hub_arguments(kwargs), variant), variant)
    loaded: Any = LlamaForCausalLM.from_pretrained(
        base, **kwargs | {"output_loading_info": True, "ignore_mismatched_sizes": True}
    )
    llama, info = loaded
    mismatched = {name: (stored, wanted) for name, stored, wanted in info["mismatched_keys"]}
    check_complete(base, info["missing_keys"], mismatched, info["unexpected_keys"])
    return llama.eval()


def check_names(base: str, hub: dict[str, Any], variant: str | None) -> None:
    """Raise ValueError if the weights of a checkpoint are elsewhere, or, in a folder, not whole or not safetensors."""
    if os.path.isdir(base):
        folder = Path(base, hub.get("subfolder", ""))
        check_inside(folder)
        tensor_files(folder, variant)
        return
    index = optional_file(base, with_variant(SAFE_WEIGHTS_INDEX_NAME, variant), hub)
    if index is not None:
        shard_names(Path(index))


def optional_file(base: str, name: str, hub: dict[str, Any]) -> str | None:
    """Path of a checkpoint's file on this machine, None if there is no such file, or it can not be had."""
    return cached_file(
        base,
        name,
        **{key: value for key, value in hub.items() if key != "gguf_file"},
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of from_pretrained's arguments that say where files are."""
    return {name: kwargs[name] for name in _HUB_ARGUMENTS if kwargs.get(name) is not None}


def _tokenizer_beside(name_or_path: str | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer in the folder that a model was loaded from, if there is one."""
    if not name_or_path or not os.path.isfile(os.path.join(name_or_path, "tokenizer_config.json")):
        return None
    return load_tokenizer(name_or_path, {})
