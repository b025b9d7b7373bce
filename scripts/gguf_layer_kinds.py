#!/usr/bin/env python3
"""Write into the GGUF file of a fused Gemma 2 or 3 which layers have sliding windows: llama.cpp's converter does not.

.venv/bin/python scripts/gguf_layer_kinds.py FUSED FUSED.gguf OUT.gguf
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fused", type=Path, help="folder that was converted")
    parser.add_argument("gguf", help="what the converter made of it")
    parser.add_argument("out", help="the same file with one entry more")
    options = parser.parse_args()
    config = json.loads((options.fused / "config.json").read_text(encoding="utf-8"))
    sliding = [kind == "sliding_attention" for kind in config.get("text_config", config)["layer_types"]]
    reader = GGUFReader(options.gguf)
    field = reader.get_field("general.architecture")
    assert field is not None  # every file has one
    architecture = field.contents()
    entry = MetadataDetails(GGUFValueType.ARRAY, sliding, sub_type=GGUFValueType.BOOL)
    writer = GGUFWriter(options.out, architecture, endianess=reader.endianess)
    copy_with_new_metadata(reader, writer, {f"{architecture}.attention.sliding_window_pattern": entry}, [])


if __name__ == "__main__":
    main()
