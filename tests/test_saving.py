"""A result's folder is made whole, and nothing else that is there is lost; a model that was kept is used again."""

import contextlib
import copy
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import peft
import pytest
import torch
from conftest import (
    ON_DISK,
    QUICK,
    dry_run,
    files,
    make_llama,
    make_texts,
    make_tokenizer,
    pickled,
    run_program,
    same,
    tensors,
)
from peft import LoraConfig, inject_adapter_in_model
from run_faults import Answers
from safetensors.torch import save_file
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

import lf_hf
from lf_hf import FusedLlamaForCausalLM, FusionConfig, FusionReport, fuse_checkpoint
from lf_hf.checkpoint.saving import WORK, locked_folder
from lf_hf.evaluate.sweep import sweep
from lf_hf.evaluate.tables import RESULTS
from lf_hf.pipeline.run import fuse


@pytest.fixture(scope="module")
def model(base: str) -> FusedLlamaForCausalLM:
    return FusedLlamaForCausalLM.from_pretrained_fused(base, **QUICK | {"num_fusions": 2})


def ways_of_fusing(base: str, out: Path) -> list[Callable[[], Any]]:
    return [
        partial(fuse_checkpoint, base, out, overwrite=True, **QUICK),
        partial(fuse_checkpoint, base, out, overwrite=True, **QUICK, **ON_DISK),
        partial(FusedLlamaForCausalLM.from_pretrained_fused, base, fused_dir=out, **QUICK),
        partial(dry_run, base, FusionConfig(**QUICK), out=out, overwrite=True),
    ]


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", ["config.json", "notes.txt", "runs", "fusion_report.json"])
def test_a_folder_with_anything_else_is_refused_before_the_work(name: str, base: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    for way in ways_of_fusing(base, tmp_path):
        with pytest.raises(ValueError, match=f"holds {name}, which is not as lf_hf wrote it; choose another folder"):
            way()
    assert files(tmp_path) == {name: b"{}"} and not (tmp_path / WORK).exists()


def test_a_result_is_replaced_only_as_it_was_written_and_only_if_it_may_go(base: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fuse_checkpoint(base, out, **QUICK)
    for again in (partial(fuse_checkpoint, base, out, **QUICK), partial(dry_run, base, FusionConfig(**QUICK), out=out)):
        with pytest.raises(ValueError, match="holds a result already; give overwrite=True to replace it"):
            again()
    (out / "fusion_report.html").write_text("a page about it")
    assert (
        "holds a result, which would be replaced"
        in dry_run(base, FusionConfig(**QUICK), out=out, overwrite=True).summary()
    )
    fuse_checkpoint(base, out, overwrite=True, **QUICK | {"num_fusions": 2})
    assert FusionReport.load(out).layers_after == 3 and not (out / "fusion_report.html").exists()
    kept = AutoModelForCausalLM.from_pretrained(out)
    edited = tensors(out)
    edited["model.layers.1.mlp.up_proj.weight"] *= 2
    changes: dict[str, Callable[[], Any]] = {
        "notes.txt": lambda: (out / "notes.txt").write_text("mine"),
        "model.safetensors": lambda: save_file(edited, out / "model.safetensors", metadata={"format": "pt"}),
        "tokenizer.json": lambda: (out / "tokenizer.json").unlink(),
        "README.md": lambda: kept.save_pretrained(out),
    }
    for name, change in changes.items():
        whole = shutil.copytree(out, tmp_path / f"before {name}")
        change()
        before = files(out)
        for way in ways_of_fusing(base, out):
            with pytest.raises(ValueError, match=rf"holds .*\b{name}, which is not as|holds .*which is not as"):
                way()
        assert files(out) == before
        shutil.rmtree(out)
        whole.rename(out)


@pytest.mark.usefixtures("no_work")
def test_what_a_run_reads_is_not_where_it_writes(base: str, fused: Path, tmp_path: Path) -> None:
    out, healed = (Path(shutil.copytree(source, tmp_path / "models" / Path(source).name)) for source in (base, fused))
    ways: list[Callable[[], Any]] = [*ways_of_fusing(str(out), out)]
    ways += [partial(lf_hf.heal, healed, healed, base=base, overwrite=True)]
    ways.append(partial(fuse_checkpoint, out.parent, out, subfolder=out.name, overwrite=True, **QUICK))
    for way in ways:
        with pytest.raises(ValueError, match="is what the run reads; choose another folder for its result"):
            way()
    assert files(out) == files(Path(base)) and files(healed) == files(fused)


def test_a_broken_tokenizer_costs_no_weights(
    model: FusedLlamaForCausalLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model.save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "tokenizer.json").write_text("{")
    AutoModelForCausalLM.from_pretrained(tmp_path / "in").save_pretrained(tmp_path / "out")
    assert "No tokenizer can be read" in caplog.text and "saved without a tokenizer" in caplog.text
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), model)


