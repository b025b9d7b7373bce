from __future__ import annotations

import json
from pathlib import Path

import pytest

from lf_hf import FusionReport
from lf_hf.report.report import CalibrationInfo, FittedLayer, FusionStep, PerplexityInfo
from lf_hf.stages.alignment import RowMatch


def make_report(**values: object) -> FusionReport:
    fields: dict[str, object] = {
        "base": "meta-llama/Meta-Llama-3-8B",
        "config": {"method": "neural_alignment", "num_fusions": 1},
        "steps": [
            FusionStep([30], [31], 0.62, 0.38, {"mlp.up_proj": RowMatch(0.01, 0.2, 0.99)}),
            *(FusionStep([n], list(range(n + 1, 32)), 0.62, 0.38) for n in (29, 28, 27)),
        ],
        "layers_before": 32,
        "layers_after": 28,
        "parameters_before": 8_030_261_248,
        "parameters_after": 7_157_813_248,
        "fitted_layers": [FittedLayer([30, 31], [5, 3], [1000, 536], 0.5, 0.2)],
        "calibration": [CalibrationInfo("MMLU", 57, 5000)],
        "perplexities": [
            PerplexityInfo("docs", "prose", 4000, 6.1, 30.0, "kin"),
            PerplexityInfo("reasoning", "riddles", 4000, 5.2, 20.0),
        ],
        "similarity": [[1.0] * 32] * 32,
        "embeddings": [[[0.1, 0.2]]] * 32,
        "seconds": {"activations": 1.5},
        "versions": {"torch": "2"},
        "notes": ["Mind the gap."],
    }
    return FusionReport(**fields | values)  # type: ignore[arg-type]


def test_both_compression_figures() -> None:
    assert make_report().layers_removed_fraction == 0.125
    assert make_report().parameters_removed_fraction == pytest.approx(0.1086, abs=5e-5)


def test_round_trip_through_a_folder(tmp_path: Path) -> None:
    for report in (
        make_report(),
        make_report(calibration=[], fitted_layers=[], perplexities=[], similarity=None, embeddings=None),
    ):
        report.save(tmp_path)
        assert FusionReport.load(tmp_path) == report
    assert json.loads((tmp_path / "fusion_report.json").read_text())["layers_removed_fraction"] == 0.125


def test_summary_says_it_in_a_few_lines() -> None:
    summary = make_report().summary()
    assert "32 -> 28 layers (-12.5%)" in summary and "7,157,813,248 parameters (-10.9%)" in summary
    assert "layer 30 <- 30 x 0.6200 + 31 x 0.3800, mean matched cosine 0.010 -> 0.200" in summary
    assert "note: Mind the gap." in summary


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "is not JSON"), (b"\xff", "is not JSON"), (b"{}", "no fusion report"), (b"[]", "no fusion report")],
)
def test_bad_files_get_one_sentence(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "fusion_report.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        FusionReport.load(tmp_path)


def test_a_folder_without_a_report_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no fusion_report\.json"):
        FusionReport.load(tmp_path)
