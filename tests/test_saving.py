"""A folder belongs to its user: nothing in it is lost, whatever goes wrong; and a model that was kept is used again."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import Mock

import filelock
import peft
import pytest
import torch
from conftest import ON_DISK, QUICK, files, make_llama, make_texts, make_tokenizer, pickled, run_program, same, tensors
from peft import LoraConfig, inject_adapter_in_model
from run_faults import Answers
from safetensors.torch import save_file
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from lf_hf import FusedLlamaForCausalLM, FusionReport, fuse_checkpoint, pipeline
from lf_hf.checkpoint.saving import locked_folder, replaced_files
from lf_hf.evaluate.points import RESULTS
from lf_hf.evaluate.sweep import sweep
from lf_hf.report.report import CHANGED_NOTE


@pytest.fixture(scope="module")
def model(base: str) -> FusedLlamaForCausalLM:
    return FusedLlamaForCausalLM.from_pretrained_fused(base, **QUICK | {"num_fusions": 2})


def ways_of_fusing(base: str, out: Path) -> list[Callable[[], Any]]:
    return [
        partial(fuse_checkpoint, base, out, **QUICK),
        partial(fuse_checkpoint, base, out, **QUICK, **ON_DISK),
        partial(FusedLlamaForCausalLM.from_pretrained_fused, base, fused_dir=out, **QUICK),
    ]


def test_only_what_an_earlier_save_wrote_goes(model: FusedLlamaForCausalLM, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with_template = make_tokenizer()
    with_template.chat_template = "{{ messages }}"
    model.save_pretrained(out, tokenizer=with_template, max_shard_size="5KB")
    template, shards = out / "chat_template.jinja", list(out.glob("model-*.safetensors"))
    assert template.is_file() and len(shards) > 1
    template.write_text("the user's now")
    model.save_pretrained(out, tokenizer=make_tokenizer())
    assert template.read_text() == "the user's now"
    assert [file.name for file in out.glob("model*")] == ["model.safetensors"]
    template.unlink()
    for _ in range(2):
        model.save_pretrained(out, tokenizer=with_template)
    model.save_pretrained(out, tokenizer=make_tokenizer())
    assert not template.exists()


def test_a_report_from_a_stranger_removes_nothing(model: FusedLlamaForCausalLM, tmp_path: Path) -> None:
    out = tmp_path / "out"
    model.save_pretrained(out)
    (out / "folder").mkdir()
    for file in (tmp_path / "mine", out / "mine", out / "folder" / "mine", out / "theirs\nmine"):
        file.write_text("mine")
    report = json.loads((out / "fusion_report.json").read_text())
    report["files"]["theirs\nmine"] = hashlib.sha256(b"mine").hexdigest()
    report["files"] |= dict.fromkeys(("../mine", "mine", "folder", "folder/mine", str(tmp_path / "mine"), "..", ""), "")
    (out / "fusion_report.json").write_text(json.dumps(report))
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("mine")
    hidden = out / ".lf_hf-saving"
    (hidden / "new").mkdir(parents=True)
    (hidden / "new" / "additional_chat_templates").symlink_to(tmp_path / "private")
    (hidden / "complete").write_text("\n".join(["../mine", "folder/mine", str(tmp_path / "mine"), "..", "\0"]))
    FusedLlamaForCausalLM.from_pretrained(out)
    assert not hidden.exists() and files(tmp_path / "private") == {"key": b"mine"}
    hidden.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "new").mkdir(parents=True)
    (tmp_path / "elsewhere" / "new" / "config.json").write_text("mine")
    (tmp_path / "elsewhere" / "complete").touch()
    model.save_pretrained(out)
    assert all(file.exists() for file in (tmp_path / "mine", out / "mine", out / "folder" / "mine"))
    assert (tmp_path / "elsewhere" / "new" / "config.json").read_text() == "mine"


def test_a_users_tokenizer_and_card_stay(model: FusedLlamaForCausalLM, base: str, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    extended = AutoTokenizer.from_pretrained(tmp_path)
    extended.add_tokens(["<new>"])
    extended.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("my card")
    kept = {name: content for name, content in files(tmp_path).items() if name.startswith(("tokenizer", "README"))}
    AutoModelForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path)
    fuse_checkpoint(base, tmp_path, **QUICK)
    assert len(kept) == 3 and kept.items() <= files(tmp_path).items()
    model.save_pretrained(tmp_path, tokenizer=make_tokenizer())
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == len(make_tokenizer())
    (tmp_path / "tokenizer_config.json").write_text("{}")
    FusedLlamaForCausalLM(model.config).save_pretrained(tmp_path)  # without a tokenizer
    assert (tmp_path / "tokenizer_config.json").read_text() == "{}" and (tmp_path / "tokenizer.json").is_file()
    assert (tmp_path / "README.md").read_text() == "my card"


@pytest.mark.parametrize("link", [True, False])
def test_a_users_templates_and_words_stay(model: FusedLlamaForCausalLM, base: str, tmp_path: Path, link: bool) -> None:
    folder, templates = tmp_path / "model", tmp_path / "templates"
    place = templates if link else folder / "additional_chat_templates"
    place.mkdir(parents=True)
    folder.mkdir(exist_ok=True)
    if link:
        (folder / "additional_chat_templates").symlink_to(templates)
    users = {place / "rag.jinja": "mine", folder / "chat_template.jinja": "mine", folder / "vocab.json": "{}"}
    users[folder / "tokenizer.json"] = Path(base, "tokenizer.json").read_text()
    for file, content in users.items():
        file.write_text(content)
    ours: Any = copy.deepcopy(model)
    ours.tokenizer.chat_template = "ours"
    ours.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab() and tokenizer.eos_token == make_tokenizer().eos_token
    assert "mine" in (tokenizer.chat_template, tokenizer.get_chat_template("default"))
    assert all(file.read_text() == content for file, content in users.items())
    tokenizer.chat_template = {"default": "base", "rag": "base", "tool": "base"}
    model.save_pretrained(folder, tokenizer=tokenizer)
    assert (place / "rag.jinja").read_text() == "mine"
    assert (place / "tool.jinja").exists() is not link  # nothing is written outside the folder


def test_a_tokenizer_that_cannot_be_read_costs_no_weights(
    model: FusedLlamaForCausalLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model.save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "tokenizer.json").write_text("{")
    AutoModelForCausalLM.from_pretrained(tmp_path / "in").save_pretrained(tmp_path / "out")
    assert "No tokenizer can be read" in caplog.text and "saved without a tokenizer" in caplog.text
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), model)


def test_the_report_is_of_the_weights_that_were_given(model: FusedLlamaForCausalLM, tmp_path: Path) -> None:
    given = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "other", state_dict=given)
    model.save_pretrained(tmp_path / "same", state_dict=model.state_dict())
    assert CHANGED_NOTE in FusionReport.load(tmp_path / "other").notes
    assert CHANGED_NOTE not in FusionReport.load(tmp_path / "same").notes


def test_what_transformers_accepts_is_accepted(
    model: FusedLlamaForCausalLM, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LlamaForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "llama", max_shard_size="40KB")
    model.save_pretrained(tmp_path / "llama")
    assert same(FusedLlamaForCausalLM.from_pretrained(tmp_path / "llama"), model)
    new = FusedLlamaForCausalLM(model.config)
    for size in ("5KB", "1GB", "5KB"):
        new.save_pretrained(tmp_path / "without report", max_shard_size=size)
        assert same(FusedLlamaForCausalLM.from_pretrained(tmp_path / "without report"), new)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    model.save_pretrained(".")
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


def test_variants_and_adapters_lie_beside_a_model(model: FusedLlamaForCausalLM, tmp_path: Path) -> None:
    for variant in (None, "fp16", None):
        model.save_pretrained(tmp_path, variant=variant)
    assert {file.name for file in tmp_path.glob("*.safetensors*")} == {"model.safetensors", "model.fp16.safetensors"}
    for variant in (None, "fp16"):
        assert same(FusedLlamaForCausalLM.from_pretrained(tmp_path, variant=variant), model)
    peft.get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(str(tmp_path))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_a_model_can_be_saved_where_it_was_loaded_from(model: FusedLlamaForCausalLM, tmp_path: Path) -> None:
    """Its weights may still be mapped from the file that is replaced; a link keeps pointing to the checkpoint."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    model.save_pretrained(tmp_path / "link")
    before = files(tmp_path / "disk" / "out")
    for _ in range(2):
        AutoModelForCausalLM.from_pretrained(tmp_path / "link").save_pretrained(tmp_path / "link")
    after = files(tmp_path / "disk" / "out")
    assert after["model.safetensors"] == before["model.safetensors"] and after.keys() == before.keys()
    assert (tmp_path / "link").is_symlink()


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors", "a.gguf"])
def test_fusing_refuses_another_model_before_the_work(name: str, base: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    for way in ways_of_fusing(base, tmp_path):
        with pytest.raises(ValueError, match=f"holds {name}, which lf_hf did not write or which changed since"):
            way()
    assert files(tmp_path) == {name: b"{}"}


@pytest.mark.parametrize("how", ["native", "plain", "a matrix in the file"])
def test_fusing_does_not_replace_what_was_changed(base: str, tmp_path: Path, how: str) -> None:
    model: Any = None
    for way in ways_of_fusing(base, tmp_path):
        model = way()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(2)
    if how in ("native", "plain"):
        model.save_pretrained(tmp_path, plain=how == "plain")
    else:
        edited = tensors(tmp_path)
        edited["model.layers.1.mlp.up_proj.weight"] *= 2
        save_file(edited, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for way in ways_of_fusing(base, tmp_path):
        with pytest.raises(ValueError, match=r"change.* since; choose another folder"):
            way()
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path), model)


