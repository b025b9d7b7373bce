"""Fused models: models with fewer decoder layers that know how they were made, and save and explain themselves.

What they can do is in `FusedForCausalLM`; the classes of each family are made of that and of transformers' own. How
they are made stands in `lf_hf.fuse`.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

from huggingface_hub import ModelCard, create_repo
from torch.distributed.tensor import DTensor
from transformers import GenerationMixin, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_utils import _add_variant
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from lf_hf.checkpoint.base import Base, hub_arguments, load_tokenizer, optional_file
from lf_hf.checkpoint.card import CARD_NAME
from lf_hf.checkpoint.companions import write_companions
from lf_hf.checkpoint.configuration import (
    FUSED,
    FUSED_CONFIGS,
    FusedLlamaConfig,
    fused_config,
    fusion_entry,
    plain_config,
    register_peft,
)
from lf_hf.checkpoint.saving import checked_folder, finish_save, only_writer, replaced_files
from lf_hf.checkpoint.weights import shard_names, tensor_files
from lf_hf.families import FAMILIES, HEADS, Family, family_of
from lf_hf.report.report import REPORT_NAME, FusionReport
from lf_hf.runtime.launch import ALONE, Processes, rank
from lf_hf.runtime.numerics import weights_digest
from lf_hf.settings import FusionConfig

logger = logging.get_logger(__name__)
_CAUSAL_LM = "AutoModelForCausalLM"
_UPLOADING = ("private", "commit_message", "commit_description", "create_pr", "revision")  # transformers' names


class FusedForCausalLM(PreTrainedModel):
    """What fused models of all families are made of: FusedLlamaForCausalLM, FusedQwen3ForCausalLM, ..."""

    family: ClassVar[Family]
    _fuse: ClassVar[Callable[..., Any]]  # set by lf_hf.fuse: fusing is a client of these classes
    _opened_in: Path | None = None  # the folder
    _trusts_code: bool | None = None  # as it was loaded with

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        register_peft()
        self.fusion_report: FusionReport | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None

    @classmethod
    def from_pretrained_fused(
        cls: type[Model], base: str | os.PathLike[str] | Base, config: FusionConfig | None = None, **kwargs: Any
    ) -> Model:
        """Load a model of this class's family and fuse its layers.

        Parameters
        ----------
        base, config, **kwargs
            As for `lf_hf.from_pretrained_fused`, which loads models of all families: `calibration`, `tokenizer`,
            `fused_dir`, settings, ...

        Raises
        ------
        ValueError
            As that function does; also for a base of another family.
        """
        return cls._fuse(base, config, model_class=cls, **kwargs)

    @classmethod
    def adopt(cls: type[Model], stock: Any, report: FusionReport, tokenizer: PreTrainedTokenizerBase) -> Model:
        """Turn a stock model, whose layers are fused, into this class, keeping its modules and their hooks."""
        # A base from GGUF is plain floats now, whatever the loader left behind.
        for name in ("hf_quantizer", "is_quantized", "quantization_method"):
            stock.__dict__.pop(name, None)
        _turn_into(cls, stock, fused_config(stock.config, report))
        register_peft()
        stock.fusion_report, stock.tokenizer = report, tokenizer
        return stock

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As for any transformers model; `fusion_report` is read from the checkpoint.

        It is None, with a warning, where the report cannot be read. Of an adapter's folder the model that it belongs
        to is loaded, with the adapter.
        """
        hub, name = hub_arguments(kwargs), os.fspath(pretrained_model_name_or_path or "")
        folder, variant = Path(name, hub.get("subfolder", "")), kwargs.get("variant")
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True  # pickled weights can run code
        if name and kwargs.get("config") is None:  # else the files that it was read with count
            finish_save(folder)
            cls._check_family(name, hub)
        index, single = (folder / _add_variant(file, variant) for file in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME))
        if index.is_file() and not single.is_file():  # beside which no index is looked at
            shard_names(index)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        name = str(model.name_or_path)  # which an adapter's folder has led to
        model._trusts_code = kwargs.get("trust_remote_code")
        if os.path.isdir(name):
            model._opened_in = Path(name, hub.get("subfolder", "")).resolve()
            read = kwargs["use_safetensors"] and kwargs.get("state_dict") is None and not hub.get("gguf_file")
            if read and getattr(model, "hf_quantizer", None) is None:  # quantised weights are integers
                tensor_files(model._opened_in, variant)
        if name and (file := optional_file(name, REPORT_NAME, hub)):
            try:
                model.fusion_report = FusionReport.load(file)
            except (ValueError, OSError) as error:  # damaged, or of a newer version: the weights are good
                logger.warning(f"{str(error).rstrip('.')}; the model is loaded without its report.")
        if model.fusion_report is not None and model.config.fusion is None:  # of a plain checkpoint
            model.config.fusion = fusion_entry(model.fusion_report)
        return loaded

    @classmethod
    def _check_family(cls, name: str, hub: dict[str, Any]) -> None:
        """Raise ValueError, before weights are read, for a model of another family; an adapter names its own model."""
        if not optional_file(name, CONFIG_NAME, hub) and optional_file(name, ADAPTER_CONFIG_NAME, hub):
            return
        model_type = PreTrainedConfig.get_config_dict(name, **hub)[0].get("model_type")
        family = str(model_type).removeprefix(FUSED)
        if family != cls.family.model_type:
            loader = f"; load it with {FUSED_CLASSES[family][_CAUSAL_LM].__name__}" if family in FUSED_CLASSES else ""
            raise ValueError(
                f"{name!r} has no config.json of a {cls.family.model_type!r} model, as {cls.__name__} needs: its "
                f"model_type is {model_type!r}{loader}."
            )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        *args: Any,
        plain: bool | None = None,
        as_llama: bool | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        repo_id: str | None = None,
        token: str | bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Save the model, its report, a model card and the tokenizer into a folder, all or nothing.

        Files of a checkpoint that lf_hf saved there before are replaced, and other weights and configs as by any
        transformers model; all else in the folder stays. A model whose weights are spread over processes must be saved
        by all of them; rank 0 writes.

        Parameters
        ----------
        save_directory : path
        push_to_hub, repo_id, token
            Also upload what was written; `repo_id` defaults to the folder's name.
        plain : bool, optional
            Write a plain checkpoint, of the base's own architecture, that programs without lf_hf open. Default: no.
        as_llama : bool, optional
            Another name of `plain`.
        tokenizer : optional
            Default: the base's, or that in the folder that the model was loaded from, unless there is one in the folder
            to save into that lf_hf did not write.
        is_main_process, state_dict, *args, **kwargs
            As for any transformers model: max_shard_size, variant, ...

        Raises
        ------
        ValueError
            If the path is empty or a file's, or `plain` is asked of a model with an adapter.
        OSError
            If another process is saving there, or if files cannot be written.
        """
        folder, plain = checked_folder(save_directory), bool(plain or as_llama)
        checked_tokenizer(tokenizer)
        if plain:
            self._check_without_adapter()
        writes = is_main_process and not rank()
        if kwargs.get("distributed_checkpoint"):  # a training's state in files of all ranks, which is no checkpoint
            kwargs |= {"token": token, "repo_id": repo_id or folder.name}
            return super().save_pretrained(folder, writes, state_dict, push_to_hub, *args, **kwargs)
        uploading = {name: kwargs.pop(name) for name in _UPLOADING if name in kwargs}
        tensors = self.state_dict() if state_dict is None else state_dict
        sharded = any(isinstance(tensor, DTensor) for tensor in tensors.values())
        if sharded:
            state_dict = _gathered(tensors)
            if self.config.tie_word_embeddings and state_dict:  # gathered one by one, they share no memory any more
                state_dict.pop("lm_head.weight", None)

        def save() -> None:
            if not writes:
                return
            with only_writer(folder), replaced_files(folder, own_tokenizer=tokenizer is not None) as new:
                if push_to_hub:
                    before.update((file.name, file.stat().st_mtime) for file in folder.iterdir() if file.exists())
                self.write_files(new, state_dict, *args, plain=plain, tokenizer=tokenizer, **kwargs)

        before = dict[str, float]()
        (Processes.of_launch() if sharded else ALONE).broadcast_object(save)
        if not self.name_or_path:  # of a model that was fused here; adapters trained on it name it
            self.name_or_path = self.config._name_or_path = os.fspath(save_directory)
        if push_to_hub and writes:
            self._upload(folder, repo_id or folder.name, before, token=token, **uploading)

    def should_save_on_this_rank(self, is_main_process: bool) -> bool:
        """What transformers asks before it writes weights; who calls it has decided before."""
        return is_main_process

    def write_files(
        self,
        folder: Path,
        state_dict: dict[str, Any] | None = None,
        *args: Any,
        plain: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        """Write what `save_pretrained` saves into a folder that the caller looks after."""
        tokenizer = tokenizer or self.tokenizer or self._tokenizer_of_checkpoint()
        spread = vars(self.config).pop("distributed_config", None)  # else transformers would gather, on all ranks
        try:
            super().save_pretrained(folder, True, state_dict, False, *args, **kwargs)
        finally:
            if spread is not None:
                self.config.distributed_config = spread
        if plain:
            config = plain_config(self.config)
            config.architectures = [self.family.causal_lm.__name__]
            config.save_pretrained(folder)
        written = dict(self.named_parameters())
        if state_dict is not None:  # what is saved in place of them
            written = {name: state_dict[name] for name in written if name in state_dict}
        report = self.fusion_report and self.fusion_report.of_weights(weights_digest(written.items()))
        write_companions(folder, self.config, report, tokenizer, plain=plain)

    def _tokenizer_of_checkpoint(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer in the folder that the model was loaded from, if there is one."""
        if self._opened_in is None or not (self._opened_in / TOKENIZER_CONFIG_FILE).is_file():
            return None
        try:
            return load_tokenizer(str(self._opened_in), {"trust_remote_code": self._trusts_code})
        except ValueError as error:  # the weights may be all that is left of a long training
            logger.warning(f"{str(error).rstrip('.')}; the model is saved without a tokenizer.")
            return None

    def push_to_hub(  # type: ignore[override]
        self, repo_id: str, *, tags: list[str] | None = None, token: bool | str | None = None, **kwargs: Any
    ) -> str:
        """Upload what `save_pretrained(**kwargs)` writes, model card included; returns the commit's address.

        `private`, `commit_message`, `commit_description`, `create_pr` and `revision` are as for any transformers model.
        """
        uploading = {name: kwargs.pop(name) for name in _UPLOADING if name in kwargs}
        with tempfile.TemporaryDirectory() as folder:
            name = self.name_or_path or repo_id
            self.save_pretrained(folder, **kwargs)
            self.name_or_path = self.config._name_or_path = name
            if tags:
                file = Path(folder, CARD_NAME)  # none of a model without a report
                card = ModelCard.load(file) if file.is_file() else ModelCard("---\n{}\n---\n")
                card.data["tags"] = [*(card.data.get("tags") or []), *tags]
                card.save(file)
            return self._upload(folder, repo_id, {}, token=token, **uploading)

    def _upload(
        self, folder: Any, repo_id: str, before: dict[str, float], *, token: Any, private: Any = None, **commit: Any
    ) -> str:
        """Upload the files of a folder that changed after times that were noted `before`."""
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        return str(self._upload_modified_files(folder, repo_id, before, token=token, **commit))

    def _check_without_adapter(self) -> None:
        if any(".base_layer." in name for name, _ in self.named_parameters()):
            raise ValueError(
                "A model with an adapter cannot be saved as a plain one; load it without the adapter, or merge the "
                "adapter with PEFT's PeftModel.from_pretrained and merge_and_unload."
            )

    def to_plain(self) -> Any:
        """A model of transformers' own class for the base's architecture that shares this model's weights.

        Raises
        ------
        ValueError
            If weights are offloaded: there is nothing in memory to share. Also with an adapter.
        """
        self._check_without_adapter()
        for name, parameter in self.named_parameters():
            if parameter.device.type == "meta":
                raise ValueError(f"{name} is offloaded; use save_pretrained(plain=True) and load what it writes.")
        shared: dict[int, Any] = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        plain = copy.deepcopy(self, shared | {id(self.tokenizer): None})
        _turn_into(self.family.causal_lm, plain, plain_config(self.config))
        return plain


