"""The API page is that of the docstrings."""

from __future__ import annotations

import pytest
from conftest import ROOT


def test_the_api_reference_is_that_of_the_docstrings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import api_reference

    page = api_reference.PAGE.read_text(encoding="utf-8")
    assert page == api_reference.reference(), "Run scripts/api_reference.py, and commit docs/api.md."
