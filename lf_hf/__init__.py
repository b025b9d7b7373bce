"""lf_hf: compress language models, of Llama and other families, by fusing decoder layers."""

from importlib.metadata import version
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lf_hf.checkpoint.configuration import FusedLlamaConfig
from lf_hf.fuse import FusedLlamaForCausalLM, FusedLlamaModel, from_pretrained_fused, fuse_checkpoint, heal
from lf_hf.report.report import FusionReport
from lf_hf.runtime.tasks import tasks_path
from lf_hf.settings import FusionConfig, HealSettings
from lf_hf_startup import arm

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


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


def __getattr__(name: str) -> Any:
    if name == "__version__":  # which a checkout that is not installed lacks
        return version("lf_hf")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
