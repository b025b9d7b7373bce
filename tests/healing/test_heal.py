"""Healing: a fused model comes nearer to its base, never further from it, by a loss that is minimised on its text."""

import json
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from builders import normal
from conftest import QUICK, changed, dry_run, files, make_texts, make_tokenizer, same, tensors
from test_saving import file_size_limit
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

import lf_hf
from lf_hf import FusedLlamaForCausalLM, FusionConfig, FusionReport, HealSettings
from lf_hf.checkpoint.base import Base
from lf_hf.checkpoint.saving import TEACHER, TRAINING, WORK
from lf_hf.cli import main, parse_training_arguments
from lf_hf.decoder.decoder import Decoder
from lf_hf.healing import loss as module
from lf_hf.healing import trainer
from lf_hf.healing.loss import Loss, Targets, distillation_loss
from lf_hf.healing.text import HELD_OUT, WRITTEN, healing_text
from lf_hf.measure.judge import judge, judge_dense
from lf_hf.pipeline.dry_run import plan_heal
from lf_hf.pipeline.healing import HealInputs
from lf_hf.report.report import CHANGED_NOTE
from lf_hf.text.calibration import DOCUMENTATION, QUESTIONS, Corpus
from lf_hf.text.packing import pack_tokens

TEXTS = make_texts(1200, seed=5)
Heal = Callable[..., Any]  # a FusionReport, with what healing found


class Killed(BaseException):
    """Nothing but the next run clears up behind it."""


def settings(**changes: Any) -> dict[str, Any]:
    """Arguments of a healing that takes a second or two: few short sequences, in float32, at a high rate."""
    usual: dict[str, Any] = {"tokens": 2048, "length": 32, "batch_tokens": 128, "learning_rate": 3e-3, "text": TEXTS}
    return usual | {"training_args": {"bf16": False}} | changes


def inputs(fused: Path, *, base: str, text: Any, training_args: Any = None, **given: Any) -> HealInputs:
    return HealInputs.open(fused, base, text, None, training_args, given)


