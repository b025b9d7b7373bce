"""Parsers get files that nobody meant to write: they end with a ValueError or OSError, in little memory."""

from __future__ import annotations

import copy
import json
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

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)


@st.composite
def edited(draw: st.DrawFn, whole: Any) -> Any:
    """A JSON value with one to three of its parts replaced, removed or doubled."""
    root: Any = {"": copy.deepcopy(whole)}
    for _ in range(draw(st.integers(1, 3))):
        parent, key = root, ""
        while isinstance(parent[key], (dict, list)) and parent[key] and draw(st.integers(0, 4)):
            parent = parent[key]
            key = draw(st.sampled_from(sorted(parent) if isinstance(parent, dict) else range(len(parent))))
        action = draw(st.sampled_from(["replace", "remove", "double"])) if parent is not root else "replace"
        if action == "remove":
            del parent[key]
        elif action == "double" and isinstance(parent, dict):
            parent[f"{key}2"] = parent[key]
        else:
            parent[key] = draw(values)
    return root[""]


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes of a file with some of them cut out, overwritten or put in; or any others."""
    content = whole if draw(st.integers(0, 5)) else draw(st.binary(max_size=200))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, min(len(content), start + 20)))
        content = content[:start] + draw(st.binary(max_size=20)) + content[end:]
    return content


def json_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


POINT = make_point("mka", 1, 0.5)
RESULT = vars(POINT) | {"scores": {"task": vars(POINT.scores["mmlu_5shot"])}}
REPORT = make_report(similarity=None, embeddings=None).to_dict()
INDEX = {"metadata": {"total_size": 9}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
INDEX_NAME = "model.safetensors.index.json"
WHOLE = {f"model-{n}.safetensors": save({name: torch.ones(2, 3)}) for n, name in ((1, "a"), (2, "b"))}
WHOLE[INDEX_NAME] = json_bytes(INDEX)
TEXTS = ["one\ntwo", 'a "b", c', *make_texts(3)]

edited_index = edited(INDEX).map(json_bytes) | damaged(json_bytes(INDEX))
edited_results = st.tuples(st.lists(edited(RESULT).map(json_bytes)), st.binary(max_size=20))
# A file, what may be in it, and who reads it.
PARSERS: dict[str, tuple[str, st.SearchStrategy[bytes], Any]] = {
    "report": ("fusion_report.json", edited(REPORT).map(json_bytes) | damaged(json_bytes(REPORT)), FusionReport.load),
    "results": ("results.jsonl", edited_results.map(lambda parts: b"\n".join([*parts[0], parts[1]])), read_points),
    "index": (INDEX_NAME, edited_index, shard_names),
    "index, for its weights": (INDEX_NAME, edited_index, lambda file: tensor_files(file.parent)),
    "shard": ("model-1.safetensors", damaged(WHOLE["model-1.safetensors"]), lambda file: tensor_files(file.parent)),
}
for name, content in {
    "a.txt": "\n\n".join(TEXTS).encode(),
    "a.jsonl": b"\n".join(json_bytes({"text": text}) for text in TEXTS),
    "a.csv": b'n,text\n0,one\n1,"a ""b"", c"\n',
}.items():
    PARSERS[f"samples in {name}"] = name, damaged(content), lambda file: load_calibration(file).texts
    PARSERS[f"text in {name}"] = name, damaged(content), lambda file: load_corpus(file).parts


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_can_be_read_can_be_used(tmp_path: Path, name: str, data: st.DataObject) -> None:
    file_name, contents, read = PARSERS[name]
    for other, whole in WHOLE.items():
        (tmp_path / other).write_bytes(whole)
    (tmp_path / file_name).write_bytes(content := data.draw(contents))
    found = None
    with suppress(ValueError, OSError):
        found = read(tmp_path / file_name)
    if isinstance(found, FusionReport):
        assert found.summary() and model_card(found, FAMILIES["llama"], plain=False)
        assert len(found.groups) == found.layers_after
    elif found is not None and read is shard_names:
        assert all(Path(shard).name == shard for shard in found.values())
    elif isinstance(found, list):
        assert all(isinstance(text, str) and text.encode() for text in found)
    assert (tmp_path / file_name).read_bytes() == content


@settings(max_examples=60, deadline=None)
@given(edited(FusionConfig(2).to_dict()) | edited({name: str(value) for name, value in vars(FusionConfig(2)).items()}))
def test_settings(content: Any) -> None:
    if isinstance(content, dict):
        with suppress(ValueError):
            FusionConfig.from_kwargs(**content)
