"""Reports: what they say of a model, what they give away, what is read back; and the page about a fusion."""

from __future__ import annotations

import base64
import dataclasses
import html
import importlib.util
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from builders import HEALED, MATCHES, Page, make_point, make_report, no_warnings
from conftest import make_llama
from matplotlib.patches import Rectangle
from transformers import AutoModelForCausalLM, LlamaConfig

from lf_hf import FusedLlamaForCausalLM, FusionConfig, FusionReport, fuse_checkpoint
from lf_hf.checkpoint.card import model_card
from lf_hf.cli import main
from lf_hf.evaluate.results import Results
from lf_hf.evaluate.tables import markdown
from lf_hf.report.data import BudgetInfo, BudgetTrial, Continuation, FusedLayer, PerplexityInfo
from lf_hf.report.notes import damage_notes
from lf_hf.report.page import report_figures, write_page
from lf_hf.report.report import CHANGED_NOTE, published_name
from lf_hf.runtime.numerics import weights_digest
from lf_hf.settings import METHODS

SETTINGS: dict[str, Any] = {"perplexity_tokens": 0, "calibration_tokens": 1024, "entropy_neighbors": 20}
PHONE = 400  # points: a picture that is wider has letters too small to read at 390 pixels
FEW_PICTURES: dict[str, Any] = {"similarity": None, "embeddings": None}


def fuse(base: str, text: Path, method: str, **settings: Any) -> FusedLlamaForCausalLM:
    settings = {"num_fusions": 2, **SETTINGS, **settings}
    return FusedLlamaForCausalLM.from_pretrained_fused(base, method=method, calibration=str(text), **settings)


def everywhere(report: FusionReport, folder: Path) -> list[str]:
    """All that is made of a report for people."""
    write_page(dataclasses.replace(report, similarity=None, embeddings=None), folder / "page.html")
    page = (folder / "page.html").read_text("utf-8")
    return [report.summary(), model_card(report, LlamaConfig(), plain=True).replace("\\", ""), page]


def test_rows_have_all_figures_of_all_models() -> None:
    assert [row.cells for row in make_report().rows((100, 80))] == [
        ["layers", "32", "28", "-12.5%"],
        ["parameters", "8,030,261,248", "7,157,813,248", "-10.9%"],
        ["bytes on disk", "100", "80", "-20.0%"],
        ["perplexity, docs", "6.1", "30", "x 4.92"],
        ["divergence, docs", "0", "1.25", ""],
        ["agreement, docs", "100.0%", "62.5%", "-37.5%"],
        ["perplexity, reasoning", "5.2", "20", "x 3.85"],
        ["divergence, reasoning", "0", "0.75", ""],
        ["agreement, reasoning", "100.0%", "50.0%", "-50.0%"],
    ]
    assert [row.cells for row in make_report(healed=HEALED).rows()][:3] == [
        ["layers", "32", "28", "28", "-12.5%"],
        ["parameters", "8,030,261,248", "7,157,813,248", "7,157,813,248", "-10.9%"],
        ["perplexity, docs", "6.1", "40", "30", "x 4.92"],
    ]


def test_every_view_shows_all_rows(tmp_path: Path) -> None:
    budget = BudgetInfo("max_divergence", 0.5, 1000, [BudgetTrial(3, 0.25, 1.5), BudgetTrial(4, math.inf, 9.0)])
    report = make_report(healed=HEALED, budget=budget)
    for view in everywhere(report, tmp_path):
        for row in report.rows():
            assert all(cell in view for cell in row.cells), row
        sources = [text.source for text in report.perplexities]
        assert all(words in view for words in (budget.summary(), "Mind the gap.", HEALED.summary(), *sources))
    assert "docs: 4,000 tokens of prose; similar text was used for fitting" in report.summary()
    assert "reasoning: 4,000 tokens of riddles; not used for fitting\n" in report.summary()


def test_perplexities_that_more_than_double_are_named() -> None:
    [judged, _] = make_report().perplexities
    broken = dataclasses.replace(judged, dense=5.0, fused=10.1)
    sound = dataclasses.replace(judged, name="reasoning", dense=5.0, fused=10.0)
    for fitted, advice in ((True, "Fewer fusions"), (False, "method refit")):
        [note] = damage_notes([broken, sound], fitted=fitted)
        assert note.startswith("Perplexity went from 5 to 10.1 (docs): ") and advice in note
        assert "reasoning" not in note and not damage_notes([sound], fitted=fitted)


