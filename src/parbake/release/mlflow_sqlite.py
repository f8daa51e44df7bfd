"""MLflow on SQLite, in this process: the registry of a team on one machine."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parbake.errors import MissingExtra, RegistryAway
from parbake.release.mlflow import Calls, Found, Missing

if TYPE_CHECKING:
    from mlflow import MlflowClient

_ABSENT = ("RESOURCE_DOES_NOT_EXIST",)
_NO_ALIAS = "INVALID_PARAMETER_VALUE"
_THERE = "RESOURCE_ALREADY_EXISTS"


class SqliteCalls(Calls):
    """MLflow's own library on the file ``path``, which the first call that writes makes (that takes seconds).

    Raises `MissingExtra` where MLflow is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        self._path = path.absolute()
        self._lock = self._path.with_suffix(".lock")
        self._new_client = _client_class()
        self._client: MlflowClient | None = None

    def create_model(self, name: str) -> None:
        """As `Calls.create_model`."""
        with self._asked(there_is_well=True) as client:
            client.create_registered_model(name)

    def create_version(self, name: str, source: str, tags: Mapping[str, str]) -> Found:
        """As `Calls.create_version`."""
        with self._asked() as client:
            return _found(client.create_model_version(name, source, tags=dict(tags)))

    def model_names(self) -> Sequence[str]:
        """As `Calls.model_names`."""
        names: list[str] = []
        if not self._is_there:
            return names
        token: str | None = None
        while True:
            with self._asked() as client:
                page = client.search_registered_models(max_results=500, page_token=token)
            names += [model.name for model in page]
            token = page.token
            if not token:
                return names

    def model_aliases(self, name: str) -> dict[str, str]:
        """As `Calls.model_aliases`."""
        self._expect()
        with self._asked() as client:
            return {
                alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()
            }

    def search(self, name: str) -> Sequence[Found]:
        """As `Calls.search`."""
        found: list[Found] = []
        if not self._is_there:
            return found
        token: str | None = None
        while True:
            with self._asked() as client:
                page = client.search_model_versions(f"name='{name}'", max_results=500, page_token=token)
            found += [_found(version) for version in page]
            token = page.token
            if not token:
                return found

    def by_number(self, name: str, version: str) -> Found:
        """As `Calls.by_number`."""
        self._expect()
        with self._asked() as client:
            return _found(client.get_model_version(name, version))

    def by_alias(self, name: str, alias: str) -> Found:
        """As `Calls.by_alias`."""
        self._expect()
        with self._asked(absent=(*_ABSENT, _NO_ALIAS)) as client:
            return _found(client.get_model_version_by_alias(name, alias))

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """As `Calls.set_alias`."""
        with self._asked() as client:
            client.set_registered_model_alias(name, alias, version)

    @property
    def _is_there(self) -> bool:
        return self._client is not None or is_made(self._path)

    def _expect(self) -> None:
        """To look something up makes no registry."""
        if not self._is_there:
            raise Missing(f"there is no registry at {self.where}")

    @contextlib.contextmanager
    def _asked(
        self, *, there_is_well: bool = False, absent: Sequence[str] = _ABSENT
    ) -> Iterator[MlflowClient]:
        """The client, with what its errors mean."""
        from mlflow.exceptions import MlflowException

        with quiet():
            try:
                yield self._client or self._open()
            except MlflowException as error:
                if there_is_well and error.error_code == _THERE:
                    return
                if error.error_code in absent:
                    raise Missing(str(error)) from error
                raise self._away(error) from error
            except Exception as error:
                if isinstance(error, Missing) or not _of_database(error):
                    raise
                raise self._away(error) from error

    def _open(self) -> MlflowClient:
        """The client. While the file is made, others wait: two would migrate it at once."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._lock, os.O_CREAT | os.O_RDWR, 0o600)
            os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))
        except OSError as error:
            raise _closed(self.where, error) from error
        uri = f"sqlite:///{self._path}"
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            client: MlflowClient = self._new_client(tracking_uri=uri, registry_uri=uri)
            # With the first question the tables are made.
            client.search_registered_models(max_results=1)
            self._client = client
            return client
        finally:
            os.close(descriptor)

    def _away(self, error: Exception) -> RegistryAway:
        words = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return RegistryAway(
            f"the registry {self.where} does not answer: {words[:300]}",
            hint="is its file damaged or locked, or the disk full? what serves goes on serving",
        )


def is_made(path: Path) -> bool:
    """Whether a registry is there. Raises `RegistryAway` where one may not look."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise _closed(str(path), error) from error
    return True


def _closed(where: str, error: OSError) -> RegistryAway:
    return RegistryAway(
        f"the registry {where} cannot be opened: {error.strerror}",
        hint="who runs parbake needs to read and write there; --registry or --state-dir names another place",
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """MLflow and what is under it keep their words and warnings to themselves."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def _client_class() -> type[MlflowClient]:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    try:
        with quiet():
            from mlflow import MlflowClient
    except ImportError as error:
        raise MissingExtra("MLflow", "mlflow") from error
    found: type[MlflowClient] = MlflowClient
    return found


def _found(version: Any) -> Found:
    return Found(
        version.name,
        str(version.version),
        version.source or "",
        int(version.creation_timestamp or 0),
        dict(version.tags or {}),
    )


def _of_database(error: Exception) -> bool:
    import sqlite3

    from sqlalchemy.exc import SQLAlchemyError

    return isinstance(error, SQLAlchemyError | sqlite3.Error)
