"""The stores that the state is kept in, each for real."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from parbake.release.database import Database, open_database
from tests.postgres import Postgres


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