@pytest.fixture(scope="module")
def fused(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fused") / "fused"
    lf_hf.fuse_checkpoint(base, folder, num_fusions=2, method="truncate", perplexity_tokens=512)
    return folder


@pytest.fixture(scope="module")
def healed(base: str, fused: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("healed") / "healed"
    lf_hf.heal(fused, folder, base=base, **settings())
    return folder


@pytest.fixture
def heal(base: str, fused: Path, tmp_path: Path) -> Heal:
    """`lf_hf.heal` with these settings, into "out"."""
    places: dict[str, Any] = {"fused": fused, "out": tmp_path / "out", "base": base}
    return lambda **given: lf_hf.heal(**places | settings(**given))


def curve(folder: Path) -> list[dict[str, Any]]:
    return FusionReport.load(folder).to_dict()["healed"]["curve"]


def test_it_comes_nearer_to_the_base_on_text_that_it_has_not_seen(healed: Path, fused: Path) -> None:
    report: Any = FusionReport.load(healed)
    assert report.healed.kept > 0
    means = {point.step: np.mean([*point.divergences.values()]) for point in report.healed.curve}
    assert all(len(point.divergences) >= 2 for point in report.healed.curve)
    assert means[report.healed.kept] == min(means.values()) < 0.8 * means[0]
    assert report.healed.judged == FusionReport.load(fused).perplexities
    for before, after in zip(report.healed.judged, report.perplexities, strict=True):
        assert after.figures["divergence"] < before.figures["divergence"]
        assert after.figures["agreement"] > before.figures["agreement"]
    assert FusedLlamaForCausalLM.from_pretrained(healed).fusion_report == report
    assert sum(info.tokens for info in report.healed.text) * report.healed.epochs == pytest.approx(2048)
    assert DOCUMENTATION in [info.source for info in report.healed.text]  # beside the text that was given
    assert {file.name for file in healed.iterdir()} == {file.name for file in fused.iterdir()}
    assert type(AutoModelForCausalLM.from_pretrained(healed)).__name__ == "LlamaForCausalLM"
    assert "- healed: " in (healed / "README.md").read_text(encoding="utf-8")


def test_nothing_to_gain_gives_back_the_fused_model(heal: Heal, fused: Path, tmp_path: Path) -> None:
    """With notes: of its collapse, of many times through a short text, and of a change before."""
    model = FusedLlamaForCausalLM.from_pretrained(fused)
    with torch.no_grad():
        model.model.norm.weight *= 100
    model.save_pretrained(tmp_path / "sharp")
    changed_since = FusionReport.load(tmp_path / "sharp")
    assert changed_since.changed and CHANGED_NOTE in changed_since.all_notes
    report = heal(fused=tmp_path / "sharp", text=TEXTS[:6], learning_rate=1e-30)
    assert not changed(tmp_path / "out", tmp_path / "sharp")
    assert report.healed.kept == 0 and report.healed.epochs > 3
    for now, then in zip(report.perplexities, FusionReport.load(fused).perplexities, strict=True):
        assert (now.name, now.tokens) == (then.name, then.tokens) and now.ratio > 2
    begins = ("Healing did not bring", "Healing goes", "Perplexity went", "The weights had been changed")
    assert all(sum(note.startswith(begin) for note in report.all_notes) == 1 for begin in begins)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "The weights had been changed" in card and CHANGED_NOTE not in card


def test_a_training_that_diverges_ends_and_keeps_the_last_good_state(heal: Heal, fused: Path, tmp_path: Path) -> None:
    """A row of the embeddings without a gradient, and so without a size of steps, gets NaN for its next one."""
    report = heal(train="all", training_args={"bf16": False, "adam_epsilon": 0.0})
    assert report.healed.kept == 0 and report.healed.steps < 16
    assert not changed(tmp_path / "out", fused)
    assert any("Healing diverged by step 8, so the state of step 0 is kept" in note for note in report.all_notes)


@contextmanager
def cut_short(step: int = 1) -> Iterator[None]:
    """Kill the healing inside the block before it takes this step, counted from 0."""
    real = Trainer.training_step

    def training_step(self: Any, *given: Any) -> torch.Tensor:
        if self.state.global_step == step:
            raise Killed
        return real(self, *given)

    with patch.object(Trainer, "training_step", training_step), pytest.raises(Killed):
        yield


@pytest.fixture(scope="module")
def left_behind(base: str, fused: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a healing left that was killed at step 10 of 16."""
    out = tmp_path_factory.mktemp("killed") / "out"
    with cut_short(10):
        lf_hf.heal(fused, out, base=base, **settings())
    (out / WORK / TRAINING / "runs").mkdir()
    (out / WORK / TRAINING / "runs" / "events").touch()
    assert [path.name for path in out.iterdir()] == [WORK]
    return out


@pytest.fixture
def killed(left_behind: Path, tmp_path: Path) -> Path:
    """The same in another place."""
    return Path(shutil.copytree(left_behind, tmp_path / "moved"))


def test_a_killed_run_ends_with_the_same_bits(
    heal: Heal, base: str, fused: Path, healed: Path, killed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its states take no more of the disk than a plan says, and its logs are in the result."""
    plan = plan_heal(inputs(fused, base=base, **settings()), tmp_path / "else")
    [said] = re.findall(r"disk, .*: ([\d.]+) MiB", plan.summary())
    [state] = (killed / WORK / TRAINING).glob("checkpoint-*")
    size = sum(file.stat().st_size for file in state.iterdir()) / 2**20
    assert 0.6 * float(said) < 4 / 3 * size < float(said) + 0.05
    for changes in ({"learning_rate": 1e-3}, {"text": make_texts(900)}):
        with pytest.raises(ValueError, match=r"cut short, and that makes something else: give its command again to go"):
            heal(out=killed, **changes)
    assert (
        "holds a run that was cut short, which goes on"
        in plan_heal(inputs(fused, base=base, **settings()), killed).summary()
    )
    copied = shutil.copytree(base, tmp_path / "a copy of the base")
    heal(out=killed, base=copied)
    assert "Going on from" in caplog.text and not changed(killed, healed) and curve(killed) == curve(healed)
    assert (killed / "runs" / "events").is_file() and not (killed / WORK).exists()
    assert not AcceleratorState._shared_state
    report = heal(out=killed, overwrite=True, learning_rate=1e-3)  # also in place of a result with logs
    assert report.healed.settings["learning_rate"] == 1e-3 and not (killed / "runs" / "events").exists()


DAMAGE: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("model.safetensors", lambda content: content[: len(content) // 2]),
    ("trainer_state.json", lambda _: b""),
]


@pytest.mark.parametrize(("file", "damage"), DAMAGE)
def test_a_broken_state_is_left_out(
    file: str, damage: Callable[[bytes], bytes], heal: Heal, killed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    [written] = (killed / WORK / TRAINING).glob(f"checkpoint-*/{file}")
    written.write_bytes(damage(written.read_bytes()))
    with cut_short(0):  # so the training begins anew
        heal(out=killed)
    [line] = [line for line in caplog.messages if "cannot be read, so the training does not go on from" in line]
    assert file in line


@pytest.mark.parametrize("file", ["states.bin", "teacher.pt"])
def test_what_was_cut_is_measured_on_the_base_anew(heal: Heal, healed: Path, killed: Path, file: str) -> None:
    states = killed / WORK / TEACHER / file
    states.write_bytes(states.read_bytes()[:-100])
    heal(out=killed)
    assert not changed(killed, healed)


def test_too_little_memory_to_go_on_says_how_to_begin(
    heal: Heal, killed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lf_hf.healing.ladder.training_bytes", lambda *_, **__: 1 << 48)
    place = re.escape(str(killed / WORK))
    with pytest.raises(ValueError, match=f"train='layers' .* give a device with so much, or remove '{place}' to begin"):
        heal(out=killed)
    with pytest.raises(ValueError, match=r"train='lora' .* or length=16\.$"):
        heal(out=killed.parent / "else")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("shutil.disk_usage", r"has 0\.0 MiB free, and the result takes, "),
        ("psutil.virtual_memory", r"1\.0 MiB are free on cpu, and .* takes .* there at least; give "),
    ],
)
def test_too_little_room_is_said_before_the_base_is_read(
    place: str, message: str, heal: Heal, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Base, "load")
    monkeypatch.setattr(place, lambda *_: SimpleNamespace(free=1 << 10, available=1 << 20))
    out = tmp_path / "new" / "out"
    for start in (
        lambda: heal(out=out),
        lambda: lf_hf.from_pretrained_fused(base, **QUICK, heal_tokens=4096, calibration=TEXTS),
        lambda: lf_hf.fuse_checkpoint(base, out, **QUICK),
        lambda: dry_run(base, FusionConfig(**QUICK), out=out),
    ):
        with pytest.raises((OSError, ValueError), match=message):
            start()
    assert not any(tmp_path.iterdir())


def test_what_is_not_to_be_trained_stays(heal: Heal, fused: Path, healed: Path, tmp_path: Path) -> None:
    """Bfloat16 weights learn what is too small for them."""
    half = tmp_path / "half"
    FusedLlamaForCausalLM.from_pretrained(fused, dtype=torch.bfloat16).save_pretrained(half)
    assert heal(fused=half, train="fused", learning_rate=1e-4).healed.kept
    assert {tensor.dtype for tensor in tensors(tmp_path / "out").values()} == {torch.bfloat16}
    for before, after, trained in ((fused, healed, "model.layers."), (half, tmp_path / "out", "model.layers.2.")):
        found = changed(before, after)
        assert found <= {name for name in tensors(fused) if "norm" in name or name.startswith(trained)}
        assert found >= {name for name in tensors(fused) if "proj" in name and name.startswith(trained)}


def test_dropout_is_off_where_a_base_has_some(base: str, heal: Heal, fused: Path, healed: Path, tmp_path: Path) -> None:
    folders = list[Path]()
    for folder in (Path(base), fused):
        copied = Path(shutil.copytree(folder, tmp_path / f"{len(folders)}"))
        config = json.loads((copied / "config.json").read_text()) | {"attention_dropout": 0.3, "resid_pdrop": 0.3}
        (copied / "config.json").write_text(json.dumps(config))
        folders.append(copied)
    heal(base=folders[0], fused=folders[1])
    assert not changed(tmp_path / "out", healed)


def test_held_out_text_shows_what_is_minimised(heal: Heal, tmp_path: Path) -> None:
    """And is judged by the divergence itself: what is compared is alike before the training, and not after it."""
    curves = []
    for number, changes in enumerate(({"next_token_share": 0.0}, {"next_token_share": 1.0}, {"temperature": 9.0})):
        heal(out=tmp_path / str(number), tokens=1024, **{"next_token_share": 0.0} | changes)
        curves.append([np.mean([*point["divergences"].values()]) for point in curve(tmp_path / str(number))])
    assert len({curve[0] for curve in curves}) == 1
    usual, of_text, warm = (curve[-1] for curve in curves)
    assert usual < 0.8 * of_text and warm != pytest.approx(usual, rel=0.01)


def test_a_trained_head_is_judged_against_the_base_s(heal: Heal, base: str, fused: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = heal(train="all")
    assert "lm_head.weight" in changed(fused, out)
    dense, healed = (Decoder(AutoModelForCausalLM.from_pretrained(folder)) for folder in (base, out))
    judged = judge(healed, judge_dense(dense, make_tokenizer(), 512), dense.model.lm_head.weight)
    for reported, found in zip(report.perplexities, judged, strict=True):
        assert reported.figures == pytest.approx(found.figures) and reported.tokens == found.tokens


def test_adapters_have_their_rank(heal: Heal, fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the training computes in bfloat16: what is saved is the fused model's own weight and the rest."""
    numbers = []
    for work in (lambda **_: None, heal):  # which leaves the process its random numbers
        set_seed(7)
        work(tokens=1024, train="lora", lora_rank=2, training_args={"bf16": True})
        numbers.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert numbers[0] == numbers[1]
    before, after = tensors(fused), tensors(tmp_path / "out")
    assert changed(fused, tmp_path / "out") == {name for name in before if "_proj" in name}
    for name in (name for name in before if "_proj" in name):
        assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) <= 2
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="needs the peft package; run `pip install"):
        heal(out=tmp_path / "again", train="lora")


def test_training_arguments_are_read_as_people_write_them(tmp_path: Path) -> None:
    """And fp16 takes the place of bf16, which is the default where the machine is fast at it."""
    written = {"False": False, "false": False, ".5": 0.5, "None": None, "null": None, "a": "a"}
    assert parse_training_arguments([f"{value}={value}" for value in written]) == written
    arguments = trainer.training_arguments(HealSettings(tokens=4096), tmp_path, {"fp16": True}, "cpu")
    assert arguments.fp16 and not arguments.bf16


def test_its_command(base: str, fused: Path, healed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    FusedLlamaForCausalLM.from_pretrained(fused).save_pretrained(tmp_path / "native")
    lf_hf.fuse_checkpoint(base, tmp_path / "out", **QUICK)  # which is replaced
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    command = ["heal", str(tmp_path / "native"), str(tmp_path / "out"), "--base", base]
    command += ["--text", str(tmp_path / "text.jsonl"), "--arg", "bf16=false"]
    values = "--tokens 2048 --length 32 --batch-tokens 128 --learning-rate 3e-3".split()
    assert main([*command, *values]) == 1 and "give --overwrite to replace it" in capsys.readouterr().err
    command.append("--overwrite")
    assert main([*command, *values, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "16 steps of 128 tokens" in said and "holds a result, which would be replaced" in said
    assert main([*command, *values]) == 0
    out = capsys.readouterr().out
    assert "divergence, docs" in out and "of which step" in out
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__ == "LlamaForCausalLM"
    assert not changed(tmp_path / "out", healed)


def test_many_processes_share_a_step(base: str, fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"base": base, "text": TEXTS, "length": 256, "batch_tokens": 1024}
    cases = (1, 1024, "1 step of 1,024"), (1, 4096, "4 steps of 1,024"), (3, 4096, "2 steps of 1,536")
    for world, tokens, said in cases:
        monkeypatch.setattr(TrainingArguments, "world_size", world)
        assert f"{said} tokens" in plan_heal(inputs(fused, tokens=tokens, **given), tmp_path).summary()


def test_a_full_disk_says_what_is_kept(heal: Heal) -> None:
    with file_size_limit(205_000), pytest.raises(OSError, match=r"The state of step \d was not written .*; the one"):
        heal(tokens=1024)


FUSE: dict[str, Any] = QUICK | {"heal_tokens": 4096, "perplexity_tokens": 256, "calibration": TEXTS}


@pytest.fixture(scope="module")
def whole(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a fusion that heals writes."""
    folder = tmp_path_factory.mktemp("whole") / "whole"
    lf_hf.fuse_checkpoint(base, folder, **FUSE)
    return folder


def test_a_fusion_that_was_healing_goes_on(
    base: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fuses no second time, and ends as one that nothing stopped; also where it was killed as it ended."""
    out, fuse, real = tmp_path / "out", partial(lf_hf.fuse_checkpoint, base, tmp_path / "out"), Path.replace
    with cut_short():
        fuse(**FUSE)
    given = {name: value for name, value in FUSE.items() if name != "calibration"}
    assert (
        "holds a run that was cut short, which goes on"
        in dry_run(base, FusionConfig(**given), calibration=TEXTS, out=out).summary()
    )
    other = partial(lf_hf.heal, whole, out, base=base, text=TEXTS, tokens=4096)
    for something_else in (other, partial(fuse, **FUSE | {"num_fusions": 2})):
        with pytest.raises(ValueError, match=r"cut short, and that makes something else"):
            something_else()

    def die(file: Path, target: Path) -> Path:
        if target == out / "config.json":
            raise Killed
        return real(file, target)

    monkeypatch.setattr("lf_hf.pipeline.run.fuse", None)
    with patch.object(Path, "replace", die), pytest.raises(Killed):
        fuse(**FUSE)
    assert not (out / "config.json").exists()
    monkeypatch.delattr(Base, "load")  # nothing is trained or saved again
    assert fuse(**FUSE) == FusionReport.load(out) and not (out / WORK).exists() and not changed(out, whole)
    assert FusionReport.load(out).settings == FusionReport.load(whole).settings
    saved = files(out)
    with pytest.raises(ValueError, match="holds a result already; give overwrite=True to replace it"):
        fuse(**FUSE | {"seed": 1})
    assert files(out) == saved


def test_a_fusion_that_heals_is_the_fusion_and_then_the_healing(base: str, whole: Path, tmp_path: Path) -> None:
    """Also in memory."""
    lf_hf.fuse_checkpoint(base, tmp_path / "fused", **FUSE | {"heal_tokens": 0})
    lf_hf.heal(tmp_path / "fused", tmp_path / "after", base=base, text=TEXTS, tokens=FUSE["heal_tokens"])
    assert not changed(whole, tmp_path / "after")
    model: Any = lf_hf.from_pretrained_fused(base, **FUSE)
    assert same(model, tensors(whole)) and model.fusion_report.healed is not None


SEQUENCES, TOKENS, HIDDEN, VOCAB = 2, 7, 5, 11
IDS = torch.randint(VOCAB, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(0))
OF_BASE = normal(SEQUENCES, TOKENS, HIDDEN, seed=3), normal(VOCAB, HIDDEN, seed=4)
LOGITS = OF_BASE[0] @ OF_BASE[1].T


def student() -> tuple[torch.Tensor, torch.Tensor]:
    """Last states and the head."""
    states, weight = normal(SEQUENCES, TOKENS, HIDDEN, seed=1), normal(VOCAB, HIDDEN, seed=2)
    return states.requires_grad_(), weight.requires_grad_()


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRAINED_LOGITS", 5 * VOCAB)
    monkeypatch.setattr(module, "FLOAT_LOGITS_ON_CPU", 2 * VOCAB)


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize(("temperature", "share", "softcap"), [(1.0, 0.0, None), (1.0, 0.3, 3.0), (2.5, 0.3, None)])
def test_it_is_divergence_and_the_next_token_s_loss(temperature: float, share: float, softcap: float | None) -> None:
    states, weight = student()
    to_logits: Any = torch.nn.Identity() if softcap is None else lambda logits: softcap * torch.tanh(logits / softcap)
    logits = to_logits(states @ weight.T).flatten(0, 1).double()
    of_base = to_logits(LOGITS).flatten(0, 1).double()
    found_log, wanted_log = ((each / temperature).log_softmax(-1) for each in (logits, of_base))
    divergence = kl_div(found_log, wanted_log, log_target=True, reduction="batchmean") * temperature**2
    following = logits.view(SEQUENCES, TOKENS, VOCAB)[:, :-1].flatten(0, 1)
    wanted = (1 - share) * divergence + share * cross_entropy(following, IDS[:, 1:].flatten())
    expected = torch.autograd.grad(3 * wanted, [states, weight])
    found = distillation_loss(states, weight, IDS, Targets(*OF_BASE, to_logits), Loss(temperature, share))
    torch.testing.assert_close(found, wanted.float())
    torch.testing.assert_close(torch.autograd.grad(3 * found, [states, weight]), expected)


TEXT = "\n\n".join(make_texts(3000, seed=3))
CORPUS = Corpus({"a text": TEXT}, 0.25)
SETTINGS = HealSettings(tokens=4096, length=32, batch_tokens=256)


def write(count: int, length: int, seed: int) -> list[torch.Tensor]:
    return list(torch.randint(300, (count, length), generator=torch.Generator().manual_seed(seed)))


def test_what_is_kept_aside_is_not_trained_on_and_the_base_writes_its_share() -> None:
    kinds = healing_text(make_tokenizer(), CORPUS, SETTINGS, 320, write)
    assert [kind.name for kind in kinds] == ["a text", WRITTEN]
    assert [(len(kind.training), len(kind.held_out)) for kind in kinds] == [(96, HELD_OUT), (32, HELD_OUT)]
    assert all(sequence.shape == (32,) for kind in kinds for sequence in (*kind.training, *kind.held_out))
    # All of it once, from its beginning to its end.
    places = {tuple(part.tolist()): n for n, part in enumerate(pack_tokens(make_tokenizer(), TEXT, 32, 1 << 30))}
    found = sorted(places[tuple(sequence.tolist())] for sequence in (*kinds[0].training, *kinds[0].held_out))
    assert len(set(found)) == 100 and found[0] == 0 and found[-1] > 0.95 * len(places)


@pytest.mark.parametrize(("share", "kept"), [(0.25, {"a text", WRITTEN}), (0.0, {"a text", QUESTIONS})])
def test_questions_are_kept_aside_only_where_there_is_no_other_text(share: float, kept: set[str]) -> None:
    """Each is there in two forms, so the other one would be trained on."""
    corpus = Corpus({name: "\n".join(make_texts(400, seed=len(name))) for name in ("a text", QUESTIONS)}, share)
    kinds = healing_text(make_tokenizer(), corpus, SETTINGS, 320, write)
    assert {kind.name for kind in kinds if kind.held_out} == kept
    assert all(kind.training for kind in kinds)
