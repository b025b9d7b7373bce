"""Nothing is lost while fusing and sweeping: killed, interrupted, full disks, folders that cannot be written."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from conftest import files, make_texts, run_program
from run_faults import Answers
from test_saving import file_size_limit, no_privileges

from lf_hf.evaluate.points import RESULTS
from lf_hf.evaluate.sweep import sweep


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """What opens is whole; what does not open is whole with the next load."""
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


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", ["there", "new/deeper"])
def test_a_sweep_into_a_folder_that_can_not_be_written_does_no_work(
    name: str, base: str, arguments: dict[str, Any]
) -> None:
    with tempfile.TemporaryDirectory() as made:
        parent = Path(made)
        shutil.copytree(base, parent / "base")
        (parent / "there").mkdir()
        for path in (*parent.rglob("*"), parent):
            path.chmod(0o555 if path.is_dir() else 0o444)
        with no_privileges(), pytest.raises(OSError, match=r"cannot be written .*Permission denied"):
            sweep(parent / "base", parent / name, **arguments | {"methods": ["truncate"], "calibration": None})
        parent.chmod(0o755)
        assert {path.name for path in parent.iterdir()} == {"base", "there"} and not any((parent / "there").iterdir())


@pytest.mark.parametrize("content", [b"years of work", b'{"accuracy": 1}\n', b"\xff\n"])
def test_results_of_something_else_are_left_alone(
    content: bytes, base: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / RESULTS).write_bytes(content)
    with pytest.raises(ValueError, match=r"Line 1 of .*results\.jsonl' is no result of a sweep, so choose another"):
        sweep(base, tmp_path, **arguments)
    assert (tmp_path / RESULTS).read_bytes() == content