def test_a_model_is_saved_as_any_transformers_model_is(
    model: FusedLlamaForCausalLM, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into a folder with other files, in other shards, as a variant, beside adapters and where it was loaded from."""
    out = tmp_path / "llama"
    LlamaForCausalLM.from_pretrained(base).save_pretrained(out, max_shard_size="40KB")
    (out / "notes.txt").write_text("mine")
    for variant in (None, "fp16"):
        model.save_pretrained(out, variant=variant)
        assert same(FusedLlamaForCausalLM.from_pretrained(out, variant=variant), model)
    peft.get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(str(out))
    model.save_pretrained(out)
    assert (out / "adapter_model.safetensors").is_file() and (out / "notes.txt").read_text() == "mine"
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    (tmp_path / "disk").mkdir()
    model.save_pretrained(tmp_path / "link")
    for _ in range(2):
        AutoModelForCausalLM.from_pretrained(tmp_path / "link").save_pretrained(tmp_path / "link")
    assert same(tensors(tmp_path / "disk"), model) and (tmp_path / "link").is_symlink()
    new = FusedLlamaForCausalLM(model.config)
    new.save_pretrained(tmp_path / "without report")
    assert same(FusedLlamaForCausalLM.from_pretrained(tmp_path / "without report"), new)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    fuse_checkpoint(base, ".", **QUICK)
    assert os.path.samefile(os.getcwd(), tmp_path / "here")
    assert FusedLlamaForCausalLM.from_pretrained(".").config.num_hidden_layers == 4


def test_a_trainer_saves_into_its_folder_and_checkpoints(model: FusedLlamaForCausalLM, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = TrainingArguments(
        str(out), max_steps=2, save_steps=1, per_device_train_batch_size=1, report_to=[], use_cpu=True
    )
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 2
    student: Any = copy.deepcopy(model)
    trainer = Trainer(student, arguments, train_dataset=rows, processing_class=model.tokenizer)
    trainer.save_metrics("train", trainer.train().metrics)
    for _ in range(2):
        trainer.save_model()
    assert {"train_results.json", "training_args.bin", "checkpoint-1", "checkpoint-2"} <= {*os.listdir(out)}
    for folder in (out, out / "checkpoint-2"):
        assert same(FusedLlamaForCausalLM.from_pretrained(folder), student)


@pytest.mark.usefixtures("no_work")
def test_what_cannot_be_saved_is_refused(model: FusedLlamaForCausalLM, base: str, tmp_path: Path) -> None:
    adapted = copy.deepcopy(model)
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), adapted)  # as add_adapter does
    with pytest.raises(ValueError, match="A model with an adapter cannot be saved as a plain one"):
        adapted.save_pretrained(tmp_path / "new", plain=True)
    assert not (tmp_path / "new").exists()
    (tmp_path / "one").symlink_to(tmp_path / "other")
    (tmp_path / "other").symlink_to(tmp_path / "one")
    paths: list[Any] = ["", None, 5, tmp_path / "one"]
    for path in paths:
        for way in (partial(model.save_pretrained, path), partial(fuse_checkpoint, base, path, **QUICK)):
            with pytest.raises(
                ValueError, match=r"must be a path, got .*; '\.' is the current folder|cannot be written"
            ):
                way()


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes, as on a full disk. Without bars, as pytest has them in a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    disable_progress_bar()
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        enable_progress_bar()


def test_full_disk(base: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fuse_checkpoint(base, out, **QUICK)
    before = files(out)
    sizes = {name: len(content) for name, content in before.items()}
    for target in (out, tmp_path / "new"):
        for size in (sizes["tokenizer.json"] - 1, max(sizes.values()) - 1):
            with file_size_limit(size), pytest.raises(OSError, match=r"was not written \(.*File too large") as error:
                fuse_checkpoint(base, target, overwrite=True, **QUICK)
            assert str(target) in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert files(out) == before and not (out / WORK).exists()


@pytest.fixture
def parent() -> Iterator[Path]:
    """A folder that other users can come to."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@contextlib.contextmanager
def read_only(parent: Path, *writable: Path) -> Iterator[None]:
    """Nothing below a folder can be written. Root may write everywhere, so for a moment it is somebody else."""
    paths = (*parent.rglob("*"), parent)
    for path in paths:
        path.chmod(0o777 if path in writable else 0o555 if path.is_dir() else 0o444)
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        for path in paths:
            path.chmod(0o755)


def test_read_only_folders(base: str, parent: Path) -> None:
    """A folder that can be written may lie in one that cannot, as a mount point does."""
    copied = shutil.copytree(base, parent / "base")
    fuse_checkpoint(copied, parent / "out", **QUICK)
    before = files(parent / "out")
    (parent / "writable").mkdir()
    with read_only(parent, parent / "writable"):
        for target in ("out", "new", "new/deeper"):
            with pytest.raises(OSError, match=r"was not written .*Permission denied"):
                fuse_checkpoint(copied, parent / target, overwrite=True, **QUICK)
        fuse_checkpoint(copied, parent / "writable", **QUICK)
    assert {path.name for path in parent.iterdir()} == {"base", "out", "writable"} and files(parent / "out") == before
    assert files(parent / "writable").keys() == before.keys()


def test_of_two_runs_in_one_folder_one_says_so(base: str, tmp_path: Path) -> None:
    message = f"Another process is at work in '{tmp_path / 'out'}'; wait until it is done, or choose another folder"
    with (
        locked_folder(tmp_path / "out"),
        pytest.raises(BlockingIOError, match=message),
    ):  # before the work, not after it
        fuse_checkpoint(base, tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()


def test_what_a_killed_process_leaves_is_whole_and_of_two_that_start_at_once_one_fuses(tmp_path: Path) -> None:
    done = run_program("run_faults.py", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("lf_hf.evaluate.evaluation.Evaluation", Answers)
    given: dict[str, Any] = {"num_fusions": [1, 2], "methods": ["truncate"], "tasks": ["task"]}
    return given | {"settings": {"perplexity_tokens": 0}}


def test_a_sweep_on_a_full_disk_keeps_what_it_has(base: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    sweep(base, out, **arguments)
    before = files(out)
    with (
        file_size_limit(len(before[RESULTS]) + 50),  # within a point
        pytest.raises(OSError, match=r"out' was not written .*File too .*run the sweep again"),
    ):
        sweep(base, out, **arguments | {"num_fusions": [3]})
    assert files(out) == before
    (out / RESULTS).write_bytes(cut := before[RESULTS][:-50])
    with pytest.raises(ValueError, match=r"Line 3 of .* is no result of a sweep \(.*\); remove it, and its point is"):
        sweep(base, out, **arguments)
    assert (out / RESULTS).read_bytes() == cut


@pytest.mark.parametrize("content", [b"years of work", b'{"accuracy": 1}\n', b"\xff\n"])
def test_other_results_are_left_alone(content: bytes, base: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / RESULTS).write_bytes(content)
    with pytest.raises(ValueError, match=r"Line 1 of .*results\.jsonl' is no result of a sweep \(.*\); choose another"):
        sweep(base, tmp_path, **arguments)
    assert (tmp_path / RESULTS).read_bytes() == content


@pytest.fixture
def fusions(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Counts them."""
    monkeypatch.setattr("lf_hf.pipeline.run.fuse", counted := Mock(wraps=fuse))
    return counted


def load(base: str | Path, fused_dir: Path, **kwargs: Any) -> Any:
    arguments: dict[str, Any] = {"num_fusions": 2, "perplexity_tokens": 0, "calibration": make_texts(), **kwargs}
    return FusedLlamaForCausalLM.from_pretrained_fused(base, fused_dir=fused_dir, **arguments)


PLACED = {"device_map": "auto", "max_memory": "cpu=2GiB"}
LOADED = [PLACED, {"variant": "fp16", "output_loading_info": True}, {"use_safetensors": False}]


@pytest.mark.parametrize("arguments", LOADED)
def test_what_was_fused_is_loaded(
    arguments: dict[str, Any], make_base: Callable[..., str], tmp_path: Path, fusions: Mock
) -> None:
    """A base is known by its content, and what is true of it alone does not matter for the result."""
    base, fused = Path(make_base()), tmp_path / "fused"
    if variant := arguments.get("variant"):
        (base / "model.safetensors").rename(base / f"model.{variant}.safetensors")
    if "use_safetensors" in arguments:
        pickled(base)
    first = load(base, fused, **arguments)
    (base / "consolidated.safetensors").write_bytes(b"in a format of its publisher's, which nothing here reads")
    for name in ("training_config.json", "token_counts.json"):
        (base / name).write_text("{}")  # which transformers does not read
    second = load(base.rename(tmp_path / "of another name"), fused, **arguments)
    assert fusions.call_count == 1 and same(first, second) and not second.training
    assert first.fusion_report == second.fusion_report and second.tokenizer is not None
    assert first.name_or_path == second.name_or_path == str(fused)  # which adapters name as their base
    assert first.config.to_diff_dict() == second.config.to_diff_dict()
    assert same(first, FusedLlamaForCausalLM.from_pretrained(fused))


def test_judging_fuses_nothing_anew(base: str, tmp_path: Path, fusions: Mock, caplog: pytest.LogCaptureFixture) -> None:
    """The report keeps the figures that it has, and a line says with which settings they were measured."""
    settings: dict[str, Any] = {"method": "refit", "calibration_tokens": 1024, "calibration_length": 64}
    settings |= {"speed": False}
    first = load(base, tmp_path / "fused", perplexity_tokens=200, **settings)
    caplog.clear()
    second = load(base, tmp_path / "fused", perplexity_tokens=400, **settings | {"speed": True})
    assert fusions.call_count == 1 and same(first, second) and second.fusion_report == first.fusion_report
    [line] = caplog.messages
    assert line.endswith("was judged with perplexity_tokens=200 and speed=False; its report keeps those figures.")
    other = load(base, tmp_path / "other", perplexity_tokens=400, **settings)
    assert same(first, other)


def with_other_weights(base: Path) -> None:
    model = make_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] += 1e-3
    model.save_pretrained(base)


def tokenizer_with(normalizer: Any = None, template: str | None = None) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizer
    tokenizer.chat_template = template
    return tokenizer


CHANGES: dict[str, tuple[Callable[[Path], Any] | None, dict[str, Any], str]] = {
    "settings": (None, {"num_fusions": 1, "seed": 3}, "num_fusions=2 instead of 1 and seed=0 instead of 3"),
    "weights": (with_other_weights, {}, "another base"),
    "arguments": (None, {"rms_norm_eps": 0.5}, "another base"),
    "calibration": (None, {"calibration": make_texts(seed=5)}, "other calibration text"),
    "dtype": (None, {"dtype": "bfloat16"}, "another dtype"),
    "tokenizer": (None, {"tokenizer": tokenizer_with(normalizer=normalizers.Replace("layer", "laier"))}, "tokenizer"),
    "chat template": (None, {"tokenizer": tokenizer_with(template="{{ messages[0].content }}")}, "tokenizer"),
}


def test_what_differs_is_fused_again(
    base: str, tmp_path: Path, fusions: Mock, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(base, tmp_path / "base")
    load(str(tmp_path / "base"), tmp_path / "fused")
    assert caplog.messages == []
    for number, (edit, arguments, message) in enumerate(CHANGES.values(), 2):
        caplog.clear()
        if edit:
            edit(tmp_path / "base")
        again = load(str(tmp_path / "base"), tmp_path / "fused", **arguments)
        assert fusions.call_count == number
        assert [text for text in caplog.messages if message in text and text.endswith("Fusing, to replace it.")]
    assert same(again, load(str(tmp_path / "base"), tmp_path / "fused", **arguments)) and fusions.call_count == number


def test_what_is_finished_loads_at_once(base: str, fusions: Mock, parent: Path) -> None:
    """While another process holds the folder's lock, and from a disk that cannot be written."""
    copied, fused = shutil.copytree(base, parent / "base"), parent / "fused"
    first = load(copied, fused)
    with locked_folder(fused):
        assert same(first, load(copied, fused))
    with read_only(parent):
        assert same(first, load(copied, fused))
    assert fusions.call_count == 1
