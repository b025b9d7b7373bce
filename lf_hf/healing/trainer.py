"""The training: transformers' Trainer, with a student that computes its own loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from accelerate.utils import parse_flag_from_env
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from lf_hf.decoder.decoder import Decoder
from lf_hf.decoder.placement import value
from lf_hf.families.models import CausalLM, family_of, model_class, text_model, text_prefix
from lf_hf.healing.loss import Loss, Targets, distillation_loss
from lf_hf.healing.teacher import STATES, Items, Teacher
from lf_hf.plan.plan import HealingPlan
from lf_hf.report.data import HealingPoint
from lf_hf.runtime.amounts import EVALUATIONS
from lf_hf.runtime.errors import explained, reason
from lf_hf.runtime.launch import PATIENCE
from lf_hf.runtime.numerics import computes_bfloat16, typical_size
from lf_hf.runtime.progress import progress
from lf_hf.settings import HealSettings

logger = logging.get_logger(__name__)

_RELATIVE_RATE = 5.5e-4  # the default learning rate, in units of the size of the model's weights
_ADAPTERS_RATE = 5 * _RELATIVE_RATE

LORA_SCALE = 2
"""What adapters add is multiplied by this."""

DIVERGENCE = "eval_divergence"
_OF_ADAPTERS = "base_model.model."  # before the names of a model with adapters
_LEAST_WARMED_UP = 10  # steps with which there is a warm-up: its first one, at a rate of 0, is lost


class Student:
    """What makes a model's forward pass its distillation loss, so that any wrapper around it sees an ordinary module.

    It goes before the class of the model among the bases of a new one.
    """

    lm_head: Any

    def forward(
        self, input_ids: Tensor, targets: Targets, loss: Loss, return_loss: bool = True, **_: Any
    ) -> dict[str, Tensor]:
        """{"loss": ...} of a batch: ids of shape (sequences B, tokens T). By `return_loss` the Trainer expects it."""
        decoder = text_model(self)
        embedded = decoder.embed_tokens(input_ids).float()  # so that the residual stream is in float32
        states = decoder(inputs_embeds=embedded, use_cache=False).last_hidden_state
        return {"loss": distillation_loss(states, self.lm_head.weight, input_ids, targets, loss)}


def make_student(
    decoder: Decoder, settings: HealSettings, fused_layers: Sequence[int], arguments: TrainingArguments
) -> nn.Module:
    """A module that computes what a fused model does, to be trained on the device of the training.

    What is trained is there in float32, as bfloat16 loses small steps. All else is shared with the model where the
    training computes in its dtype, on its device. Raises ValueError if adapters are asked for, and peft is not
    installed.
    """
    config = copy.deepcopy(decoder.model_config)  # which the Trainer changes
    names = {name for name, _ in decoder.named_parameters()}
    config.tie_word_embeddings = "lm_head.weight" not in names
    for name, share in vars(config.get_text_config()).items():
        if "dropout" in name and isinstance(share, float):  # which few steps would only suffer from
            setattr(config.get_text_config(), name, 0.0)
    stock = model_class(config)
    with torch.device("meta"):
        student = type(Student.__name__, (Student, stock), {"__module__": __name__})(config)
    student._weight_conversions = []  # so that states have the names that they are loaded by
    trained = _trained_names(names, text_prefix(student), settings.train, fused_layers)
    # What is sharded is of one dtype.
    frozen = torch.bfloat16 if arguments.bf16 and num_shards(arguments) == 1 else torch.float32
    weights = {}
    for name, weight in decoder.named_parameters():
        dtype = torch.float32 if name in trained else frozen
        weights[name] = weight.detach().to(arguments.device, dtype, copy=name in trained)
    student.load_state_dict(weights, assign=True, strict=False)
    student.tie_weights()
    for name, buffer in decoder.model.named_buffers():  # of which checkpoints have none
        place, _, own_name = name.rpartition(".")
        setattr(student.get_submodule(place), own_name, buffer.to(arguments.device, copy=True))
    text = text_model(student)  # whose rotary embeddings are its own, as long texts change them
    text.rotary_emb = family_of(text.config).rotary_embedding(text.config).to(arguments.device)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in trained)
    if settings.train == "lora":
        return _with_adapters(student, settings)
    # States of the training hold what is trained; the Trainer is not to miss the rest.
    student._keys_to_ignore_on_save = student.state_dict().keys() - trained
    return student


def _trained_names(names: Iterable[str], text: str, train: str | None, fused_layers: Sequence[int]) -> set[str]:
    """Those of a model's parameters that are trained: of what begins with `text` by the settings, of a tower none."""
    if train == "lora":
        return set()
    layers = f"{text}layers."
    fused = tuple(f"{layers}{number}." for number in fused_layers)
    begins = {"all": (text, "lm_head."), "layers": (layers,), "fused": fused}[train or "layers"]
    return {name for name in names if name.startswith(begins) or (name.startswith(text) and "norm" in name)}


