"""MLflow as the registry: its versions and aliases, with what a bundle promises in the tags of a version.

`Calls` are the few questions that are put to MLflow: over HTTP to a tracking server (`parbake.release.mlflow_rest`,
which needs no MLflow here), or to MLflow on SQLite in this process (`parbake.release.mlflow_sqlite`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from parbake.errors import VersionNotFound
from parbake.release.bundles import folder_name
from parbake.release.registry import (
    Registration,
    Version,
    check_alias,
    check_name,
    is_number,
    no_model,
    no_version,
)

TAG: Final = "parbake."
_MAX_TAG: Final = 4000


@dataclass(frozen=True, slots=True)
class Found:
    """A model version as MLflow has it."""

    name: str
    version: str
    source: str
    created_ms: int
    tags: Mapping[str, str] = field(default_factory=dict)


class Missing(Exception):
    """MLflow does not have what was asked for. Never leaves this plane."""


class Calls(Protocol):
    """What is asked of MLflow. All raise `RegistryAway` where it does not answer, `NotAllowed` where it refuses."""

    where: str

    def create_model(self, name: str) -> None:
        """Make a registered model, unless it is there."""

    def create_version(self, name: str, source: str, tags: Mapping[str, str]) -> Found:
        """Add a version."""

    def model_names(self) -> Sequence[str]:
        """The names of all registered models."""

    def model_aliases(self, name: str) -> dict[str, str]:
        """Version by alias. Raises `Missing` where there is no such model."""

    def search(self, name: str) -> Sequence[Found]:
        """All versions of a model."""

    def by_number(self, name: str, version: str) -> Found:
        """One version. Raises `Missing`."""

    def by_alias(self, name: str, alias: str) -> Found:
        """What an alias points at. Raises `Missing`."""

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Let an alias point at a version. Raises `Missing`."""


class MlflowRegistry:
    """A `Registry` in MLflow."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self.where = calls.where

    def register(self, wanted: Registration) -> Version:
        """As `Registry.register`."""
        check_name(wanted.name)
        self._calls.create_model(wanted.name)
        for found in self._sorted(wanted.name):
            if found.tags.get(f"{TAG}digest") == wanted.digest:
                return self._version(found, self._calls.model_aliases(wanted.name))
        tags = {
            f"{TAG}{key}": value[:_MAX_TAG]
            for key in ("digest", "purpose", "owner", "source", "by", "forced")
            if (value := getattr(wanted, key))
        }
        # A file's path would be refused by a server, and so would a URL whose path is not absolute.
        made = self._calls.create_version(
            wanted.name, f"parbake-bundle:///{folder_name(wanted.digest)}", tags
        )
        return self._version(made, {})

    def names(self) -> Sequence[str]:
        """As `Registry.names`."""
        return sorted(self._calls.model_names())

    def versions(self, name: str) -> Sequence[Version]:
        """As `Registry.versions`."""
        aliases = self.aliases(name)
        return [self._version(found, aliases) for found in self._sorted(name)]

    def version(self, name: str, which: str) -> Version:
        """As `Registry.version`."""
        check_name(name)
        ask = self._calls.by_number if is_number(which) else self._calls.by_alias
        try:
            found = ask(name, which)
        except Missing:
            there = sorted(self.aliases(name))
            if is_number(which):
                there = [version.version for version in self._sorted(name)]
            raise no_version(name, which, self.where, there) from None
        return self._version(found, {} if is_number(which) else {which: found.version})

    def alias(self, name: str, alias: str, version: str) -> None:
        """As `Registry.alias`."""
        check_alias(alias)
        if not is_number(version):
            raise VersionNotFound(f"{version[:80]!r} is no version's number")
        # Some servers let an alias point at nothing.
        self.version(name, version)
        try:
            self._calls.set_alias(name, alias, version)
        except Missing:
            there = [one.version for one in self._sorted(name)]
            raise no_version(name, version, self.where, there) from None

    def aliases(self, name: str) -> dict[str, str]:
        """As `Registry.aliases`."""
        check_name(name)
        try:
            return self._calls.model_aliases(name)
        except Missing:
            raise no_model(name, self.where) from None

    def _sorted(self, name: str) -> list[Found]:
        return sorted(self._calls.search(name), key=lambda found: int(found.version))

    def _version(self, found: Found, aliases: Mapping[str, str]) -> Version:
        tags = found.tags
        return Version(
            found.name,
            found.version,
            tags.get(f"{TAG}digest", ""),
            tags.get(f"{TAG}source") or found.source,
            tags.get(f"{TAG}purpose", ""),
            tags.get(f"{TAG}owner", ""),
            tags.get(f"{TAG}by", ""),
            tags.get(f"{TAG}forced", ""),
            found.created_ms / 1000,
            tuple(sorted(alias for alias, version in aliases.items() if version == found.version)),
        )
