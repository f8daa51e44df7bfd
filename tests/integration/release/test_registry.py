"""What every registry promises: memory, MLflow on SQLite, and an MLflow server that runs for real."""

from __future__ import annotations

from pathlib import Path

import pytest

from parbake.app.registry import open_registry
from parbake.errors import InvalidInput, ModelNotFound, RegistryAway, SettingsError, VersionNotFound
from parbake.release.registry import Registration, Registry
from tests.mlflow_server import MlflowServer

# One after the other, with one server for all of them.
pytestmark = pytest.mark.xdist_group("mlflow")


def wanted(name: str, number: int, **more: str) -> Registration:
    digest = f"sha256:{number:064x}"
    return Registration(name, digest, "counts", "ana", source=f"/store/{number}", by="bob", **more)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A model that no other test knows."""
    return f"m{abs(hash(request.node.nodeid)) % 10**12}"


def test_versions_are_numbered_and_say_what_they_are(registry: Registry, name: str) -> None:
    first = registry.register(wanted(name, 1))
    registry.register(wanted(name, 2, forced="no owner"))
    assert (first.version, first.digest, first.purpose, first.owner, first.by, first.source) == (
        "1", f"sha256:{1:064x}", "counts", "ana", "bob", "/store/1",
    )  # fmt: skip
    there = registry.versions(name)
    assert [version.version for version in there] == ["1", "2"]
    assert [version.forced for version in there] == ["", "no owner"]
    assert all(version.created > 1_700_000_000 for version in there)
    assert registry.version(name, "2").digest == f"sha256:{2:064x}"
    assert name in registry.names()


def test_the_same_bundle_is_the_same_version(registry: Registry, name: str) -> None:
    assert registry.register(wanted(name, 1)).version == "1"
    assert registry.register(wanted(name, 2)).version == "2"
    assert registry.register(wanted(name, 1)).version == "1"
    assert len(registry.versions(name)) == 2


def test_versions_beyond_nine_stand_in_the_order_of_their_numbers(registry: Registry, name: str) -> None:
    for number in range(1, 12):
        registry.register(wanted(name, number))
    assert [version.version for version in registry.versions(name)] == [str(n) for n in range(1, 12)]


def test_an_alias_points_at_one_version_at_a_time(registry: Registry, name: str) -> None:
    registry.register(wanted(name, 1))
    registry.register(wanted(name, 2))
    assert registry.aliases(name) == {}
    registry.alias(name, "champion", "1")
    assert registry.version(name, "champion").version == "1"
    registry.alias(name, "champion", "2")
    registry.alias(name, "challenger", "2")
    assert registry.version(name, "champion").version == "2"
    assert registry.aliases(name) == {"champion": "2", "challenger": "2"}
    assert [version.aliases for version in registry.versions(name)] == [(), ("challenger", "champion")]


def test_what_is_not_there_is_said_by_name(registry: Registry, name: str) -> None:
    with pytest.raises(ModelNotFound, match=f"no model '{name}'"):
        registry.versions(name)
    with pytest.raises(ModelNotFound):
        registry.version(name, "1")
    with pytest.raises(ModelNotFound):
        registry.version(name, "champion")
    registry.register(wanted(name, 1))
    with pytest.raises(VersionNotFound, match=r"has no version '7' .*: there is version 1\n"):
        registry.version(name, "7")
    with pytest.raises(VersionNotFound, match=r"has no alias 'nobody' .*: there is no alias\n"):
        registry.version(name, "nobody")
    with pytest.raises(VersionNotFound):
        registry.alias(name, "champion", "7")
    assert registry.aliases(name) == {}


@pytest.mark.parametrize("alias", ["latest", "3", "v3", "a b", "", "a/b", "../x"])
def test_an_alias_cannot_look_like_a_version_or_a_path(registry: Registry, name: str, alias: str) -> None:
    registry.register(wanted(name, 1))
    with pytest.raises(InvalidInput, match="cannot be an alias"):
        registry.alias(name, alias, "1")


def test_a_name_cannot_break_out_of_a_question(registry: Registry) -> None:
    with pytest.raises((InvalidInput, ModelNotFound)):
        registry.versions("x' OR name LIKE '%")


def test_a_second_opening_sees_what_the_first_has_written(mlflow_file: str, name: str) -> None:
    open_registry(mlflow_file).register(wanted(name, 1))
    assert open_registry(mlflow_file).version(name, "1").owner == "ana"


def test_a_killed_server_is_away_by_name_and_knows_everything_afterwards(
    mlflow_server: MlflowServer, name: str
) -> None:
    registry = open_registry(mlflow_server.url)
    registry.register(wanted(name, 1))
    registry.alias(name, "champion", "1")
    mlflow_server.kill()
    with pytest.raises(RegistryAway, match=r"127\.0\.0\.1.* does not answer"):
        registry.version(name, "champion")
    with pytest.raises(RegistryAway):
        registry.register(wanted(name, 2))
    mlflow_server.start()
    assert registry.version(name, "champion").version == "1"
    assert registry.register(wanted(name, 2)).version == "2"


def test_what_is_no_registry_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="is no registry"):
        open_registry("ftp://somewhere")
    file = tmp_path / "mlflow.db"
    file.write_bytes(b"this is no database" * 100)
    pytest.importorskip("mlflow")
    with pytest.raises(RegistryAway, match=r"mlflow\.db"):
        open_registry(f"sqlite:///{file}").names()


def test_to_look_something_up_makes_no_registry(tmp_path: Path) -> None:
    registry = open_registry(f"sqlite:///{tmp_path / 'none' / 'mlflow.db'}")
    assert list(registry.names()) == []
    for look in (lambda: registry.versions("eta"), lambda: registry.version("eta", "1")):
        with pytest.raises(ModelNotFound):
            look()
    assert not (tmp_path / "none").exists()
