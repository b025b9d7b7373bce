"""Nothing is lost: whatever goes wrong while saving, a folder is what it was or what it is to be."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import make_texts, outcome_of
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from lf_hf import FusedLlamaForCausalLM, fuse_checkpoint
from lf_hf.files import saving
from lf_hf.files.saving import replaced_folder


@pytest.fixture(scope="module")
def model(base: str) -> FusedLlamaForCausalLM:
    return FusedLlamaForCausalLM.from_pretrained_fused(base, num_fusions=2, method="truncate", perplexity_tokens=0)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """At 25 random moments of many saves, and before every line of saving.py and locks.py, there also by SIGINT."""
    outcome = outcome_of("saving_faults.py", tmp_path)
    for name, states in outcome["found"].items():
        assert set(states) == {"old", "new"}, name
        assert len(states) >= 25
    assert len(outcome["kept"]) > 75 and all(outcome["kept"])
    # What the very last one left goes with the next save; of all the others there is nothing.
    left = {name for name in outcome["left"] if not name.startswith(".")}
    assert left == {"base", "out", "whole0", "whole1", *outcome["found"]} - {"kill"}
    assert set(outcome["left"]) <= left | {".out.lock", ".out.saving"}


def test_what_else_is_in_the_folder_stays(model: FusedLlamaForCausalLM, base: str, tmp_path: Path) -> None:
    """As with a trainer, which has its checkpoints and logs where it saves the model."""
    out = tmp_path / "out"
    for name in ("checkpoint-1", "runs"):
        (out / name).mkdir(parents=True)
        (out / name / "state.json").write_text("mine")
    model.save_pretrained(out, max_shard_size="5KB")
    for name in ("training_args.bin", "trainer_state.json", ".gitattributes"):
        (out / name).write_text("mine")
    assert len(list(out.glob("model-*.safetensors"))) > 1
    model.save_pretrained(out)
    fuse_checkpoint(base, out, num_fusions=1, method="truncate", perplexity_tokens=0)
    mine = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file() and file.read_bytes() == b"mine"}
    assert mine == {
        "checkpoint-1/state.json",
        "runs/state.json",
        "training_args.bin",
        "trainer_state.json",
        ".gitattributes",
    }
    assert [file.name for file in out.glob("*.safetensors*")] == ["model.safetensors"]


def test_a_folder_that_can_not_be_moved_is_named_and_kept(
    model: FusedLlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where somebody else owns it."""
    out, aside = tmp_path / "out", tmp_path / ".out.saving" / "done" / "runs"
    model.save_pretrained(out)
    (out / "runs").mkdir()
    (out / "runs" / "state.json").write_text("mine")
    (out / "config.json").write_text("{}")
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == "runs":
            raise PermissionError(13, "Permission denied", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match=r"'.*out' was written, but other files.*runs.*move them from '.*out.saving'"):
        model.save_pretrained(out)
    FusedLlamaForCausalLM.from_pretrained(out)
    assert (aside / "state.json").read_text() == "mine"
    with pytest.raises(OSError, match=r"'.*out' was not written.*runs"):
        model.save_pretrained(out)
    assert (aside / "state.json").read_text() == "mine"
    monkeypatch.undo()
    model.save_pretrained(out)
    assert (out / "runs" / "state.json").read_text() == "mine"
    assert not aside.exists()


def test_a_mount_point_is_refused_before_the_work(
    model: FusedLlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == tmp_path)
    with pytest.raises(ValueError, match=f"is a mount point.*such as '{tmp_path}/fused'"):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "fused")


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


@pytest.mark.parametrize("exists", [False, True])
def test_full_disk(model: FusedLlamaForCausalLM, exists: bool, tmp_path: Path) -> None:
    """Whichever file it is that does not fit."""
    model.save_pretrained(tmp_path / "out", max_shard_size="5KB")
    before = files(tmp_path / "out")
    sizes = {name: len(content) for name, content in before.items()}
    target = tmp_path / ("out" if exists else "new")
    for size in sorted({min(sizes.values()) - 1, sizes["tokenizer.json"] - 1, max(sizes.values()) - 1}):
        with file_size_limit(size), pytest.raises(OSError, match=r"was not written \(.*File too large") as error:
            model.save_pretrained(target, max_shard_size="5KB")
        assert str(target) in str(error.value) and "\n" not in str(error.value)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert files(tmp_path / "out") == before


def test_full_disk_while_fusing_from_folder_to_folder(base: str, tmp_path: Path) -> None:
    with file_size_limit(20_000), pytest.raises(OSError, match=r"was not written .*File too large"):
        fuse_checkpoint(base, tmp_path / "out", num_fusions=1, method="mka", calibration=make_texts())
    assert list(tmp_path.iterdir()) == []