AVERAGED = FusedLayer([1, 2, 3], [0.6, 0.3, 0.1], ratios=[0.75, 0.6], matches=[MATCHES, MATCHES])
FITTED = FusedLayer(
    [1, 2, 3],
    [0.25, 0.25, 0.5],
    cost=0.125,
    heads_kept=[1, 0, 1],
    channels_kept=[8, 8, 16],
    error_before=0.5,
    error_after=0.25,
)
TRUNCATED = FusedLayer([1, 2, 3], [1.0, 0.0, 0.0])


def small_report(fused: FusedLayer = AVERAGED, **values: Any) -> FusionReport:
    """Of a base with 5 layers, of which 3 are fused."""
    fields: dict[str, Any] = {
        "fused_layers": [fused],
        "layers_before": 5,
        "layers_after": 3,
        "similarity": [[0.5 + 0.1 * i * j for i in range(5)] for j in range(5)],
        "embeddings": [[[0.1 * layer * n % 0.7, 0.3 * n] for n in range(4)] for layer in range(5)],
        "sample_labels": ["astronomy", "marketing", "philosophy", "econometrics"],
        "influences": [0.5, 0.2, 0.1, 0.3, 0.4],
    }
    return make_report(**fields | values)


@pytest.mark.parametrize(
    ("fused", "line"),
    [
        (AVERAGED, "60.0% of layer 1 + 30.0% of layer 2 + 10.0% of layer 3, mean matched cosine 0.2000"),
        (
            FITTED,
            "key-value groups 1 of layer 1 + 0 of layer 2 + 1 of layer 3, MLP channels 8 of layer 1 + 8 of layer 2 + "
            "16 of layer 3, costs 0.1250 nats a token by itself, error of the MLP 0.500 -> 0.250",
        ),
        (TRUNCATED, ""),
        (dataclasses.replace(TRUNCATED, layer_instead=3), "layer 3 taken as it is"),
    ],
)
def test_each_fused_layer_has_a_line(fused: FusedLayer, line: str, tmp_path: Path) -> None:
    report = small_report(fused)
    assert report.groups == [{0: 1}, dict(zip([1, 2, 3], fused.shares, strict=True)), {4: 1}]
    assert report.pairs == [(2, 3), (1, 2)]
    expected = ", ".join(filter(None, ["layer 1 stands for 1 to 3", line]))
    assert report.details()[1] == expected
    summary, card, page = everywhere(report, tmp_path)
    assert f"\n  {expected}\n" in summary and f"- {expected}\n" in card and f"<p>{html.escape(expected)}</p>" in page