@pytest.mark.usefixtures("no_work")
def test_what_cannot_be_saved_is_refused(model: FusedLlamaForCausalLM, base: str, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").unlink()
    (tmp_path / "out" / "tokenizer.json").mkdir()
    before = files(tmp_path / "out")
    with pytest.raises(OSError, match=r"was not written \(tokenizer\.json has the name .* before is unchanged"):
        model.save_pretrained(tmp_path / "out")
    assert files(tmp_path / "out") == before
    adapted = copy.deepcopy(model)
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), adapted)  # as add_adapter does
    with pytest.raises(ValueError, match="A model with an adapter cannot be saved as a plain one"):
        adapted.save_pretrained(tmp_path / "new", plain=True)
    assert not (tmp_path / "new").exists()
    paths: list[Any] = ["", None, 5]
    for path in paths:
        for way in (partial(model.save_pretrained, path), partial(fuse_checkpoint, base, path, **QUICK)):
            with pytest.raises(ValueError, match=r"must be a path, got .*; '\.' is the current folder"):
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


def test_full_disk(model: FusedLlamaForCausalLM, base: str, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "out", max_shard_size="5KB")
    before = files(tmp_path / "out")
    sizes = {name: len(content) for name, content in before.items()}
    for target in (tmp_path / "out", tmp_path / "new"):
        for size in sorted({min(sizes.values()) - 1, sizes["tokenizer.json"] - 1, max(sizes.values()) - 1}):
            with file_size_limit(size), pytest.raises(OSError, match=r"was not written \(.*File too large") as error:
                model.save_pretrained(target, max_shard_size="5KB")
            assert str(target) in str(error.value) and "\n" not in str(error.value)
    with file_size_limit(20_000), pytest.raises(OSError, match=r"was not written .*File too large"):
        fuse_checkpoint(base, tmp_path / "fused", num_fusions=1, method="mka", calibration=make_texts())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert files(tmp_path / "out") == before and not (tmp_path / "out" / ".lf_hf-saving").exists()


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


