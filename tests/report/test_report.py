"""Reports: what people are shown of them, what they give away, what is read back; and the commands of a model card."""

import base64
import dataclasses
import json
import math
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from builders import HEALED, MATCHES, check_golden, check_golden_page, make_judged, make_report, no_warnings
from conftest import make_llama, make_texts
from huggingface_hub import ModelCard
from matplotlib.patches import Rectangle
from transformers import AutoModelForCausalLM, LlamaConfig

import lf_hf
from lf_hf import FusedLlamaForCausalLM, FusionConfig, FusionReport, fuse_checkpoint
from lf_hf.checkpoint.card import model_card
from lf_hf.cli import main
from lf_hf.evaluate.tables import markdown
from lf_hf.report.data import BudgetInfo, Continuation, FusedLayer, PerplexityInfo, Rate, SpeedInfo
from lf_hf.report.page import report_figures, write_page
from lf_hf.report.report import CHANGED_NOTE, damage_notes, published_name
from lf_hf.runtime.numerics import weights_digest
from lf_hf.settings import METHODS

SETTINGS: dict[str, Any] = {"perplexity_tokens": 0, "calibration_tokens": 1024, "entropy_neighbors": 20}
PHONE = 400  # points: a picture that is wider has letters too small to read at 390 pixels
FEW_PICTURES: dict[str, Any] = {"similarity": None, "embeddings": None}


def fuse(base: str, text: Path, method: str, **settings: Any) -> FusedLlamaForCausalLM:
    settings = {"num_fusions": 2, **SETTINGS, **settings}
    return FusedLlamaForCausalLM.from_pretrained_fused(base, method=method, calibration=str(text), **settings)


def test_perplexities_that_more_than_double_are_named() -> None:
    [judged, _] = make_report().perplexities
    broken = dataclasses.replace(judged, dense=5.0, figures={"perplexity": 10.1})
    sound = dataclasses.replace(judged, name="reasoning", dense=5.0, figures={"perplexity": 10.0})
    for method, advice in (("refit", "Fewer fusions"), ("mka", "method refit")):
        [note] = damage_notes([broken, sound], [], method)
        assert note.startswith("Perplexity went from 5 to 10.1 (docs): ") and advice in note
        assert "reasoning" not in note and not damage_notes([sound], [], method)


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


JUDGED = make_judged("docs", "some documentation", 10.0, 12.5, 0.25, 0.875)
SPEED = SpeedInfo(
    "a CPU", "float32", 512, 128, Rate(50.0, 75.0, 1.5, 1.4, 1.6), Rate(5.0, 6.0, 1.2, 1.1, 1.3), [9, 8], [4, 3], 7
)
BUDGET = BudgetInfo("max_divergence", 0.5, 1000, {3: 0.25, 4: math.inf})
REPORTS = {
    "averaged": small_report(
        base="owner/model",
        config=FusionConfig(2, "mka", rank_normalize=False).to_dict(),
        continuations=[Continuation("def f():", "\n    a | b", ""), Continuation("Two", "three", "four")],
        dtype="torch.bfloat16",
        speed=SPEED,
    ),
    "fitted and healed": small_report(
        FITTED,
        base="owner/model",
        budget=BUDGET,
        config=FusionConfig(method="refit", max_divergence=0.5, calibration_tokens=8192).to_dict(),
        healed=HEALED,
        perplexities=[JUDGED],
        **{"base_digest": "12ab", "weights_digest": "34cd", "revision": "v2", "license": {"license": "mit"}},
        **FEW_PICTURES,
    ),
    "truncated": small_report(
        dataclasses.replace(TRUNCATED, layer_instead=3), base="model", influences=None, perplexities=[], **FEW_PICTURES
    ),
}


