"""The README's code runs: on a tiny checkpoint in place of the 8B one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, make_texts

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = ("./scripts/quickstart", "./scripts/test")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def adapted(code: str, base: str) -> str:
    """The same with a tiny base, settings that fit it, and tasks that need no network."""
    code = code.replace("path/to/Meta-Llama-3-8B", base).replace("meta-llama/Meta-Llama-3-8B", base)
    code = code.replace("num_fusions=4", "num_fusions=2").replace(",dtype=bfloat16", ",calibration_tokens=1024")
    return code.replace("mmlu_5shot --batch_size 4", "mmlu_sample_anatomy,mmlu_sample_virology --batch_size 1")


def test_python_blocks_run_one_after_the_other(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(adapted(block, base), names)
    assert "5 -> 3 layers" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"llama3-8b-fused4", "llama3-8b-fused4-plain"}


@pytest.mark.parametrize("block", [block for block in blocks("bash") if block.startswith("lm_eval")])
def test_lm_eval_blocks_run(block: str, base: str, tmp_path: Path) -> None:
    (tmp_path / "my_text.txt").write_text("\n\n".join(make_texts(400)), encoding="utf-8")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", adapted(block, base)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    assert "|anatomy" in done.stdout.replace(" ", "")


def test_every_other_command_is_a_script_of_this_project() -> None:
    for block in blocks("bash"):
        if not block.startswith("lm_eval"):
            for line in block.splitlines():
                command = line.split()[-1]
                assert command in SCRIPTS and os.access(ROOT / command, os.X_OK)


def test_links_lead_somewhere() -> None:
    headings = {re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", README, re.M)}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in headings
        elif not target.startswith("https://"):
            assert (ROOT / target).exists()
