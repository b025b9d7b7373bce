"""Healing: a fused model comes nearer to its base, never further from it, and is saved as what it was."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT, make_llama, make_texts, make_tokenizer
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainingArguments
from two_devices import TwoDevices, spread

import lf_hf
from lf_hf import FusedLlamaForCausalLM, FusionReport
from lf_hf.checkpoint.base import Base
from lf_hf.cli import main
from lf_hf.estimate import plan_heal
from lf_hf.healing import lesson as module
from lf_hf.healing import loss, memory, training
from lf_hf.healing.heal import fitted_arguments
from lf_hf.healing.judge import judge
from lf_hf.healing.loss import LOGITS, distillation_loss
from lf_hf.healing.models import open_fused
from lf_hf.healing.settings import HealSettings
from lf_hf.healing.teacher import Item, MemoryTeacher
from lf_hf.report.report import COLLAPSED
from lf_hf.runtime.memory import PROCESS
from lf_hf.text.calibration import DOCUMENTATION
from lf_hf.text.judging import judging_texts
from lf_hf.text.packing import pack_tokens

TEXTS = make_texts(1200, seed=5)
SETTINGS: dict[str, Any] = {"tokens": 4096, "length": 64, "batch_tokens": 256, "learning_rate": 3e-3}
SETTINGS |= {"text": TEXTS, "training_args": {"bf16": False}}


@pytest.fixture(scope="module")
def fused(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fused") / "fused"
    lf_hf.fuse_checkpoint(base, folder, num_fusions=2, method="truncate", perplexity_tokens=2000)
    return folder


@pytest.fixture(scope="module")
def healed(base: str, fused: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("healed") / "healed"
    lf_hf.heal(fused, folder, base=base, **SETTINGS)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same_bits(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def mean(divergences: dict[str, float]) -> float:
    return sum(divergences.values()) / len(divergences)


def test_it_comes_nearer_to_the_base_on_text_that_it_has_not_seen(healed: Path, fused: Path) -> None:
    report = FusionReport.load(healed)
    assert report.healed is not None and report.healed.kept > 0
    points = {point.step: mean(point.divergences) for point in report.healed.curve}
    assert all(len(point.divergences) >= 2 for point in report.healed.curve)
    assert points[report.healed.kept] == min(points.values()) < 0.7 * points[0]
    assert {judged.name for judged in report.healed.judged} == {judging.name for judging in judging_texts()}
    for judged in report.healed.judged:
        assert judged.divergence_after < judged.divergence_before
        assert judged.agreement_after > judged.agreement_before
    assert not same_bits(healed, fused) and {file.name for file in healed.iterdir()} == {
        f.name for f in fused.iterdir()
    }
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (healed / name).read_bytes() == (fused / name).read_bytes()
    assert "## Healed" in (healed / "README.md").read_text(encoding="utf-8")
    assert FusionReport.from_dict(report.to_dict()) == report
    assert sum(info.tokens for info in report.healed.text) * report.healed.epochs == pytest.approx(4096)
    assert DOCUMENTATION in [info.source for info in report.healed.text]  # beside the text that was given
    assert {info.name: info.relation for info in report.perplexities} == {"docs": "kin", "reasoning": "unseen"}


def test_the_report_says_what_the_saved_model_does(healed: Path, base: str) -> None:
    report = FusionReport.load(healed)
    model = AutoModelForCausalLM.from_pretrained(healed)
    assert isinstance(model, FusedLlamaForCausalLM) and model.fusion_report == report
    of_base = AutoModelForCausalLM.from_pretrained(base)
    [judging, *_] = judging_texts()
    ids = torch.stack(pack_tokens(make_tokenizer(), judging.text, 256, 2000))
    with torch.no_grad():
        logits, wanted = (m(ids).logits[:, :-1].flatten(0, 1).double() for m in (model, of_base))
    loss = cross_entropy(logits, ids[:, 1:].flatten())
    assert report.healed is not None
    [judged] = [entry for entry in report.healed.judged if entry.name == judging.name]
    assert judged.perplexity_after == pytest.approx(loss.exp().item(), rel=1e-4)
    agreement = (logits.argmax(-1) == wanted.argmax(-1)).double().mean().item()
    assert judged.agreement_after == pytest.approx(agreement, abs=1e-3)
    p, q = wanted.log_softmax(-1), logits.log_softmax(-1)
    assert judged.divergence_after == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    [perplexity] = [info for info in report.perplexities if info.name == judging.name]
    assert perplexity.fused == judged.perplexity_after


def test_a_data_set_is_healed_on(base: str, fused: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    rows = "\n".join(json.dumps({"body": text}) for text in TEXTS)
    (folder / "train.jsonl").write_text(rows, encoding="utf-8")
    arguments = SETTINGS | {"text": None, "dataset": str(folder), "dataset_column": "body"}
    report = lf_hf.heal(fused, tmp_path / "out", base=base, **arguments)
    assert report.healed is not None and report.healed.kept > 0
    assert any(info.source == f"{folder} (train)" and info.tokens > 500 for info in report.healed.text)


def test_the_base_reads_no_text_twice(base: str, fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often held-out and judging text is looked at."""
    load, read = module._loaded_base, Counter[tuple[int, ...]]()

    def count(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        read.update(map(tuple, inputs["input_ids"].tolist()))

    def loaded(*arguments: Any) -> Any:
        model = load(*arguments)
        model.model.register_forward_pre_hook(count, with_kwargs=True)
        return model

    monkeypatch.setattr(module, "_loaded_base", loaded)
    report = lf_hf.heal(fused, tmp_path / "out", base=base, **SETTINGS)
    assert report.healed is not None and report.healed.epochs == 1
    assert len(read) > 64 and set(read.values()) == {1}


def test_nothing_to_gain_gives_back_what_came_in(base: str, fused: Path, tmp_path: Path) -> None:
    """And many times through a short text is a warning."""
    arguments = SETTINGS | {"text": TEXTS[:10], "learning_rate": 1e-30}
    report = lf_hf.heal(fused, tmp_path / "out", base=base, **arguments)
    assert same_bits(tmp_path / "out", fused)
    assert report.healed is not None and report.healed.kept == 0 and report.healed.epochs > 3
    for now, then in zip(report.perplexities, FusionReport.load(fused).perplexities, strict=True):
        assert (now.name, now.tokens, now.relation) == (then.name, then.tokens, "unseen")
        assert now.fused == pytest.approx(then.fused, rel=1e-3)
        assert now.divergence == pytest.approx(then.divergence, rel=1e-2)
    assert any("did not bring the model nearer" in note for note in report.notes)
    assert any("times through its text" in note for note in report.notes)
    report = lf_hf.heal(tmp_path / "out", tmp_path / "again", base=base, **SETTINGS)
    assert report.healed is not None and report.healed.kept > 0
    assert not any("did not bring" in note or "times through its text" in note for note in report.notes)


def test_a_model_on_two_devices_is_judged_as_on_one(base: str, fused: Path) -> None:
    whole, parts = (FusedLlamaForCausalLM.from_pretrained(fused) for _ in range(2))
    items: list[Item] = [{"input_ids": torch.arange(2, 34) + n} for n in range(2)]
    teacher = MemoryTeacher(LlamaForCausalLM.from_pretrained(base))
    found = judge(whole, items, teacher)
    with TwoDevices() as devices:
        spread(parts, 2, devices)
        assert judge(parts, items, teacher) == found
    assert devices.moved > 0


def test_a_collapsed_model_that_healing_does_not_help_is_still_called_so(
    base: str, fused: Path, tmp_path: Path
) -> None:
    model = FusedLlamaForCausalLM.from_pretrained(fused)
    with torch.no_grad():
        model.model.norm.weight *= 100
    model.save_pretrained(tmp_path / "sharp")
    report = lf_hf.heal(tmp_path / "sharp", tmp_path / "out", base=base, **SETTINGS | {"learning_rate": 1e-30})
    assert report.healed is not None and report.healed.kept == 0
    assert all(info.ratio > 2 for info in report.perplexities)
    notes = [note for note in report.notes if note.startswith(COLLAPSED)]
    assert len(notes) == 1
    assert all(f"to {info.fused:.4g} ({info.name})" in notes[0] for info in report.perplexities)


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(
    base: str, fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = distillation_loss, list[bool]()

    def breaks(states: torch.Tensor, *arguments: Any) -> torch.Tensor:
        calls.append(states.requires_grad)
        return real(states, *arguments) * (float("nan") if states.requires_grad and sum(calls) > 9 else 1)

    monkeypatch.setattr(training, "distillation_loss", breaks)
    report = lf_hf.heal(fused, tmp_path / "out", base=base, **SETTINGS)
    assert report.healed is not None and 0 < report.healed.kept < 10
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "out").values())
    assert any("not finite at step 10" in note and "learning rate of" in note for note in report.notes)


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(
    base: str, fused: Path, healed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    real = training.DistillationTrainer.training_step

    def kill(self: Any, *arguments: Any) -> torch.Tensor:
        if self.state.global_step == 10:
            raise Killed
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training.DistillationTrainer, "training_step", kill)
        with pytest.raises(Killed):
            lf_hf.heal(fused, tmp_path / "out", base=base, **SETTINGS)
    assert not (tmp_path / "out" / "config.json").exists()
    [work] = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
    (work / "checkpoint-99").mkdir()
    (work / "checkpoint-99" / "trainer_state.json").write_text("{")  # cut short while it was written
    with pytest.raises(ValueError, match="For the run that was cut short the base's predictions were computed by"):
        lf_hf.heal(fused, tmp_path / "out", base=base, cache=tmp_path / "cache", **SETTINGS)
    with pytest.raises(
        ValueError, match=r"a run that was cut short, of another healing: settings differ\. Give the same"
    ):
        lf_hf.heal(fused, tmp_path / "out", base=base, **SETTINGS | {"learning_rate": 1e-3})
    with pytest.raises(ValueError, match="is not the base that this model was fused from"):
        lf_hf.heal(fused, tmp_path / "out", base=another_base(tmp_path / "other"), **SETTINGS)
    steps: list[int] = []

    def counted(self: Any, *arguments: Any) -> torch.Tensor:
        steps.append(self.state.global_step)
        return real(self, *arguments)

    monkeypatch.setattr(training.DistillationTrainer, "training_step", counted)
    bars: list[int] = []

    def bar(*, total: int, **_: str) -> MagicMock:
        bars.append(total)
        return MagicMock()

    monkeypatch.setattr(training, "progress", bar)
    same_base = f"{base}/../{Path(base).name}"
    without_effect = {"training_args": {"bf16": False, "report_to": "none", "gradient_checkpointing": True}}
    report = lf_hf.heal(fused, tmp_path / "out", base=same_base, **SETTINGS | without_effect)
    assert bars == [len(steps)]  # those that are left
    assert 0 < min(steps) < 10 and same_bits(tmp_path / "out", healed)
    whole = FusionReport.load(healed).healed
    assert whole is not None and report.healed is not None and report.healed.curve == whole.curve


