"""Fused models: models with fewer decoder layers that can make, save and explain themselves.

What they can do is in `FusedForCausalLM`; the classes of each family are made of that and of transformers' own.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import StrictDataclassError
from torch.distributed.tensor import DTensor
from transformers import (
    GenerationMixin,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from lf_hf.checkpoint.base import (
    Base,
    check_names,
    finish_and_check,
    hub_arguments,
    is_spread,
    load_tokenizer,
    optional_file,
    without_adapter,
)
from lf_hf.checkpoint.card import CARD_NAME
from lf_hf.checkpoint.companions import is_plain, write_companions
from lf_hf.checkpoint.configuration import (
    FUSED,
    FUSED_CONFIGS,
    FusedLlamaConfig,
    fused_config,
    fusion_entry,
    plain_config,
)
from lf_hf.checkpoint.fused_cache import fingerprints, why_not_reused
from lf_hf.checkpoint.saving import (
    check_replaceable,
    checked_folder,
    only_writer,
    replaced_files,
)
from lf_hf.checkpoint.weights import check_floats
from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.families import FAMILIES, HEADS, Family, check_layers, family_of, is_tied
from lf_hf.report.report import REPORT_NAME, FusionReport
from lf_hf.runtime.launch import ALONE, Processes, local_rank, rank
from lf_hf.runtime.numerics import weights_digest
from lf_hf.settings import FusionConfig, fusion_settings
from lf_hf.text.calibration import Calibration, Corpus, load_needed, load_training_text
from lf_hf.text.readers import Samples

if TYPE_CHECKING:
    from lf_hf.measure import Measurements

logger = logging.get_logger(__name__)
_UPLOADING = ("private", "commit_message", "commit_description", "create_pr", "revision")  # of save_pretrained


@dataclass(frozen=True)
class FusionInputs:
    """All that a fusion is made of. `samples` and `text` may be None where there are measurements.

    `to_heal` is the text of the healing that follows, where there is one.
    """

    base: Base
    config: FusionConfig
    tokenizer: PreTrainedTokenizerBase
    samples: Calibration | None
    text: Corpus | None
    measurements: Measurements | None = None
    to_heal: Corpus | None = None

    def check_text(self) -> None:
        """Raise ValueError, before weights are read, if there is too little calibration text."""
        from lf_hf.measure import given_sequences  # imports scipy and scikit-learn, which loading does not need

        if self.text is not None:
            given_sequences(self.base.config, self.tokenizer, self.text, self.config)


class FusedForCausalLM(PreTrainedModel):
    """What fused models of all families are made of: FusedLlamaForCausalLM, FusedQwen3ForCausalLM, ..."""

    family: ClassVar[Family]
    _opened_in: str | None = None  # the folder
    _opened_with: Mapping[str, Any] = MappingProxyType({})  # arguments with which its tokenizer is read, too

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.fusion_report: FusionReport | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None

    @classmethod
    def from_pretrained_fused(
        cls: type[Model],
        base: str | os.PathLike[str] | Base,
        config: FusionConfig | None = None,
        *,
        calibration: Samples | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        measurements: Measurements | None = None,
        fused_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> Model:
        """Load a model and fuse its layers.

        Processes that a launcher started share the work, and each of them gets the result: all must call this.

        Parameters
        ----------
        base : str or Base
            Hub name or folder of a checkpoint of the class's family, or one that `lf_hf.checkpoint.base.Base.open` has
            opened.
        config : FusionConfig, optional
            Settings; FusionConfig fields in `kwargs` override it. Without it `num_fusions` or a budget is required.
        calibration : list of str or chats, or path, optional
            Calibration text, as `lf_hf.text.calibration.load_calibration` takes it, and what is healed on where
            `heal_tokens` asks for that. Default: MMLU questions, or for `refit` and healing the mixture of
            `lf_hf.text.calibration.load_corpus`.
        tokenizer : optional
            The base's tokenizer, if it is not beside the base.
        measurements : Measurements, optional
            What `lf_hf.measure.measure` found on the same base, to fuse it several times; by default it is measured.
        fused_dir : path, optional
            Where to keep the fused model. If one is there that was made of the same base (by content), calibration
            text and settings, it is loaded; else the base is fused and saved there, once on each machine. Not with
            `measurements`.
        **kwargs
            FusionConfig fields; all others go to `from_pretrained` (dtype, device_map, revision, gguf_file, ...).

        Raises
        ------
        ValueError
            Before any long work, for settings, a base or calibration text that cannot be used.
        """
        kept_in = None if fused_dir is None else checked_folder(fused_dir)
        if kept_in is not None and measurements is not None:
            raise ValueError(
                "fused_dir and measurements exclude each other: measurements do not say what text they are of. Leave "
                "one of them out."
            )
        config = fusion_settings(config, kwargs)
        base = base if isinstance(base, Base) else Base.open(base, kwargs)
        if base.family != cls.family:
            raise ValueError(
                f"{base.full_name!r} is a {base.config.model_type!r} model, so it is fused with "
                f"{fused_class(base.config).__name__}, not with {cls.__name__}; or use lf_hf.from_pretrained_fused, "
                "which finds the class itself."
            )
        check_layers(config, base.config)
        own, opened = checked_tokenizer(tokenizer), base
        samples, text = (
            (None, None) if measurements else load_needed(config, calibration, lambda: own or opened.tokenizer())
        )
        tokenizer = own or base.tokenizer()
        to_heal = load_training_text(calibration, config.heal_tokens, lambda: tokenizer) if config.heal_tokens else None
        inputs = FusionInputs(base, config, tokenizer, samples, text, measurements, to_heal)
        # Where each process spreads its model over several devices, its states are not on its own one.
        processes = ALONE if is_spread(base.loading.get("device_map")) else Processes.of_launch()
        if kept_in is None:
            return cls._load_and_fuse(inputs, processes)
        return cls._load_or_fuse(inputs, kept_in, processes)

    @classmethod
    def _load_and_fuse(cls: type[Model], inputs: FusionInputs, processes: Processes) -> Model:
        """Load the base and fuse it in memory."""
        from lf_hf import pipeline  # imports scipy and scikit-learn, which loading does not need

        if inputs.to_heal is not None:
            from lf_hf.healing.heal import check_can_heal, heal_loaded  # import the Trainer, which takes seconds

            check_can_heal(inputs.base, inputs.tokenizer, inputs.to_heal, inputs.config)
        inputs.check_text()
        loaded = inputs.base.load()
        decoder = ModelDecoder(loaded, keep_originals=inputs.config.refit != "none", processes=processes)
        report = pipeline.fuse(
            decoder,
            inputs.tokenizer,
            inputs.config,
            inputs.samples,
            inputs.text,
            base=inputs.base.full_name,
            measurements=inputs.measurements,
        )
        model = cls.adopt(loaded, report, inputs.tokenizer)
        if inputs.to_heal is not None:
            heal_loaded(model, inputs.base, inputs.to_heal, inputs.config)
        return model

    @classmethod
    def _load_or_fuse(cls: type[Model], inputs: FusionInputs, folder: Path, processes: Processes) -> Model:
        """Load what one of several runs fused and kept, or fuse it."""
        base, config = inputs.base, inputs.config
        made_of = fingerprints(base, inputs.tokenizer, inputs.samples, inputs.text, inputs.to_heal)
        model: Model | None = None

        def to_fuse() -> list[str]:
            reasons = processes.all_gather_object(
                why_not_reused(folder, config, made_of)
            )  # machines may have a folder each
            return [reason for reason in reasons if reason]

        with ExitStack() as stack:
            if to_fuse():
                check_replaceable(folder, base.name)
                processes.broadcast_object(lambda: bool(stack.enter_context(only_writer(folder, wait=True))))
                if reasons := to_fuse():  # checked again under the lock
                    if (folder / REPORT_NAME).is_file():
                        logger.warning(f"{reasons[0]} Fusing, to replace it.")
                    model = cls._load_and_fuse(inputs, processes)
                    assert model.fusion_report is not None
                    model.fusion_report = dataclasses.replace(model.fusion_report, fingerprints=made_of)
                    processes.broadcast_object(partial(model._write_whole, folder))
            if (
                model is not None
                and not processes.is_main
                and local_rank() == 0
                and why_not_reused(folder, config, made_of)
            ):
                with only_writer(folder, wait=True):
                    model._write_whole(folder)
        if model is None:
            logger.info(f"Loading what was fused before from {str(folder)!r}.")
            model = cast(Model, cls.from_pretrained(folder, **base.loading_fused()))
            model.tokenizer = inputs.tokenizer
            if to_fuse():  # replaced while it was read, by a run with other settings
                del model
                return cls._load_or_fuse(inputs, folder, processes)
        return model

    def _write_whole(self, folder: Path) -> None:
        with replaced_files(folder) as written:
            self.write_files(written)

    @classmethod
    def adopt(
        cls: type[Model], stock: PreTrainedModel, report: FusionReport, tokenizer: PreTrainedTokenizerBase
    ) -> Model:
        """Turn a stock model, whose layers are fused, into this class, keeping its modules and their hooks."""
        config = fused_config(stock.config, report)
        for module in stock.modules():
            if isinstance(getattr(module, "config", None), PreTrainedConfig):
                vars(module)["config"] = config
        stock.name_or_path = config._name_or_path
        # A base from GGUF is plain floats now, whatever the loader left behind.
        for name in ("hf_quantizer", "is_quantized", "quantization_method"):
            stock.__dict__.pop(name, None)
        # The decoder stays a stock one, as in a model that was loaded: transformers knows what else a class can
        # return, such as hidden states, only once one of it was built.
        stock.__class__ = cls
        assert isinstance(stock, cls)
        stock.fusion_report = report
        stock.tokenizer = tokenizer
        return stock

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As for any transformers model; `fusion_report` is read from the checkpoint.

        It is None, with a warning, where the report cannot be read. Of an adapter's folder the model that it belongs
        to is loaded, with the adapter.
        """
        hub = hub_arguments(kwargs)
        if fusing := [name for name in kwargs if name in (*FusionConfig.field_names(), "calibration", "fused_dir")]:
            raise ValueError(f"from_pretrained takes no {fusing[0]}; a model is fused with from_pretrained_fused.")
        if pretrained_model_name_or_path is not None and kwargs.get("config") is None:
            # With a config that was read before, the files that it was read with count.
            finish_and_check(pretrained_model_name_or_path, hub)
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True  # pickled weights can run code
        own_files = pretrained_model_name_or_path is not None and kwargs.get("state_dict") is None
        name = "" if pretrained_model_name_or_path is None else os.fspath(pretrained_model_name_or_path)
        name = without_adapter(name, hub) if name else name
        if name and kwargs.get("config") is None and not hub.get("gguf_file"):
            cls._check_family(name, hub)
        tensors = {}
        if own_files and kwargs["use_safetensors"] and not hub.get("gguf_file"):
            tensors = check_names(name, hub, kwargs.get("variant"))
        try:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except (StrictDataclassError, ZeroDivisionError, KeyError) as error:  # the latter two of an edited config
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(
                f"The config of {pretrained_model_name_or_path!r} is of no {cls.family.title}: {reason:.300}"
            ) from None
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._opened_in = str(Path(name).resolve()) if os.path.isdir(name) else None
        model._opened_with = hub | {"trust_remote_code": kwargs.get("trust_remote_code")}
        if (family := family_of(model.config)) is not cls.family:
            raise ValueError(
                f"{pretrained_model_name_or_path!r} is a {family.title}; load it with "
                f"{fused_class(model.config).__name__}."
            )
        if not isinstance(model.config.fusion, dict | None):
            raise ValueError(
                f"fusion in the config of {pretrained_model_name_or_path!r} must be an object or null, got "
                f"{model.config.fusion!r:.80}; save the model again."
            )
        if getattr(model, "hf_quantizer", None) is None:  # quantised weights are integers as they should be
            check_floats(tensors)
        file = optional_file(name, REPORT_NAME, hub) if name else None
        if file is not None:
            try:
                model.fusion_report = FusionReport.load(file)
            except (ValueError, OSError) as error:  # damaged, or of a newer version: the weights are good
                logger.warning(f"{str(error).rstrip('.')}; the model is loaded without its report.")
        if model.fusion_report is not None and model.config.fusion is None:  # of a plain checkpoint
            model.config.fusion = fusion_entry(model.fusion_report)
        return loaded

    @classmethod
    def _check_family(cls, name: str, hub: Mapping[str, Any]) -> None:
        """Raise ValueError, before weights are read, for a checkpoint of another family."""
        try:
            values: Any = PreTrainedConfig.get_config_dict(name, **hub)[0]
        except (OSError, ValueError):  # which transformers says itself
            return
        if not isinstance(values, dict):
            raise ValueError(f"The config.json of {name!r} holds no object; repair it.")
        model_type = values.get("model_type")
        if model_type is None or str(model_type).removeprefix(FUSED) == cls.family.model_type:
            return
        if made := FUSED_CLASSES.get(str(model_type).removeprefix(FUSED)):
            family: Family = made.causal_lm.family
            raise ValueError(f"{name!r} is a {family.title}; load it with {made.causal_lm.__name__}.")
        raise ValueError(f"{name!r} is a {model_type!r} model, and not the {cls.family.model_type!r} that is wanted.")

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
            If the path is empty or a file's, or if `plain` and `as_llama` differ.
        OSError
            If another process is saving there, or if files cannot be written.
        """
        folder, as_plain = checked_folder(save_directory), is_plain(plain, as_llama)
        checked_tokenizer(tokenizer)
        if as_plain:
            self._check_without_adapter()
        writes = is_main_process and not rank()
        if kwargs.get("distributed_checkpoint"):  # a training's state in files of all ranks, which is no checkpoint
            kwargs |= {"token": token, "repo_id": repo_id or folder.name}
            return super().save_pretrained(folder, writes, state_dict, push_to_hub, *args, **kwargs)
        uploading = {name: kwargs.pop(name) for name in _UPLOADING if name in kwargs}
        tensors = self.state_dict() if state_dict is None else state_dict
        sharded = _is_sharded(tensors)
        if sharded:
            state_dict = _gathered(tensors)
            if self.config.tie_word_embeddings and state_dict:  # gathered one by one, they share no memory any more
                state_dict.pop("lm_head.weight", None)
        failure, names = None, list[str]()
        try:
            if writes:
                with only_writer(folder), replaced_files(folder, own_tokenizer=tokenizer is not None) as new:
                    chosen: dict[str, Any] = {"plain": as_plain, "tokenizer": tokenizer}
                    self.write_files(new, state_dict, *args, **chosen, **kwargs)
                    names = [str(file.relative_to(new)) for file in new.rglob("*")]
        except BaseException as error:
            failure = str(error)
            raise
        finally:  # the others wait for it
            if sharded and (reason := Processes.of_launch().broadcast_object(lambda: failure)) and failure is None:
                raise OSError(f"Rank 0 could not save: {reason}")
        if not self.name_or_path:  # of a model that was fused here; adapters trained on it name it
            self.name_or_path = self.config._name_or_path = os.fspath(save_directory)
        if push_to_hub and writes:
            _upload(folder, repo_id or folder.name, token=token, allow_patterns=names, **uploading)

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
        tokenizer = (
            tokenizer or self.tokenizer or _tokenizer_beside(self._opened_in or self.name_or_path, self._opened_with)
        )
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

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: list[str] | None = None,
        **kwargs: Any,
    ) -> str:
        """Upload what `save_pretrained(**kwargs)` writes, model card included; returns the commit's address."""
        with tempfile.TemporaryDirectory() as folder:
            name = self.name_or_path or repo_id
            self.save_pretrained(folder, **kwargs)
            self.name_or_path = self.config._name_or_path = name
            if tags:
                _add_tags(Path(folder, CARD_NAME), tags)
            return _upload(
                folder,
                repo_id,
                commit_message=commit_message,
                commit_description=commit_description,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )

    def _check_without_adapter(self) -> None:
        if any(".base_layer." in name for name, _ in self.named_parameters()):
            raise ValueError(
                "No plain model is made of one with an adapter; load it again without, and merge the adapter by peft's "
                "PeftModel.from_pretrained and merge_and_unload."
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
        config = plain_config(self.config)
        with torch.device("meta"):
            plain = self.family.causal_lm(config)
        trained = {name: parameter.requires_grad for name, parameter in self.named_parameters()}
        plain.load_state_dict(self.state_dict(keep_vars=True), assign=True)  # which lets all be trained
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(trained[name])
        with_buffers(plain, self)
        if is_tied(self):
            plain.tie_weights()
        plain.generation_config = self.generation_config
        return plain.train(self.training)


Model = TypeVar("Model", bound=FusedForCausalLM)


class _OtherThanCausalLM(PreTrainedModel):
    """A fused model without a head, or with another one: only causal language models have plain checkpoints."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        if pretrained_model_name_or_path is not None and kwargs.get("config") is None:
            finish_and_check(pretrained_model_name_or_path, hub_arguments(kwargs))
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *args: Any,
        plain: bool = False,
        as_llama: bool = False,
        **kwargs: Any,
    ) -> None:
        if plain or as_llama:
            raise ValueError(
                f"Only a causal language model is saved with plain=True; save this {type(self).__name__} without it, "
                "or load a plain checkpoint into transformers' own class and train that."
            )
        super().save_pretrained(save_directory, *args, **kwargs)


class FusedLlamaModel(_OtherThanCausalLM, LlamaModel):
    """The decoder of a fused Llama, without a head. Computes what LlamaModel computes."""

    config_class = FusedLlamaConfig
    config: FusedLlamaConfig


class FusedLlamaForSequenceClassification(_OtherThanCausalLM, LlamaForSequenceClassification):
    """A fused Llama with a head that classifies texts."""

    config_class = FusedLlamaConfig
    config: FusedLlamaConfig


class FusedLlamaForTokenClassification(_OtherThanCausalLM, LlamaForTokenClassification):
    """A fused Llama with a head that classifies tokens."""

    config_class = FusedLlamaConfig
    config: FusedLlamaConfig


class FusedLlamaForQuestionAnswering(_OtherThanCausalLM, LlamaForQuestionAnswering):
    """A fused Llama with a head that finds where in a text an answer starts and ends."""

    config_class = FusedLlamaConfig
    config: FusedLlamaConfig
    base_model_prefix = "model"  # as in all other checkpoints; Llama's own class would find no layers in them


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
        return cast(LlamaForCausalLM, self.to_plain())


@dataclass(frozen=True)
class FusedClasses:
    """The classes of one family's fused models; `heads` by the names in `lf_hf.families.HEADS`, as transformers has."""

    config: Any
    model: Any
    causal_lm: type[FusedForCausalLM]
    heads: dict[str, Any]


def _made(family: Family) -> FusedClasses:
    """Classes as those for Llama are, for another family."""
    config = FUSED_CONFIGS[family.model_type]

    def derived(stock: Any, what: str, *bases: type, **more: Any) -> Any:
        doc = f"{what} Computes what {stock.__name__} computes."
        contents = {"__doc__": doc, "__module__": __name__, "__annotations__": {"config": config}}
        return type(
            f"Fused{stock.__name__}", bases or (_OtherThanCausalLM, stock), contents | {"config_class": config} | more
        )

    lm = family.causal_lm
    heads = {kind: stock for kind in HEADS if (stock := family.head_class(kind)) is not None}
    return FusedClasses(
        config,
        derived(family.model_class, f"The decoder of a fused {family.title}, without a head."),
        derived(lm, f"A {family.title} whose layers were fused.", FusedForCausalLM, lm, GenerationMixin, family=family),
        {
            # The prefix is that of all other checkpoints; some heads' own classes would find no layers in them.
            kind: derived(stock, f"A fused {family.title} with another head.", base_model_prefix=lm.base_model_prefix)
            for kind, stock in heads.items()
        },
    )


_LLAMA = FusedClasses(
    FusedLlamaConfig,
    FusedLlamaModel,
    FusedLlamaForCausalLM,
    {
        "SequenceClassification": FusedLlamaForSequenceClassification,
        "TokenClassification": FusedLlamaForTokenClassification,
        "QuestionAnswering": FusedLlamaForQuestionAnswering,
    },
)
FUSED_CLASSES = MappingProxyType(
    {name: _LLAMA if name == "llama" else _made(family) for name, family in FAMILIES.items()}
)
"""By the base's `model_type`; by their names they are in this module, too."""
globals().update(
    {
        made.__name__: made
        for classes in FUSED_CLASSES.values()
        for made in (classes.model, classes.causal_lm, *classes.heads.values())
    }
)


def fused_class(config: PreTrainedConfig) -> type[FusedForCausalLM]:
    """The class of fused models for the family that a config, of a base or of a fused model, is of.

    Raises ValueError where it is of none.
    """
    return FUSED_CLASSES[family_of(config).model_type].causal_lm


def from_pretrained_fused(
    base: str | os.PathLike[str] | Base, config: FusionConfig | None = None, **kwargs: Any
) -> FusedForCausalLM:
    """Load a model of any family that can be fused, and fuse its layers.

    Parameters
    ----------
    base : str or Base
        Hub name or folder of a checkpoint.
    config, **kwargs
        As for `FusedLlamaForCausalLM.from_pretrained_fused`: settings, `calibration`, `tokenizer`, `fused_dir`, ...

    Returns
    -------
    FusedForCausalLM
        In the class for the base's family: a FusedLlamaForCausalLM, a FusedQwen3ForCausalLM, ...

    Raises
    ------
    ValueError
        As that method does; also for a base of a family that cannot be fused.
    """
    own = ("calibration", "tokenizer", "measurements", "fused_dir")
    given = {name: kwargs.pop(name) for name in own if name in kwargs}
    config = fusion_settings(config, kwargs)
    opened = base if isinstance(base, Base) else Base.open(base, kwargs)
    return fused_class(opened.config).from_pretrained_fused(opened, config, **given)


def with_buffers(model: Any, like: Any) -> None:
    """Give a model without buffers, which no checkpoint has, those that one of the same layers has, on its device."""
    rotary_embedding = family_of(model.config).rotary_embedding(model.config)  # its own, as long texts change them
    model.model.rotary_emb = rotary_embedding.to(like.device)
    for name, buffer in [*model.named_buffers()]:
        if buffer.device.type == "meta":
            place, _, short = name.rpartition(".")
            model.get_submodule(place).register_buffer(short, like.get_buffer(name).clone(), persistent=False)


def _is_sharded(state_dict: dict[str, Any]) -> bool:
    return any(isinstance(tensor, DTensor) for tensor in state_dict.values())


def _gathered(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The tensors of a sharded model in one piece, in rank 0's memory; all ranks must call it."""
    whole = {}
    for name, tensor in state_dict.items():
        gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if not rank():
            whole[name] = gathered.cpu()
    return whole


def _upload(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    **commit: Any,
) -> str:
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return str(api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, **commit))


def _add_tags(file: Path, tags: list[str]) -> None:
    """Add tags to those of a model card, which is made where there is none."""
    card = ModelCard.load(file) if file.is_file() else ModelCard("---\n{}\n---\n")
    card.data["tags"] = [*(card.data.get("tags") or []), *tags]
    card.save(file)


def _tokenizer_beside(name_or_path: str | None, opened_with: Mapping[str, Any]) -> PreTrainedTokenizerBase | None:
    """The tokenizer in the folder that a model was loaded from, if there is one."""
    if not name_or_path or not Path(name_or_path, opened_with.get("subfolder", ""), "tokenizer_config.json").is_file():
        return None
    try:
        return load_tokenizer(name_or_path, opened_with)
    except ValueError as error:  # the weights may be all that is left of a long training
        logger.warning(f"{str(error).rstrip('.')}; the model is saved without a tokenizer.")
        return None


def checked_tokenizer(tokenizer: object) -> PreTrainedTokenizerBase | None:
    """A tokenizer that a user gave, if any. Raises ValueError if it is none."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase | None):
        raise ValueError(f"tokenizer must be a loaded tokenizer, got {tokenizer!r:.80}.")
    return tokenizer