@pytest.mark.parametrize("name", REPORTS)
def test_what_people_see_of_a_report(name: str, tmp_path: Path) -> None:
    """The page loads nothing, its pictures are readable on a phone, and it is made again of the same bytes."""
    report = REPORTS[name]
    assert report.pairs == [(2, 3), (1, 2)]
    check_golden(f"{name}.txt", report.summary())
    check_golden(f"{name}.md", model_card(report, LlamaConfig(), plain=name != "truncated"))
    write_page(report, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    check_golden_page(f"{name}.html", page)
    for picture in re.findall('base64,([^"]*)', page):
        svg = ElementTree.fromstring(base64.b64decode(picture))
        assert svg.tag.endswith("svg") and float(svg.attrib["width"].removesuffix("pt")) <= PHONE
    assert not re.search(r"url\(|@import|https?://|<script|href", page) and "prefers-color-scheme: dark" in page
    write_page(report, tmp_path / "new" / "again.html")
    assert (tmp_path / "new" / "again.html").read_text(encoding="utf-8") == page


@pytest.mark.parametrize(
    ("edit", "error"),
    [
        ({"fused_layers": [vars(FusedLayer([3, 40], [1.0, 0.0]))]}, "parts do not fit together"),
        ({"layers_before": 10**12}, "layers_before=1000000000000 is not 2 to 10000"),
        ({"layers_after": 4}, "layers_after=4 does not fit its fused layers"),
        ({"layers_before": "five"}, "layers_before: Input should be a valid integer, "),
        ({"fused_layers": [{"layers": [1]}]}, "fused_layers: 0: shares: Field required"),
    ],
)
def test_a_report_that_was_edited_is_refused(edit: dict[str, Any], error: str, tmp_path: Path) -> None:
    values = small_report(FITTED).to_dict() | edit
    (tmp_path / "fusion_report.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"fusion_report.json' is no fusion report \(.*{re.escape(error)}"):
        FusionReport.load(tmp_path)


def strictly(content: str) -> Any:
    return json.loads(content, parse_constant=pytest.fail)  # infinity, and what is no number, are no JSON


@pytest.mark.parametrize(
    "report",
    [
        make_report(license={"license": "mit"}),
        make_report(healed=HEALED, calibration=[], perplexities=[], similarity=None, embeddings=None),
        make_report(perplexities=[make_judged("docs", "text", 10.0, math.inf, math.inf, 0.5)]),
        make_report(perplexities=[PerplexityInfo("docs", "text", 10, 10.0, {"perplexity": 12.0})]),  # an older one
    ],
)
def test_a_report_comes_back_from_strict_json(report: FusionReport, tmp_path: Path) -> None:
    report.save(tmp_path)
    assert FusionReport.load(tmp_path) == FusionReport.from_dict(report.to_dict()) == report
    assert strictly((tmp_path / "fusion_report.json").read_text())["layers_removed_fraction"] == 0.125


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


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B"),
        ("/home/me/secret/model", "model"),
        ("C:\\Users\\me\\model", "model"),
        ("/", "/"),
        ("./mine/model/", "model"),
        ("mine/model/..", "mine"),
        pytest.param("mine/a\\b", "a\\b", marks=pytest.mark.skipif(os.name == "nt", reason="two names there")),
    ],
)
def test_the_last_name_is_published(name: str, published: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("model", "a\\b"):
        (tmp_path / "mine" / folder).mkdir(parents=True)
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
        assert changed.all_notes == [CHANGED_NOTE, *report.all_notes] and changed.for_weights("another") == changed
    assert make_report().for_weights("any") == make_report()  # of an older report nothing is known
    with torch.device("meta"):
        assert digest(make_llama()) is None


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
    texts = [make_judged(f"$\\frac${value}", "text", 10.0, value, value, value) for value in values]
    with no_warnings():
        write_page(make_report(perplexities=texts, influences=values * 11, **FEW_PICTURES), tmp_path / "page.html")
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


HOSTILE = (
    "<script>alert('x')</script> `code` | cell\n---\nkey: [a, *b, !!python/object:c]\n# title $\\frac$ &amp; \"q\""
)


@pytest.mark.parametrize(
    ("readme", "found"),
    [
        ("---\nlicense: other\nlicense_name: a\nlicense_link: b\ntags: [c]\n---\n", ["other", "a", "b"]),
        ("---\nlicense: mit\n---\n# A model\n", ["mit", None, None]),
        ("---\na: [\n---\n", [None] * 3),
    ],
)
def test_the_licence(readme: str, found: list[str | None], make_base: Callable[..., str], tmp_path: Path) -> None:
    base = make_base()
    Path(base, "README.md").write_text(readme)
    fuse_checkpoint(base, tmp_path / "out", num_fusions=1, method="truncate", perplexity_tokens=0)
    metadata = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---\n")[1])
    assert [metadata.get(name) for name in ("license", "license_name", "license_link")] == found


def test_its_commands_make_the_same_weights(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder where only the base is; figures of a model that was healed twice are those before both."""
    (tmp_path / "text.txt").write_text("\n\n".join(make_texts(200)))
    text, fresh = str(tmp_path / "text.txt"), tmp_path / "fresh"
    base = str(shutil.copytree(base, fresh / "-rf"))
    given: dict[str, Any] = {"num_fusions": 2, "calibration": text, "perplexity_tokens": 256, "speed": False}
    fuse_checkpoint(base, tmp_path / "averaged", method="mka", **given)
    fuse_checkpoint(base, tmp_path / "twice", method="truncate", heal_tokens=1024, **given)
    healing: dict[str, Any] = {"tokens": 1024, "length": 64, "batch_tokens": 256}
    healing["training_args"] = {"optim": "adafactor", "bf16": False}
    report = lf_hf.heal(tmp_path / "twice", tmp_path / "twice-healed", base=base, text=text, **healing)
    monkeypatch.chdir(fresh)
    for name, last in (("averaged", "averaged"), ("twice", "twice-healed")):
        [block] = re.findall(r"^```bash\n(.*?)\n```$", (tmp_path / last / "README.md").read_text(), re.M | re.S)
        for line in block.replace(" out", f" {name}").splitlines():
            _, *words = shlex.split(line)
            assert main([*words, "--text" if words[0] == "heal" else "--calibration", text]) == 0
    for name in ("averaged", "twice", "twice-healed"):
        made, again = (FusionReport.load(folder / name).weights_digest for folder in (tmp_path, fresh))
        assert made == again is not None
    healed = {row.name: row.values for row in report.rows()}
    for row in FusionReport.load(tmp_path / "twice").rows():
        if row.kind == "perplexity":
            assert healed[row.name][1] == pytest.approx(row.values[1]) and healed[row.name][2] != row.values[2]


@pytest.fixture
def hostile_report() -> FusionReport:
    [text] = make_report().calibration
    report = make_report(
        base=HOSTILE,
        calibration=[dataclasses.replace(text, source=HOSTILE)],
        perplexities=[make_judged(HOSTILE, HOSTILE, 6.0, 30.0, 0.5, 0.5)],
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
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;") >= 11 and "<script" not in page
    check_golden_page("hostile.html", page)


def test_cards_and_tables_show_hostile_text_as_text(hostile_report: FusionReport) -> None:
    """Outside of code there are line breaks and nothing hostile, and every table row has its head's number of cells."""
    texts = [markdown([], HOSTILE)]
    for plain in (True, False):
        card = model_card(hostile_report, LlamaConfig(), plain=plain)
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
