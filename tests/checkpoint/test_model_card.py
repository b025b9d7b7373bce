"""What people are shown of a fusion: what the model card lists, and that other people's words are text there."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders import HEALED, Page, make_report
from conftest import make_texts
from huggingface_hub import ModelCard
from transformers import LlamaConfig

import lf_hf
from lf_hf import FusionConfig, FusionReport, fuse_checkpoint
from lf_hf.checkpoint.card import model_card
from lf_hf.cli import main
from lf_hf.evaluate.tables import markdown
from lf_hf.report.data import CalibrationInfo, Continuation, PerplexityInfo
from lf_hf.report.page import write_page

HOSTILE = (
    "<script>alert('x')</script> `code` | cell\n---\nkey: [a, *b, !!python/object:c]\n# title $\\frac$ &amp; \"q\""
)


def a_report(method: str = "refit", **values: Any) -> FusionReport:
    fields: dict[str, Any] = {"base": "owner/model", "config": FusionConfig(num_fusions=1, method=method).to_dict()}
    fields["calibration"] = [CalibrationInfo("some text", 20, 4096)]
    fields["perplexities"] = [PerplexityInfo("docs", "some documentation", 4000, 10.0, 12.5, "seen", 0.25, 0.875)]
    return make_report(**fields | values)


def card_of(report: FusionReport, *, plain: bool = False) -> str:
    return model_card(report, LlamaConfig(), plain=plain)


def test_figures_say_what_they_are_of() -> None:
    card = card_of(a_report(continuations=[Continuation("def f():", "\n    a | b", "")]))
    for words in (
        "\n| perplexity, docs | 10 | 12.5 | x 1.25 |\n| divergence, docs | 0 | 0.25 |  |\n",
        "\n- docs: 4,000 tokens of some documentation; partly used for fitting.\n",
        "\n- calibration: some text (20 samples, 4096 tokens)\n",
        "| `def f():` | ` `<br>`\xa0\xa0\xa0\xa0a \\| b` | - |",
    ):
        assert words in card
    assert "erplexity" not in card_of(a_report(perplexities=[], config={"method": "refit"}))


def metadata_of(card: str) -> dict[str, Any]:
    metadata: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return metadata


@pytest.mark.parametrize("base", ["owner/model", "owner/model/file.gguf", "model"])
def test_a_folder_is_no_repository(base: str) -> None:
    card = card_of(a_report(base=base))
    repository, relation = ("owner/model", "finetune") if base.startswith("owner/") else (None, None)
    metadata = metadata_of(card)
    assert (metadata.get("base_model"), metadata.get("base_model_relation")) == (repository, relation)
    assert metadata["tags"] == ["llama", "layer-fusion", "depth-pruning"]
    assert "model" in card
    if base.endswith(".gguf"):
        assert "fuse owner/model out" in card and "--gguf-file file.gguf" in card


@pytest.mark.parametrize(
    ("readme", "found"),
    [
        ("---\nlicense: other\nlicense_name: a\nlicense_link: b\ntags: [c]\n---\n", ["other", "a", "b"]),
        ("---\nlicense: mit\n---\n# A model\n", ["mit", None, None]),
        ("---\nlicense: [mit]\n---\n", [None] * 3),
        ("---\na: [\n---\n", [None] * 3),
        ("# A model", [None] * 3),
    ],
)
def test_the_licence_is_that_of_the_base(
    readme: str, found: list[str | None], make_base: Callable[..., str], tmp_path: Path
) -> None:
    base = make_base()
    Path(base, "README.md").write_text(readme)
    fuse_checkpoint(base, tmp_path / "out", num_fusions=1, method="truncate", perplexity_tokens=0)
    metadata = metadata_of((tmp_path / "out" / "README.md").read_text())
    assert [metadata.get(name) for name in ("license", "license_name", "license_link")] == found


@pytest.mark.parametrize(
    ("config", "healed", "options", "heals"),
    [
        ({"num_fusions": 4, "calibration_tokens": 8192}, None, "--num-fusions 4 --calibration-tokens 8192", []),
        ({"max_divergence": 0.5}, None, "--max-divergence 0.5", []),
        (
            {"num_fusions": 1, "method": "mka", "rank_normalize": False},
            HEALED,
            "--num-fusions 1 --no-rank-normalize",
            ["heal out out-healed --base owner/model --revision v2 --train fused"],
        ),
    ],
)
def test_a_command_makes_the_model_again(config: dict[str, Any], healed: Any, options: str, heals: list[str]) -> None:
    config = FusionConfig(**{"method": "refit"} | config).to_dict()
    digests = {"base_digest": "12ab", "weights_digest": "34cd"}
    report = a_report(config=config, healed=healed, dtype="torch.bfloat16", revision="v2", **digests)
    card = card_of(report)
    [block] = re.findall(r"^```bash\n(.*?)\n```$", card, re.M | re.S)
    commands = [f"fuse owner/model out --method {config['method']} {options} --dtype bfloat16 --revision v2", *heals]
    for line, command in zip(block.splitlines(), commands, strict=True):
        program, *words = shlex.split(line)
        assert program == "lf-hf" and sorted(words) == sorted(command.split())
    for row in ("| `torch` | `2` |", "| `weights of the base` | `12ab` |", "| `weights` | `34cd` |"):
        assert row in card


@pytest.mark.parametrize("options", ["--method refit", "--heal-tokens 2048"])
def test_its_command_makes_the_same_weights_in_another_process(
    options: str, base: str, text: Path, tmp_path: Path
) -> None:
    """In one that knows nothing of the first, but for the base and the text."""
    few = "--num-fusions 2 --calibration-length 64 --calibration-tokens 2048 --perplexity-tokens 200 --no-speed".split()
    assert main(["fuse", base, str(tmp_path / "out"), *few, *options.split(), "--calibration", str(text)]) == 0
    made = FusionReport.load(tmp_path / "out")
    [command] = re.findall(r"^```bash\nlf-hf (.*)\n```$", (tmp_path / "out" / "README.md").read_text(), re.M)
    shutil.copytree(base, tmp_path / "fresh" / Path(base).name)
    words = [sys.executable, "-m", "lf_hf", *shlex.split(command), "--calibration", str(text)]
    environment = {"PYTHONPATH": str(Path(lf_hf.__file__).parents[1]), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # another number adds up in another order
    subprocess.run(words, cwd=tmp_path / "fresh", env=environment, check=True)
    assert FusionReport.load(tmp_path / "fresh" / "out").weights_digest == made.weights_digest is not None


def test_its_commands_make_a_model_again_that_was_healed_twice(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what a healing was told beside its settings. The fused model's figures are those before both."""
    (tmp_path / "text.txt").write_text("\n\n".join(make_texts(1200)))
    text, out = str(tmp_path / "text.txt"), tmp_path / "first"
    base = str(shutil.copytree(base, tmp_path / "-rf"))
    fuse_checkpoint(
        base, out, num_fusions=2, method="truncate", heal_tokens=2048, calibration=text, perplexity_tokens=256
    )
    twice: dict[str, Any] = {"tokens": 1024, "length": 64, "batch_tokens": 256}
    twice["training_args"] = {"optim": "adafactor", "bf16": False}
    report = lf_hf.heal(out, tmp_path / "second", base=base, text=text, **twice)
    [block] = re.findall(r"^```bash\n(.*?)\n```$", (tmp_path / "second" / "README.md").read_text(), re.M | re.S)
    monkeypatch.chdir(tmp_path)
    for line in block.splitlines():
        _, command, *words = shlex.split(line)
        assert main([command, *words, "--calibration" if command == "fuse" else "--text", text]) == 0
    again = FusionReport.load("out-healed")
    assert again.weights_digest == report.weights_digest != FusionReport.load(out).weights_digest
    fused, healed = FusionReport.load(out), {row.name: row.values for row in report.rows()}
    for row in fused.rows():
        if row.kind == "perplexity":
            assert healed[row.name][1] == pytest.approx(row.values[1]) and healed[row.name][2] != row.values[2]


