"""Reports, points and random tensors that several test files build on."""

import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st

from lf_hf import FusionReport
from lf_hf.evaluate.points import Point, Score
from lf_hf.report.data import CalibrationInfo, FusedLayer, HealingInfo, HealingPoint, PerplexityInfo, RowMatch
from lf_hf.report.figures import FIGURES

MATCHES = {"mlp.up_proj": RowMatch(0.01, 0.2, 0.99)}
SEED = st.integers(0, 1000)


def make_judged(
    name: str, text: str, dense: float, fused: float, divergence: float, agreement: float
) -> PerplexityInfo:
    figures = {"perplexity": fused, "divergence": divergence, "agreement": agreement}
    return PerplexityInfo(name, text, 4000, dense, dict.fromkeys([figure.name for figure in FIGURES], 0.5) | figures)


HEALED = HealingInfo(
    {"train": "fused"},
    [CalibrationInfo("a text", 2, 1024)],
    1.0,
    10,
    1,
    1,
    "the fused layers",
    [HealingPoint(0, {"a": 2.0}), HealingPoint(1, {"a": 1.0})],
    [make_judged("docs", "prose", 6.1, 40.0, 2.5, 0.5)],
    60.0,
)


def examples(count: int) -> Callable[[Any], Any]:
    return hypothesis.settings(max_examples=count, deadline=None, derandomize=True, database=None)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@contextmanager
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def check_golden(name: str, found: str) -> None:
    """Compare text with a file in tests/golden; with WRITE_GOLDEN=1 in the environment that is written anew."""
    file = Path(__file__).parent / "golden" / name
    if os.environ.get("WRITE_GOLDEN"):
        file.write_text(found, encoding="utf-8")
    assert found == file.read_text(encoding="utf-8")


def check_golden_page(name: str, page: str) -> None:
    """The same for what a page has, without how it looks and without the pictures' bytes."""
    body = page.partition("<body>")[2].replace("\0", "\\0")  # with it a file would count as binary
    check_golden(name, re.sub('base64,[^"]*', "base64,", body))


def make_report(**values: object) -> FusionReport:
    fields: dict[str, object] = {
        "base": "meta-llama/Meta-Llama-3-8B",
        "config": {"method": "neural_alignment", "num_fusions": 1},
        "fused_layers": [FusedLayer([27, 28, 29, 30, 31], [0.62, 0.24, 0.09, 0.03, 0.02], [0.62] * 4, [MATCHES] * 4)],
        "layers_before": 32,
        "layers_after": 28,
        "parameters_before": 8_030_261_248,
        "parameters_after": 7_157_813_248,
        "calibration": [CalibrationInfo("MMLU", 57, 5000)],
        "perplexities": [
            make_judged("docs", "prose", 6.1, 30.0, 1.25, 0.625),
            make_judged("reasoning", "riddles", 5.2, 20.0, 0.75, 0.5),
        ],
        "similarity": [[1.0] * 32] * 32,
        "embeddings": [[[0.1, 0.2]]] * 32,
        "seconds": {"activations": 1.5},
        "versions": {"torch": "2"},
        "notes": ["Mind the gap."],
    }
    return FusionReport(**fields | values)  # type: ignore[arg-type]


def make_point(method: str, num_fusions: int, accuracy: float, perplexity: float | None = 10.0) -> Point:
    return Point(
        key=f"{method}{num_fusions}",
        method=method,
        num_fusions=num_fusions,
        layers=32 - num_fusions,
        parameters=1000,
        layers_removed_fraction=num_fusions / 32,
        parameters_removed_fraction=num_fusions / 40,
        texts={} if perplexity is None else {"docs": {"perplexity": perplexity}},
        scores={"mmlu_5shot": Score("acc", accuracy, 0.01)},
        config=None,
        notes=[],
        seconds={},
        versions={},
    )