def num_shards(arguments: TrainingArguments) -> int:
    """How many processes share the student's weights."""
    if arguments.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return arguments.world_size
    if not arguments.fsdp and not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return 1
    if arguments.device.type == "cpu":
        logger.warning("FSDP is ignored, as accelerate splits no model on a CPU: each process trains a whole copy.")
        return 1
    return arguments.world_size


def default_learning_rate(decoder: Decoder, train: str) -> float:
    """A fixed part of the size of a model's weights, as one digit: the median over matrices of their root mean square.

    A step of Adam is as long as the rate, whatever the gradient, and so changes weights by that part of their size.
    """
    layers = f"{text_prefix(decoder.model)}layers."
    size = typical_size(weight for name, weight in decoder.named_parameters() if name.startswith(layers))
    if size == 0:
        raise ValueError(
            "Most matrices of the layers are 0, so no learning rate follows from them; give learning_rate."
        )
    rate = _ADAPTERS_RATE if train == "lora" else _RELATIVE_RATE
    return float(f"{rate * size:.0e}")


def _with_adapters(student: CausalLM, settings: HealSettings) -> nn.Module:
    from peft import LoraConfig, get_peft_model  # of an extra

    layers = f"{text_prefix(student)}layers."
    targets = [
        name for name, module in student.named_modules() if isinstance(module, nn.Linear) and name.startswith(layers)
    ]
    rank = settings.lora_rank
    adapters = LoraConfig(r=rank, lora_alpha=LORA_SCALE * rank, target_modules=targets, task_type="CAUSAL_LM")
    torch.manual_seed(settings.seed)
    return get_peft_model(student, adapters)


