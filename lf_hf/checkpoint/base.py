"""The checkpoint that is fused: where it is, its config, tokenizer, files and model."""

from __future__ import annotations

import copy
import os
import re
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_utils import str_to_torch_dtype
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, logging
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from lf_hf.checkpoint.card import CARD_NAME, base_license
from lf_hf.checkpoint.dequantising import Quantisation, take_quantisation
from lf_hf.checkpoint.saving import PROCESSOR_FILES
from lf_hf.checkpoint.weights import (
    CHECKPOINT_FILES,
    UNREAD,
    check_weights,
    local_folder,
    tensor_types,
    weight_files,
)
from lf_hf.decoder.placement import mend_offloading
from lf_hf.families.models import MODEL_TYPES, is_wrapper, known_family, model_class, text_prefix, why_refused
from lf_hf.families.table import FAMILIES
from lf_hf.runtime.errors import explained, reason
from lf_hf.runtime.launch import SPREAD, own_device

logger = logging.get_logger(__name__)
# Arguments of from_pretrained that say where files are; the config and the tokenizer need them too.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
BASE_ONLY_ARGUMENTS = (*HUB_ARGUMENTS, "max_memory", "output_loading_info", "use_safetensors", "variant")
"""Those, and others that hold for a base only, and not for what it is fused to."""
_QUANTIZATION_ARGUMENTS = ("quantization_config", "load_in_4bit", "load_in_8bit", "gguf_file")
_SAFETENSORS = "*.safetensors*"  # and their index
DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
"""What layers compute in, by name."""


