"""The checkpoint that is fused: its name, where it is, its config, tokenizer, files and model."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import os
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    quantization_config,
)
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from lf_hf.checkpoint.saving import finish_save
from lf_hf.checkpoint.weights import (
    CHECKPOINT_FILES,
    check_complete,
    check_floats,
    shard_names,
    tensor_files,
    weight_files,
    weights_folder,
    with_variant,
)
from lf_hf.families import FAMILIES, Family, family_of
from lf_hf.report.report import MOST_LAYERS
from lf_hf.runtime.checked_json import parse_json
from lf_hf.runtime.fields import unknown_name

# Arguments of from_pretrained that say where files are; the config and the tokenizer need them too.
_HUB_ARGUMENTS = ("cache_dir", "force_download", "gguf_file", "local_files_only", "revision", "subfolder", "token")
# Those, and what else is true of a base only, and not of what it is fused to.
_BASE_ONLY_ARGUMENTS = (*_HUB_ARGUMENTS, "output_loading_info", "use_safetensors", "variant")
_SHORTEST_CONTEXT = 16  # tokens, the shortest calibration_length
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")
"""Device maps that spread a model over all devices."""
_QUANTIZATION_ARGUMENTS = ("quantization_config", "load_in_4bit", "load_in_8bit")


def is_spread(device_map: object) -> bool:
    """Whether from_pretrained's `device_map` puts a model on several devices, or may do so."""
    if isinstance(device_map, dict):
        return len(set(map(str, device_map.values()))) > 1
    return isinstance(device_map, str) and device_map in SPREAD


@dataclass(frozen=True)
class Base:
    """A checkpoint that can be fused. Its config was read; its weights are not.

    Attributes
    ----------
    name : str
        Folder or hub name.
    config : PreTrainedConfig
        Of one of the families in `lf_hf.families`.
    loading : dict
        `from_pretrained`'s arguments: where files are, dtype, device_map, ...
    """

    name: str
    config: PreTrainedConfig
    loading: Mapping[str, Any]

    @classmethod
    def open(cls, name: str | os.PathLike[str], loading: Mapping[str, Any]) -> Base:
        """Read the config of a checkpoint.

        Raises
        ------
        ValueError
            If there is no model in plain floats of a family that can be fused, or `loading` has an argument that
            from_pretrained does not take, or a dtype or device that cannot be used.
        """
        loading = dict(loading)
        if "torch_dtype" in loading:  # its older name
            loading.setdefault("dtype", loading.pop("torch_dtype"))
        loading["dtype"] = checked_dtype(loading.get("dtype")) or "auto"
        name = _checked_name(name)
        check_device(loading.get("device_map"))
        config = _checked_config(name, loading)
        check_arguments(loading, config)
        fixed = ("num_hidden_layers", *family_of(config).layer_lists)
        if given := [argument for argument in fixed if loading.get(argument) is not None]:
            raise ValueError(f"{given[0]} cannot be given while fusing, which decides what layers there are.")
        return cls(name, config, loading)

    @property
    def family(self) -> Family:
        """What transformers has for models of this kind."""
        return family_of(self.config)

    @property
    def full_name(self) -> str:
        """The name, with that of the GGUF file in it, for people."""
        return f"{self.name}/{self.loading['gguf_file']}" if self.loading.get("gguf_file") else self.name

    @property
    def hub(self) -> dict[str, Any]:
        """Those of the arguments that say where files are."""
        return hub_arguments(self.loading)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype that was asked for, None for the checkpoint's own."""
        dtype: torch.dtype | str = self.loading["dtype"]
        return dtype if isinstance(dtype, torch.dtype) else None

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer beside the weights. Raises ValueError if there is none that can be read."""
        return load_tokenizer(self.name, self.loading)

    def files(self) -> list[Path]:
        """The files of weights on this machine; none if they are on the hub only.

        Raises
        ------
        ValueError
            If a folder holds none.
        """
        try:
            return weight_files(self.name, self.hub)
        except (ValueError, OSError):
            if os.path.isdir(self.name):
                raise
            return []

    def content_files(self) -> list[Path]:
        """The files that decide what the model computes and how it reads text; those of the hub are downloaded."""
        hub = self.hub
        patterns = [str(hub.pop("gguf_file"))] if "gguf_file" in hub else [*CHECKPOINT_FILES]
        if self.loading.get("use_safetensors") is False:
            patterns.append("*.bin")
        subfolder = hub.pop("subfolder", "")
        hub.pop("force_download", None)  # loading fetches them again
        is_folder = os.path.isdir(self.name)
        folder = Path(
            self.name if is_folder else snapshot_download(self.name, allow_patterns=patterns, **hub), subfolder
        )
        return sorted(file for pattern in patterns for file in folder.glob(pattern))

    def weights_folder(self) -> Path:
        """The folder of the safetensors files; those of the hub are downloaded."""
        return weights_folder(self.name, self.hub)

    def load(self) -> PreTrainedModel:
        """The model, checked to be whole.

        Raises
        ------
        ValueError
            If the files of weights are not whole or not what the config describes, or if they are pickled, which can
            run code, and the user did not ask for it with use_safetensors=False.
        """
        variant = self.loading.get("variant")
        loading = {**self.loading}
        if not loading.get("gguf_file") and loading.get("use_safetensors") is not False:
            loading["use_safetensors"] = True
            check_floats(tensor_files(weights_folder(self.name, self.hub, variant), variant))
            loading.pop("force_download", None)  # as that has fetched them again
        if loading.get("gguf_file") and hasattr(quantization_config, "GgufConfig"):
            # Newer transformers keeps weights packed where it has a kernel; before, there was nothing to choose.
            loading["quantization_config"] = quantization_config.GgufConfig(dequantize=True)
        loaded: Any = self.family.causal_lm.from_pretrained(
            self.name, **loading | {"output_loading_info": True, "ignore_mismatched_sizes": True}
        )
        model, info = loaded
        mismatched = {name: (stored, wanted) for name, stored, wanted in info["mismatched_keys"]}
        check_complete(self.name, info["missing_keys"], mismatched, info["unexpected_keys"])
        return model.eval()

    def new_config(self) -> PreTrainedConfig:
        """A copy of the config, to be changed."""
        return copy.deepcopy(self.config)

    def loading_fused(self) -> dict[str, Any]:
        """Those of the arguments that are true of a fused model in another folder, too."""
        return {name: value for name, value in self.loading.items() if name not in _BASE_ONLY_ARGUMENTS}


def _checked_name(base: str | os.PathLike[str]) -> str:
    """A base's name as a string. Raises ValueError if it cannot be one."""
    if not isinstance(base, (str, os.PathLike)) or not os.fspath(base):
        raise ValueError(f"base must be the folder or hub name of a checkpoint, got {base!r:.80}.")
    if os.path.isfile(base):
        raise ValueError(
            f"{os.fspath(base)!r} is a file; give the folder that it is in (and name a GGUF file with gguf_file= or "
            "--gguf-file)."
        )
    return os.fspath(base)


