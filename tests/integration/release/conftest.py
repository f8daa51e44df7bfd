"""The stores that the state is kept in, each for real."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from parbake.app.registry import open_bundles, open_registry
from parbake.release.bundles import BundleStore
from parbake.release.database import Database, open_database
from parbake.release.registry import MemoryRegistry, Registry
from tests.mlflow_server import MlflowServer
from tests.postgres import Postgres
from tests.s3 import BUCKET, Moto


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server for all tests that do not break it."""
    server = Postgres(synced=False)
    yield server
    server.close()


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store that nobody has used, in each of the databases."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'state.db'}"
    server: Postgres = request.getfixturevalue("postgres")
    return server.database()


@pytest.fixture
def state(url: str) -> Iterator[Database]:
    """That store, opened."""
    database = open_database(url)
    yield database
    database.close()


@pytest.fixture(params=["memory", "sqlite", "server"])
def registry(request: pytest.FixtureRequest) -> Registry:
    """Each kind of registry. Names are the test's own: two of them outlive it."""
    if request.param == "memory":
        return MemoryRegistry()
    if request.param == "sqlite":
        return open_registry(request.getfixturevalue("mlflow_file"))
    server: MlflowServer = request.getfixturevalue("mlflow_server")
    return open_registry(server.url)


@pytest.fixture(scope="session")
def shared_moto() -> Iterator[Moto]:
    """An S3-compatible server for all tests that do not break it."""
    server = Moto()
    yield server
    server.kill()


@pytest.fixture
def moto(shared_moto: Moto, monkeypatch: pytest.MonkeyPatch) -> Moto:
    """That server, which this process finds by its environment."""
    shared_moto.tell(monkeypatch)
    return shared_moto


@pytest.fixture
def own_moto(monkeypatch: pytest.MonkeyPatch) -> Iterator[Moto]:
    """A server to break."""
    server = Moto()
    server.tell(monkeypatch)
    yield server
    server.kill()


@pytest.fixture(params=["directory", "s3"])
def store_place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty bundle store of each kind, by its place."""
    if request.param == "directory":
        return str(tmp_path / "store")
    request.getfixturevalue("moto")
    return f"s3://{BUCKET}/{uuid.uuid4().hex}/prefix"


@pytest.fixture
def store(store_place: str) -> BundleStore:
    """That store, opened."""
    return open_bundles(store_place)
