"""lf_hf: compress language models, of Llama and other families, by fusing decoder layers."""

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lf_hf.checkpoint.configuration import FusedLlamaConfig
from lf_hf.fuse import FusedLlamaForCausalLM, FusedLlamaModel, from_pretrained_fused, fuse_checkpoint
from lf_hf.healing.settings import HealSettings
from lf_hf.report.report import FusionReport
from lf_hf.settings import FusionConfig
from lf_hf_startup import arm

if TYPE_CHECKING:
    from lf_hf.healing.heal import heal

arm()
AutoConfig.register(FusedLlamaConfig.model_type, FusedLlamaConfig)
AutoModel.register(FusedLlamaConfig, FusedLlamaModel)
AutoModelForCausalLM.register(FusedLlamaConfig, FusedLlamaForCausalLM)
# The Trainer shifts labels for classes that have their names here.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[FusedLlamaConfig.model_type] = FusedLlamaForCausalLM.__name__

__all__ = [
    "FusedLlamaConfig",
    "FusedLlamaForCausalLM",
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


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


def __getattr__(name: str) -> Any:
    if name == "__version__":  # which a checkout that is not installed lacks
        return version("lf_hf")
    if name == "heal":  # transformers' Trainer takes seconds to import
        from lf_hf.healing.heal import heal

        return heal
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