def checked_dtype(dtype: object) -> torch.dtype | None:
    """The dtype that a user means, None for the base's own. Raises ValueError for one that layers do not compute in."""
    if dtype is None or dtype == "auto":
        return None
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if isinstance(named, torch.dtype) and named in _DTYPES:
        return named
    names = ", ".join(str(known).removeprefix("torch.") for known in _DTYPES)
    raise ValueError(f"dtype must be auto, {names}, got {dtype!r:.80}.")


def check_device(device_map: object) -> None:
    """Raise ValueError if a device map names a device that this machine does not have."""
    if isinstance(device_map, dict):
        for device in {*device_map.values()} - {"disk"}:
            check_device(device)
    if not isinstance(device_map, str | int | torch.device) or device_map in SPREAD:
        return
    try:
        torch.empty(0, device=device_map)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"The device {str(device_map)!r} cannot be used ({reason:.200}); take one that this machine has, or cpu."
        ) from None


def _checked_config(base: str, kwargs: Mapping[str, Any]) -> PreTrainedConfig:
    """Config of the model to fuse, checked to be of a family that can be fused, in plain floats."""
    gguf_file = kwargs.get("gguf_file")
    hub = hub_arguments(kwargs)
    finish_and_check(base, hub)
    if gguf_file and importlib.util.find_spec("gguf") is None:
        raise ValueError("Reading a GGUF file needs the gguf package; run `pip install '.[gguf]'` in lf_hf's checkout.")
    for name in _QUANTIZATION_ARGUMENTS:
        if kwargs.get(name):
            raise ValueError(f"{name} cannot be used while fusing; fuse in bfloat16, save, and quantise the result.")
    if kwargs.get("attn_implementation") == "flex_attention":  # whose masks are of a kind of their own
        raise ValueError("attn_implementation='flex_attention' cannot be used while fusing; take 'sdpa' or 'eager'.")
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False, **hub)  # only stock classes can be fused
    except Exception as error:  # of any kind, where a config holds what it should not
        if isinstance(error.__cause__ or error, HFValidationError):
            raise ValueError(f"There is no folder {base!r}, and it cannot be a name on the hub.") from None
        reason = " ".join(str(error).split())
        raise ValueError(f"No config of a model can be read for {base!r}: {reason:.400}") from None
    if config.model_type.startswith("fused_"):
        raise ValueError(
            f"{base!r} is fused already; fuse its base with a larger num_fusions, or save it with plain=True "
            "(--plain) and fuse that plain checkpoint."
        )
    family = _family(base, config)
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
            f"The config of {base!r} has max_position_embeddings={config.max_position_embeddings}, but fusing "
            f"takes {_SHORTEST_CONTEXT} tokens or more; repair the config."
        )
    _check_computable(base, config, family)
    if not gguf_file and optional_file(base, ADAPTER_CONFIG_NAME, hub):
        raise ValueError(f"{base!r} is an adapter, not a model; merge it into its base, and fuse that.")
    return config


