#!/usr/bin/env python3
"""Write a Llama checkpoint of any shape with random weights, a shard at a time, and a tokenizer for English.

    .venv/bin/python scripts/random_checkpoint.py OUT --layers 22 --hidden 2048 --mlp 5632 --heads 32 --kv-heads 4

What it says is noise, but it takes the time and the memory of a real model of its shape. Memory is that of one shard.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from lf_hf.text.calibration import documentation_halves

_FEWEST_TOKENS = 258  # all bytes, and two special ones
_MAX_LEARNED_TOKENS = 8192  # more take long to train, and no text here needs them


def write_checkpoint(
    folder: Path, config: LlamaConfig, *, seed: int = 0, max_shard_bytes: int = 500_000_000, device: str = "cpu"
) -> None:
    """Write random weights of `config`'s shapes and dtype, the config and a tokenizer into a folder.

    Matrices are normal with the config's `initializer_range`, norm gains are 1. Names, shapes and tied weights are
    those of transformers' own LlamaForCausalLM. Numbers are drawn on `device`: a CPU takes minutes for 8 billion.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    parameters = dict(model.named_parameters())  # tied ones once
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    shards = _split(parameters, max_shard_bytes // dtype.itemsize)
    random = torch.Generator(device).manual_seed(seed)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(logging.tqdm(shards, desc="Writing", unit="shard"), 1):
        file = SAFE_WEIGHTS_NAME if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name in names:
            tensor = torch.ones(parameters[name].shape, dtype=dtype, device=device)
            if tensor.dim() > 1:
                tensor.normal_(std=config.initializer_range, generator=random)
            tensors[name] = tensor.cpu()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = dtype.itemsize * sum(parameter.numel() for parameter in parameters.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    make_tokenizer(config.vocab_size).save_pretrained(folder)


def make_tokenizer(vocab_size: int, text: str = "") -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens, trained on some text or on Python's documentation."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, _MAX_LEARNED_TOKENS),
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text or documentation_halves()[0]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def add_shape(parser: argparse.ArgumentParser) -> None:
    """Add the options that `llama_config` reads."""
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--mlp", type=int, default=5632)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--vocab", type=_vocab_size, default=32000)
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--tie", action="store_true", help="tie the head to the embeddings")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])


def llama_config(options: argparse.Namespace) -> LlamaConfig:
    """The config of a shape given on the command line."""
    return LlamaConfig(
        num_hidden_layers=options.layers,
        hidden_size=options.hidden,
        intermediate_size=options.mlp,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        vocab_size=options.vocab,
        max_position_embeddings=options.positions,
        tie_word_embeddings=options.tie,
        dtype=getattr(torch, options.dtype),
        bos_token_id=0,
        eos_token_id=1,
    )


def _vocab_size(text: str) -> int:
    size = int(text)
    if size < _FEWEST_TOKENS:
        raise argparse.ArgumentTypeError(f"must be {_FEWEST_TOKENS} or more: all bytes, and two special tokens.")
    return size


def _split(parameters: dict[str, nn.Parameter], max_numbers: int) -> list[list[str]]:
    """Names, in order, in groups of at most `max_numbers` numbers, or of a single larger tensor."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, parameter in parameters.items():
        if shards[-1] and size + parameter.numel() > max_numbers:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += parameter.numel()
    return shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder without weights")
    add_shape(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-bytes", type=int, default=500_000_000)
    options = parser.parse_args()
    if any(options.out.glob("*.safetensors")) or (options.out / SAFE_WEIGHTS_INDEX_NAME).exists():
        parser.error(f"{options.out} has weights already, which could be taken for those that are to be written.")
    write_checkpoint(options.out, llama_config(options), seed=options.seed, max_shard_bytes=options.shard_bytes)


if __name__ == "__main__":
    main()
