"""A checkpoint's files of weights: where they are, and that they are whole, complete and of plain floats."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from pydantic_core import from_json
from safetensors import safe_open
from transformers.modeling_utils import _add_variant
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from lf_hf.runtime.errors import explained

# Files of a checkpoint that decide what a model computes, or how it reads text.
CHECKPOINT_FILES = (
    *("*.safetensors", "*.index*.json", "config.json", "generation_config.json"),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "*.model", "*.jinja"),
)
UNREAD = "consolidated*.safetensors"
"""Mistral publishes its weights a second time, for its own library. These files are skipped."""
_FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them


def weights_size(folder: Path) -> int:
    """Bytes of a checkpoint's safetensors files."""
    return sum(file.stat().st_size for file in weight_files(folder))


def local_folder(base: str, hub: dict[str, Any], patterns: list[str]) -> Path:
    """The folder of a checkpoint; of one on the hub, files of these patterns are downloaded."""
    where = dict(hub)
    subfolder = where.pop("subfolder", "")
    if os.path.isdir(base):
        return Path(base, subfolder)
    place = f"{subfolder.strip('/')}/" if subfolder else ""
    wanted = [place + pattern for pattern in patterns]
    unwanted = [f"{place}*/*", place + UNREAD]  # the hub's patterns match in folders, too, such as those of a training
    return Path(snapshot_download(base, allow_patterns=wanted, ignore_patterns=unwanted, **where), subfolder)


def check_weights(folder: Path, variant: str | None = None, *, plain: bool = True) -> None:
    """Raise the errors of `weight_files`, and for each file those of `tensor_types`."""
    for file in weight_files(folder, variant):
        tensor_types(file, plain=plain)


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """A checkpoint's safetensors files. Raises ValueError if there are none, or the index names files elsewhere."""
    index = folder / _add_variant(SAFE_WEIGHTS_INDEX_NAME, variant)
    single = folder / _add_variant(SAFE_WEIGHTS_NAME, variant)
    if single.is_file():  # then transformers does not look at an index either
        return [single]
    if index.is_file():
        return sorted(folder / name for name in _shard_names(index))
    raise ValueError(
        f"{str(folder)!r} holds neither {single.name} nor {index.name}; convert pickled weights, which can run "
        "code when they are read, to safetensors, or if you trust them load them in Python, with "
        "use_safetensors=False (variant=NAME for files of another variant)."
    )


def _shard_names(index: Path) -> set[str]:
    """Names of the files that an index has: always of such as lie beside it."""
    with explained(f"{index.name} is not an index of safetensors files", "repair the index"):
        content = from_json(index.read_bytes())
        names = set(map(str, content["weight_map"].values()))
        if not names:
            raise ValueError("its weight_map does not name any")
    if not isinstance(content.get("metadata"), dict):  # without which transformers reads none
        raise ValueError(f'{index.name} has no metadata, as an index must have; write "metadata": {{}} into it.')
    for file in names:
        if not file.endswith(".safetensors") or any(mark in file for mark in ("/", "\\", "\0", ":")):
            raise ValueError(
                f"{index.name} names {file!r:.80} as a file of weights; only safetensors files in its own folder are "
                "read, so repair the index."
            )
    return names


def tensor_types(file: Path, *, plain: bool = True) -> dict[str, str]:
    """The type of each tensor in a safetensors file by the tensor's name, from the file's header.

    Raises ValueError if it is damaged, or if it is to be `plain` and holds weights that are no plain floats:
    transformers would cast them to floats without a word.
    """
    with (
        explained(f"{str(file)!r} cannot be read", "if it is not whole, download it again"),
        safe_open(file, "pt", backend="pread") as opened,  # it may be larger than memory, where it could not be mapped
    ):
        dtypes = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    for name, dtype in dtypes.items():
        if plain and name.endswith((".weight", ".bias")) and dtype not in _FLOATS:
            raise ValueError(
                f"{name!r} in {file.name!r} holds numbers of type {dtype}, not plain floats; convert the weights to "
                "bfloat16 or float32, or use the checkpoint that they were quantised from."
            )
    return dtypes
