"""Parsers get files that nobody meant to write: they end with a ValueError or OSError, in little memory."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import make_point, make_report
from conftest import make_texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from lf_hf import FusionConfig, FusionReport
from lf_hf.checkpoint.card import model_card
from lf_hf.checkpoint.weights import shard_names, tensor_files
from lf_hf.evaluate.points import read_points
from lf_hf.families import FAMILIES
from lf_hf.text.calibration import load_calibration, load_corpus

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)


@st.composite
def edited(draw: st.DrawFn, whole: Any) -> Any:
    """A JSON value with one to three of its parts replaced, removed or doubled."""
    root = [copy.deepcopy(whole)]
    for _ in range(draw(st.integers(1, 3))):
        parent: Any = root
        key: Any = 0
        while isinstance(parent[key], (dict, list)) and parent[key] and draw(st.integers(0, 4)):
            parent = parent[key]
            key = draw(st.sampled_from(sorted(parent) if isinstance(parent, dict) else range(len(parent))))
        action = draw(st.sampled_from(["replace", "remove", "double"])) if parent is not root else "replace"
        if action == "replace":
            parent[key] = draw(values)
        elif action == "remove":
            del parent[key]
        elif isinstance(parent, list):
            parent.append(parent[key])
        else:
            parent[f"{key}2"] = parent[key]
    return root[0]


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes of a file with some of them cut out, overwritten or put in; or any others."""
    if not draw(st.integers(0, 5)):
        return draw(st.binary(max_size=200))
    content = whole
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, min(len(content), start + 20)))
        content = content[:start] + draw(st.binary(max_size=20)) + content[end:]
    return content


def only_our_errors(read: Callable[[], Any]) -> None:
    with suppress(ValueError, OSError):
        read()


def json_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


POINT = make_point("mka", 1, 0.5)
REPORT = make_report(similarity=None, embeddings=None).to_dict()


@quick
@given(edited(REPORT).map(json_bytes) | damaged(json_bytes(REPORT)))
def test_reports(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "fusion_report.json").write_bytes(content)
    try:
        report = FusionReport.load(tmp_path)
    except (ValueError, OSError):
        return
    assert report.summary() and model_card(report, FAMILIES["llama"], plain=False)  # what loads can be shown and saved
    assert len(report.groups) == report.layers_after
    report.save(tmp_path)


@quick
@given(edited([vars(POINT) | {"scores": {"task": vars(POINT.scores["mmlu_5shot"])}}]), st.binary(max_size=20))
def test_results_of_sweeps(tmp_path: Path, lines: Any, rest: bytes) -> None:
    file = tmp_path / "results.jsonl"
    shown = lines if isinstance(lines, list) else [lines]
    file.write_bytes(b"".join(json_bytes(line) + b"\n" for line in shown) + rest)
    before = file.read_bytes()
    only_our_errors(lambda: read_points(file))
    assert file.read_bytes() == before


INDEX = {"metadata": {"total_size": 9}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
SHARDS = {f"model-{n}.safetensors": save({name: torch.ones(2, 3)}) for n, name in ((1, "a"), (2, "b"))}


@quick
@given(edited(INDEX).map(json_bytes) | damaged(json_bytes(INDEX)), damaged(SHARDS["model-1.safetensors"]) | st.none())
def test_indexes_and_shards(tmp_path: Path, index: bytes, shard: bytes | None) -> None:
    for name, content in SHARDS.items():
        (tmp_path / name).write_bytes(content)
    if shard is not None:
        (tmp_path / "model-1.safetensors").write_bytes(shard)
    file = tmp_path / "model.safetensors.index.json"
    file.write_bytes(index)
    only_our_errors(lambda: tensor_files(tmp_path))
    with suppress(ValueError):
        assert {(tmp_path / name).parent for name in shard_names(file).values()} == {tmp_path}


@quick
@given(edited(FusionConfig(2).to_dict()) | edited({name: str(value) for name, value in vars(FusionConfig(2)).items()}))
def test_fusion_configs(content: Any) -> None:
    if isinstance(content, dict):
        only_our_errors(lambda: FusionConfig.from_kwargs(**content))


TEXTS = ["one\ntwo", 'a "b", c', *make_texts(3)]
FILES = {
    "a.txt": "\n\n".join(TEXTS).encode(),
    "a.jsonl": b"\n".join(json_bytes({"text": text}) for text in TEXTS),
    "a.csv": b'n,text\n0,one\n1,"a ""b"", c"\n',
}


@pytest.mark.parametrize("name", FILES)
@settings(quick, max_examples=20)
@given(data=st.data())
def test_calibration_files(tmp_path: Path, name: str, data: st.DataObject) -> None:
    (tmp_path / name).write_bytes(data.draw(damaged(FILES[name])))
    for load in (load_calibration, load_corpus):

        def read() -> None:
            texts = [*getattr(load(tmp_path / name), "texts", [])]  # noqa: B023
            assert all(isinstance(text, str) and text.encode() for text in texts)

        only_our_errors(read)