def _family(base: str, config: PreTrainedConfig) -> Family:
    """The family of a base. Raises ValueError if it is none of those that can be fused."""
    family = FAMILIES.get(config.model_type)
    if family is None or not isinstance(config, family.config_class):  # of code that came with a checkpoint
        raise ValueError(
            f"{base!r} is a {config.model_type!r} model; only dense decoders of text fuse, which are those of type "
            f"{', '.join(FAMILIES)}."
        )
    return family


def finish_and_check(name: str | os.PathLike[str], hub: Mapping[str, Any]) -> None:
    """Finish what a killed save left in a checkpoint's folder, and look whether a model is there.

    Raises ValueError for a folder with neither a config nor a GGUF file or an adapter, which bring their own.
    """
    folder = Path(name, hub.get("subfolder", ""))
    finish_save(folder)
    if not os.path.isdir(name) or hub.get("gguf_file"):
        return
    if not folder.is_dir():
        raise ValueError(f"{os.fspath(name)!r} has no subfolder {hub['subfolder']!r}.")
    if not any(_is_file(folder / file) for file in (CONFIG_NAME, ADAPTER_CONFIG_NAME)):
        raise ValueError(
            f"{str(folder)!r} holds no model: config.json is missing (name a GGUF file with gguf_file= or --gguf-file)."
        )


def _is_file(file: Path) -> bool:
    """Whether there is such a file. Raises ValueError without permission to look."""
    try:
        return stat.S_ISREG(file.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise ValueError(f"{str(file)!r} cannot be read: {error.strerror or error}.") from None


def _check_computable(base: str, config: PreTrainedConfig, family: Family) -> None:
    """Raise ValueError if no model can be made of a config, or only an implausible one."""
    if not 1 <= config.num_hidden_layers <= MOST_LAYERS:
        raise ValueError(
            f"The config of {base!r} has num_hidden_layers={config.num_hidden_layers}, but a model has 1 to "
            f"{MOST_LAYERS}; repair the config."
        )
    for name in ("bos_token_id", "pad_token_id"):
        token = getattr(config, name)
        if token is not None and not 0 <= token < config.vocab_size:
            raise ValueError(
                f"The config of {base!r} has {name}={token}, but a vocabulary of {config.vocab_size} tokens, numbered "
                "from 0; repair the config."
            )
    try:
        family.rotary_embedding(config)
        with torch.device("meta"):
            family.decoder_layer(config, layer_idx=0)
    except Exception as error:  # of any kind: KeyError for a name, TypeError for a value, ZeroDivisionError, ...
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"No {family.title} can be built of the config of {base!r} ({reason:.300}); repair the config."
        ) from None


def check_arguments(given: Iterable[str], config: PreTrainedConfig, others: Collection[str] = ()) -> None:
    """Raise ValueError, with the nearest name, for an argument that nothing takes.

    transformers takes its own names and those of the config's values; `others` are what the caller takes.
    """
    function = inspect.unwrap(PreTrainedModel.from_pretrained)
    # Most of its arguments are not in its signature, but taken out of **kwargs by names that its code holds.
    constants = [names if isinstance(names, tuple) else (names,) for names in function.__code__.co_consts]
    taken = {name for names in constants for name in names if isinstance(name, str) and name.isidentifier()}
    taken |= {*inspect.signature(function).parameters, "code_revision"} - {"model_args", "kwargs"}
    for name in given:
        if name not in taken and name not in others and not hasattr(config, name):
            public = [known for known in (*others, *taken, *vars(config)) if known[:1] != "_"]
            raise ValueError(unknown_name("argument", name, public))


def load_tokenizer(base: str, kwargs: Mapping[str, Any]) -> PreTrainedTokenizerBase:
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


def check_names(base: str, hub: dict[str, Any], variant: str | None) -> dict[str, Path]:
    """For each tensor of a checkpoint in a folder the file that holds it; on the hub only an index is looked at.

    Raises ValueError if weights are elsewhere, or, in a folder, not whole or not safetensors.
    """
    if os.path.isdir(base):
        return tensor_files(Path(base, hub.get("subfolder", "")), variant)
    index = optional_file(base, with_variant(SAFE_WEIGHTS_INDEX_NAME, variant), hub)
    if index is not None:
        shard_names(Path(index))
    return {}


def without_adapter(name: str, hub: dict[str, Any]) -> str:
    """The checkpoint that transformers loads by a name: of an adapter alone the one that it was trained on."""
    if os.path.isfile(os.path.join(name, CONFIG_NAME)):
        return name
    file = optional_file(name, ADAPTER_CONFIG_NAME, hub)
    if file is None:
        return name
    values = parse_json(Path(file).read_bytes(), repr(file))
    base = values.get("base_model_name_or_path") if isinstance(values, dict) else None
    if not isinstance(base, str):
        raise ValueError(f"{file!r} does not name the model that the adapter belongs to; give that model.")
    return base


def optional_file(base: str, name: str, hub: dict[str, Any]) -> str | None:
    """Path of a checkpoint's file on this machine, None if there is no such file, or it cannot be fetched."""
    return cached_file(
        base,
        name,
        **{key: value for key, value in hub.items() if key != "gguf_file"},
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of from_pretrained's arguments that say where files are."""
    return {name: kwargs[name] for name in _HUB_ARGUMENTS if kwargs.get(name) is not None}
