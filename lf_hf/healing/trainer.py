"""The training: transformers' Trainer, with a student that computes its own loss."""

from __future__ import annotations

import ast
import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from lf_hf.checkpoint.classes import with_buffers
from lf_hf.healing.loss import Loss, Targets, distillation_loss
from lf_hf.healing.settings import RELATIVE_RATES, HealSettings
from lf_hf.models import CausalLM, family_of, is_tied, model_class, text_model, text_prefix
from lf_hf.report.data import HealingPoint
from lf_hf.runtime.errors import explained, reason
from lf_hf.runtime.launch import PATIENCE
from lf_hf.runtime.numerics import computes_bfloat16, typical_size
from lf_hf.runtime.progress import progress

logger = logging.get_logger(__name__)

EVALUATIONS = 6
"""How many times a training looks at held-out text, and keeps its state."""

DIVERGENCE = "eval_divergence"
_FILES = "files.json"  # in a state of the training: its files and their sizes
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
        states = decoder(input_ids=input_ids, use_cache=False).last_hidden_state
        to_logits = partial(family_of(decoder.config).logits, decoder.config)
        return {"loss": distillation_loss(states, self.lm_head.weight, input_ids, targets, loss, to_logits)}


def make_student(model: CausalLM, settings: HealSettings, fused_layers: Sequence[int]) -> nn.Module:
    """A copy of a model to be trained as the settings say.

    What is trained is in float32, as bfloat16 loses small steps. Raises ValueError if adapters are asked for, and peft
    is not installed.
    """
    config = copy.deepcopy(model.config)  # which the Trainer changes
    config.tie_word_embeddings = is_tied(model)
    stock = model_class(config)
    with torch.device("meta"):
        student = type(Student.__name__, (Student, stock), {"__module__": __name__})(config)
    # What adapters leave as it is may be in bfloat16; gradients through float16 would need scaling.
    dtype = model.dtype if settings.train == "lora" and model.dtype != torch.float16 else torch.float32
    weights = {name: tensor.to(dtype, copy=True) for name, tensor in model.state_dict().items()}
    student.load_state_dict(weights, assign=True)
    student.tie_weights()
    if config.tie_word_embeddings:
        student._keys_to_ignore_on_save = {"lm_head.weight"}  # so that the Trainer does not miss it in its checkpoints
    with_buffers(student, model)
    if settings.train == "lora":
        return _with_adapters(student, settings)
    text = text_prefix(student)
    fused = tuple(f"{text}layers.{number}." for number in fused_layers)
    trained = {"all": "", "layers": f"{text}layers.", "fused": fused}[settings.train]
    for name, parameter in student.named_parameters():
        is_text = name.startswith((text, "lm_head."))
        parameter.requires_grad_(is_text and (name.startswith(trained) or "norm" in name))
    return student


def default_learning_rate(model: CausalLM, train: str) -> float:
    """A fixed part of the size of a model's weights, as one digit: the median over matrices of their root mean square.

    A step of Adam is as long as the rate, whatever the gradient, and so changes weights by that part of their size.
    """
    layers = f"{text_prefix(model)}layers."
    size = typical_size(weight for name, weight in model.named_parameters() if name.startswith(layers))
    return float(f"{RELATIVE_RATES[train] * size:.0e}")


def _with_adapters(student: CausalLM, settings: HealSettings) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ValueError(
            "train='lora' needs the peft package; run `pip install '.[heal]'` in lf_hf's checkout."
        ) from None
    rank = settings.lora_rank
    layers = f"{text_prefix(student)}layers."
    targets = [
        name for name, module in student.named_modules() if isinstance(module, nn.Linear) and name.startswith(layers)
    ]
    adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    torch.manual_seed(settings.seed)
    return get_peft_model(student, adapters)