def test_read_only_folders(model: FusedLlamaForCausalLM, parent: Path) -> None:
    """A folder that can be written may lie in one that cannot, as a mount point does."""
    model.save_pretrained(parent / "out")
    before = files(parent / "out")
    (parent / "writable").mkdir()
    with read_only(parent, parent / "writable"):
        for target in ("out", "new", "new/deeper"):
            with pytest.raises(OSError, match=r"was not written .*Permission denied"):
                model.save_pretrained(parent / target)
        model.save_pretrained(parent / "writable")
    assert {path.name for path in parent.iterdir()} == {"out", "writable"} and files(parent / "out") == before
    assert files(parent / "writable").keys() == before.keys()


def test_of_two_writers_one_wins_and_the_other_says_so(model: FusedLlamaForCausalLM, base: str, tmp_path: Path) -> None:
    message = f"Another process is saving into '{tmp_path / 'out'}'; wait until it is done, or choose another folder"
    with locked_folder(tmp_path / "out"), replaced_files(tmp_path / "out") as folder:
        model.write_files(folder)
        with pytest.raises(BlockingIOError, match=message):
            model.save_pretrained(tmp_path / "out")
        with pytest.raises(BlockingIOError, match=message):  # before the work, not after it
            fuse_checkpoint(base, tmp_path / "out", **QUICK)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_another_process_removes_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does that wrote nothing, between the making and the locking of this one."""
    out = tmp_path / "new" / "out"

    def removed_meanwhile(lock: Any, **_: Any) -> None:
        monkeypatch.undo()
        shutil.rmtree(out.parent)
        raise FileNotFoundError(lock.lock_file)

    monkeypatch.setattr(filelock.FileLock, "acquire", removed_meanwhile)
    with locked_folder(out):
        (out / "file").touch()
    assert (out / "file").exists()


def test_ctrl_c_while_a_folder_is_locked_leaves_nothing(tmp_path: Path) -> None:
    """Whatever line of the lock's own code it meets."""

    def interrupt(frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(place):
            return None
        lines.append(frame.f_lineno)
        if len(lines) == meets:
            raise KeyboardInterrupt
        return interrupt

    place, meets, inside = str(Path(filelock.__file__).parent), 0, False
    while not inside:
        meets, lines = meets + 1, list[int]()
        sys.settrace(interrupt)
        try:
            with locked_folder(tmp_path / "out"):
                sys.settrace(None)
                inside = True
        except KeyboardInterrupt:
            assert not (tmp_path / "out").exists(), f"after line {lines[-1]}"
        finally:
            sys.settrace(None)
    assert meets > 20


def test_all_files_follow_the_umask(model: FusedLlamaForCausalLM, base: str, tmp_path: Path) -> None:
    before = os.umask(mask := 0o027)
    try:
        model.save_pretrained(tmp_path / "saved")
        fuse_checkpoint(base, tmp_path / "fused", **QUICK)
    finally:
        os.umask(before)
    for folder in (tmp_path / "saved", tmp_path / "fused"):
        modes = {file.name: file.stat().st_mode & 0o777 for file in folder.iterdir()}
        assert "model.safetensors" in modes and set(modes.values()) == {0o666 & ~mask}
        assert folder.stat().st_mode & 0o777 == 0o777 & ~mask


def test_what_a_killed_process_leaves_is_whole_and_of_two_that_start_at_once_one_fuses(tmp_path: Path) -> None:
    done = run_program("run_faults.py", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("lf_hf.evaluate.evaluation.Evaluation", Answers)
    (tmp_path / "text.txt").write_text("\n\n".join(make_texts(100)))
    given: dict[str, Any] = {"num_fusions": [1], "methods": ["truncate", "mka"], "tasks": ["task"]}
    return given | {"calibration": tmp_path / "text.txt", "settings": {"perplexity_tokens": 0}}


def test_a_sweep_on_a_full_disk_keeps_what_it_has(base: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    sweep(base, out, **arguments)
    before = files(out)
    with (
        file_size_limit(len(before[RESULTS]) + 50),  # within a point
        pytest.raises(OSError, match=r"results in .*out' cannot be written .*File too .*run the sweep again"),
    ):
        sweep(base, out, **arguments | {"num_fusions": [2]})
    assert files(out) == before
    (out / RESULTS).write_bytes(cut := before[RESULTS][:-50])
    with pytest.raises(ValueError, match=r"Line 3 of .* is no result of a sweep \(.*\); remove it, and its point is"):
        sweep(base, out, **arguments)
    assert (out / RESULTS).read_bytes() == cut


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", ["there", "new/deeper"])
def test_a_sweep_into_a_read_only_folder_does_no_work(
    name: str, base: str, arguments: dict[str, Any], parent: Path
) -> None:
    shutil.copytree(base, parent / "base")
    (parent / "there").mkdir()
    with read_only(parent), pytest.raises(OSError, match=r"cannot be written .*Permission denied"):
        sweep(parent / "base", parent / name, **arguments | {"methods": ["truncate"], "calibration": None})
    assert {path.name for path in parent.iterdir()} == {"base", "there"} and not any((parent / "there").iterdir())


@pytest.mark.parametrize("content", [b"years of work", b'{"accuracy": 1}\n', b"\xff\n"])
def test_other_results_are_left_alone(content: bytes, base: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / RESULTS).write_bytes(content)
    with pytest.raises(ValueError, match=r"Line 1 of .*results\.jsonl' is no result of a sweep \(.*\); choose another"):
        sweep(base, tmp_path, **arguments)
    assert (tmp_path / RESULTS).read_bytes() == content


@pytest.fixture
def fusions(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Counts them."""
    monkeypatch.setattr(pipeline, "fuse", counted := Mock(wraps=pipeline.fuse))
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


@pytest.mark.parametrize("changed", [{"kernel_scale": 4.0}, {"calibration": ["other text"]}, {"calibration": None}])
def test_what_has_no_effect_does_not_fuse_anew(
    changed: dict[str, Any], base: str, tmp_path: Path, fusions: Mock
) -> None:
    settings: dict[str, Any] = {"method": "truncate", "num_fusions": 1}
    models = [load(base, tmp_path / "fused", **settings | more) for more in ({}, changed)]
    assert fusions.call_count == 1 and same(*models)


def test_what_is_judged_otherwise_is_not_fused_anew(
    base: str, tmp_path: Path, fusions: Mock, caplog: pytest.LogCaptureFixture
) -> None:
    """The report keeps the figures that it has, and a line says with which settings they were measured."""
    settings: dict[str, Any] = {"method": "refit", "calibration_tokens": 1024, "calibration_length": 64}
    settings |= {"heal_tokens": 1024, "speed": False}
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


def test_what_differs_is_said_and_fused_again(
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


def test_what_another_run_replaces_while_it_is_read_is_not_used(
    base: str, tmp_path: Path, fusions: Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, from_pretrained = load(base, tmp_path / "fused"), FusedLlamaForCausalLM.from_pretrained

    def after_another_run(*args: Any, **kwargs: Any) -> Any:
        if fusions.call_count == 1:
            load(base, tmp_path / "fused", num_fusions=1)
        return from_pretrained(*args, **kwargs)

    monkeypatch.setattr(FusedLlamaForCausalLM, "from_pretrained", after_another_run)
    assert same(load(base, tmp_path / "fused"), first) and fusions.call_count == 3


def test_what_is_finished_loads_at_once(base: str, fusions: Mock, parent: Path) -> None:
    """While another process holds the folder's lock, and from a disk that cannot be written."""
    copy, fused = shutil.copytree(base, parent / "base"), parent / "fused"
    first = load(copy, fused)
    with locked_folder(fused):
        assert same(first, load(copy, fused))
    with read_only(parent):
        assert same(first, load(copy, fused))
    assert fusions.call_count == 1
