"""What `scripts/mend_gguf.py` makes of a converted file: the same model, with columns that quantise well."""

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from mend_gguf import READERS, mend

COLUMNS = 8
KINDS = ["full_attention", "sliding_attention"]
PATTERN = "gemma3.attention.sliding_window_pattern"


def write_gguf(file: Path) -> None:
    """A file of two layers whose gains were folded into what reads the stream, as fusing does."""
    random = np.random.default_rng(0)
    writer = GGUFWriter(file, "gemma3")
    for layer in range(len(KINDS)):
        for norm, names in READERS.items():
            gains = np.exp(random.normal(0, 3, COLUMNS)).astype(np.float32)
            writer.add_tensor(f"blk.{layer}.{norm}.weight", random.uniform(0.5, 2, COLUMNS).astype(np.float32))
            for name in names:
                weight = random.normal(size=(6, COLUMNS)).astype(np.float32) * gains
                writer.add_tensor(f"blk.{layer}.{name}.weight", weight)
        for name in ("attn_output", "ffn_down"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", random.normal(size=(COLUMNS, 6)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(file: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in GGUFReader(file).tensors}


def effective(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the model computes with: readers times the gains of their norm."""
    norm_of = {reader: norm for norm, names in READERS.items() for reader in names}
    products = {}
    for name, tensor in tensors.items():
        layer, part = name.removesuffix(".weight").rsplit(".", 1)
        if part in norm_of:
            products[name] = tensor * tensors[f"{layer}.{norm_of[part]}.weight"]
        elif part not in READERS:
            products[name] = tensor
    return products


def spread(tensors: dict[str, np.ndarray]) -> float:
    """The largest column over the smallest, of what reads the stream behind one norm."""
    sizes = np.sqrt(sum(np.square(tensors[f"blk.0.{name}.weight"]).sum(0) for name in READERS["attn_norm"]))
    return float(sizes.max() / sizes.min())


@pytest.fixture
def converted(tmp_path: Path) -> tuple[Path, Path]:
    """The folder of a fused model, and what was converted from it."""
    config = {"text_config": {"layer_types": KINDS}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_gguf(tmp_path / "fused.gguf")
    return tmp_path, tmp_path / "fused.gguf"


def test_the_model_is_the_same_with_columns_of_like_size(converted: tuple[Path, Path]) -> None:
    before = read(converted[1])
    mend(*converted)
    after = read(converted[1])
    assert before.keys() == after.keys()
    expected = effective(before)
    for name, tensor in effective(after).items():
        np.testing.assert_array_equal(tensor, expected[name])  # factors are powers of two
    assert spread(before) > 20 and spread(after) < 2.1


def test_kinds_of_layers_are_said_once(converted: tuple[Path, Path]) -> None:
    assert GGUFReader(converted[1]).get_field(PATTERN) is None
    for _ in range(2):
        mend(*converted)
        field = GGUFReader(converted[1]).get_field(PATTERN)
        assert field is not None and field.contents() == [False, True]
    once = read(converted[1])
    mend(*converted)
    assert all(np.array_equal(tensor, once[name]) for name, tensor in read(converted[1]).items())