class DistillationTrainer(Trainer):
    """A Trainer whose targets are a teacher's predictions, and whose measure of a state is how far it is from them.

    That is its mean divergence on held-out text; `loss` says what is minimised.
    """

    to_targets: Callable[[Tensor], Targets]  # of the teacher's final states of a batch
    loss: Loss
    trained: AbstractSet[str]  # names of what is trained
    dtypes: Mapping[str, torch.dtype]  # of these in the healed model, but for adapters
    eval_dataset: Items

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = self.loss if model.training else Loss()  # held-out text is judged by the divergence itself
        targets = self.to_targets(inputs[STATES])
        outputs = model(input_ids=inputs["input_ids"], targets=targets, loss=loss)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def evaluate(self, eval_dataset: Any = None, *arguments: Any, **named: Any) -> dict[str, float]:
        metrics: dict[str, float] = super().evaluate(eval_dataset, *arguments, **named)
        if eval_dataset is None:  # all kinds of text, and not one of several
            mean = sum(metrics[f"eval_{name}_loss"] for name in self.eval_dataset) / len(self.eval_dataset)
            metrics[DIVERGENCE] = mean if math.isfinite(mean) else math.inf
            self.control.should_training_stop |= not math.isfinite(mean)  # which it never is again
            self.log(metrics)
        return metrics

    def _save_checkpoint(self, *arguments: Any, **named: Any) -> None:
        try:
            super()._save_checkpoint(*arguments, **named)
        except torch.OutOfMemoryError:
            raise
        except (SafetensorError, RuntimeError, OSError) as error:  # of which a full disk gives any
            raise OSError(
                f"The state of step {self.state.global_step} was not written ({reason(error)}); the one before it is "
                "kept: with room on the disk the same command goes on from there."
            ) from error

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """The last state, from which no step goes on, has the healed model's dtypes: of bfloat16 half as many bytes."""
        if state_dict is None and self.state.global_step == self.state.max_steps:
            student: Any = self.model
            weights = student.state_dict()
            state_dict = {name: weight.to(self.dtypes.get(name, weight.dtype)) for name, weight in weights.items()}
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Not in the last state, from which no step goes on. States of sharded weights are read as wholes."""
        is_sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if is_sharded or self.state.global_step < self.state.max_steps:
            super()._save_optimizer_and_scheduler(output_dir)

    def curve(self) -> list[HealingPoint]:
        """Divergences on held-out text, nats a token, by kind of text, in the order of steps."""
        points = []
        for look in self._looks():
            divergences = {name: look[f"eval_{name}_loss"] for name in self.eval_dataset}
            points.append(HealingPoint(int(look["step"]), divergences))
        return points

    def best_step(self) -> int:
        """The first step whose state is the nearest to the teacher on held-out text; 0 is the fused model."""
        return int(min(self._looks(), key=itemgetter(DIVERGENCE))["step"])

    def _looks(self) -> list[dict[str, float]]:
        return [entry for entry in self.state.log_history if DIVERGENCE in entry]

    def trained_weights(self, decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
        """What was trained, by its name in the decoder, one by one, in one piece and float32; in the first process.

        In the others nothing. What adapters add is added to the decoder's own weights: the student's may have a
        narrower dtype. The student has no weights afterwards, unless they are sharded, so that those that the decoder
        gives up are freed.
        """
        state = self.accelerator.get_state_dict(self.deepspeed or self.model) or {}  # DeepSpeed's other ranks have none
        if not self.is_world_process_zero():
            return
        state = {name: weight for name, weight in state.items() if name in self.trained}
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            model: Any = self.model
            model.to("meta")
        for name in [name for name, _ in decoder.model.named_parameters()]:
            place = name.removesuffix(".weight")
            down, up = (f"{_OF_ADAPTERS}{place}.lora_{kind}.default.weight" for kind in "AB")
            if name in self.trained:
                yield name, state[name].detach().float()
            elif down in self.trained:
                added = LORA_SCALE * (state[up].float() @ state[down].float())
                own = value(decoder.model.get_submodule(place), "weight")
                yield name, own.detach().to(added.device, torch.float32) + added


def unreadable_file(state: Path) -> Path | None:
    """A file of a state of the training that cannot be read, as where a process was killed or a disk was full."""
    if not (state / TRAINER_STATE_NAME).is_file():  # the last one that the Trainer writes
        return state / TRAINER_STATE_NAME
    for file in filter(Path.is_file, state.rglob("*")):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt"):  # which compares its header with its size
                    pass
            elif file.suffix in (".pt", ".pth"):
                ZipFile(file).close()  # whose list of contents comes last
            elif file.name == TRAINER_STATE_NAME:
                TrainerState.load_from_json(str(file))
        except (OSError, SafetensorError, BadZipFile, TypeError, ValueError):
            return file
    return None


class _Progress(TrainerCallback):
    """Shows how far a training is."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        left = state.max_steps - state.global_step  # fewer where a run goes on
        self._shown = progress(total=left, desc="Healing", unit="step").__enter__()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._shown.update()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._shown.__exit__(None, None, None)


def make_trainer(
    student: nn.Module, decoder: Decoder, teacher: Teacher, settings: HealSettings, arguments: TrainingArguments
) -> DistillationTrainer:
    """The Trainer, before it is given text to train on. Raises ValueError for arguments with which it cannot train."""
    model: Any = student
    config, weight = text_model(model).config, model.get_output_embeddings().weight
    if teacher.head is not None:
        head = teacher.head.to(weight.device, weight.dtype)
    else:  # the student's own, as it is before it trains
        head = weight.detach().clone() if weight.requires_grad else weight.detach()
    given: dict[str, Any] = {"data_collator": default_collate, "eval_dataset": teacher.held_out}
    with _accepted():
        trainer = DistillationTrainer(student, arguments, **given, callbacks=[_Progress()])
    trainer.to_targets = partial(Targets, weight=head, to_logits=partial(family_of(config).logits, config))
    trainer.loss = Loss(settings.temperature, settings.next_token_share)
    trainer.trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    weights = decoder.model.named_parameters()
    trainer.dtypes = {name: weight.dtype for name, weight in weights if name in trainer.trained}
    trainer.remove_callback(PrinterCallback)
    unset_hf_deepspeed_config()  # DeepSpeed splits the student when training begins
    return trainer


def check_trains(arguments: TrainingArguments) -> None:
    """Raise ValueError for arguments with which the Trainer cannot train: its optimizer and schedule are made once."""
    model: Any = nn.Linear(1, 1)
    with _accepted():
        trainer = Trainer(model, arguments, eval_dataset={})
        trainer.get_optimizer_cls_and_kwargs(arguments, model)
        if not trainer.is_deepspeed_enabled:  # which makes its own
            trainer.create_optimizer_and_scheduler(arguments.max_steps)
    unset_hf_deepspeed_config()