def test_predictions_on_disk_teach_what_the_base_in_memory_teaches(
    base: str, fused: Path, healed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept to half precision. A second healing reads them, and no base."""
    arguments = SETTINGS | {"top_k": 320, "cache": tmp_path / "cache", "base": base}
    lf_hf.heal(fused, tmp_path / "out", **arguments)
    found, wanted, before = weights(tmp_path / "out"), weights(healed), weights(fused)
    apart = sum((found[name] - wanted[name]).norm() ** 2 for name in wanted) ** 0.5
    moved = sum((before[name] - wanted[name]).norm() ** 2 for name in wanted) ** 0.5
    assert apart < 0.02 * moved
    [index] = (tmp_path / "cache").glob("*/text.json")
    index.unlink()  # as where a process was killed while it wrote
    lf_hf.heal(fused, tmp_path / "once more", **arguments)
    monkeypatch.delattr(Base, "load")
    lf_hf.heal(fused, tmp_path / "again", **arguments)
    assert all(same_bits(tmp_path / name, tmp_path / "out") for name in ("once more", "again"))


def test_a_temperature_is_the_same_on_disk_and_is_for_training_alone(
    base: str, fused: Path, healed: Path, tmp_path: Path
) -> None:
    arguments = SETTINGS | {"base": base, "temperature": 3.0, "top_k": 320}
    reports = [
        lf_hf.heal(fused, tmp_path / name, **arguments, cache=cache)
        for name, cache in (("out", None), ("from disk", tmp_path / "cache"))
    ]
    one, other, cold = (report.healed for report in (*reports, FusionReport.load(healed)))
    assert one is not None and other is not None and cold is not None
    assert one.curve[-1].divergences != pytest.approx(cold.curve[-1].divergences, rel=0.02)
    for point, on_disk in zip(one.curve, other.curve, strict=True):
        assert on_disk.divergences == pytest.approx(point.divergences, rel=0.01)
    assert other.curve[0].divergences == pytest.approx(cold.curve[0].divergences, rel=0.01)
    for judged, of_disk in zip(one.judged, other.judged, strict=True):
        assert of_disk.divergence_after == pytest.approx(judged.divergence_after, rel=0.01)
        assert of_disk.perplexity_after == pytest.approx(judged.perplexity_after, rel=0.01)


def test_in_bfloat16_it_is_the_base_that_teaches(
    base: str, fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With angles of positions as exact as in any model in bfloat16."""
    load, loaded = module._loaded_base, list[Any]()

    def spy(*arguments: Any) -> Any:
        loaded.append(load(*arguments))
        return loaded[-1]

    monkeypatch.setattr(module, "_loaded_base", spy)
    arguments = SETTINGS | {"training_args": {"bf16": True}, "tokens": 1024}
    lf_hf.heal(fused, tmp_path / "out", base=base, **arguments)
    ids = torch.randint(300, (1, 250), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)(ids).logits
        assert torch.equal(loaded[0](ids).logits, wanted)


def test_a_base_that_does_not_fit_is_read_from_disk(
    base: str, fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "model_bytes", lambda *_: 1 << 60)
    monkeypatch.delattr(Base, "load")
    monkeypatch.setattr("lf_hf.healing.lesson.generate", lambda *_, **__: pytest.fail("reads all of it for each token"))
    report = lf_hf.heal(fused, tmp_path / "out", base=base, **SETTINGS)
    assert report.healed is not None and report.healed.kept > 0 and "layer by layer" in report.healed.teacher


def test_too_little_memory_is_said_before_anything_is_loaded(
    base: str, fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what would fit."""
    monkeypatch.delattr(Base, "load")
    monkeypatch.setattr(module, "training_memory", lambda *_, **__: memory.TrainingMemory(10**6, 10**9))
    checkpointing = {"training_args": {"gradient_checkpointing": True}}
    for free, given, ways in (
        (1000, checkpointing, "take a device with more"),
        (10**7, checkpointing, "take a shorter length, train='lora', a device with more"),
        (10**7, {}, "take the training argument gradient_checkpointing=True, a shorter length, train='lora', a device"),
    ):
        monkeypatch.setattr(module, "free_memory", lambda _, free=free: free)
        with pytest.raises(ValueError, match=f"GB are free, but training takes .* on disk; {re.escape(ways)}"):
            lf_hf.heal(fused, tmp_path / "out", base=base, **SETTINGS | given)
    assert not (tmp_path / "out").exists()


def test_checkpointing_takes_less_memory() -> None:
    config, student = make_llama(num_hidden_layers=12).config, make_llama()
    plain, less = (memory.training_memory(config, student, 64, 4, checkpointing=kept) for kept in (False, True))
    assert plain.fixed == less.fixed and less.sequence < plain.sequence / 5


def test_frozen_weights_in_bfloat16_need_no_copy_to_compute_in() -> None:
    """As under adapters."""
    of_weights = []
    for dtype in (torch.bfloat16, torch.float32):
        student = make_llama(dtype=dtype).requires_grad_(False)
        of_weights.append(memory.training_memory(student.config, student, 64, 2).fixed - 24 * LOGITS)
    count = sum(parameter.numel() for parameter in student.parameters())
    assert of_weights == [2 * count, 6 * count]


def test_a_disk_without_room_is_found_out_before_anything_is_loaded(
    base: str, fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1 << 10))
    monkeypatch.delattr(Base, "load")
    for call in (plan_heal, lf_hf.heal):
        with pytest.raises(OSError, match=r"has 0\.0 MiB free, and states of the training take"):
            call(fused, tmp_path / "out", base=base, **SETTINGS)
    with pytest.raises(OSError, match="states of the training take"):  # at load time, before it is fused
        lf_hf.from_pretrained_fused(base, calibration=TEXTS, num_fusions=2, method="truncate", heal_tokens=4096)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("train", ["layers", "all", "fused", "lora"])
def test_what_is_not_to_be_trained_stays(
    train: str, base: str, fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a plan says what is trained."""
    settings = SETTINGS | {"train": train, "lora_rank": 2}
    plan = plan_heal(fused, tmp_path / "out", base=base, **settings)
    real, sizes = training.DistillationTrainer._save_checkpoint, list[int]()

    def saved(self: Any, *arguments: Any) -> None:
        before = set(Path(self.args.output_dir).glob("checkpoint-*"))
        real(self, *arguments)
        [new] = set(Path(self.args.output_dir).glob("checkpoint-*")) - before
        assert len(before) < 3
        sizes.append(sum(file.stat().st_size for file in new.iterdir()))

    monkeypatch.setattr(training.DistillationTrainer, "_save_checkpoint", saved)
    report = lf_hf.heal(fused, tmp_path / "out", base=base, **settings)
    before, after = weights(fused), weights(tmp_path / "out")
    assert report.healed is not None and report.healed.kept > 0 and before.keys() == after.keys()
    assert f"trained: {report.healed.trained:,} of " in plan.summary()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    if train == "lora":
        assert changed == {name for name in before if "_proj" in name}
        low = {name for name in changed if torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) <= 2}
        assert low == changed
    else:
        trained = {"layers": "model.layers.", "all": "", "fused": "model.layers.2."}[train]
        assert changed == {name for name in before if "norm" in name or name.startswith(trained)}


ZERO = {"zero_optimization": {"stage": 3}, "gradient_clipping": "auto"}
ZERO |= dict.fromkeys(["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"], "auto")


@pytest.mark.parametrize(("way", "given"), [("ddp", {}), ("fsdp2", {"fsdp": True}), ("deepspeed", {"deepspeed": ZERO})])
def test_two_processes_do_what_one_does(
    way: str, given: dict[str, Any], base: str, fused: Path, healed: Path, tmp_path: Path
) -> None:
    """With the same sequences in each step; to rounding, which training amplifies. What was split loads whole."""
    if way == "deepspeed":
        pytest.importorskip("deepspeed")
    arguments = {**SETTINGS, "fused": str(fused), "out": str(tmp_path / "out"), "base": base}
    arguments["training_args"] = {"bf16": False, **given}
    (tmp_path / "arguments.json").write_text(json.dumps(arguments), encoding="utf-8")
    launch = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2"
    done = subprocess.run(
        [*launch.split(), str(ROOT / "tests" / "healing_processes.py"), str(tmp_path / "arguments.json")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found, wanted = (FusionReport.load(folder).healed for folder in (tmp_path / "out", healed))
    assert found is not None and wanted is not None
    assert [point.step for point in found.curve] == [point.step for point in wanted.curve]
    for point, of_one in zip(found.curve, wanted.curve, strict=True):
        assert point.divergences == pytest.approx(of_one.divergences, rel=2e-3)
    for text, of_text in zip(found.judged, wanted.judged, strict=True):
        assert text.tokens == of_text.tokens
        assert text.divergence_before == pytest.approx(of_text.divergence_before, rel=1e-5)
        assert text.perplexity_after == pytest.approx(of_text.perplexity_after, rel=2e-3)
    loaded = FusedLlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in FusedLlamaForCausalLM.from_pretrained(healed).state_dict().items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=2e-3)


def test_bfloat16_weights_learn_what_is_too_small_for_them(base: str, tmp_path: Path) -> None:
    lf_hf.fuse_checkpoint(
        base, tmp_path / "fused", num_fusions=2, method="truncate", dtype="bfloat16", perplexity_tokens=500
    )
    arguments = SETTINGS | {"learning_rate": 1e-4, "training_args": {}}
    report = lf_hf.heal(tmp_path / "fused", tmp_path / "out", base=base, **arguments)
    assert report.healed is not None and report.healed.kept > 0
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}
    assert not same_bits(tmp_path / "out", tmp_path / "fused")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokens": 10}, "tokens must be an integer of at least 1024, got 10"),
        ({"train": "norms"}, "Unknown train 'norms'"),
        ({"learning_rate": 0}, "learning_rate must be a finite number greater than 0"),
        ({"written_share": 1.0}, "written_share must be a finite number of at least 0 and at most 0.9"),
        ({"next_token_share": 2}, "next_token_share must be a finite number of at least 0 and at most 1"),
        ({"batch_tokens": 32}, "batch_tokens=32 holds no sequence of length=64"),
        ({"learning_rat": 1e-3}, "learning_rat"),
        ({"seed": 1 << 32}, "seed must be at most 4294967295"),
        ({"cache": ""}, "must be a path, got ''"),
        ({"text": ["too short"]}, "do not fill two sequences of length=64"),
        ({"training_args": {"bf61": True}}, "did you mean 'bf16'?"),
        ({"training_args": {"max_steps": 5}}, "'max_steps' is set by heal itself"),
        ({"training_args": {"per_device_train_batch_size": 3}}, "does not divide"),
        ({"training_args": {"gradient_accumulation_steps": 3}}, "gradient_accumulation_steps=3 does not divide"),
        ({"dataset": "some/set"}, "text and dataset exclude each other"),
        ({"dataset_split": "test"}, "split or column is one of a data set; name it with dataset= (--dataset)"),
        ({"base": None}, "say where it is with base="),
    ],
)
def test_bad_settings_get_a_sentence(
    values: dict[str, Any], message: str, base: str, fused: Path, tmp_path: Path
) -> None:
    arguments = {**SETTINGS, "base": base, **values}
    if "text" in values:
        arguments["written_share"] = 0
    with pytest.raises(ValueError, match=re.escape(message)):
        lf_hf.heal(fused, tmp_path / "out", **arguments)
    assert not (tmp_path / "out" / "config.json").exists()