@dataclass(frozen=True)
class Base:
    """A checkpoint that can be fused: folder or hub name, config, and `from_pretrained`'s arguments; no weights yet."""

    name: str
    config: PreTrainedConfig
    loading: Mapping[str, Any]
    quantisation: Quantisation | None = None
    """How the weights are stored, if not in plain floats."""

    @classmethod
    def open(cls, name: str | os.PathLike[str] | Base, loading: Mapping[str, Any]) -> Base:
        """Read the config of a checkpoint; one that is open stays as it is.

        Raises ValueError if there is no model of a family that can be fused, in plain floats or such numbers as
        transformers dequantises here, or if `loading` holds an argument that cannot be used.
        """
        if isinstance(name, Base):
            if loading:
                raise ValueError(f"The base is open already, so give {', '.join(loading)} to Base.open.")
            return name
        loading = dict(loading)
        older_name = loading.pop("torch_dtype", None)  # transformers takes either
        loading["dtype"] = checked_dtype(loading.get("dtype", older_name)) or "auto"
        loading.setdefault("use_kernels", False)  # of the hub, which compute what the table of families does not know
        if not isinstance(name, (str, os.PathLike)) or not os.fspath(name):
            raise ValueError(f"base must be the folder or hub name of a checkpoint, got {name!r:.80}.")
        name = os.fspath(name)
        if os.path.isfile(name):
            raise ValueError(f"{name!r} is a file; give the folder of the checkpoint.")
        check_device(loading.get("device_map"))
        if loading.get("revision") and os.path.isdir(name):
            logger.warning(f"revision={loading['revision']!r} has no effect on a folder, which is taken as it is.")
        hub = hub_arguments(loading)
        if optional_file(name, ADAPTER_CONFIG_NAME, hub):
            raise ValueError(f"{name!r} is an adapter, not a model; merge it into its base, and fuse that.")
        config = read_config(name, hub)
        stored = take_quantisation(config)
        config = _as_text(config)
        if problem := _problem(name, config, loading):
            raise ValueError(f"{name!r} {problem}.")
        if stored is None:
            return cls(name, config, loading)
        if loading["dtype"] == "auto":
            loading["dtype"] = torch.bfloat16
        return cls(name, config, loading, Quantisation.open(name, stored))

    @property
    def text_config(self) -> PreTrainedConfig:
        """The config of the decoder, which is a part of that of a vision-language model."""
        return self.config.get_text_config()

    @property
    def folder(self) -> Path | None:
        """The folder that it is in, if it is no name on the hub."""
        return Path(self.name, self.hub.get("subfolder", "")).resolve() if os.path.isdir(self.name) else None

    @property
    def hub(self) -> dict[str, Any]:
        """The arguments that say where files are; without `force_download`, which is for weights alone."""
        return {name: value for name, value in hub_arguments(self.loading).items() if name != "force_download"}

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype that was asked for, None for the checkpoint's own."""
        return checked_dtype(self.loading["dtype"])

    @property
    def loaded_dtype(self) -> torch.dtype:
        """What the weights are in when they are loaded."""
        if dtype := self.dtype or checked_dtype(self.config.dtype):
            return dtype
        stored = [file for file in self.files() if file.suffix == ".safetensors"]
        return str_to_torch_dtype[next(iter(tensor_types(stored[0]).values()))] if stored else torch.float32

    @property
    def _weights(self) -> str:
        """Pattern of the names of the files of weights."""
        return "*.bin" if self.loading.get("use_safetensors") is False else _SAFETENSORS

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer beside the weights. Raises ValueError if there is none that can be read."""
        return load_tokenizer(self.name, self.loading)

    def files(self) -> list[Path]:
        """The files of weights on this machine; none if they are on the hub only. ValueError if a folder holds none."""
        try:
            folder = local_folder(self.name, self.hub | {"local_files_only": True}, [self._weights])
            if self._weights == _SAFETENSORS:
                return weight_files(folder, self.loading.get("variant"))
            return sorted(folder.glob(self._weights))
        except (ValueError, OSError):
            if os.path.isdir(self.name):
                raise
            return []

    def content_files(self) -> list[Path]:
        """The files that decide what the model computes and how it reads text; those of the hub are downloaded."""
        patterns = [self._weights, *CHECKPOINT_FILES, *PROCESSOR_FILES]
        folder = local_folder(self.name, self.hub, patterns)
        files = {file for pattern in patterns for file in folder.glob(pattern)}
        return sorted(file for file in files if not file.match(UNREAD))

    def check_generation_config(self) -> None:
        """Raise ValueError if the settings for generation, which are saved with a result, are not valid."""
        found = optional_file(self.name, GENERATION_CONFIG_NAME, self.hub)
        older: dict[str, Any] = {} if found else {"config_file_name": CONFIG_NAME, "_from_model_config": True}
        with (
            explained(f"{GENERATION_CONFIG_NAME} of {self.name!r} cannot be used", "repair it"),
            tempfile.TemporaryDirectory() as scratch,
        ):
            config = GenerationConfig.from_pretrained(self.name, **self.hub, **older)
            config.save_pretrained(scratch)  # as not all that can be read can be saved

    def load(self, **placing: Any) -> PreTrainedModel:
        """The model, checked to be whole; arguments of `from_pretrained` take the place of the base's own.

        Raises ValueError for files that are not whole or not what the config describes, for pickled ones, which can
        run code, unless use_safetensors=False asks for them, and for arguments that transformers does not know.
        """
        loading = {**self.loading, **placing, "output_loading_info": True, "ignore_mismatched_sizes": True}
        if self._weights == _SAFETENSORS:
            loading["use_safetensors"] = True
            weights = local_folder(self.name, hub_arguments(self.loading), [_SAFETENSORS])  # which downloads them
            check_weights(weights, loading.get("variant"), plain=self.quantisation is None)
            loading.pop("force_download", None)  # as that has fetched them again
        if self.quantisation is not None:
            self.quantisation.check_place(self.name, loading.get("device_map"))
            loading["config"] = copy.deepcopy(self.config)
            loading["config"].quantization_config = dict(self.quantisation.config)
        # A TypeError is for an argument that nobody takes, a RuntimeError for tensors that do not go together, as where
        # an expert lacks one.
        kinds = (TypeError, RuntimeError)
        with explained(f"{self.name!r} cannot be loaded", "check the arguments and its files", kinds):
            model, info = model_class(self.config).from_pretrained(self.name, **loading)
        layers = f"{text_prefix(model)}layers."
        # Old checkpoints hold rotary embeddings, and other tensors outside the layers do no harm.
        unknown = [name for name in info["unexpected_keys"] if name.startswith(layers) and "rotary_emb" not in name]
        problem = None
        if missing := info["missing_keys"]:
            problem = f"has no tensor {min(missing)!r}, which its config.json asks for"
        elif mismatched := info["mismatched_keys"]:
            name, stored, described = min(mismatched)
            problem = f"holds {name!r} in shape {list(stored)}, but by its config.json that is {list(described)}"
        elif unknown:
            problem = f"holds {min(unknown)!r}, which its config.json does not know"
        if problem:
            raise ValueError(f"{self.name!r} {problem}; repair the base.")
        if self.quantisation is not None:
            self.quantisation.undo(model)
        mend_offloading(model)
        return model.eval()

    def credit(self, model: Any) -> None:
        """Give a fused model what it takes over from this base: how images are read, licence, revision, and a note."""
        report = model.report
        card = optional_file(self.name, CARD_NAME, self.hub)
        license, notes = base_license(card) if card else {}, [*report.notes, *self.notes()]
        model.remember(replace(report, license=license, notes=notes, revision=self.hub.get("revision")))
        model.processor_files = read_processor_files(self.name, self.config, self.hub)

    def notes(self) -> list[str]:
        """What users should know of a model that is made of this base."""
        if self.quantisation is None:
            return self._left_out()
        return [self.quantisation.note(self.loaded_dtype), *self._left_out()]

    def _left_out(self) -> list[str]:
        """One sentence on tensors in the files that transformers leaves out for this model, where there are some."""
        stock = model_class(self.config)
        patterns = stock._keys_to_ignore_on_load_unexpected
        if not patterns or self._weights != _SAFETENSORS:
            return []
        names = [name for file in self.files() for name in tensor_types(file, plain=False)]
        left_out = [pattern.strip("^") for pattern in patterns if any(re.search(pattern, name) for name in names)]
        if not left_out:
            return []
        return [f"The base's {', '.join(left_out)} are left out, as transformers reads none in a {stock.__name__}."]


def checked_dtype(dtype: object) -> torch.dtype | None:
    """The dtype that a user means, None for the base's own. Raises ValueError for one that layers do not compute in."""
    if dtype is None or dtype == "auto":
        return None
    if (name := str(dtype).removeprefix("torch.")) in DTYPES:
        return DTYPES[name]
    raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, got {dtype!r:.80}.")