class DistillationTrainer(Trainer):
    """A Trainer that asks a teacher for targets, and whose measure of a state is its mean divergence on held-out text.

    `targets` gives the teacher's predictions of a batch, and `loss` says what is minimised.
    """

    targets: Callable[[Mapping[str, Tensor]], Targets]
    loss: Loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = self.loss if model.training else Loss()  # held-out text is judged by the divergence itself
        outputs = model(input_ids=inputs["input_ids"], targets=self.targets(inputs), loss=loss)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def evaluate(self, eval_dataset: Any = None, *arguments: Any, **named: Any) -> dict[str, float]:
        metrics: dict[str, float] = super().evaluate(eval_dataset, *arguments, **named)
        if eval_dataset is None and isinstance(self.eval_dataset, dict):  # not one kind of text of several
            mean = sum(metrics[f"eval_{name}_loss"] for name in self.eval_dataset) / len(self.eval_dataset)
            metrics[DIVERGENCE] = mean if math.isfinite(mean) else math.inf
            self.control.should_training_stop |= not math.isfinite(mean)  # which it never is again
            self.log({DIVERGENCE: metrics[DIVERGENCE]})
        return metrics

    def _save_checkpoint(self, *arguments: Any, **named: Any) -> None:
        try:
            super()._save_checkpoint(*arguments, **named)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                state = Path(self.args.output_dir or ".", f"checkpoint-{self.state.global_step}")
                (state / _FILES).write_text(json.dumps(_file_sizes(state)), encoding="utf-8")
        except (SafetensorError, RuntimeError, OSError) as error:  # of which a full disk gives any
            raise OSError(
                f"The state of step {self.state.global_step} was not written ({reason(error)}); the one before it is "
                "kept: with room on the disk the same command goes on from there."
            ) from error

    def curve(self) -> list[HealingPoint]:
        """Divergences on held-out text, nats a token, by kind of text, in the order of steps."""
        assert isinstance(self.eval_dataset, dict)
        points: dict[int, HealingPoint] = {}
        for entry in self.state.log_history:
            for name in self.eval_dataset:
                figure = f"eval_{name}_loss"
                if figure in entry:
                    step = int(entry["step"])
                    points.setdefault(step, HealingPoint(step, {})).divergences[name] = entry[figure]
        return list(points.values())

    def best_step(self) -> int:
        """The step whose state is the nearest to the teacher on held-out text; 0 is the fused model."""
        before, *means = [entry[DIVERGENCE] for entry in self.state.log_history if DIVERGENCE in entry]
        if min(means, default=math.inf) < before:
            return self.state.best_global_step or 0
        return 0

    def trained_state(self, model: CausalLM, settings: HealSettings) -> dict[str, Tensor]:
        """The student's weights in one piece, adapters merged; in rank 0's memory, and empty elsewhere."""
        state = self.accelerator.get_state_dict(self.deepspeed or self.model)
        if not self.is_world_process_zero():
            return {}
        if settings.train == "lora":
            student: Any = make_student(model, settings, [])
            student.load_state_dict(state)
            state = student.merge_and_unload().state_dict()
        return {name: tensor.detach().cpu() for name, tensor in state.items()}


def _file_sizes(state: Path) -> dict[str, int]:
    return {str(file.relative_to(state)): file.stat().st_size for file in state.rglob("*") if file.is_file()}


def damaged_file(state: Path) -> str | None:
    """A file of a state of the training that is not as it was written, as where a process was killed; None if whole."""
    try:
        sizes: dict[str, int] = json.loads((state / _FILES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return _FILES
    found = _file_sizes(state)
    return next((name for name, size in sizes.items() if found.get(name) != size), None)


class _Progress(TrainerCallback):
    """Shows how far a training is."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        left = state.max_steps - state.global_step  # fewer where a run goes on
        self._shown = progress(total=left, desc="Healing", unit="step").__enter__()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._shown.update()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._shown.__exit__(None, None, None)


def make_trainer(student: nn.Module, arguments: TrainingArguments) -> DistillationTrainer:
    """The Trainer, before there is text and a teacher. Raises ValueError for arguments with which it cannot train."""
    with _accepted():
        trainer = DistillationTrainer(
            student, arguments, data_collator=default_collate, eval_dataset={}, callbacks=[_Progress()]
        )
        trainer.get_optimizer_cls_and_kwargs(arguments, student)  # type: ignore[arg-type]
    trainer.remove_callback(PrinterCallback)
    unset_hf_deepspeed_config()  # so that the base loads whole; DeepSpeed splits the student when training begins
    return trainer


def parse_training_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """TrainingArguments of a command line, each "name=value", the value as in JSON or Python, or a string."""
    given = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise ValueError(f"A training argument must be NAME=VALUE, got {pair!r:.80}.")
        given[name] = value
        for read in (ast.literal_eval, json.loads):
            with suppress(ValueError, SyntaxError):
                given[name] = read(value)
    return given


def training_arguments(settings: HealSettings, folder: Path, given: Mapping[str, Any]) -> TrainingArguments:
    """TrainingArguments for a healing whose state is kept in `folder`; those `given` count.

    Making them joins the processes of a launcher. Raises ValueError for a name or a value that cannot be used.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"training_args must be a dict of TrainingArguments' fields, got {given!r:.80}.")
    every = max(1, math.ceil(settings.steps / EVALUATIONS))
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
        "use_cpu": not torch.accelerator.is_available(),
        "bf16": computes_bfloat16() and not given.get("fp16"),
        "disable_tqdm": True,
        "logging_steps": max(1, settings.steps // 50),
        "dataloader_pin_memory": torch.accelerator.is_available(),
    }
    if refused := own.keys() & given.keys():
        raise ValueError(f"The training argument {min(refused)!r} is set by heal itself; leave it out.")
    with _accepted():
        arguments = TrainingArguments(**defaults | dict(given) | own)
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
            if getattr(arguments, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(arguments, name)}")
    unset_hf_deepspeed_config()
    if arguments.deepspeed_plugin is not None:  # else what ZeRO-3 has split cannot be gathered
        zero = arguments.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if arguments.n_gpu > 1:  # one process takes one device: a launcher takes several
        arguments._n_gpu = 1
    return arguments


def _accepted() -> AbstractContextManager[None]:
    """Say in one sentence that the training arguments are what transformers raises an error about."""
    kinds = TypeError, ValueError, ImportError, AttributeError, RuntimeError
    return explained("The training arguments cannot be used", "correct them", kinds)
