"""Other people's files: what they hold is not run, does not reach beyond its folder, and is shown as text."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders import Page, make_report
from conftest import make_texts
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lf_hf import FusedLlamaForCausalLM, fuse_checkpoint
from lf_hf.checkpoint.card import model_card
from lf_hf.evaluate.tables import markdown
from lf_hf.families import FAMILIES
from lf_hf.report.page import write_page
from lf_hf.report.records import CalibrationInfo, Continuation, PerplexityInfo

HOSTILE = (
    "<script>alert('x')</script> `code` | cell\n---\nkey: [a, *b, !!python/object:c]\n# title $\\frac$ &amp; \"q\""
)


def in_memory(base: str, out: Path, **kwargs: Any) -> None:
    settings: dict[str, Any] = {"num_fusions": 1, "perplexity_tokens": 0, "calibration": make_texts()}
    FusedLlamaForCausalLM.from_pretrained_fused(base, **settings | kwargs).save_pretrained(out)


def from_folder_to_folder(base: str, out: Path, **kwargs: Any) -> None:
    settings: dict[str, Any] = {"num_fusions": 1, "perplexity_tokens": 0, "calibration": make_texts()}
    fuse_checkpoint(base, out, **settings | kwargs)


both = pytest.mark.parametrize("fuse", [in_memory, from_folder_to_folder])
Fuse = Callable[..., None]


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8")


@pytest.fixture
def copy(base: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "base"))


# Code


@both
def test_code_in_a_repository_runs_only_when_asked_for(fuse: Fuse, copy: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (copy / "own.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, PreTrainedTokenizerFast\n"
        "class Config(LlamaConfig): ...\n"
        "class Tokenizer(PreTrainedTokenizerFast): ...\n"
    )
    edit_json(copy / "config.json", auto_map={"AutoConfig": "own.Config"})
    edit_json(copy / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.Tokenizer"]})
    fuse(str(copy), tmp_path / "out")
    assert not marker.exists()
    AutoTokenizer.from_pretrained(copy, trust_remote_code=True)
    assert marker.exists()  # so it could have
    marker.unlink()

    edit_json(copy / "tokenizer_config.json", tokenizer_class="Own")
    edit_json(copy / "config.json", model_type="own")
    with pytest.raises(ValueError, match=r"No config of a model can be read for .*contains custom code"):
        fuse(str(copy), tmp_path / "new")
    assert not marker.exists() and not (tmp_path / "new").exists()


def test_pickled_weights_are_read_only_when_asked_for(copy: Path, fused: Path, base: str, tmp_path: Path) -> None:
    saved = Path(shutil.copytree(fused, tmp_path / "fused"))
    for folder in (copy, saved):
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    for given in ({}, {"use_safetensors": None}, {"use_safetensors": True}):
        with pytest.raises(ValueError, match=r"pickled weights can run code .* pass use_safetensors=False"):
            in_memory(str(copy), tmp_path / "out", **given)
    for name, given in ((base, {}), (str(copy), {"use_safetensors": False})):
        in_memory(name, tmp_path / Path(name).name, **given)
    a, b = (load_file(tmp_path / Path(name).name / "model.safetensors") for name in (base, copy))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    loaders: list[Any] = [FusedLlamaForCausalLM, AutoModelForCausalLM]
    for kind in loaders:
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            kind.from_pretrained(saved)
        assert len(kind.from_pretrained(saved, use_safetensors=False).model.layers) == 4


# Names


@both
def test_names_of_chat_templates_stay_in_the_folder(fuse: Fuse, copy: Path, tmp_path: Path) -> None:
    templates = [{"name": name, "template": "x"} for name in ("default", "../../../stray", str(tmp_path / "stray"))]
    edit_json(copy / "tokenizer_config.json", chat_template=templates)
    with pytest.raises((ValueError, OSError), match="stray"):
        fuse(str(copy), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert not list(tmp_path.parent.glob("stray*"))


def test_an_index_of_a_fused_checkpoint_names_its_own_files_alone(fused: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(fused, tmp_path / "out"))
    (out / "model.safetensors").unlink()
    for shard in ("../fused/model.safetensors", "sub/model.safetensors", "model.bin", ""):
        index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(fused / "model.safetensors"), shard)}
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
        for kind in (FusedLlamaForCausalLM, AutoModelForCausalLM):
            with pytest.raises(ValueError, match="only safetensors files in its own folder are read"):
                kind.from_pretrained(out)
    shutil.copy(fused / "model.safetensors", out)  # beside which no index is looked at
    FusedLlamaForCausalLM.from_pretrained(out)


@both
def test_links_are_followed_in_the_hub_cache(fuse: Fuse, base: str, tmp_path: Path) -> None:
    home = tmp_path / "models--some--model"
    snapshot = home / "snapshots" / "0123"
    for folder in (home / "blobs", home / "refs", snapshot):
        folder.mkdir(parents=True)
    (home / "refs" / "main").write_text("0123")
    for number, file in enumerate(Path(base).iterdir()):
        shutil.copy(file, home / "blobs" / f"{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    fuse(str(snapshot), tmp_path / "of-a-folder")
    fuse("some/model", tmp_path / "of-a-name", cache_dir=str(tmp_path))
    files = [tmp_path / name / "model.safetensors" for name in ("of-a-folder", "of-a-name")]
    assert files[0].read_bytes() == files[1].read_bytes()


# What is shown


def hostile_report() -> Any:
    report = make_report(
        base=HOSTILE,
        config={"method": HOSTILE, "num_fusions": HOSTILE, HOSTILE: HOSTILE},
        calibration=[CalibrationInfo(HOSTILE, 57, 5000)],
        perplexities=[PerplexityInfo(HOSTILE, HOSTILE, 4000, 6.0, 30.0, "kin", 0.5, 0.5)],
        continuations=[Continuation(HOSTILE, f"\t{HOSTILE}\x00\x1b[2J", "")],
        seconds={HOSTILE: 1.0},
        versions={HOSTILE: HOSTILE},
        notes=[HOSTILE],
        sample_labels=[HOSTILE],
    )
    first = dataclasses.replace(report.steps[0], matches={HOSTILE: report.steps[0].matches["mlp.up_proj"]})
    return dataclasses.replace(report, steps=[first, *report.steps[1:]])


def test_the_page_shows_hostile_text_as_text(tmp_path: Path) -> None:
    write_page(hostile_report(), tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.text.count("<script>alert('x')</script>") >= 11
    known = "html head meta title style body main h1 h2 p div span b pre section details summary img table tr th td"
    assert {tag for tag, _ in page.tags} <= set(known.split())
    assert not any(name.startswith("on") or name == "href" for _, attributes in page.tags for name in attributes)


def check_markdown(text: str) -> None:
    """Outside of code there are line breaks and nothing hostile, and every table row has its head's number of cells."""
    rows: list[int] = []
    for line in text.splitlines():
        outside = re.sub(r"`[^`]*`", "", re.sub(r"\\.", "", line)).replace("<br>", "")
        assert "<" not in outside and not outside.startswith(("key:", "# title"))
        cells = len(re.findall(r"(?<!\\)\|", line))
        assert not rows or not cells or cells == rows[-1]
        rows = [*rows, cells] if cells else []


@pytest.mark.parametrize("as_llama", [True, False])
def test_the_model_card_shows_hostile_text_as_text(as_llama: bool) -> None:
    card = model_card(hostile_report(), FAMILIES["llama"], plain=as_llama)
    metadata, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert set(yaml.safe_load(metadata)) == {"library_name", "pipeline_tag", "tags"}  # the base is no repository
    assert ModelCard(card).content == card and all(c.isprintable() or c in "\n\xa0" for c in card)
    check_markdown(body)


def test_the_tables_of_a_sweep_show_hostile_text_as_text() -> None:
    check_markdown(markdown([], HOSTILE))