def check_device(device_map: Any) -> None:
    """Raise ValueError if a device map names a device that this machine does not have, or one without memory."""
    by_module = isinstance(device_map, dict)
    for device in device_map.values() if by_module else [device_map]:
        if device in (None, *SPREAD) or (by_module and device == "disk"):
            continue
        with explained(f"The device {str(device)!r} cannot be used", "take one that this machine has, or cpu"):
            torch.empty(0, device=own_device(device)).cpu()  # of "meta" there is nothing to copy


def read_config(name: str, hub: Mapping[str, Any]) -> PreTrainedConfig:
    """The config of a checkpoint. Raises ValueError if there is none that can be read."""
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False, **hub)  # only stock classes can be fused
    except Exception as error:  # of any kind, where a config holds what it should not
        why = reason(error)
        if isinstance(error.__cause__ or error, HFValidationError):
            why = "there is no such folder, and it cannot be a name on the hub"
        raise ValueError(f"No config of a model can be read for {name!r}, here or on the hub: {why}.") from None


def _as_text(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the text alone, where AutoModelForCausalLM opens a vision-language model as a model of text."""
    text = config.get_text_config()
    opened = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    is_text = text.model_type in FAMILIES and getattr(opened, "config_class", None) is type(text)
    return text if is_text else config


def _problem(name: str, config: PreTrainedConfig, loading: Mapping[str, Any]) -> str | None:
    """What keeps a model from being fused, and what to do about it; None where nothing does."""
    text = config.get_text_config() if is_wrapper(config) else config
    family = known_family(text)
    if config.model_type.startswith("fused_"):
        return (
            "is fused already; fuse its base with a larger num_fusions, or load it, save it with plain=True and fuse "
            "that plain checkpoint"
        )
    is_known = config.model_type in MODEL_TYPES
    if family is None or not is_known or not isinstance(text, family.config_class):  # of code beside a checkpoint
        return f"is a {config.model_type!r} model; {why_refused(text)}"
    if getattr(text, "is_heterogeneous", False) and not family.scalar:
        return "has layers of different kinds (per_layer_config); only layers of one kind fuse"
    fixed = [name for name in ("num_hidden_layers", *family.layer_lists) if loading.get(name) is not None]
    if given := [*filter(loading.get, _QUANTIZATION_ARGUMENTS), *fixed]:
        return f"cannot be fused with {given[0]}; leave it out: fusing takes all layers, in floating point"
    if loading.get("attn_implementation") == "flex_attention":  # whose masks are of a kind of their own
        return "cannot be fused with attn_implementation='flex_attention'; take 'sdpa' or 'eager'"
    if file := getattr(config, "transformers_weights", None):  # which only transformers would read
        return f"has transformers_weights={file!r:.80} in its config; remove that, and name the file model.safetensors"
    try:
        with torch.device("meta"):
            model_class(config)(copy.deepcopy(config))
    except Exception as error:  # of any kind: KeyError for a name, TypeError for a value, ZeroDivisionError, ...
        why = f"{type(error).__name__}: {reason(error)}"
        return f"has a config from which no {family.title} can be built ({why}); repair it"
    return None


def load_tokenizer(base: str, kwargs: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer beside a base. Raises ValueError if there is none that can be read."""
    trusted = bool(kwargs.get("trust_remote_code"))
    with reading_tokenizer(base):
        return AutoTokenizer.from_pretrained(base, trust_remote_code=trusted, **hub_arguments(kwargs))


def reading_tokenizer(base: str) -> AbstractContextManager[None]:
    """Say in one sentence that there is no tokenizer that can be read, whatever the error."""
    return explained(f"No tokenizer can be read for {base!r}", "put the base's own there")


def optional_file(base: str, name: str, hub: Mapping[str, Any]) -> str | None:
    """Path of a checkpoint's file on this machine, None if there is no such file, or it cannot be fetched."""
    with suppress(HFValidationError, OSError):
        return cached_file(base, name, **hub)
    return None


def read_processor_files(base: str, config: PreTrainedConfig, hub: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of a checkpoint that say how images are read, where its model reads any."""
    names = PROCESSOR_FILES if is_wrapper(config) else ()
    paths = {name: optional_file(base, name, hub) for name in names}
    return {name: Path(path).read_bytes() for name, path in paths.items() if path}


def hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of from_pretrained that say where files are."""
    return {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