@pytest.mark.parametrize(
    ("edit", "error"),
    [
        ({"fused_layers": [vars(FusedLayer([3, 40], [1.0, 0.0]))]}, "parts do not fit together"),
        ({"fused_layers": [vars(FusedLayer([], []))]}, "parts do not fit together"),
        ({"fused_layers": [vars(FITTED), vars(FITTED)]}, "parts do not fit together"),
        ({"layers_before": 10**12}, "layers_before=1000000000000 is not 2 to 10000"),
        ({"layers_after": 4}, "layers_after=4 does not fit its fused layers"),
        ({"layers_before": "five"}, "layers_before: Input should be a valid integer, "),
        ({"fused_layers": [{"layers": [1]}]}, "fused_layers: 0: shares: Field required"),
        ({"config": {}}, "parts do not fit together"),
    ],
)
def test_a_report_that_was_edited_is_refused(edit: dict[str, Any], error: str, tmp_path: Path) -> None:
    values = small_report(FITTED).to_dict() | edit
    (tmp_path / "fusion_report.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"fusion_report.json' is no fusion report \(.*{re.escape(error)}"):
        FusionReport.load(tmp_path)


def test_a_report_of_an_earlier_version_says_so() -> None:
    values: dict[str, Any] = {"steps": []}
    with pytest.raises(ValueError, match=r"^This was written by an earlier version of lf_hf; fuse the base again\.$"):
        FusionReport.from_dict(values)


def strictly(content: str) -> Any:
    return json.loads(content, parse_constant=pytest.fail)  # infinity, and what is no number, are no JSON


@pytest.mark.parametrize(
    "report",
    [
        make_report(license={"license": "mit"}),
        make_report(healed=HEALED, calibration=[], perplexities=[], similarity=None, embeddings=None),
        make_report(perplexities=[PerplexityInfo("docs", "text", 10, 10.0, math.inf, "seen", math.inf, 0.5)]),
    ],
)
def test_a_report_comes_back_from_strict_json(report: FusionReport, tmp_path: Path) -> None:
    report.save(tmp_path)
    assert FusionReport.load(tmp_path) == FusionReport.from_dict(report.to_dict()) == report
    assert strictly((tmp_path / "fusion_report.json").read_text())["layers_removed_fraction"] == 0.125


def test_a_sweep_s_results_come_back_from_strict_json(tmp_path: Path) -> None:
    points = [make_point("mka", n, math.inf) for n in (1, 2, 3)]
    results = Results(tmp_path, "base", [point.key for point in points])
    results.add(points[0])
    results.add(points[1])
    for line in (tmp_path / "results.jsonl").read_text().splitlines():
        strictly(line)
    assert results.missing() == [points[2].key]
    results.add(points[2])
    assert results.points() == points


@pytest.mark.parametrize("method", [name for name in METHODS if name != "healed"])
def test_settings_that_are_not_listed_have_no_effect(method: str, base: str, text: Path) -> None:
    config = FusionConfig(num_fusions=2, method=method, **SETTINGS)
    without = {name: value for name, value in config.to_dict().items() if name not in config.in_effect()}
    other: dict[str, Any] = {name: 2 * value for name, value in without.items() if type(value) in (int, float)}
    other |= {name: value for name, value in {"seed": 7, "rank_normalize": False}.items() if name in without}
    first, second = fuse(base, text, method), fuse(base, text, method, **other)
    assert first.fusion_report is not None and set(first.fusion_report.settings) == config.in_effect().keys()
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    unknown = config.to_dict() | {"from_the_future": 1}  # of another version all are listed
    assert make_report(config=unknown).settings == unknown


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B"),
        ("owner/model-GGUF/model.Q4.gguf", "owner/model-GGUF/model.Q4.gguf"),
        ("/home/me/secret/model.Q4.gguf", "model.Q4.gguf"),
        ("C:\\Users\\me\\model", "model"),
        ("/", "/"),
        ("mine/model", "model"),
        ("./mine/model/", "model"),
        ("mine/model/..", "mine"),
    ],
)
def test_the_last_name_is_published(name: str, published: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert published_name(name) == published


def test_no_file_of_a_fusion_says_where_its_base_was(base: str, text: Path, tmp_path: Path) -> None:
    fuse(base, text, "refit").save_pretrained(tmp_path / "out")
    fuse_checkpoint(base, tmp_path / "low", num_fusions=1, method="truncate", perplexity_tokens=0)
    for folder in ("out", "low"):
        write_page(FusionReport.load(tmp_path / folder), tmp_path / folder / "page.html")
        for file in (tmp_path / folder).iterdir():
            content = file.read_bytes()
            assert str(Path(base).parent).encode() not in content and str(text.parent).encode() not in content, file
        assert FusionReport.load(tmp_path / folder).base == Path(base).name
    assert str(Path(base).parent) not in markdown([], base)


def digest(model: torch.nn.Module) -> str | None:
    return weights_digest(model.named_parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_the_digest_is_of_what_was_saved(tied: bool, make_base: Callable[..., str], text: Path, tmp_path: Path) -> None:
    model = fuse(make_base(tie_word_embeddings=tied, dtype=torch.bfloat16), text, "truncate")
    model.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert digest(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)) == digest(model) is not None


def test_a_change_of_any_parameter_gets_a_note_once() -> None:
    model = make_llama()
    report = make_report(weights_digest=digest(model))
    assert report.for_weights(digest(model)) == report.for_weights(None) == report
    for parameter in model.parameters():
        with torch.no_grad():
            kept = parameter.clone()
            parameter.mul_(1.01)
            changed = report.for_weights(digest(model))
            parameter.copy_(kept)
        assert changed.notes == [CHANGED_NOTE, *report.notes] and changed.for_weights("another") == changed
    assert make_report().for_weights("any") == make_report()  # of an older report nothing is known
    with torch.device("meta"):
        assert digest(make_llama()) is None


def page_of(report: FusionReport, folder: Path) -> tuple[Page, str]:
    """The page, and all that is to be read on it, in order."""
    write_page(report, folder / "page.html")
    page = Page((folder / "page.html").read_text(encoding="utf-8"))
    return page, " ".join(page.text.split())


@pytest.mark.parametrize(
    ("report", "names"),
    [
        (small_report(), ["similarity_heatmap", "manifolds", "along_depth", "matched_cosines"]),
        (small_report(TRUNCATED, influences=None, **FEW_PICTURES), []),
        (small_report(FITTED, healed=HEALED, **FEW_PICTURES), ["along_depth", "healing_curve"]),
    ],
    ids=["averaged", "truncated", "fitted and healed"],
)
def test_a_page_shows_what_was_measured(report: FusionReport, names: list[str], tmp_path: Path) -> None:
    """And loads nothing, and is made again of the same bytes."""
    page, text = page_of(report, tmp_path)
    shown = [attributes["id"] for tag, attributes in page.tags if tag in ("section", "details")]
    assert shown == ["layer_map", "figures", *names, "fused_layers", "settings"]
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == len(names) + 1
    for picture in pictures:
        assert picture["alt"]
        svg = ElementTree.fromstring(base64.b64decode(str(picture["src"]).removeprefix("data:image/svg+xml;base64,")))
        assert svg.tag.endswith("svg") and float(svg.attrib["width"].removesuffix("pt")) <= PHONE
    assert "5 → 3 layers" in text and all(note in text for note in report.notes)
    assert not any("href" in attributes or tag == "script" for tag, attributes in page.tags)
    content = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"url\(|@import|https?://", content) and "prefers-color-scheme: dark" in content
    write_page(report, tmp_path / "new" / "again.html")
    assert (tmp_path / "new" / "again.html").read_text(encoding="utf-8") == content