def training_arguments(
    settings: HealSettings, folder: Path, given: Mapping[str, Any], device: str, plan: HealingPlan | None = None
) -> TrainingArguments:
    """TrainingArguments for a healing on a device, with its state in `folder`; those `given` and of the plan count.

    Making them joins the processes of a launcher. Raises ValueError for a name or a value that cannot be used.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"training_args must be a dict of TrainingArguments' fields, got {given!r:.80}.")
    every = max(1, math.ceil(settings.steps / EVALUATIONS))
    on_cpu = device == "cpu"
    pins = not on_cpu and not device.startswith("mps")  # memory from which a card copies by itself
    own: dict[str, Any] = {
        "output_dir": str(folder),
        "seed": settings.seed,
        "learning_rate": settings.learning_rate or 0.0,  # none where nothing is trained yet
        "max_steps": settings.steps,
        "num_train_epochs": 1,
        "gradient_accumulation_steps": 1,  # as many as fit the memory
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "eval_strategy": "steps",
        "eval_steps": every,
        "eval_on_start": True,
        "save_strategy": "steps",
        "save_steps": every,
        "save_only_model": False,
        "load_best_model_at_end": True,
        "metric_for_best_model": DIVERGENCE,
        "greater_is_better": False,
        # What would leave no state to keep, change the steps unseen, do nothing, or upload states of the training.
        "eval_delay": 0,
        "auto_find_batch_size": False,
        "label_smoothing_factor": 0.0,
        "push_to_hub": False,
        # Of transformers' own losses and layers, which a healing has none of.
        "label_names": None,
        "use_liger_kernel": False,
    }
    defaults: dict[str, Any] = {
        "save_total_limit": 1,
        "ddp_timeout": int(PATIENCE.total_seconds()),
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1 if settings.steps >= _LEAST_WARMED_UP else 0,
        "per_device_train_batch_size": settings.batch,  # at most
        # One by one, as the mean of a batch that is filled up for the last of several processes is another.
        "per_device_eval_batch_size": 1,
        "adam_beta2": 0.95,  # some tens of steps only
        "use_cpu": on_cpu,
        "bf16": computes_bfloat16(torch.device(device)) and not given.get("fp16"),
        "disable_tqdm": True,
        "logging_steps": max(1, settings.steps // 50),
        "dataloader_pin_memory": pins,
        # Where the host would wait for a card: for each batch, and to leave NaN out of the losses that are logged.
        "accelerator_config": {"non_blocking": pins},
        "logging_nan_inf_filter": False,
    }
    if refused := own.keys() & given.keys():
        name = min(refused)
        instead = f"give --{name.replace('_', '-')} ({name}=)" if hasattr(settings, name) else "leave it out"
        raise ValueError(f"The training argument {name!r} is set by heal itself; {instead}.")
    with _accepted():
        arguments = TrainingArguments(**defaults | dict(given) | own)
        for name, value in given.items():
            default = getattr(TrainingArguments, name, None)
            if isinstance(value, str) and isinstance(default, int | float):
                raise ValueError(f"{name} must be a {type(default).__name__}, got {value!r:.80}")
            if (
                name in ("per_device_train_batch_size", "per_device_eval_batch_size", "eval_accumulation_steps")
                and value < 1
            ):
                raise ValueError(f"{name} must be at least 1, got {value}")
    unset_hf_deepspeed_config()
    if arguments.deepspeed_plugin is not None:  # else what ZeRO-3 has split cannot be gathered
        zero = arguments.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if plan is not None:
        part = settings.batch // arguments.world_size
        most = min(plan.sequences, arguments.per_device_train_batch_size)
        size = max(number for number in range(1, min(part, most) + 1) if part % number == 0)
        arguments.per_device_train_batch_size = size
        arguments.gradient_accumulation_steps = part // size
        of_fsdp: Any = arguments.fsdp_config or {}
        by_fsdp = of_fsdp.get("activation_checkpointing") or parse_flag_from_env("FSDP_ACTIVATION_CHECKPOINTING")
        if plan.gradient_checkpointing and not by_fsdp:
            vars(arguments).update(gradient_checkpointing=True, activation_checkpointing=True)  # of either transformers
    if arguments.n_gpu > 1:  # one process takes one device: a launcher takes several
        arguments._n_gpu = 1
    return arguments


def _accepted() -> AbstractContextManager[None]:
    """Say in one sentence that the training arguments are what transformers raises an error about."""
    kinds = TypeError, ValueError, ImportError, AttributeError, RuntimeError
    return explained("The training arguments cannot be used", "correct them", kinds)
