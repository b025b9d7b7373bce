"""What a report gives away, how its page reads on any screen, and what it says of a model that was changed since."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import make_point
from conftest import make_llama, make_texts
from transformers import AutoModelForCausalLM

from lf_hf import FusedLlamaForCausalLM, FusionConfig, FusionReport, fuse_checkpoint
from lf_hf.evaluate.curve import sweep_curve
from lf_hf.evaluate.points import DENSE, Point, Score, append_point, read_points
from lf_hf.evaluate.tables import markdown, write_tables
from lf_hf.report import figures
from lf_hf.report.page import report_sections, write_page
from lf_hf.report.report import CHANGED_NOTE, CalibrationInfo, FusionStep, PerplexityInfo, published_name
from lf_hf.runtime.numerics import weights_digest
from lf_hf.settings import METHODS

PHONE = 400  # points: a picture that is wider has letters too small to read at 390 pixels
SETTINGS: dict[str, Any] = {"perplexity_tokens": 0, "calibration_tokens": 1024, "entropy_neighbors": 20}
OTHERWISE: dict[str, Any] = {
    "ridge": 0.5,
    "calibration_tokens": 2048,
    "calibration_length": 32,
    "kernel_scale": 2.0,
    "kernel_alpha": 1.0,
    "embedding_dim": 3,
    "mi_neighbors": 3,
    "entropy_neighbors": 10,
    "rank_normalize": False,
    "ratio_beta": 2.0,
    "sample_length": 7,
    "samples_per_subject": 2,
    "seed": 7,
}


def make_report(layers: int = 32, fused: int = 4, **values: Any) -> FusionReport:
    """A report of the last layers, made one."""
    first = layers - fused - 1
    steps = [FusionStep([n], list(range(n + 1, layers)), 0.625, 0.375) for n in range(layers - 2, first - 1, -1)]
    fields: dict[str, Any] = {
        "base": "owner/model",
        "config": FusionConfig(num_fusions=fused).to_dict(),
        "steps": steps,
        "fitted_layers": [],
        "layers_before": layers,
        "layers_after": layers - fused,
        "parameters_before": 1000,
        "parameters_after": 900,
        "calibration": [CalibrationInfo("MMLU", 57, 5000)],
        "perplexities": [
            PerplexityInfo("docs", "some documentation", 4000, 10.0, 1234.0, "kin"),
            PerplexityInfo("reasoning", "some questions", 3000, 5.0, 7.5),
        ],
        "similarity": [[1.0] * layers] * layers,
        "embeddings": [[[0.1, 0.2], [0.3, 0.1]]] * layers,
        "seconds": {"activations": 1.5},
        "versions": {"torch": "2"},
        "notes": ["Perplexity went up; another method helps."],
        "influences": [0.1] * layers,
    }
    return FusionReport(**fields | values)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("private") / "text.txt"
    file.write_text("\n\n".join(make_texts(400)), encoding="utf-8")
    return file


def fuse(base: str, text: Path, method: str, **settings: Any) -> FusedLlamaForCausalLM:
    settings = {"num_fusions": 2, **SETTINGS, **settings}
    return FusedLlamaForCausalLM.from_pretrained_fused(base, method=method, calibration=str(text), **settings)


def digest(model: torch.nn.Module) -> str | None:
    return weights_digest(model.named_parameters())


# The page


def test_ratios_and_what_helps_come_before_anything_else(tmp_path: Path) -> None:
    write_page(make_report(), tmp_path / "page.html")
    page = " ".join((tmp_path / "page.html").read_text(encoding="utf-8").split())
    in_order = ["<body>", "&times; 123<", "&times; 1.5<", "another method helps", "32 &rarr; 28", "<section"]
    places = [page.index(part) for part in in_order]
    assert places == sorted(places)
    for words in (
        "some documentation; text of its kind was fitted on",
        "some questions; it was not fitted on",
    ):
        assert words in page
    assert report_sections(make_report())[0].name == "cost_and_gain"


def test_the_page_follows_the_colour_scheme_of_its_reader(tmp_path: Path) -> None:
    write_page(make_report(), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert '<meta name="color-scheme" content="light dark">' in page and "prefers-color-scheme: dark" in page


@pytest.mark.parametrize("layers", [4, 32, 126])
def test_pictures_are_narrow_enough_for_a_phone(layers: int) -> None:
    for section in report_sections(make_report(layers, 2)):
        assert section.figure.get_figwidth() * 72 <= PHONE, section.name


def test_the_map_has_every_layer_inside_its_frame() -> None:
    report = make_report(37, 12)
    [axis] = figures.layer_map(report).axes
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    for label in axis.texts:
        x, y = label.get_position()
        assert left <= x <= right and bottom <= y <= top
    shown = [label.get_text() for label in axis.texts]
    numbers = [int(label) for label in shown if label.isdigit()]
    assert set(numbers) == set(range(37)) and len(numbers) == 37 + 25 + 1  # the fused layer goes on in a second row
    assert len([label for label in shown if label.endswith("%")]) == 13


@pytest.mark.parametrize("fused", [10.0, 5.0, 10.2, 1e300, math.inf, math.nan])
def test_any_ratio_can_be_drawn(fused: float) -> None:
    judged = [PerplexityInfo("$\\frac$", "text", 10, 10.0, fused), PerplexityInfo("b", "text", 10, 10.0, 20.0)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures.cost_and_gain(make_report(perplexities=judged)).draw_without_rendering()
        figures.cost_and_gain(make_report(perplexities=[])).draw_without_rendering()


@pytest.mark.parametrize("influence", [0.0, math.inf, math.nan])
def test_influences_without_a_logarithm_can_be_drawn(influence: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures.along_depth(make_report(influences=[influence] * 32)).draw_without_rendering()


@pytest.mark.parametrize("figures_of", [{}, {"influence": 0.25}, {"divergence": 0.125}])
def test_steps_have_a_column_for_each_figure_that_there_is(figures_of: dict[str, float], tmp_path: Path) -> None:
    steps = [FusionStep([30], [31], 1.0, 0.0, **figures_of)]  # type: ignore[arg-type]
    write_page(make_report(fused=1, steps=steps), tmp_path / "page.html")
    section = (tmp_path / "page.html").read_text(encoding="utf-8").split('id="steps"')[1].split("</table>")[0]
    heads = re.findall("<th>(.*?)</th>", section)
    assert len(heads) == section.count("<td>") == 3 + len(figures_of)
    assert all(f"<td>{value:.4f}</td>" in section and name in heads[3] for name, value in figures_of.items())


# What is published


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B"),
        ("owner/model-GGUF/model.Q4.gguf", "owner/model-GGUF/model.Q4.gguf"),
        ("/home/me/secret/model", "model"),
        ("/home/me/secret/model/", "model"),
        ("/home/me/secret/model.Q4.gguf", "model.Q4.gguf"),
        ("C:\\Users\\me\\model", "model"),
        ("/", "/"),
    ],
)
def test_of_a_path_the_last_name_is_published(name: str, published: str) -> None:
    assert published_name(name) == published == make_report(base=name).base


def test_of_a_folder_that_is_here_the_last_name_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert published_name("mine/model") == published_name("./mine/model/") == "model"
    monkeypatch.chdir(tmp_path / "mine" / "model")
    assert published_name(".") == "model"


def test_no_file_of_a_fusion_says_where_its_base_was(base: str, text: Path, tmp_path: Path) -> None:
    fuse(base, text, "refit").save_pretrained(tmp_path / "out")
    fuse_checkpoint(base, tmp_path / "low", num_fusions=1, method="truncate", perplexity_tokens=0)
    for folder in ("out", "low"):
        write_page(FusionReport.load(tmp_path / folder), tmp_path / folder / "page.html")
        for file in (tmp_path / folder).iterdir():
            content = file.read_bytes()
            assert str(Path(base).parent).encode() not in content and str(text.parent).encode() not in content, file
        name = Path(base).name
        assert json.loads((tmp_path / folder / "config.json").read_text())["fusion"]["base"] == name
        assert FusionReport.load(tmp_path / folder).base == name
    assert str(Path(base).parent) not in markdown([], base, published=False)


# Strict JSON


def strictly(content: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(content, parse_constant=refuse)


def test_infinite_figures_are_strict_json_and_come_back(tmp_path: Path) -> None:
    judged = [PerplexityInfo("docs", "text", 10, 10.0, math.inf), PerplexityInfo("b", "text", 10, math.nan, 2.0)]
    report = make_report(perplexities=judged)
    report.save(tmp_path)
    strictly((tmp_path / "fusion_report.json").read_text())
    json.dumps(report.to_dict(), allow_nan=False)
    for loaded in (FusionReport.load(tmp_path), FusionReport.from_dict(report.to_dict())):
        assert loaded.perplexities[0] == judged[0] and math.isnan(loaded.perplexities[1].dense)
        assert dataclasses.replace(loaded, perplexities=[]) == dataclasses.replace(report, perplexities=[])

    point = sweep_point("mka", 1, {"docs": math.inf, "b": -math.inf}, math.inf)
    append_point(tmp_path / "results.jsonl", point)
    strictly((tmp_path / "results.jsonl").read_text())
    assert read_points(tmp_path / "results.jsonl") == {point.key: point}


# Settings that have an effect


@pytest.mark.parametrize("method", METHODS)
def test_settings_that_are_not_listed_have_no_effect(method: str, base: str, text: Path) -> None:
    config = FusionConfig(num_fusions=2, method=method, **SETTINGS)
    without = {name: value for name, value in OTHERWISE.items() if name not in config.in_effect()}
    assert without
    one, other = fuse(base, text, method), fuse(base, text, method, **without)
    weights = other.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in one.state_dict().items())


def test_each_method_lists_what_it_is_about() -> None:
    listed = {method: FusionConfig(num_fusions=1, method=method).in_effect() for method in METHODS}
    for values in listed.values():
        assert {"num_fusions", "method", "selection", "alignment", "merge", "refit"} <= values.keys()
    assert {"kernel_scale", "seed"} <= listed["mka"].keys() and "calibration_tokens" not in listed["mka"]
    assert {"calibration_tokens", "ridge", "seed"} <= listed["refit"].keys() and "kernel_scale" not in listed["refit"]
    assert not {"kernel_scale", "calibration_tokens", "ridge", "seed"} & listed["truncate"].keys()


def test_settings_of_another_version_are_all_listed() -> None:
    config = FusionConfig(num_fusions=1, method="refit").to_dict() | {"from_the_future": 1}
    assert make_report(config=config).settings == config


# Models that were changed


def test_the_digest_is_that_of_the_saved_model_in_any_wider_dtype(
    make_base: Callable[..., str], text: Path, tmp_path: Path
) -> None:
    for tied in (False, True):
        base = make_base(tie_word_embeddings=tied, dtype=torch.bfloat16)
        model, folder = fuse(base, text, "truncate"), tmp_path / str(tied)
        model.save_pretrained(folder)
        low: dict[str, Any] = {"num_fusions": 2, "method": "truncate", "perplexity_tokens": 0}
        fuse_checkpoint(base, tmp_path / f"low{tied}", **low)
        for saved in (folder, tmp_path / f"low{tied}"):
            for dtype in (torch.bfloat16, torch.float32, torch.float64):
                assert digest(AutoModelForCausalLM.from_pretrained(saved, dtype=dtype)) == digest(model) is not None


def test_a_change_of_any_parameter_changes_the_digest() -> None:
    model = make_llama()
    before = digest(model)
    for parameter in model.parameters():
        with torch.no_grad():
            kept = parameter.clone()
            parameter.mul_(1.01)
            assert digest(model) != before
            parameter.copy_(kept)
    assert digest(model) == before
    with torch.device("meta"):
        assert digest(make_llama()) is None


def test_a_merged_adapter_gets_a_note_once(base: str, text: Path) -> None:
    peft = pytest.importorskip("peft")
    model = fuse(base, text, "truncate")
    assert model.fusion_report is not None
    report = dataclasses.replace(model.fusion_report, weights_digest=digest(model))
    assert report.of_weights(digest(model)) == report.of_weights(None) == report
    lora = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    changed = report.of_weights(digest(peft.get_peft_model(model, lora).merge_and_unload()))
    assert changed.notes == [CHANGED_NOTE, *report.notes]
    assert changed.of_weights("another") == changed
    assert make_report().of_weights("any") == make_report()  # of an older report nothing is known


# Sweeps


def sweep_point(method: str, num_fusions: int, perplexities: dict[str, float], score: float) -> Point:
    point = make_point(method, num_fusions, 0.5)
    scores = point.scores | {"wikitext": Score("word_perplexity", score, None)}
    return dataclasses.replace(point, perplexities=perplexities, scores=scores)


def test_a_sweep_shows_what_there_is_and_no_empty_panel(tmp_path: Path) -> None:
    points = [
        sweep_point(DENSE, 0, {"docs": 10.0}, math.inf),
        sweep_point("mka", 1, {"docs": math.inf, "reasoning": 5.0}, math.inf),
        sweep_point("refit", 1, {"docs": 11.0}, math.inf),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_tables(tmp_path, points, "owner/model", published=True)
        figure = sweep_curve(points, {})
    document = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert re.search(r"\| perplexity, docs \| perplexity, reasoning \|\n", document)
    assert "| inf | inf | 5 |\n" in document and "| inf | 11 | - |\n" in document
    labels = [axis.get_ylabel() for axis in figure.axes]
    assert labels == ["acc, mmlu_5shot", "perplexity, docs (log scale)", "perplexity, reasoning (log scale)"]
    assert all(axis.get_legend() is None for axis in figure.axes)  # it is above them
    [legend] = figure.legends
    assert {label.get_text() for label in legend.get_texts()} == {"mka", "refit", "dense", "infinite"}
