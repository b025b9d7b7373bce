"""Fused models in memory: models of transformers' own classes that know how they were made, and save and explain it.

All that they can do stands in `FusedForCausalLM`, which `fused_class` adds to the class of any family. How they are
made stands in `lf_hf.fuse`.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

from huggingface_hub import ModelCard, create_repo
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_utils import _add_variant
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, logging
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from lf_hf.checkpoint.base import hub_arguments, load_tokenizer, optional_file, read_config, read_processor_files
from lf_hf.checkpoint.card import CARD_NAME
from lf_hf.checkpoint.companions import write_companions
from lf_hf.checkpoint.configuration import NOT_KEPT, FusedLlamaConfig, plain_config, register_peft
from lf_hf.checkpoint.saving import checked_folder
from lf_hf.checkpoint.weights import check_weights, weight_files
from lf_hf.decoder.placement import named_values
from lf_hf.families.models import auto_class, family_of, is_wrapper, model_class
from lf_hf.report.report import REPORT_NAME, FusionReport
from lf_hf.runtime.numerics import weights_digest

logger = logging.get_logger(__name__)
# Arguments of uploading, as transformers names them.
_UPLOADING = ("repo_id", "token", "private", "commit_message", "commit_description", "create_pr", "revision")


class FusedForCausalLM(PreTrainedModel):
    """A fused model of any family, as a mixin of transformers' own class.

    `fusion_report` says how it was made, where that is known. `tokenizer` is the base's, where the model was fused in
    this process, and is saved with it.
    """

    native: ClassVar[bool] = False
    """Whether checkpoints have a format of their own, so that `plain` makes a difference."""
    fusion_report: FusionReport | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    processor_files: Mapping[str, bytes] = MappingProxyType({})
    """Of a vision-language model: its base's files that say how images are read, by their names."""
    _opened_in: Path | None = None  # the folder
    _trusts_code: bool | None = None  # as it was loaded with

    @classmethod
    def adopt(cls: type[Model], model: Any, report: FusionReport, tokenizer: PreTrainedTokenizerBase) -> Model:
        """Turn a model of transformers' own class, whose layers are fused, into this class.

        Its modules and their hooks stay. It is another model than its base now, in plain floats.
        """
        config = model.config
        if family_of(config).mlp.experts:  # which are one tensor in memory, and may be many in files
            vars(model).pop("_weight_conversions", None)
        elif not is_wrapper(config):  # a vision-language model is saved under the names that its base's files have
            model._weight_conversions = []
        for name in NOT_KEPT:
            vars(config).pop(name, None)
        config._name_or_path = model.name_or_path = ""
        model.__class__, config.__class__ = cls, cls.config_class
        model.tokenizer = tokenizer
        model.remember(report)
        return model

    @property
    def report(self) -> FusionReport:
        """The report of a model that was made in this process, which has one."""
        assert self.fusion_report is not None
        return self.fusion_report

    def remember(self, report: FusionReport) -> None:
        """Take a report as this model's, and as its config's, where that has a place for it."""
        self.fusion_report = report
        if isinstance(self.config, FusedLlamaConfig):
            self.config.remember(report)
            register_peft()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As for any transformers model; `fusion_report` is read from the checkpoint.

        It is None, with a warning, where the report cannot be read. Of an adapter's folder the model that it belongs
        to is loaded, with the adapter.
        """
        name = os.fspath(pretrained_model_name_or_path or "")
        hub = hub_arguments(kwargs)
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True  # pickled weights can run code
        folder, variant = Path(name, hub.get("subfolder", "")), kwargs.get("variant")
        if (folder / _add_variant(SAFE_WEIGHTS_INDEX_NAME, variant)).is_file():
            weight_files(folder, variant)  # of which all lie in the folder
        if name and kwargs.get("config") is None:  # else the files that it was read with count
            cls._check_family(name, hub)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        name = str(model.name_or_path)  # which an adapter's folder has led to
        model._trusts_code = kwargs.get("trust_remote_code")
        if os.path.isdir(name):
            model._opened_in = Path(name, hub.get("subfolder", "")).resolve()
            model.processor_files = read_processor_files(name, model.config, hub)
            from_files = kwargs["use_safetensors"] and kwargs.get("state_dict") is None
            if from_files and getattr(model, "hf_quantizer", None) is None:  # quantised weights are integers
                check_weights(model._opened_in, variant)
        if name and (file := optional_file(name, REPORT_NAME, hub)):
            try:
                model.remember(FusionReport.load(file))
            except (ValueError, OSError) as error:  # damaged, or of a newer version: the weights are good
                logger.warning(f"{str(error).rstrip('.')}; the model is loaded without its report.")
        return loaded

    @classmethod
    def _check_family(cls, name: str, hub: dict[str, Any]) -> None:
        """Raise ValueError, before weights are read, for a model of another family."""
        if not optional_file(name, CONFIG_NAME, hub) and optional_file(name, ADAPTER_CONFIG_NAME, hub):
            return  # an adapter, which names its model
        config, own = read_config(name, hub), cls.config_class.model_type  # type: ignore[union-attr]
        plain = own.removeprefix("fused_")
        if config.model_type not in (own, plain):
            raise ValueError(
                f"{name!r} has no config.json of a {plain!r} model, as {cls.__name__} needs: its model_type is "
                f"{config.model_type!r}; load it with {auto_class(config)}."
            )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        *args: Any,
        plain: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        """Save the model as any transformers model is saved, and its report, a model card and the tokenizer beside it.

        Parameters
        ----------
        save_directory : path
        push_to_hub
            Also upload what was written, to `repo_id`, which defaults to the folder's name.
        plain : bool
            Of a FusedLlamaForCausalLM: write a checkpoint of a Llama, which opens without lf_hf. Models of all other
            families are always written as their base is.
        tokenizer : optional
            Default: the base's, or that in the folder that the model was loaded from.
        is_main_process, state_dict, *args, **kwargs
            As for any transformers model: max_shard_size, variant, ...

        Raises
        ------
        ValueError
            If the path is empty or a file's, or `plain` is asked of a model with an adapter.
        """
        folder = checked_folder(save_directory)
        checked_tokenizer(tokenizer)
        if plain and any(".base_layer." in name for name, _ in self.named_parameters()):
            raise ValueError(
                "A model with an adapter cannot be saved as a plain one; load it without the adapter, or merge the "
                "adapter with PEFT's PeftModel.from_pretrained and merge_and_unload."
            )
        uploading = {"repo_id": folder.name} | {name: kwargs.pop(name) for name in _UPLOADING if name in kwargs}
        before = {file.name: file.stat().st_mtime for file in folder.glob("*") if file.exists()}
        # What is read before files are written, as it may lie where they go.
        tokenizer = tokenizer or self.tokenizer or self._tokenizer_of_checkpoint()
        super().save_pretrained(str(folder), is_main_process, state_dict, False, *args, **kwargs)
        if not self.should_save_on_this_rank(is_main_process):
            return
        if plain and self.native:
            config = plain_config(self.config)
            config.dtype = self.dtype
            config.architectures = [model_class(config).__name__]
            config.save_pretrained(folder)
        written = named_values(self)
        if state_dict is not None:  # what is saved in place of them
            names = (name for name, _ in (*self.named_parameters(), *self.named_buffers()))
            written = ((name, state_dict[name]) for name in names if name in state_dict)
        report = self.fusion_report and self.fusion_report.for_weights(weights_digest(written))
        plain = plain or not self.native
        write_companions(folder, self.config, report, tokenizer, self.processor_files, plain=plain)
        self.is_found_at(os.fspath(save_directory))
        if push_to_hub:
            self._upload(folder, before, **uploading)

    def is_found_at(self, name: str) -> None:
        """Take a folder or hub name as the model's, if it has none: adapters that are trained on it name their base."""
        if not self.name_or_path:
            self.name_or_path = self.config._name_or_path = name

    def _tokenizer_of_checkpoint(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer in the folder that the model was loaded from, if there is one."""
        if self._opened_in is None or not (self._opened_in / TOKENIZER_CONFIG_FILE).is_file():
            return None
        try:
            return load_tokenizer(str(self._opened_in), {"trust_remote_code": self._trusts_code})
        except ValueError as error:  # the weights may be all that is left of a long training
            logger.warning(f"{str(error).rstrip('.')}; the model is saved without a tokenizer.")
            return None

    def push_to_hub(self, repo_id: str, *, tags: str | list[str] | None = None, **kwargs: Any) -> str:  # type: ignore[override]
        """Upload what `save_pretrained(**kwargs)` writes, model card included; returns the commit's address.

        `private`, `commit_message`, `commit_description`, `create_pr` and `revision` are as for any transformers model.
        """
        uploading = {name: kwargs.pop(name) for name in _UPLOADING if name in kwargs}
        with tempfile.TemporaryDirectory() as folder:
            name = str(self.name_or_path)
            self.save_pretrained(folder, **kwargs)
            self.name_or_path = self.config._name_or_path = name
            if tags:
                file = Path(folder, CARD_NAME)  # none of a model without a report
                card = ModelCard.load(file) if file.is_file() else ModelCard("---\n{}\n---\n")
                card.data["tags"] = [*(card.data.get("tags") or []), *([tags] if isinstance(tags, str) else tags)]
                card.save(file)
            return self._upload(folder, {}, repo_id, **uploading)

    def _upload(
        self, folder: Any, before: dict[str, float], repo_id: str, token: Any = None, private: Any = None, **commit: Any
    ) -> str:
        """Upload the files of a folder that changed after times that were noted `before`."""
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        self.is_found_at(repo_id)
        return str(self._upload_modified_files(folder, repo_id, before, token=token, **commit))


Model = TypeVar("Model", bound=FusedForCausalLM)


def fused_class(config: PreTrainedConfig) -> type[FusedForCausalLM]:
    """transformers' own class of a model, as a class of fused models.

    It has the name of transformers' class: checkpoints name that one, and programs know what it computes by its name.
    """
    return _with_fusion(model_class(config))


@functools.cache
def _with_fusion(stock: Any) -> type[FusedForCausalLM]:
    contents = {
        "__doc__": FusedForCausalLM.__doc__,
        "__module__": stock.__module__,
        "__reduce__": lambda self: (_empty_model, (self.config,), vars(self)),  # for copies and pickles
        "config_class": stock.config_class,
    }
    return type(stock.__name__, (FusedForCausalLM, stock, GenerationMixin), contents)


def _empty_model(config: PreTrainedConfig) -> FusedForCausalLM:
    cls = fused_class(config)
    return cls.__new__(cls)


def checked_tokenizer(tokenizer: object) -> PreTrainedTokenizerBase | None:
    """A tokenizer that a user gave, if any. Raises ValueError if it is none."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase | None):
        raise ValueError(f"tokenizer must be a loaded tokenizer, got {tokenizer!r:.80}.")
    return tokenizer
