"""The environment lock: what was installed where a bundle was packed, and what differs here."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Final

from parbake.contract.model import Environment, Library

_FIELD: Final = re.compile(r"^(Name|Version): *(\S+)", re.MULTILINE)

# The first part of each path, or the stem of a module that lies at the top.
_TOP: Final = re.compile(r"^([A-Za-z_]\w*)(?:/|(?:\.[\w-]+)*\.(?:py|so|pyd)(?=,))", re.MULTILINE)

# What can be imported.
_MODULES: Final = frozenset({".py", ".so", ".pyd"})

_CPU: Final = re.compile(r"^(?:model name|Model|Hardware)\s*: *(.+)$", re.MULTILINE)
_GPU: Final = re.compile(r"^Model: *(.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as it was when the bundle was packed."""

    name: str
    packed: str
    here: str
    required: bool
    """Whether the bundle's own code depends on it."""


def capture(required: tuple[str, ...] = ()) -> Environment:
    """The environment of this process. ``required`` are the libraries that the bundle's code imports."""
    return Environment(
        python=platform.python_version(),
        implementation=platform.python_implementation(),
        system=f"{platform.system()} {platform.release()}",
        machine=platform.machine(),
        libraries=tuple(Library(name, version) for name, version in sorted(_installed().items())),
        required=tuple(sorted({_canonical(name) for name in required})),
        os=_os(),
        cpu=_cpu(),
        gpus=_gpus(),
    )


def differences(packed: Environment, here: Environment) -> list[Difference]:
    """What differs, required libraries first; libraries that are only here do not count."""
    found: list[Difference] = []
    if packed.python != here.python:
        # Minor versions of Python change what source code means; patch releases do not.
        same_minor = packed.python.split(".")[:2] == here.python.split(".")[:2]
        found.append(
            Difference("python", packed.python, here.python, bool(packed.required) and not same_minor)
        )
    if packed.implementation != here.implementation:
        found.append(
            Difference("implementation", packed.implementation, here.implementation, bool(packed.required))
        )
    if packed.system != here.system:
        found.append(Difference("system", packed.system, here.system, False))
    if packed.machine != here.machine:
        found.append(Difference("machine", packed.machine, here.machine, False))
    for name, before, now in (
        ("os", packed.os, here.os),
        ("cpu", packed.cpu, here.cpu),
        ("gpus", ", ".join(packed.gpus), ", ".join(here.gpus)),
    ):
        # Locks from before this was kept say nothing.
        if before and before != now:
            found.append(Difference(name, before, now or "not known", False))
    installed = {library.name: library.version for library in here.libraries}
    for library in packed.libraries:
        version = installed.get(library.name, "not installed")
        if version != library.version:
            found.append(Difference(library.name, library.version, version, library.name in packed.required))
    return sorted(found, key=lambda difference: (not difference.required, difference.name))


class Distributions:
    """The installed distributions, by the modules that they provide.

    `importlib.metadata.packages_distributions` says the same of top-level names only, ten times as slowly. A
    namespace that several share (``google`` of protobuf and of google-auth) belongs to none of them; what lies
    in it does. Of two that bring the very same module, the first by name stands for both, wherever they lie.
    """

    def __init__(self, path: Sequence[str] | None = None) -> None:
        """``path`` is where to look instead of `sys.path`."""
        claims: dict[str, dict[str, metadata.Distribution]] = {}
        for distribution in metadata.distributions(path=list(sys.path if path is None else path)):
            name = _head(distribution).get("Name")
            top_level = distribution.read_text("top_level.txt")
            if top_level is not None:
                tops = set(top_level.split())
            else:
                tops = set(_TOP.findall(distribution.read_text("RECORD") or ""))
            for top in tops if name else ():
                claims.setdefault(top, {}).setdefault(_canonical(str(name)), distribution)
        self._by_module: dict[str, str] = {}
        for top, named in claims.items():
            if len(named) == 1:
                self._by_module[top] = next(iter(named))
                continue
            for name, distribution in sorted(named.items()):
                for module in _regular(distribution, top):
                    self._by_module.setdefault(module, name)

    def of(self, module: str) -> str | None:
        """The distribution of a module; None for a namespace, and for what no distribution brings."""
        while module and module not in self._by_module:
            module = module.rpartition(".")[0]
        return self._by_module.get(module)


def _regular(distribution: metadata.Distribution, top: str) -> set[str]:
    """The outermost modules and packages of a distribution that lie under a top-level name and are no namespace.

    One that does not say which files it has (a package of Debian's) stands for all that no other one brings.
    """
    record = distribution.read_text("RECORD")
    if record is None:
        return {top}
    files = re.findall(rf"^({re.escape(top)}[/.][^,\n]*)", record, re.MULTILINE)
    packages = {PurePosixPath(file).parent for file in files if file.endswith("/__init__.py")}
    found: set[str] = set()
    for file in map(PurePosixPath, files):
        if file.suffix not in _MODULES:
            continue
        outer = [folder for folder in reversed(file.parents) if folder in packages]
        at = outer[0] if outer else file.with_name(file.name.partition(".")[0])
        found.add(".".join(at.parts))
    return found


def _installed() -> dict[str, str]:
    """Versions by name. Read from the text: parsing the whole metadata takes ten times as long."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        head = _head(distribution)
        if "Name" in head and "Version" in head:
            # The first on the path is the one that is imported.
            found.setdefault(_canonical(head["Name"]), head["Version"])
    return found


def _os() -> str:
    """``debian 12``, or what the system calls itself."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return f"{platform.system()} {platform.mac_ver()[0] or platform.version()}".strip()
    return f"{release['ID']} {release.get('VERSION_ID', '')}".strip()


def _cpu() -> str:
    found = _CPU.search(_text(Path("/proc/cpuinfo")))
    return " ".join(found[1].split()) if found else platform.processor()


def _gpus() -> tuple[str, ...]:
    """What NVIDIA's driver shows. A library would say more, and not every machine has it."""
    files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    found = (_GPU.search(_text(file)) for file in files)
    return tuple(match[1].strip() for match in found if match)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _head(distribution: metadata.Distribution) -> dict[str, str]:
    """Name and version as the metadata says them."""
    text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
    return dict(_FIELD.findall(text.partition("\n\n")[0]))


def _canonical(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")
