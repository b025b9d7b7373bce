from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_api_reference_is_that_of_the_docstrings() -> None:
    code = "import api_reference as a, sys; sys.exit(a.PAGE.read_text(encoding='utf-8') != a.reference())"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "scripts", capture_output=True, text=True)
    assert run.returncode == 0, run.stderr or "Run scripts/api_reference.py, and commit docs/api.md."
