#!/usr/bin/env python
"""What large models take on machines that need not be here, as a table: places, what trains, peak memory and disk.

The configs are written down here as their checkpoints have them, so nothing is downloaded.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config

from lf_hf import FusionConfig
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
MACHINES = {
    "80 GB card": Machine({"cuda:0": 80 * GB, "cpu": 64 * GIB}, bfloat16=True, is_here=False),
    "24 GB card": Machine({"cuda:0": 24 * GB, "cpu": 64 * GIB}, bfloat16=True, is_here=False),
    "laptop of 16 GiB": Machine({"cpu": 16 * GIB}, bfloat16=False, is_here=False),
}


def main() -> None:
    """Print the table."""
    print("| model, fusions | machine | method | weights | trains | peak | disk |\n|---|---|---|---|---|---|---|")
    for name, (config, fusions) in MODELS.items():
        for machine_name, machine in MACHINES.items():
            for method in ("refit", "healed"):
                print(f"| {name}, {fusions} | {machine_name} | {method} | {row(config, fusions, method, machine)} |")


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
