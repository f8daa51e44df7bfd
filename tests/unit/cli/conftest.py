"""The terminal of these tests is 110 columns wide, wherever they run."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pin what would come from the terminal, or from pytest-xdist."""
    monkeypatch.setenv("COLUMNS", "110")