def test_adapters_without_peft_get_a_sentence(
    base: str, fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"needs the peft package; run `pip install 'lf_hf\[heal\]'`"):
        lf_hf.heal(fused, tmp_path / "out", base=base, **SETTINGS | {"train": "lora"})


def another_base(folder: Path) -> Path:
    """As the base, but for some weights."""
    other = make_llama()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    other.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_another_base_gets_a_sentence(make_base: Callable[..., str], base: str, fused: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not the base that this model was fused from"):
        lf_hf.heal(fused, tmp_path / "out", base=another_base(tmp_path / "other"), **SETTINGS)
    with pytest.raises(ValueError, match="has 330 embeddings, and the fused model 320"):
        lf_hf.heal(fused, tmp_path / "out", base=make_base(vocab_size=330), **SETTINGS)
    tokens = make_tokenizer()
    tokens.add_tokens(["another"])
    make_llama().save_pretrained(tmp_path / "tokens")
    tokens.save_pretrained(tmp_path / "tokens")
    with pytest.raises(ValueError, match="has other tokens than the fused model's"):
        lf_hf.heal(fused, tmp_path / "out", base=tmp_path / "tokens", **SETTINGS)
    with pytest.raises(ValueError, match=r"holds no fusion_report\.json"):
        lf_hf.heal(base, tmp_path / "out", base=base, **SETTINGS)


def test_the_command_line_and_a_plain_checkpoint_which_stays_plain(
    base: str, fused: Path, healed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    FusedLlamaForCausalLM.from_pretrained(fused).save_pretrained(tmp_path / "plain", as_llama=True)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(text) + "\n" for text in TEXTS), encoding="utf-8")
    arguments = ["heal", str(tmp_path / "plain"), str(tmp_path / "out"), "--base", base]
    arguments += ["--text", str(tmp_path / "text.jsonl")]
    settings = "--tokens 4096 --length 64 --batch-tokens 256 --learning-rate 3e-3 --arg bf16=false".split()
    assert main([*arguments, *settings]) == 0
    out = capsys.readouterr().out
    assert "divergence, docs" in out and "of which step" in out
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__ == "LlamaForCausalLM"
    assert same_bits(tmp_path / "out", healed)
    assert main([*arguments, "--arg", "bf16"]) == 2


