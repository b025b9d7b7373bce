"""Two processes that hold a model's weights between them save it, and load what they wrote; run by test_saving.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard
from transformers.distributed import DistributedConfig

from lf_hf import FusedLlamaForCausalLM

IDS = torch.arange(40).reshape(2, 20)


def main(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    whole = FusedLlamaForCausalLM.from_pretrained(folder / "whole")
    with torch.no_grad():
        expected = whole(IDS).logits
    spread = FusedLlamaForCausalLM.from_pretrained(folder / "whole")
    for layer in spread.model.layers:
        fully_shard(layer)
    models = {"fsdp2": fully_shard(spread)}
    config = DistributedConfig(tp_size=2)
    models["tp"] = FusedLlamaForCausalLM.from_pretrained(folder / "whole", distributed_config=config)
    differences = {}
    for name, model in models.items():
        model.save_pretrained(folder / name, max_shard_size="50KB")
        model.save_pretrained(folder / f"{name} given", state_dict=model.state_dict())
        for out in (name, f"{name} given"):
            with torch.no_grad():
                logits = FusedLlamaForCausalLM.from_pretrained(folder / out)(IDS).logits
            differences[out] = (logits - expected).abs().max().item()
        (folder / "file").touch()
        try:
            model.save_pretrained(folder / "file" / "out")
        except OSError as error:
            differences[f"{name} refused"] = str(error)
    whole.save_pretrained(folder / f"plain {rank}")  # each rank has it whole
    if rank == 0:
        print(json.dumps(differences))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
