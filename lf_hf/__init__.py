"""lf_hf: compress Llama models by fusing decoder layers."""

from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lf_hf.config import FusionConfig
from lf_hf.model.configuration_fused_llama import FusedLlamaConfig
from lf_hf.model.fuse_checkpoint import fuse_checkpoint
from lf_hf.model.modeling_fused_llama import FusedLlamaForCausalLM, FusedLlamaModel
from lf_hf.report.report import FusionReport

AutoConfig.register(FusedLlamaConfig.model_type, FusedLlamaConfig)
AutoModel.register(FusedLlamaConfig, FusedLlamaModel)
AutoModelForCausalLM.register(FusedLlamaConfig, FusedLlamaForCausalLM)

__all__ = [
    "FusedLlamaConfig",
    "FusedLlamaForCausalLM",
    "FusedLlamaModel",
    "FusionConfig",
    "FusionReport",
    "fuse_checkpoint",
    "tasks_path",
]


def tasks_path() -> Path:
    """Folder of the lm-eval task configs, for `lm_eval --include_path`."""
    inside = Path(__file__).parent / "lm_eval_tasks"  # an installed wheel
    return inside if inside.is_dir() else Path(__file__).parent.parent / "lm_eval_tasks"  # a checkout