@pytest.fixture
def hostile_report() -> FusionReport:
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
    [fused] = report.fused_layers
    [match, *_] = fused.matches[0].values()
    return dataclasses.replace(report, fused_layers=[dataclasses.replace(fused, matches=[{HOSTILE: match}])])


def test_the_page_shows_hostile_text_as_text(hostile_report: FusionReport, tmp_path: Path) -> None:
    write_page(hostile_report, tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.text.count("<script>alert('x')</script>") >= 11
    known = "html head meta title style body main h1 h2 p div span b pre section details summary img table tr th td"
    assert {tag for tag, _ in page.tags} <= set(known.split())
    assert not any(name.startswith("on") or name == "href" for _, attributes in page.tags for name in attributes)


def test_cards_and_tables_show_hostile_text_as_text(hostile_report: FusionReport) -> None:
    """Outside of code there are line breaks and nothing hostile, and every table row has its head's number of cells."""
    texts = [markdown([], HOSTILE)]
    for plain in (True, False):
        card = card_of(hostile_report, plain=plain)
        metadata, body = card.removeprefix("---\n").split("\n---\n", 1)
        assert set(yaml.safe_load(metadata)) == {"library_name", "pipeline_tag", "tags"}  # the base is no repository
        assert ModelCard(card).content == card and all(c.isprintable() or c in "\n\xa0" for c in card)
        texts.append(re.sub(r"^```.*?^```$", "", body, flags=re.M | re.S))
    for text in texts:
        rows: list[int] = []
        for line in text.splitlines():
            outside = re.sub(r"`[^`]*`", "", re.sub(r"\\.", "", line)).replace("<br>", "")
            assert "<" not in outside and not outside.startswith(("key:", "# title"))
            cells = len(re.findall(r"(?<!\\)\|", line))
            assert not rows or not cells or cells == rows[-1]
            rows = [*rows, cells] if cells else []
