"""Predictions against their definitions, and speed beside the base's, whose value is nobody's to test."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ON_DISK, QUICK, make_llama, same
from tiny_models import divergence, tiny_model
from transformers import AutoModelForCausalLM
from transformers.utils.logging import warning_once

import lf_hf
from lf_hf.cli import main
from lf_hf.decoder.decoder import Decoder
from lf_hf.evaluate.lm_eval_model import FusedLM
from lf_hf.measure.generating import continue_prompts
from lf_hf.measure.predictions import divergences, final_states, predictions
from lf_hf.measure.speed import measure_speed
from lf_hf.report.figures import dense_figures
from lf_hf.report.report import FusionReport

IDS = torch.randint(2, 320, (89,), generator=torch.Generator().manual_seed(0))
SEQUENCES = IDS.split([40, 40, 9])


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions of seven tokens at a time."""
    monkeypatch.setattr("lf_hf.measure.predictions.LOGITS", 7 * 320)


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_predicts_what_it_predicts(dtype: torch.dtype) -> None:
    decoder = Decoder(make_llama(dtype=dtype))
    ids = {"text": decoder.make_batches(SEQUENCES), "empty": []}
    states = final_states(decoder, ids, "")
    [(name, found)] = predictions(decoder, ids, states, copy.deepcopy(states)).items()
    assert name == "text" and found == dense_figures(found["perplexity"])
    assert predictions(decoder, ids, states)["text"] == {"perplexity": found["perplexity"]}


def test_a_model_that_continued_prompts_computes_what_it_did() -> None:
    """Qwen3-VL keeps the positions of what it generated."""
    decoder, ids = Decoder(tiny_model("qwen3_vl")), torch.arange(1, 8)
    before = decoder.model(ids[None], use_cache=True).logits
    assert [len(added) for added in continue_prompts(decoder, [ids, ids[:3]], 4)] == [4, 4]
    assert decoder.model.model.rope_deltas is None and torch.equal(decoder.model(ids[None]).logits, before)


@pytest.mark.usefixtures("few_rows")
@torch.no_grad()
def test_figures_are_those_of_whole_forward_passes() -> None:
    model = make_llama()
    decoder = Decoder(model)
    ids = {"text": decoder.make_batches(SEQUENCES)}
    dense_states, before_removal = final_states(decoder, ids, ""), [*decoder.walk(ids["text"])][-1]
    dense = [model(sequence[None]).logits[0].double().log_softmax(-1) for sequence in SEQUENCES]
    decoder.remove(3)
    fused = [model(sequence[None]).logits[0].double().log_softmax(-1) for sequence in SEQUENCES]
    states = final_states(decoder, ids, "")

    broken = [torch.full_like(state, math.nan) for state in states["text"]]
    before_norm = [list(walked) for walked in (before_removal, [*decoder.walk(ids["text"])][-1])]
    found_divergences = divergences(decoder, before_norm[0], [before_norm[1], broken, before_norm[0]])
    expected = divergence(torch.cat(dense), torch.cat(fused))
    assert found_divergences == [pytest.approx(expected, rel=1e-4), math.inf, pytest.approx(0, abs=1e-6)]

    found = predictions(decoder, ids, states, dense_states)["text"]
    p, q = (torch.cat([each[:-1] for each in log_probs]) for log_probs in (dense, fused))  # (tokens, vocab)
    assert 0.05 < found["agreement"] < 0.95 and found["divergence"] > 0.1
    assert found["divergence"] == pytest.approx(divergence(p, q), rel=1e-5)
    assert found["agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    targets = torch.cat([sequence[1:] for sequence in SEQUENCES])
    assert math.log(found["perplexity"]) == pytest.approx(-float(q.gather(1, targets[:, None]).mean()), rel=1e-5)
    of_dense = predictions(decoder, ids, dense_states)["text"]
    assert math.log(of_dense["perplexity"]) == pytest.approx(-float(p.gather(1, targets[:, None]).mean()), rel=1e-5)


ROWS = ["prefill, tokens a second", "decoding, tokens a second", "bytes of weights", "bytes of cache a token"]
OPTIONS = "--num-fusions 1 --method truncate --perplexity-tokens 0".split()  # as QUICK
CACHE = 2 * 2 * 8 * 4  # bytes a layer and token: keys and values of 2 heads of 8 numbers of 4 bytes


def check(info: Any) -> None:
    for rate in (info.prefill, info.decoding):
        assert min(rate.dense, rate.fused) > 0 and 0 < rate.lowest <= rate.ratio <= rate.highest
    assert info.cache_bytes == [5 * CACHE, 4 * CACHE] and info.dtype == "float32"


@pytest.mark.usefixtures("timed")
def test_a_fusion_ends_with_it_everywhere(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fuse", base, str(tmp_path / "out"), *OPTIONS]) == 0
    table = capsys.readouterr().out
    report: Any = FusionReport.load(tmp_path / "out")
    check(report.speed)
    models = [AutoModelForCausalLM.from_pretrained(name) for name in (base, tmp_path / "out")]
    assert report.speed.weight_bytes == [sum(p.nbytes for p in model.parameters()) for model in models]
    shown = {row.name: " ".join(row.cells) for row in report.rows()}
    assert all(shown[name] in " ".join(table.split()) for name in ROWS)
    heal = ["heal", str(tmp_path / "out"), str(tmp_path / "healed"), "--base", base, "--tokens", "1024"]
    assert main(heal) == 0
    assert all(name in capsys.readouterr().out for name in ROWS[:1])
    assert FusionReport.load(tmp_path / "healed").speed == report.speed  # shapes are the same


@pytest.mark.usefixtures("timed")
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3_5_text"])
def test_measuring_leaves_the_model_as_it_is(kind: str) -> None:
    """And knows what its base had, whose layers may be of kinds of different size."""
    base = tiny_model(kind, num_hidden_layers=8)
    model = copy.deepcopy(base)
    for number in (5, 3):
        Decoder(model).remove(number)
    before = copy.deepcopy(model)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        logits = model(ids).logits
        info = measure_speed(model, base.config)
        assert torch.equal(model(ids).logits, logits)
    assert info.weight_bytes == [sum(p.nbytes for p in one.parameters()) for one in (base, model)]
    assert info.cache_bytes[0] == measure_speed(base, base.config).cache_bytes[1] > info.cache_bytes[1]
    assert model.config.to_dict() == before.config.to_dict() and same(model, before)


@pytest.mark.usefixtures("timed")
def test_it_is_left_out(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """And is, with a sentence, where layers are on disk."""
    assert main(["fuse", base, str(tmp_path / "out"), *OPTIONS, "--no-speed"]) == 0
    assert "tokens a second" not in capsys.readouterr().out and FusionReport.load(tmp_path / "out").speed is None
    arguments = f"pretrained={base},num_fusions=1,method=truncate,perplexity_tokens=0,speed=false"
    lm = FusedLM.create_from_arg_string(arguments, {"device": "cpu"})
    assert lm.get_model_info()["fusion"]["speed"] is None
    kept: dict[str, Any] = QUICK | {"fused_dir": tmp_path / "kept"}
    for speed in (True, False):
        model: Any = lf_hf.from_pretrained_fused(base, **kept, speed=speed)
        check(model.fusion_report.speed)  # which is that of the model that was kept
    warning_once.cache_clear()
    assert lf_hf.fuse_checkpoint(base, tmp_path / "low", **QUICK, **ON_DISK).speed is None
    assert "Speed is not measured where weights are offloaded" in caplog.text