def test_full_disk_when_only_the_tokenizer_does_not_fit(model: FusedLlamaForCausalLM, tmp_path: Path) -> None:
    assert model.tokenizer is not None

    def save() -> None:
        with replaced_folder(tmp_path / "out") as folder:
            saving.write_companions(folder, None, model.tokenizer, as_llama=False)

    with file_size_limit(5000), pytest.raises(OSError, match=r"was not written \(tokenizer: File too large"):
        save()
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def no_privileges() -> Iterator[None]:
    """Root may write everywhere, so for a moment it is somebody else."""
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if os.getuid() == 0:
            os.seteuid(0)


def test_read_only_folder(model: FusedLlamaForCausalLM) -> None:
    with tempfile.TemporaryDirectory() as name:
        parent = Path(name)
        model.save_pretrained(parent / "out")
        before = files(parent / "out")
        for path in (parent / "out", parent):
            path.chmod(0o555)
        for target in ("out", "new", "new/deeper"):
            with no_privileges(), pytest.raises(OSError, match=r"was not written .*Permission denied"):
                model.save_pretrained(parent / target)
        parent.chmod(0o755)
        assert [path.name for path in parent.iterdir()] == ["out"] and files(parent / "out") == before


def test_a_folder_that_vanishes(model: FusedLlamaForCausalLM, tmp_path: Path) -> None:

    def save_while_it_vanishes(out: Path, vanishing: Path) -> None:
        with replaced_folder(out) as folder:
            model.write_files(folder)
            shutil.rmtree(vanishing)

    model.save_pretrained(tmp_path / "parent" / "out")
    with pytest.raises(OSError, match=r"was not written .*No such file"):
        save_while_it_vanishes(tmp_path / "parent" / "out", tmp_path / "parent")
    assert list(tmp_path.iterdir()) == []

    model.save_pretrained(tmp_path / "out")
    save_while_it_vanishes(tmp_path / "out", tmp_path / "out")  # what is replaced may go
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_of_two_writers_one_wins_and_the_other_says_so(model: FusedLlamaForCausalLM, base: str, tmp_path: Path) -> None:
    message = f"Another process is saving into '{tmp_path / 'out'}'; wait until it is done, or choose another folder"
    with replaced_folder(tmp_path / "out") as folder:
        model.write_files(folder)
        with pytest.raises(BlockingIOError, match=message):
            model.save_pretrained(tmp_path / "out")
        for low_memory in (True, False):  # before the work, not after it
            with pytest.raises(BlockingIOError, match=message):
                fuse_checkpoint(base, tmp_path / "out", num_fusions=1, method="truncate", low_memory=low_memory)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_many_writers_at_once_leave_one_whole_checkpoint(model: FusedLlamaForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "whole")
    outcomes: list[str] = []

    def save() -> None:
        try:
            for _ in range(3):
                model.save_pretrained(tmp_path / "out")
            outcomes.append("saved")
        except BlockingIOError:
            outcomes.append("told")

    threads = [threading.Thread(target=save) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 4 and "saved" in outcomes
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_model_can_be_saved_where_it_was_loaded_from(model: FusedLlamaForCausalLM, tmp_path: Path) -> None:
    """Its weights may still be mapped from the file that is replaced."""
    model.save_pretrained(tmp_path / "out")
    before = files(tmp_path / "out")
    for _ in range(2):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "out")
    assert files(tmp_path / "out")["model.safetensors"] == before["model.safetensors"]
    assert files(tmp_path / "out").keys() == before.keys()


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_all_files_follow_the_umask(model: FusedLlamaForCausalLM, base: str, mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        model.save_pretrained(tmp_path / "saved")
        fuse_checkpoint(base, tmp_path / "fused", num_fusions=1, method="truncate", perplexity_tokens=0)
    finally:
        os.umask(before)
    for folder in (tmp_path / "saved", tmp_path / "fused"):
        modes = {file.name: file.stat().st_mode & 0o777 for file in folder.iterdir()}
        assert "model.safetensors" in modes and set(modes.values()) == {0o666 & ~mask}
        assert folder.stat().st_mode & 0o777 == 0o777 & ~mask


def test_a_link_keeps_pointing_to_the_checkpoint(model: FusedLlamaForCausalLM, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    for _ in range(2):
        model.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "out" / "config.json").is_file()


def test_whichever_rank_fuses_first_writes_the_weights(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers itself writes them on rank 0 alone; `save_pretrained`, called on all ranks, does so, too."""
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda *_: 1)
    settings: dict[str, Any] = {"num_fusions": 1, "method": "truncate", "perplexity_tokens": 0}
    fused = FusedLlamaForCausalLM.from_pretrained_fused(base, fused_dir=tmp_path / "fused", **settings)
    assert (tmp_path / "fused" / "model.safetensors").is_file()
    fused.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
