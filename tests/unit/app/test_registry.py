"""Asking a registry on this machine: one that was never made, with MLflow or without, and one that cannot be had."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from parbake.app.registry import move_alias, registry_to_ask
from parbake.app.state import open_state
from parbake.errors import MissingExtra, ModelNotFound, RegistryAway, StateAway
from parbake.release.mlflow_sqlite import is_made
from parbake.release.registry import MemoryRegistry, Registration
from parbake.settings import ReleaseSettings, ServerSettings, Settings

NOT_TO_BE_LOOKED_INTO = "x" * 300
"""A folder whose name is too long fails as one that is closed does, for whoever may look into everything too."""


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


def test_a_registry_where_one_may_not_look_is_away_and_not_empty(tmp_path: Path) -> None:
    path = tmp_path / NOT_TO_BE_LOOKED_INTO / "mlflow.db"
    with pytest.raises(
        RegistryAway, match=f"the registry {path} cannot be opened: File name too long"
    ) as away:
        registry_to_ask(f"sqlite:///{path}")
    assert "--registry or --state-dir names another place" in away.value.hint
    assert not is_made(tmp_path / "mlflow.db")
    (tmp_path / "file").touch()
    assert not is_made(tmp_path / "file" / "mlflow.db")


def test_an_alias_that_has_moved_is_told_of_where_the_history_cannot_be_looked_for(tmp_path: Path) -> None:
    registry = MemoryRegistry()
    registry.register(Registration("price", "sha256:41c2", "prices", "ada"))
    settings = Settings(
        server=ServerSettings(state_dir=str(tmp_path / NOT_TO_BE_LOOKED_INTO)),
        release=ReleaseSettings(registry="https://mlflow.example"),
    )
    untold = move_alias(settings, registry, "price", "champion", "1")
    assert untold.startswith("this does not stand in a history")
    assert registry.aliases("price") == {"champion": "1"}


def test_a_store_where_one_may_not_look_is_away_and_not_absent(tmp_path: Path) -> None:
    settings = Settings(server=ServerSettings(state_dir=str(tmp_path / NOT_TO_BE_LOOKED_INTO)))
    with pytest.raises(StateAway, match="cannot be opened: File name too long"):
        open_state(settings, create=False)
