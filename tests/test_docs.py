from __future__ import annotations

from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


def test_the_api_reference_is_that_of_the_docstrings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import api_reference

    page = api_reference.PAGE.read_text(encoding="utf-8")
    assert page == api_reference.reference(), "Run scripts/api_reference.py, and commit docs/api.md."