@pytest.fixture
def without_weights(base: str, fused: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The fused model and its base, as folders from which no weights can be read."""
    folders = tmp_path / "fused", tmp_path / "base"
    for folder, source in zip(folders, (fused, Path(base)), strict=True):
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folders


def test_a_plan_says_what_healing_does_and_reads_no_weights(
    healed: Path, without_weights: tuple[Path, Path], tmp_path: Path
) -> None:
    fused, base = without_weights
    plan, done = plan_heal(fused, tmp_path / "out", base=base, **SETTINGS), FusionReport.load(healed).healed
    assert done is not None and not (tmp_path / "out").exists()
    assert f"trained: {done.trained:,} of " in plan.summary()
    assert f"{done.steps} steps of " in plan.summary() and f"predictions: {done.teacher}\n" in plan.summary()
    assert PROCESS < plan.memory < plan.free and plan.notes == []


@pytest.mark.parametrize("train", ["layers", "lora"])
def test_a_plan_decides_as_healing_does_once_the_models_are_there(
    train: str, base: str, fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However scarce memory is: what loading the fused model and its copy takes counts before it is taken."""
    monkeypatch.setattr(loss, "LOGITS", 1)
    monkeypatch.setattr(memory, "LOGITS", 1)
    opened, chosen = Base.open(base, {}), []
    settings = HealSettings(length=64, batch_tokens=256, train=train)
    for reads_weights in (True, False):
        model = open_fused(fused, reads_weights=reads_weights).model
        student = training.make_student(model, settings, [1])
        taken = sum(p.nbytes for p in (*model.parameters(), *student.parameters()))
        ways: list[tuple[str, int, int] | None] = []
        for total in range(taken, 20 * taken, taken // 4):
            free = total - (taken if reads_weights else 0)
            monkeypatch.setattr(module, "free_memory", lambda _, free=free: free)
            arguments = training.training_arguments(settings, tmp_path, {"bf16": False})
            try:
                way = module.choose_way(
                    opened, student, settings, arguments, {}, None, planned=None if reads_weights else model
                )
            except ValueError:
                ways.append(None)
            else:
                ways.append((way.said, way.memory, arguments.per_device_train_batch_size))
        chosen.append(ways)
    assert chosen[0] == chosen[1] and len({way and way[0] for way in chosen[0]}) >= 3


def test_a_dry_run_on_the_command_line(
    base: str, fused: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (tmp_path / "text.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    command = ["heal", str(fused), str(out), "--base", base, "--text", str(tmp_path / "text.txt"), "--dry-run"]
    assert main([*command, "--tokens", "2048", "--length", "64", "--batch-tokens", "128"]) == 0
    said = capsys.readouterr().out
    assert "16 steps of 128 tokens" in said and "text: text.txt" in said and not out.exists()
    assert main([*command, "--arg", "bf61=true"]) == 1
    assert "did you mean 'bf16'?" in capsys.readouterr().err


def test_training_arguments_are_refused_before_weights_are_read(
    without_weights: tuple[Path, Path], tmp_path: Path
) -> None:
    fused, base = without_weights
    for name, value, message in (
        ("bf61", True, "did you mean 'bf16'"),
        ("report_to", "wandd", r"report_to='wandd' cannot be used: wandd is not supported"),
        ("report_to", ["comet_ml"], r"report_to=\['comet_ml'\] cannot be used: CometCallback requires comet-ml"),
    ):
        with pytest.raises(ValueError, match=message):
            lf_hf.heal(fused, tmp_path / "out", base=base, **SETTINGS | {"training_args": {name: value}})


def test_what_the_trainer_cannot_do_is_said_by_a_plan_and_before_the_base_is_loaded(
    without_weights: tuple[Path, Path], base: str, fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Base, "load")
    for name, value, message in (
        ("report_to", None, "report_to must be none, all or names of loggers"),
        ("lr_scheduler_type", "cosine_with_min_lr", "cannot be used: .*min_lr"),
        ("optim", "galore_adamw", "cannot be used: .*galore_torch"),
        ("per_device_eval_batch_size", 0, "per_device_eval_batch_size must be at least 1"),
        ("fsdp", "full_shard", "fsdp takes several processes"),
    ):
        given = SETTINGS | {"training_args": {name: value}}
        with pytest.raises(ValueError, match=message):
            lf_hf.heal(fused, tmp_path / "out", base=base, **given)
        with pytest.raises(ValueError, match=message):
            plan_heal(without_weights[0], tmp_path / "out", base=without_weights[1], **given)


def test_a_model_that_was_saved_again_in_another_type_is_healed(base: str, fused: Path, tmp_path: Path) -> None:
    FusedLlamaForCausalLM.from_pretrained(fused, dtype=torch.bfloat16).save_pretrained(tmp_path / "again")
    report = lf_hf.heal(tmp_path / "again", tmp_path / "out", base=base, **SETTINGS)
    assert report.healed is not None and report.healed.kept > 0
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}


@pytest.mark.parametrize("cache", [False, True])
def test_figures_are_of_the_fusions_sequences_whatever_is_trained_on(
    base: str, fused: Path, tmp_path: Path, *, cache: bool
) -> None:
    given = {"length": 128, "learning_rate": 1e-3} | ({"cache": tmp_path / "cache", "top_k": 8} if cache else {})
    report, before = lf_hf.heal(fused, tmp_path / "out", base=base, **SETTINGS | given), FusionReport.load(fused)
    assert report.healed is not None and report.healed.kept > 0
    assert [judged.name for judged in report.healed.judged] == [judging.name for judging in judging_texts()]
    for now, then, judged in zip(report.perplexities, before.perplexities, report.healed.judged, strict=True):
        assert now.tokens == then.tokens and now.dense == pytest.approx(then.dense, rel=1e-3)
        assert judged.perplexity_before == pytest.approx(then.fused, rel=1e-3)
        assert judged.divergence_before == pytest.approx(then.divergence, rel=1e-2)
        assert now.fused == judged.perplexity_after


@pytest.mark.parametrize(("values", "rate"), [({}, 1e-4), ({"train": "lora"}, 5e-4), ({"learning_rate": 1.0}, 1.0)])
def test_the_default_rate_follows_what_is_trained(values: dict[str, Any], rate: float) -> None:
    assert HealSettings(**values).learning_rate == rate


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_adapters_are_trained_beside_weights_that_gradients_go_through(dtype: torch.dtype) -> None:
    student = training.make_student(make_llama(dtype=dtype), HealSettings(train="lora"), [1])
    for name, parameter in student.named_parameters():
        wanted = torch.bfloat16 if dtype == torch.bfloat16 and "lora" not in name else torch.float32
        assert parameter.dtype == wanted, name


@pytest.mark.parametrize(
    ("given", "value"), [("False", False), ("false", False), (".5", 0.5), ("None", None), ("null", None), ("a", "a")]
)
def test_training_arguments_are_read_as_people_write_them(given: str, value: object) -> None:
    assert training.given_arguments([f"name={given}"]) == {"name": value}


def test_a_users_files_in_the_folder_stay(base: str, fused: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "runs").touch()
    with pytest.raises(ValueError, match="holds a file 'runs'"):
        lf_hf.heal(fused, tmp_path / "out", base=base, **SETTINGS | {"training_args": {"report_to": "all"}})
    (tmp_path / "out" / "runs").unlink()
    tokens = make_tokenizer()
    tokens.save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "tokenizer_config.json").write_text('{"mine": true}')
    lf_hf.heal(fused, tmp_path / "out", base=base, **SETTINGS | {"tokens": 1024})
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"mine": true}'


def test_a_cache_that_cannot_be_written_serves(
    base: str, fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = SETTINGS | {"tokens": 1024, "cache": tmp_path / "cache", "base": base}
    lf_hf.heal(fused, tmp_path / "once", **arguments)
    monkeypatch.setattr(module, "only_writer", lambda *_, **__: pytest.fail("wrote into it"))
    lf_hf.heal(fused, tmp_path / "twice", **arguments)
    assert same_bits(tmp_path / "once", tmp_path / "twice")


def test_the_fused_model_itself_is_not_replaced(base: str, fused: Path) -> None:
    with pytest.raises(ValueError, match="is the fused model itself"):
        lf_hf.heal(fused, fused, base=base, **SETTINGS)


def test_damaged_predictions_are_written_again(base: str, fused: Path, tmp_path: Path) -> None:
    few = SETTINGS | {"tokens": 1024}
    lf_hf.heal(fused, tmp_path / "once", base=base, cache=tmp_path / "cache", **few)
    [file, *_] = (tmp_path / "cache").glob("*/targets-*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    lf_hf.heal(fused, tmp_path / "twice", base=base, cache=tmp_path / "cache", **few)
    assert same_bits(tmp_path / "once", tmp_path / "twice")


def test_a_single_step_is_taken_at_a_rate_above_zero(tmp_path: Path) -> None:
    assert training.training_arguments(HealSettings(tokens=2048), tmp_path, {}).warmup_steps == 0


def test_another_kind_of_training_has_its_own_rate() -> None:
    assert HealSettings.taken_from({"train": "lora"}, HealSettings()) == HealSettings(train="lora")


def test_one_process_takes_one_of_several_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets are nothing that the Trainer's own way of using all would spread."""
    real = TrainingArguments.__post_init__

    def with_two(self: Any) -> None:
        real(self)
        self._n_gpu = 2

    monkeypatch.setattr(TrainingArguments, "__post_init__", with_two)
    arguments = training.training_arguments(HealSettings(), tmp_path, {"per_device_train_batch_size": 3})
    assert arguments.n_gpu == 1 and arguments.train_batch_size == 3


@pytest.mark.parametrize(
    ("world", "tokens", "batch"),
    [(1, 131072, 4), (3, 131072, 6), (4, 131072, 4), (8, 131072, 8), (1, 1024, 2), (4, 1024, 4)],
)
def test_a_step_is_shared_evenly_by_any_number_of_processes(
    world: int, tokens: int, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingArguments, "world_size", world)
    config = make_llama(max_position_embeddings=512).config
    settings, arguments = fitted_arguments(HealSettings(tokens=tokens), config, tmp_path, {})
    assert settings.batch == batch and arguments.max_steps == settings.steps == max(1, tokens // 512 // batch)
    training.set_batches(arguments, settings.batch, 100, {})
    assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * world == batch


def test_logs_are_kept_and_random_numbers_and_precision_are_as_they_were(
    base: str, fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = training.DistillationTrainer.training_step

    def logs(self: Any, *arguments: Any) -> torch.Tensor:
        (Path(self.args.output_dir) / "runs").mkdir(exist_ok=True)
        for name in ("events", "a user's"):
            (Path(self.args.output_dir) / "runs" / name).write_text(str(self.state.global_step))
        return real(self, *arguments)

    def numbers() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(1))]

    monkeypatch.setattr(training.DistillationTrainer, "training_step", logs)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    AcceleratorState._reset_state()
    wanted = numbers()
    (tmp_path / "out" / "runs").mkdir(parents=True)
    (tmp_path / "out" / "runs" / "a user's").write_text("log")
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    lf_hf.heal(fused, tmp_path / "out", base=base, **SETTINGS | {"training_args": {"bf16": True}, "tokens": 1024})
    assert numbers() == wanted and not AcceleratorState._shared_state
    assert (tmp_path / "out" / "runs" / "events").read_text() == "3"
    assert (tmp_path / "out" / "runs" / "a user's").read_text() == "log"


def test_a_full_disk_says_what_is_kept(base: str, fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("the writer failed")  # as torch.save says it

    monkeypatch.setattr("transformers.Trainer._save_checkpoint", full)
    with pytest.raises(OSError, match=r"The state of step \d was not written \(the writer failed\); the one before it"):
        lf_hf.heal(fused, tmp_path / "out", base=base, **SETTINGS)


def test_what_is_fused_within_a_budget_is_healed_while_loading(base: str, tmp_path: Path) -> None:
    """With a tokenizer that is given, where the base has none."""
    make_llama(num_hidden_layers=6).save_pretrained(tmp_path / "base")
    arguments: dict[str, Any] = {"method": "truncate", "max_divergence": 1e9, "perplexity_tokens": 0}
    arguments |= {"calibration_length": 64, "calibration_tokens": 2048, "heal_tokens": 4096, "calibration": TEXTS}
    model = FusedLlamaForCausalLM.from_pretrained_fused(tmp_path / "base", tokenizer=make_tokenizer(), **arguments)
    report = model.fusion_report
    assert report is not None and report.healed is not None and report.budget is not None
    assert report.healed.steps == 2 and report.config["max_divergence"] == 1e9


def test_it_heals_while_loading_and_keeps_the_result(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {"num_fusions": 2, "method": "truncate", "heal_tokens": 16384, "calibration": TEXTS}
    arguments |= {"perplexity_tokens": 0, "fused_dir": tmp_path / "fused"}
    with pytest.raises(ValueError, match="heal_tokens must be 0 or at least 1024, got 10"):
        FusedLlamaForCausalLM.from_pretrained_fused(base, **arguments | {"heal_tokens": 10})
    with pytest.raises(ValueError, match="heal_tokens=2048 cannot be used with low_memory=True"):
        lf_hf.fuse_checkpoint(base, tmp_path / "out", num_fusions=2, method="truncate", heal_tokens=2048)
    with monkeypatch.context() as patch:  # before anything is loaded
        patch.delattr(Base, "load")
        with pytest.raises(ValueError, match=r"has only .* tokens, which do not fill two sequences"):
            FusedLlamaForCausalLM.from_pretrained_fused(base, **arguments | {"calibration": TEXTS[:2]})
        patch.setattr("lf_hf.healing.lesson.free_memory", lambda device: 1 << 20)
        with pytest.raises(ValueError, match="GB are free, but training takes"):
            FusedLlamaForCausalLM.from_pretrained_fused(base, **arguments)
    model = FusedLlamaForCausalLM.from_pretrained_fused(base, **arguments)
    assert model.fusion_report is not None and model.fusion_report.healed is not None
    assert model.fusion_report.healed.kept > 0 and model.fusion_report.config["heal_tokens"] == 16384
    with monkeypatch.context() as patch:
        patch.delattr(Base, "load")
        again = FusedLlamaForCausalLM.from_pretrained_fused(base, **arguments)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    plain = FusedLlamaForCausalLM.from_pretrained_fused(base, **arguments | {"heal_tokens": 0})
    assert plain.fusion_report is not None and plain.fusion_report.healed is None
