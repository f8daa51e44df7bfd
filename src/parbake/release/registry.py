"""What a registry of models is to those who release: numbered versions, and aliases that point at them.

A version never changes once it is registered; an alias does. No verb is for the request path: each may take seconds.
All verbs raise `RegistryAway` where the registry does not answer; what was asked for may then have happened or not,
and asked again `Registry.register` finds the version that is there.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from msgspec import Struct
from msgspec.structs import replace

from parbake.errors import InvalidInput, ModelNotFound, VersionNotFound
from parbake.names import NAME_PATTERN
from parbake.settings import REGISTERED

SCHEME: Final = REGISTERED
_NUMBER: Final = re.compile(r"[1-9][0-9]{0,9}\Z")
_LISTED: Final = 8
_RESERVED: Final = re.compile(r"(latest|v?[0-9]+)\Z", re.IGNORECASE)


class Version(Struct, frozen=True):
    """One registered bundle."""

    name: str
    version: str
    """A number, as text."""
    digest: str
    """Of the bundle; "" for a model that another tool has registered, which is no bundle yet."""
    source: str = ""
    """Where the registry says that it is."""
    purpose: str = ""
    owner: str = ""
    by: str = ""
    """Who registered it."""
    forced: str = ""
    """What it lacked when it was registered all the same."""
    created: float = 0.0
    """Unix time."""
    aliases: tuple[str, ...] = ()


class Registration(Struct, frozen=True):
    """What is to be registered."""

    name: str
    digest: str
    purpose: str
    owner: str
    source: str = ""
    by: str = ""
    forced: str = ""


class Registry(Protocol):
    """Versions by name and number. Safe to use from several threads and processes at once."""

    where: str
    """What people know it by."""

    def register(self, wanted: Registration) -> Version:
        """The version of this bundle under this name: a new one, or the one that is there. Raises `RegistryAway`."""

    def names(self) -> Sequence[str]:
        """Every name that has versions, in order."""

    def versions(self, name: str) -> Sequence[Version]:
        """All versions of a name, oldest first. Raises `ModelNotFound`."""

    def version(self, name: str, which: str) -> Version:
        """A version by its number or an alias. Raises `ModelNotFound`, `VersionNotFound`."""

    def alias(self, name: str, alias: str, version: str) -> None:
        """Let an alias point at a version. Raises `ModelNotFound`, `VersionNotFound`, `InvalidInput`."""

    def aliases(self, name: str) -> dict[str, str]:
        """Version by alias. Raises `ModelNotFound`."""


@dataclass(frozen=True, slots=True)
class Reference:
    """``models:/NAME@WHICH``: a version by its number, or whatever an alias points at."""

    name: str
    which: str

    @property
    def follows(self) -> bool:
        """Whether it may come to mean another version."""
        return not is_number(self.which)

    def __str__(self) -> str:
        return f"{SCHEME}{self.name}@{self.which}"


def is_reference(text: str) -> bool:
    """Whether a text means a version in the registry, and not a path."""
    return text.startswith(SCHEME)


def parse_reference(text: str) -> Reference:
    """The reference in ``models:/NAME@ALIAS``, ``models:/NAME@3`` or ``models:/NAME/3``. Raises `InvalidInput`."""
    rest = text.removeprefix(SCHEME).lstrip("/")
    name, separator, which = rest.partition("@" if "@" in rest else "/")
    if (
        not is_reference(text)
        or not separator
        or not NAME_PATTERN.match(name)
        or not NAME_PATTERN.match(which)
    ):
        raise InvalidInput(
            f"{text[:200]!r} names no version",
            hint="models:/NAME@champion for an alias, models:/NAME@3 for a version",
        )
    check_which(name, which)
    return Reference(name, which)


def is_number(which: str) -> bool:
    """Whether a text is the number of a version; else it is an alias."""
    return bool(_NUMBER.match(which))


def check_number(name: str, number: str) -> None:
    """Raise `InvalidInput` for what is no number of a version."""
    if is_number(number):
        return
    raise InvalidInput(
        f"{number[:80]!r} is no version: a version is a positive whole number",
        hint=_meant(name, number) or f"as in {name}@4",
    )


def check_which(name: str, which: str) -> None:
    """Raise `InvalidInput` for what is neither the number of a version nor can be an alias."""
    if is_number(which):
        return
    if not NAME_PATTERN.match(which) or _RESERVED.match(which):
        raise InvalidInput(
            f"{which[:80]!r} is neither a version, which is a positive whole number, nor an alias",
            hint=_meant(name, which) or f"as in {name}@4, or {name}@champion",
        )


def _meant(name: str, which: str) -> str:
    """The version that somebody meant who wrote ``03`` or ``v3``; "" where it is none of these."""
    found = re.fullmatch(r"v?0*([1-9][0-9]{0,9})", which, re.IGNORECASE)
    return f"{name}@{found[1]}" if found else ""


def check_name(name: str) -> None:
    """Raise `InvalidInput` for what cannot name a model."""
    if not NAME_PATTERN.match(name):
        raise InvalidInput(
            f"{name[:80]!r} cannot be a model's name", hint="letters, digits, '.', '_' and '-'"
        )


def check_alias(alias: str) -> None:
    """Raise `InvalidInput` for what cannot be an alias."""
    if not NAME_PATTERN.match(alias) or _RESERVED.match(alias):
        raise InvalidInput(
            f"{alias[:80]!r} cannot be an alias",
            hint="letters, digits, '.', '_' and '-', and neither a version's number nor 'latest'",
        )


def no_model(name: str, where: str) -> ModelNotFound:
    """The error of a name that nothing is registered under."""
    return ModelNotFound(
        f"no model {name[:80]!r} in the registry {where}", hint="parbake register BUNDLE registers one"
    )


def no_version(name: str, which: str, where: str, there: Sequence[str]) -> VersionNotFound:
    """The error of a version or an alias that there is not; ``there`` are those that there are."""
    what = "version" if is_number(which) else "alias"
    return VersionNotFound(
        f"model {name!r} has no {what} {which[:80]!r} in the registry {where}: {listed(there, what)}",
        hint=f"parbake versions {name} shows what there is",
    )


def listed(there: Sequence[str], what: str = "version") -> str:
    """``there are versions 1, 2, 3``, the last of them where there are many."""
    if not there:
        return f"there is no {what}"
    several = f"are {what}{'es' if what.endswith('s') else 's'}" if len(there) > 1 else f"is {what}"
    return f"there {several} {'..., ' if len(there) > _LISTED else ''}{', '.join(there[-_LISTED:])}"


class MemoryRegistry:
    """A registry in this process: for tests, and for who asks one that was never made."""

    def __init__(self, where: str = "memory") -> None:
        self.where = where
        self._versions: dict[str, list[Version]] = {}
        self._aliases: dict[str, dict[str, str]] = {}
        self._lock = threading.Lock()

    def register(self, wanted: Registration) -> Version:
        """As `Registry.register`."""
        check_name(wanted.name)
        with self._lock:
            there = self._versions.setdefault(wanted.name, [])
            found = next((v for v in there if v.digest == wanted.digest), None)
            if found is None:
                found = Version(
                    wanted.name, str(len(there) + 1), wanted.digest, wanted.source, wanted.purpose,
                    wanted.owner, wanted.by, wanted.forced, time.time(),
                )  # fmt: skip
                there.append(found)
            return self._with_aliases(found)

    def names(self) -> Sequence[str]:
        """As `Registry.names`."""
        return sorted(self._versions)

    def versions(self, name: str) -> Sequence[Version]:
        """As `Registry.versions`."""
        if name not in self._versions:
            raise no_model(name, self.where)
        return [self._with_aliases(version) for version in self._versions[name]]

    def version(self, name: str, which: str) -> Version:
        """As `Registry.version`."""
        there = self.versions(name)
        number = which if is_number(which) else self._aliases.get(name, {}).get(which, "")
        found = next((version for version in there if version.version == number), None)
        if found is None:
            known = [version.version for version in there] if is_number(which) else sorted(self.aliases(name))
            raise no_version(name, which, self.where, known)
        return found

    def alias(self, name: str, alias: str, version: str) -> None:
        """As `Registry.alias`."""
        check_alias(alias)
        if not is_number(version):
            raise VersionNotFound(f"{version[:80]!r} is no version's number")
        self.version(name, version)
        with self._lock:
            self._aliases.setdefault(name, {})[alias] = version

    def aliases(self, name: str) -> dict[str, str]:
        """As `Registry.aliases`."""
        self.versions(name)
        return dict(self._aliases.get(name, {}))

    def _with_aliases(self, version: Version) -> Version:
        aliases = self._aliases.get(version.name, {})
        return replace(version, aliases=tuple(sorted(a for a, v in aliases.items() if v == version.version)))
