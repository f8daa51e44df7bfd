"""`parbake serve` builds its settings: flags over environment over file, and each table to its bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from parbake.cli.serve import build
from parbake.contract.bundle import StoredBundle
from parbake.errors import NotFound, SettingsError


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A parbake.toml with two deployments."""
    file = tmp_path / "parbake.toml"
    file.write_text(
        """
        [server]
        port = 9000
        workers = 3

        [[deployments]]
        bundle = "a.bundle"
        name = "a"
        deadline_ms = 50.0

        [[deployments]]
        bundle = "b.bundle"
        name = "b"
        """
    )
    return file


def test_a_flag_changes_the_file_for_all_deployments(config: Path) -> None:
    settings = build([], config, {"port": 0, "deadline_ms": 9.0})
    assert (settings.server.port, settings.server.workers) == (0, 3)
    assert [deployment.deadline_ms for deployment in settings.deployments] == [9.0, 9.0]


def test_without_flags_the_file_is_taken_as_it_is(config: Path) -> None:
    settings = build([], config, {"port": None, "deadline_ms": None})
    assert settings.server.port == 9000
    assert [deployment.deadline_ms for deployment in settings.deployments] == [50.0, None]


def test_bundles_named_replace_those_of_the_file(config: Path) -> None:
    settings = build([Path("c.bundle")], config, {})
    assert settings.server.port == 9000
    assert [deployment.bundle for deployment in settings.deployments] == ["c.bundle"]


def test_a_file_in_the_folder_is_taken_only_if_no_bundle_is_named(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(config.parent)
    assert build([], None, {}).server.port == 9000
    assert build([Path("c.bundle")], None, {}).server.port == 8000


def test_nothing_to_serve_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match="nothing to serve") as caught:
        build([], None, {})
    assert "parbake serve BUNDLE" in caught.value.hint


def test_a_file_that_is_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no settings file at"):
        build([], tmp_path / "other.toml", {})


def test_the_only_table_goes_to_the_only_bundle() -> None:
    (deployment,) = build([Path("a.bundle")], None, {"table": ("a.table",)}).deployments
    assert deployment.table == "a.table"


def test_a_table_goes_to_the_bundle_it_is_named_for(config: Path, doubler_bundle: StoredBundle) -> None:
    values: dict[str, Any] = {"table": ("doubler=d.table",)}
    (deployment,) = build([doubler_bundle.path], None, values).deployments
    assert deployment.table == "d.table"


def test_a_table_for_an_unknown_name_is_refused(doubler_bundle: StoredBundle) -> None:
    with pytest.raises(SettingsError, match="no bundle is named 'halver'") as caught:
        build([doubler_bundle.path], None, {"table": ("halver=d.table",)})
    assert caught.value.hint == "named are: doubler"


def test_two_tables_for_one_bundle_are_refused(doubler_bundle: StoredBundle) -> None:
    with pytest.raises(SettingsError, match=r"one\.table and two\.table are both for 'doubler'"):
        build([doubler_bundle.path], None, {"table": ("doubler=one.table", "doubler=two.table")})


def test_a_directory_with_an_equals_sign_in_its_name_is_a_directory(tmp_path: Path) -> None:
    table = tmp_path / "day=2026-11-20"
    table.mkdir()
    (deployment,) = build([Path("a.bundle")], None, {"table": (str(table),)}).deployments
    assert deployment.table == str(table)