def _turn_into(model_class: Any, model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Make a model one of another class with the same modules.

    The decoder stays as it is: transformers knows what else a class can return, such as hidden states, only once one of
    it was built.
    """
    for module in model.modules():
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            vars(module)["config"] = config
    model.name_or_path = config._name_or_path
    model.__class__ = model_class


Model = TypeVar("Model", bound=FusedForCausalLM)


class FusedLlamaForCausalLM(FusedForCausalLM, LlamaForCausalLM, GenerationMixin):
    """A Llama whose layers were fused. Computes what LlamaForCausalLM computes.

    Attributes
    ----------
    fusion_report : FusionReport or None
        What was fused and how well it went; read from the checkpoint where the model was loaded from one.
    tokenizer : PreTrainedTokenizerBase or None
        The base's tokenizer where the model was fused in this process; saved with the model.
    """

    family = FAMILIES["llama"]
    config_class = FusedLlamaConfig
    config: FusedLlamaConfig

    def to_llama(self) -> LlamaForCausalLM:
        """A stock LlamaForCausalLM that shares this model's weights: `to_plain`."""
        return self.to_plain()


def _classes_of(family: Family) -> dict[str, Any]:
    """transformers' own classes of a family, with the config of a fused model, by the Auto classes that find them."""
    config, lm = FUSED_CONFIGS[family.model_type], family.causal_lm

    def derived(stock: Any, *bases: type, **contents: Any) -> Any:
        contents |= {"config_class": config, "__annotations__": {"config": config}, "__module__": __name__}
        contents["__doc__"] = f"A {stock.__name__} whose layers were fused. Computes what that computes."
        return type(f"Fused{stock.__name__}", bases or (stock,), contents)

    classes = {"AutoConfig": config, "AutoModel": derived(family.model_class), _CAUSAL_LM: FusedLlamaForCausalLM}
    if family.model_type != "llama":
        classes[_CAUSAL_LM] = derived(lm, FusedForCausalLM, lm, GenerationMixin, family=family)
    for kind in HEADS:
        if (stock := family.head_class(kind)) is not None:
            # The prefix is that of all other checkpoints; some heads' own classes would find no layers in them.
            classes[f"AutoModelFor{kind}"] = derived(stock, base_model_prefix=lm.base_model_prefix)
    return classes


FUSED_CLASSES = MappingProxyType({name: _classes_of(family) for name, family in FAMILIES.items()})
"""By the base's `model_type`, then by the names of Auto classes; by their own names they are in this module, too."""
globals().update({made.__name__: made for classes in FUSED_CLASSES.values() for made in classes.values()})


def fused_class(config: PreTrainedConfig) -> type[FusedForCausalLM]:
    """The class of fused models for the family of a base's or fused config. Raises ValueError where it is of none."""
    return FUSED_CLASSES[family_of(config).model_type][_CAUSAL_LM]


def with_buffers(model: Any, like: Any) -> None:
    """Give a model without buffers, which no checkpoint has, those that one of the same layers has, on its device."""
    rotary_embedding = family_of(model.config).rotary_embedding(model.config)  # its own, as long texts change them
    model.model.rotary_emb = rotary_embedding.to(like.device)
    for name, buffer in [*model.named_buffers()]:
        if buffer.device.type == "meta":
            place, _, short = name.rpartition(".")
            model.get_submodule(place).register_buffer(short, like.get_buffer(name).clone(), persistent=False)


def checked_tokenizer(tokenizer: object) -> PreTrainedTokenizerBase | None:
    """A tokenizer that a user gave, if any. Raises ValueError if it is none."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase | None):
        raise ValueError(f"tokenizer must be a loaded tokenizer, got {tokenizer!r:.80}.")
    return tokenizer


def _gathered(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The tensors of a sharded model in one piece, in rank 0's memory; all ranks must call it."""
    whole = {}
    for name, tensor in state_dict.items():
        gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if not rank():
            whole[name] = gathered.cpu()
    return whole
