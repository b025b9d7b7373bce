"""lf_hf: compress Llama models, and those of other families, by fusing decoder layers."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lf_hf.checkpoint.classes import (
    FUSED_CLASSES,
    FusedLlamaForCausalLM,
    FusedLlamaForQuestionAnswering,
    FusedLlamaForSequenceClassification,
    FusedLlamaForTokenClassification,
    FusedLlamaModel,
)
from lf_hf.checkpoint.configuration import FusedLlamaConfig
from lf_hf.checkpoint.peft import register_with_peft
from lf_hf.fuse import from_pretrained_fused, fuse_checkpoint
from lf_hf.report.report import FusionReport
from lf_hf.settings import FusionConfig

if TYPE_CHECKING:
    from lf_hf.healing.heal import heal
    from lf_hf.healing.settings import HealSettings

for _made in FUSED_CLASSES.values():
    AutoConfig.register(_made.config.model_type, _made.config)
    AutoModel.register(_made.config, _made.model)
    AutoModelForCausalLM.register(_made.config, _made.causal_lm)
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[_made.config.model_type] = _made.causal_lm.__name__  # who shifts labels asks it
    for _kind, _head in _made.heads.items():
        getattr(transformers, f"AutoModelFor{_kind}").register(_made.config, _head)
    for _class in (_made.config, _made.model, _made.causal_lm, *_made.heads.values()):
        globals()[_class.__name__] = _class
register_with_peft({_made.config.model_type: name for name, _made in FUSED_CLASSES.items()})

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
    "from_pretrained_fused",
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
