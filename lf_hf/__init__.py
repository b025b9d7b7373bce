"""lf_hf: compress Llama models by fusing decoder layers."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from lf_hf.config import FusionConfig
from lf_hf.model.configuration_fused_llama import FusedLlamaConfig
from lf_hf.model.fuse_checkpoint import fuse_checkpoint
from lf_hf.model.modeling_fused_llama import (
    FusedLlamaForCausalLM,
    FusedLlamaForQuestionAnswering,
    FusedLlamaForSequenceClassification,
    FusedLlamaForTokenClassification,
    FusedLlamaModel,
)
from lf_hf.model.peft_targets import register_with_peft
from lf_hf.report.report import FusionReport

if TYPE_CHECKING:
    from lf_hf.healing.heal import heal
    from lf_hf.healing.settings import HealSettings

AutoConfig.register(FusedLlamaConfig.model_type, FusedLlamaConfig)
AutoModel.register(FusedLlamaConfig, FusedLlamaModel)
AutoModelForCausalLM.register(FusedLlamaConfig, FusedLlamaForCausalLM)
AutoModelForSequenceClassification.register(FusedLlamaConfig, FusedLlamaForSequenceClassification)
AutoModelForTokenClassification.register(FusedLlamaConfig, FusedLlamaForTokenClassification)
AutoModelForQuestionAnswering.register(FusedLlamaConfig, FusedLlamaForQuestionAnswering)
register_with_peft(FusedLlamaConfig.model_type)

__all__ = [
    "FusedLlamaConfig",
    "FusedLlamaForCausalLM",
    "FusedLlamaForQuestionAnswering",
    "FusedLlamaForSequenceClassification",
    "FusedLlamaForTokenClassification",
    "FusedLlamaModel",
    "FusionConfig",
    "FusionReport",
    "HealSettings",
    "fuse_checkpoint",
    "heal",
    "tasks_path",
]


def tasks_path() -> Path:
    """Folder of the lm-eval task configs, for `lm_eval --include_path`."""
    inside = Path(__file__).parent / "lm_eval_tasks"  # an installed wheel
    return inside if inside.is_dir() else Path(__file__).parent.parent / "lm_eval_tasks"  # a checkout


def __getattr__(name: str) -> Any:
    if name == "heal":  # transformers' Trainer takes seconds to import
        from lf_hf.healing.heal import heal

        return heal
    if name == "HealSettings":
        from lf_hf.healing.settings import HealSettings

        return HealSettings
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
