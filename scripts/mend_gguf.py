#!/usr/bin/env python3
"""Make the GGUF file that llama.cpp's converter wrote of a fused model right, before anything is made of it.

.venv/bin/python scripts/mend_gguf.py FUSED FUSED.gguf

It says which layers have sliding windows, where the converter left that out. And what reads the stream in a layer gets
columns of like size: the gains of its norm, which fusing folds into the weights, go back to the norm, as powers of two,
so the model stays the same. A quantised block has one scale for its columns, and would lose the small ones.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from itertools import chain
from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

READERS = {"attn_norm": ("attn_q", "attn_k", "attn_v"), "ffn_norm": ("ffn_gate", "ffn_up")}
OTHERS = {"attn_output", "attn_q_norm", "attn_k_norm", "ffn_down", "post_attention_norm", "post_ffw_norm"}


def mend(fused: Path, file: Path) -> None:
    """Change a file that was converted from the folder `fused`."""
    config = json.loads((fused / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    write_layer_kinds([kind == "sliding_attention" for kind in config.get("layer_types") or ()], file)
    even_columns(file)


def write_layer_kinds(sliding: list[bool], file: Path) -> None:
    reader = GGUFReader(file)
    field = reader.get_field("general.architecture")
    assert field is not None  # every file has one
    architecture = field.contents()
    key = f"{architecture}.attention.sliding_window_pattern"
    if not any(sliding) or reader.get_field(key):
        return
    whole = file.with_name(f"{file.name}.whole")
    writer = GGUFWriter(whole, architecture, endianess=reader.endianess)
    entry = MetadataDetails(GGUFValueType.ARRAY, sliding, sub_type=GGUFValueType.BOOL)
    copy_with_new_metadata(reader, writer, {key: entry}, [])
    whole.replace(file)


def even_columns(file: Path) -> None:
    """Of all layers that have these parts and no others, in 16 or 32 bits of IEEE."""
    layers: defaultdict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for tensor in GGUFReader(file, "r+").tensors:
        if found := re.fullmatch(r"(blk\.\d+)\.(.+)\.weight", tensor.name):
            layers[found[1]][found[2]] = tensor.data
    for parts in layers.values():
        known = {*READERS, *chain(*READERS.values())}
        if known - parts.keys() or parts.keys() - known - OTHERS:
            continue
        for norm, names in READERS.items():
            readers = [parts[name] for name in names]
            if any(weight.dtype.kind != "f" for weight in readers):
                continue
            squares = sum(np.square(weight, dtype=np.float32).sum(0) for weight in readers)
            sizes = np.sqrt(np.maximum(squares, np.finfo(np.float32).tiny))
            factors = 2 ** np.round(np.log2(sizes / np.median(sizes)))
            parts[norm] *= factors
            for weight in readers:
                weight /= factors.astype(weight.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fused", type=Path, help="folder that was converted")
    parser.add_argument("gguf", type=Path, help="what the converter made of it with --outtype f16")
    options = parser.parse_args()
    mend(options.fused, options.gguf)


if __name__ == "__main__":
    main()
