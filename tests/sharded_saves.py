"""Two processes that hold a model's weights between them save it, and load what was written; run by test_saving.py."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from transformers.distributed.configuration_utils import DistributedConfig

from lf_hf import FusedLlamaForCausalLM
from lf_hf.runtime.launch import OtherProcessError

IDS = torch.arange(40).reshape(2, 20)


def logits(model: FusedLlamaForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def main(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    whole, spread = (FusedLlamaForCausalLM.from_pretrained(folder / "whole") for _ in range(2))
    for layer in spread.model.layers:
        fully_shard(layer)
    models = {"fsdp2": fully_shard(spread)}
    if "tp_size" in inspect.signature(DistributedConfig).parameters:  # not in older transformers
        split = {"distributed_config": DistributedConfig(tp_size=2)}
        models["tp"] = FusedLlamaForCausalLM.from_pretrained(folder / "whole", **split)
    (folder / "file").touch()
    errors = {}
    for name, model in models.items():
        model.save_pretrained(folder / name, max_shard_size="50KB")
        model.save_pretrained(folder / f"{name} given", state_dict=model.state_dict())
        for out in (name, f"{name} given"):
            loaded = FusedLlamaForCausalLM.from_pretrained(folder / out)
            assert tensors(folder / out).keys() == tensors(folder / "whole").keys()
            errors[out] = (logits(loaded) - logits(whole)).abs().max().item()
        with pytest.raises((OSError, OtherProcessError), match="Not a directory"):  # on either rank
            model.save_pretrained(folder / "file" / "out")
    whole.save_pretrained(folder / f"plain {rank}")  # each rank has it whole, so rank 0 alone saves
    if rank == 0:
        print(json.dumps(errors))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
