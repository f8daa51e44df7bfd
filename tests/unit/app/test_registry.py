"""Who only asks a registry that was never made is told that nothing is in it, whether MLflow is installed or not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from parbake.app.registry import registry_to_ask
from parbake.errors import MissingExtra, ModelNotFound


def test_a_registry_that_was_never_made_has_nothing_and_needs_no_mlflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As where it is not installed.
    monkeypatch.setitem(sys.modules, "mlflow", None)
    url = f"sqlite:///{tmp_path / 'mlflow.db'}"
    registry = registry_to_ask(url)
    assert registry.names() == []
    with pytest.raises(ModelNotFound, match=f"no model 'price' in the registry {tmp_path}"):
        registry.version("price", "9")
    (tmp_path / "mlflow.db").touch()
    with pytest.raises(MissingExtra, match="MLflow is not installed"):
        registry_to_ask(url)