def test_the_answers_come_first_then_both_texts_then_the_layers(tmp_path: Path) -> None:
    continuations = [Continuation("Once upon", "a time", "a dime"), Continuation("Two", "three", "four")]
    _, text = page_of(make_report(continuations=continuations, **FEW_PICTURES), tmp_path)
    text = text[text.index("fused with") :]
    parts = ["How much smaller", "10.9 %", "32 → 28", "not measured", "How much worse", "4.92", "3.85", "Mind the gap."]
    parts += ["Once upon", "a time", "a dime", "Which layers became which", "Details", "three"]
    places = [text.replace("\xa0", " ").index(part) for part in parts]
    assert places == sorted(places)


def test_pictures_show_the_figures_of_the_report() -> None:
    report = small_report()
    figures = report_figures(report)
    axis = figures["similarity_heatmap"].axes[0]
    np.testing.assert_allclose(np.asarray(axis.get_images()[0].get_array()), np.array(report.similarity))
    frames = [(frame.get_x() + 0.5, frame.get_y() + 0.5) for frame in axis.patches if isinstance(frame, Rectangle)]
    assert frames == [(2, 3), (3, 2), (1, 2), (2, 1)]
    panels = figures["manifolds"].axes
    assert [panel.get_title() for panel in panels] == [f"layer {n}" for n in range(5)]
    offsets = np.asarray(panels[2].collections[0].get_offsets())  # (N, 2)
    for n in range(2):
        assert list(offsets[:, n].argsort()) == list(np.array(report.embeddings)[2, :, n].argsort())
    patches: list[Any] = list(figures["along_depth"].axes[1].patches)
    bars = [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in patches]
    assert bars == [pytest.approx(bar) for bar in [(2, 0.75), (1, 0.6), (2, 0.25), (1, 0.4)]]


def test_any_figures_can_be_shown(tmp_path: Path) -> None:
    values = [0.5, math.inf, math.nan]
    judged = [PerplexityInfo(f"$\\frac${value}", "text", 10, 10.0, value, "kin", value, value) for value in values]
    with no_warnings():
        write_page(make_report(perplexities=judged, influences=values * 11, **FEW_PICTURES), tmp_path / "page.html")
        report_figures(make_report(influences=[0.0] * 32, **FEW_PICTURES))
    for name in ("similarity", "embeddings", "influences"):  # fewer than there are layers
        with pytest.raises(ValueError, match=r"The figures for .* do not fit together .*; save the model again"):
            write_page(make_report(**FEW_PICTURES | {name: []}), tmp_path / "page.html")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_report(TRUNCATED, influences=None, **FEW_PICTURES).save(tmp_path)
    assert main(["report", str(tmp_path), "--png", str(tmp_path / "png")]) == 0
    printed = capsys.readouterr().out.split()
    assert printed == [str(tmp_path / "fusion_report.html"), str(tmp_path / "png" / "layer_map.png")]
    assert Path(printed[1]).read_bytes().startswith(b"\x89PNG")
    assert main(["report", str(tmp_path), "--html", str(tmp_path / "a.html"), "--png", str(tmp_path / "png")]) == 0
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "fusion_report.html").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "mine.html").write_text("<html>mine</html>")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "layer_map.png").write_bytes(b"mine")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    capsys.readouterr()
    refused = [("--html", name) for name in ("", "model.safetensors", "mine.html")]
    for option, place in [*refused, ("--png", "a.html"), ("--png", "mine")]:
        assert main(["report", str(tmp_path), option, str(tmp_path / place)]) == 1
        [said] = capsys.readouterr().err.splitlines()
        assert str(tmp_path) in said
        assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_page(make_report(**FEW_PICTURES), tmp_path / "page.html")
    before = (tmp_path / "page.html").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_page(small_report(), tmp_path / "page.html")
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_bytes() == before


def test_without_the_extra_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(ValueError, match=r"^Pictures and pages need matplotlib; run `pip install '\.\[plot\]'`"):
        write_page(make_report(), tmp_path / "page.html")
