#!/usr/bin/env python
"""What large models take on machines that need not be here, as a table: places, what trains, peak memory and disk.

The configs are written down here as their checkpoints have them, so nothing is downloaded.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from transformers import (
    Gemma4TextConfig,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen3_5MoeTextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from lf_hf import FusionConfig
from lf_hf.families.models import model_class
from lf_hf.families.shape import Shape
from lf_hf.pipeline.fusion import for_model
from lf_hf.pipeline.planning import plan_phases
from lf_hf.plan.machine import Machine
from lf_hf.plan.plan import NoRoom
from lf_hf.runtime.memory import in_gib

GIB, GB = 1 << 30, 10**9
WIDE: dict[str, Any] = {"num_key_value_heads": 8, "tie_word_embeddings": False, "dtype": torch.bfloat16}
LLAMA = WIDE | {"vocab_size": 128256, "max_position_embeddings": 8192}
MODELS: dict[str, tuple[PreTrainedConfig, int]] = {
    "Llama-3-8B": (
        LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **LLAMA),
        4,
    ),
    "Qwen3-8B": (
        Qwen3Config(
            hidden_size=4096,
            intermediate_size=12288,
            num_hidden_layers=36,
            num_attention_heads=32,
            head_dim=128,
            vocab_size=151936,
            max_position_embeddings=40960,
            **WIDE,
        ),
        4,
    ),
    "Llama-3-70B": (
        LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, **LLAMA),
        8,
    ),
}
GEMMA4: dict[str, Any] = {"attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "sliding_window": 1024}
GEMMA4 |= {"head_dim": 256, "global_head_dim": 512, "vocab_size": 262144, "dtype": torch.bfloat16}
LARGER: dict[str, tuple[PreTrainedConfig, int]] = {
    "Qwen3-30B-A3B": (
        Qwen3MoeConfig(
            hidden_size=2048,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
            vocab_size=151936,
            max_position_embeddings=40960,
            **WIDE | {"num_key_value_heads": 4},
        ),
        6,
    ),
    "Qwen3.6-35B-A3B": (Qwen3_5MoeTextConfig(dtype=torch.bfloat16), 5),
    "gpt-oss-20b": (
        GptOssConfig(num_hidden_layers=24, num_local_experts=32, attention_bias=True, dtype=torch.bfloat16),
        3,
    ),
    "Gemma 4 26B-A4B": (
        Gemma4TextConfig(
            **GEMMA4 | {"num_global_key_value_heads": 2},
            hidden_size=2816,
            intermediate_size=2112,
            num_hidden_layers=30,
            num_attention_heads=16,
            num_key_value_heads=8,
            enable_moe_block=True,
            num_experts=128,
            top_k_experts=8,
            moe_intermediate_size=704,
        ),
        4,
    ),
    "Gemma 4 31B": (
        Gemma4TextConfig(
            **GEMMA4 | {"num_global_key_value_heads": 4},
            hidden_size=5376,
            intermediate_size=21504,
            num_hidden_layers=60,
            num_attention_heads=32,
            num_key_value_heads=16,
        ),
        8,
    ),
    "Mixtral-8x7B": (MixtralConfig(dtype=torch.bfloat16), 4),
    "OLMoE-1B-7B": (OlmoeConfig(intermediate_size=1024, num_key_value_heads=16, dtype=torch.bfloat16), 2),
}
MACHINES = {
    "80 GB card": Machine({"cuda:0": 80 * GB, "cpu": 64 * GIB}, bfloat16=True, is_here=False),
    "24 GB card": Machine({"cuda:0": 24 * GB, "cpu": 64 * GIB}, bfloat16=True, is_here=False),
    "laptop of 16 GiB": Machine({"cpu": 16 * GIB}, bfloat16=False, is_here=False),
}


LARGER_MACHINES = {
    "80 GB card, 128 GiB": Machine({"cuda:0": 80 * GB, "cpu": 128 * GIB}, bfloat16=True, is_here=False),
    "24 GB card, 64 GiB": MACHINES["24 GB card"],
}


def main() -> None:
    """Print the tables: of plans, and of what is stored and what works on a token, with all layers and with fewer."""
    print("| model, fusions | machine | method | weights | trains | peak | disk |\n|---|---|---|---|---|---|---|")
    for models, machines in ((MODELS, MACHINES), (LARGER, LARGER_MACHINES)):
        for (name, (config, fusions)), machine_name, method in product(models.items(), machines, ("refit", "healed")):
            plan = row(config, fusions, method, machines[machine_name])
            print(f"| {name}, {fusions} | {machine_name} | {method} | {plan} |", flush=True)
    print("\n| model, fusions | stored | of a token | bytes read for one at batch 1, bf16 |\n|---|---|---|---|")
    for name, (config, fusions) in (MODELS | LARGER).items():
        print(f"| {name}, {fusions} | {' | '.join(sizes(config, fusions))} |")


def sizes(config: PreTrainedConfig, fusions: int) -> list[str]:
    """Parameters, in billions, of a model and of it with fewer layers; what decoding reads is those that work."""
    with torch.device("meta"):
        shape = Shape.of(model_class(config)(config), size=2)
    stored = [shape.total - removed * shape.layer for removed in (0, fusions)]
    inside = [(shape.layers - removed) * shape.active + shape.head for removed in (0, fusions)]
    cells = [" -> ".join(f"{count / 1e9:.1f} B" for count in counts) for counts in (stored, inside)]
    return [*cells, f"{2 * inside[0] / GB:.1f} -> {2 * inside[1] / GB:.1f} GB (x{inside[1] / inside[0]:.2f})"]


def row(config: PreTrainedConfig, fusions: int, method: str, machine: Machine) -> str:
    """The columns of one plan."""
    fusion = for_model(FusionConfig(fusions, method), config)
    try:
        made = plan_phases(config, torch.bfloat16, fusion, machine, healing=fusion.healing)
    except NoRoom as error:
        return f"refused: {error} | | |"
    trains = made.healing.why.split(" parameters")[0] if made.healing else "nothing"
    weights, peak = (
        ", ".join(f"{in_gib(size)} {place}" for place, size in sizes.items()) for sizes in (made.weights, made.peak)
    )
    return f"{weights} | {trains} | {peak} | {in_gib(made.disk)}"


if __name__ == "__main__":
    main()
