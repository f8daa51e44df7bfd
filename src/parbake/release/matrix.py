"""Which environments can run which bundles, by the rules of the gate."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from parbake.contract.bundle import StoredBundle
from parbake.contract.model import Environment, Library
from parbake.errors import NotFound, SettingsError
from parbake.release import rules
from parbake.release.rules import Comparison, Rule

_MAX_BYTES: Final = 64 * 1024**2
_PINNED: Final = re.compile(r"^([A-Za-z0-9][\w.-]*)\s*(?:\[[^\]]*\])?\s*(?:===?\s*([^\s;\\#]+)|(@)\s)")
_PYTHON: Final = re.compile(r"^#.*\bpython(?:-version)?[ =:]+(\d+\.\d+(?:\.\d+)?)", re.IGNORECASE)


class Place(Struct, frozen=True):
    """An environment that a server has, or could have."""

    label: str
    environment: Environment


class Cell(Struct, frozen=True):
    """One bundle in one environment. ``ok`` is None where that cannot be told; ``broken`` says what decides it."""

    bundle: str
    name: str
    digest: str
    place: str
    ok: bool | None
    broken: tuple[Comparison, ...] = ()


class Matrix(Struct, frozen=True):
    """Every bundle in every environment, bundle by bundle."""

    places: tuple[str, ...]
    cells: tuple[Cell, ...]


def matrix(
    bundles: Sequence[StoredBundle], places: Sequence[Place], asked: Mapping[str, Rule] | None = None
) -> Matrix:
    """Hold the lock of each bundle against each environment; ``asked`` are rules that overrule the usual ones."""
    cells: list[Cell] = []
    for stored in bundles:
        for place in places:
            found = rules.compare(stored.contract, stored.environment, place.environment, asked)
            broken = tuple(one for one in found if one.ok is not True)
            cells.append(
                Cell(
                    str(stored.path),
                    stored.contract.name,
                    stored.digest,
                    place.label,
                    rules.verdict(found),
                    broken,
                )
            )
    return Matrix(tuple(place.label for place in places), tuple(cells))


def read_place(path: Path) -> Place:
    """An environment from a lock file, what ``pip freeze`` prints, or a bundle's ``environment.json``.

    Of a list of pins the Python is known only where a comment says it (``# python 3.12``), as pip-compile writes one.
    Raises `NotFound` or `SettingsError`.
    """
    if path.is_dir():
        path = path / "environment.json"
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise SettingsError(f"{path} is larger than {_MAX_BYTES} bytes")
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError as error:
        raise NotFound(f"no environment at {path}", hint=_HINT) from error
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}", hint=_HINT) from error
    label = path.parent.name if path.name == "environment.json" and path.parent.name else path.name
    if text.lstrip().startswith("{"):
        return Place(label, _lock(path, text))
    pins = dict(_pins(text))
    if not pins:
        raise SettingsError(f"{path} pins no library", hint=_HINT)
    python = pins.pop(rules.PYTHON, "") or next(
        (found[1] for line in text.splitlines() if (found := _PYTHON.match(line))), ""
    )
    libraries = tuple(Library(name, version) for name, version in sorted(pins.items()))
    return Place(label, Environment(python, "", "", "", libraries))


_HINT: Final = "what pip freeze prints, a requirements lock with ==, or the environment.json of a bundle"


def _lock(path: Path, text: str) -> Environment:
    try:
        value = json.loads(text)
        if isinstance(value, dict) and "environment" in value:
            value = value["environment"]
        return msgspec.convert(value, Environment)
    except (ValueError, msgspec.ValidationError, RecursionError) as error:
        raise SettingsError(f"{path} is no environment lock: {error}", hint=_HINT) from error


def _pins(text: str) -> Iterator[tuple[str, str]]:
    """Name and version of each pin; the version is "" where a library comes from somewhere else."""
    for line in text.splitlines():
        if found := _PINNED.match(line.strip()):
            yield found[1].lower().replace("_", "-").replace(".", "-"), found[2] or ""
