"""What an OCI image of a bundle is made of: pins, labels, and the Containerfile whose last layer is the model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from parbake.contract.bundle import StoredBundle
from parbake.contract.model import Environment
from parbake.errors import EnvironmentDiffers, SettingsError

BUNDLE_AT: Final = "/bundle"
"""Where the bundle lies in the image."""
MARK: Final = "dev.parbake.image"
"""Label of all that a build leaves in the store of images, finished or not."""
FOUNDATIONS: Final = "localhost/parbake-libraries"
"""Name of the images that have base and libraries, and nothing else yet; what they are made of is their tag."""
DIGEST: Final = "dev.parbake.bundle.digest"
USER: Final = 65532
"""Nobody's number on Debian and elsewhere; as other images without root have it."""
EPOCH: Final = 315_532_800
"""1980, the first year that archives can say: when a file of an image was made says nothing."""

_PIN: Final = re.compile(r"^([A-Za-z0-9][\w.-]*)==([^\s;\\]+)\s*(?:;\s*([^\\]+?))?\s*\\?$")
_HASH: Final = re.compile(r"--hash=(sha256:[0-9a-f]{64})")
_REFERENCE: Final = re.compile(r"^[a-z0-9][a-z0-9._/:-]*(:[\w][\w.-]{0,127})?(@sha256:[0-9a-f]{64})?$")


@dataclass(frozen=True, slots=True)
class Pin:
    """One library at one version, and the archives of it that are known."""

    name: str
    version: str
    hashes: tuple[str, ...] = ()
    """``sha256:...``; empty: not known yet."""
    marker: str = ""
    """For which Python and system, as PEP 508 has it."""

    @property
    def line(self) -> str:
        """As pip reads it, for the system whose markers have been looked at."""
        return " ".join((f"{self.name}=={self.version}", *(f"--hash={one}" for one in sorted(self.hashes))))


@dataclass(frozen=True, slots=True)
class Base:
    """What an image starts from, as far as the libraries depend on it."""

    python: str
    """``3.11``."""
    machine: str
    """``x86_64``."""
    glibc: str
    """``2.36``."""
    site: str
    """Folder in which its Python looks for libraries."""
    start: str
    """Lines of a Containerfile that bring it in."""

    @property
    def tags(self) -> tuple[str, ...]:
        """Platforms of wheels that run there, the newest first."""
        major, minor = (int(part) for part in self.glibc.split(".")[:2])
        found = [f"manylinux_{major}_{n}_{self.machine}" for n in range(minor, 4, -1)]
        return (*found, *(f"manylinux{old}_{self.machine}" for old in ("2014", "2010", "1")))

    @property
    def markers(self) -> dict[str, str]:
        """What markers of requirements ask for."""
        return {
            "python_version": self.python,
            "python_full_version": f"{self.python}.0",
            "sys_platform": "linux",
            "platform_system": "Linux",
            "os_name": "posix",
            "platform_machine": self.machine,
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
            "extra": "",
        }


@dataclass(frozen=True, slots=True)
class Wanted:
    """The libraries of an image: what is pinned with its hashes, and what the package index must be asked about."""

    known: tuple[Pin, ...]
    unknown: tuple[Pin, ...] = ()
    """Of the bundle's lock, which has versions and no hashes."""
    within: Mapping[str, str] = field(default_factory=dict)
    """Versions that anything these bring along must have."""


def pins(text: str) -> tuple[Pin, ...]:
    """The pins of a requirements file with hashes."""
    found: list[Pin] = []
    for line in text.splitlines():
        if match := _PIN.match(line):
            found.append(Pin(canonical(match[1]), match[2], (), (match[3] or "").strip()))
        elif found and (hashes := _HASH.findall(line)):
            last = found[-1]
            found[-1] = Pin(last.name, last.version, (*last.hashes, *hashes), last.marker)
    return tuple(found)


def canonical(name: str) -> str:
    """A library's name as the index writes it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def wanted(locked: Iterable[Pin], environment: Environment, base: Base) -> Wanted:
    """What an image needs: the server's own libraries, and those that the bundle's code requires.

    Where the bundle's lock has a version, the image has it too, so that what was proven when it was packed is what
    runs; only under another Python, for a bundle without own code, the server's pins count.
    Raises `EnvironmentDiffers` where own code was packed under another Python than the image's.
    """
    from packaging.markers import Marker

    ours = {pin.name: pin for pin in locked if not pin.marker or Marker(pin.marker).evaluate(base.markers)}
    same_python = environment.python.split(".")[:2] == base.python.split(".")
    if environment.required and not same_python:
        raise EnvironmentDiffers(
            f"the bundle's code was packed under Python {environment.python}, and the base has Python {base.python}",
            hint="--base names an image with that Python, or pack the model under the base's",
        )
    packed = {canonical(library.name): library.version for library in environment.libraries}
    packed.pop("parbake", None)
    known: list[Pin] = []
    unknown: list[Pin] = []
    names = sorted({*ours, *map(canonical, environment.required)} - {"parbake"})
    for name in names:
        pin = ours.get(name)
        version = packed.get(name) if same_python or pin is None else None
        if pin is not None and version in (None, pin.version):
            known.append(pin)
        elif version is not None:
            unknown.append(Pin(name, version))
    return Wanted(tuple(known), tuple(unknown), packed if same_python else {})


def labels(bundle: StoredBundle, version: str, server: str) -> dict[str, str]:
    """What the image says of itself, without being run."""
    contract = bundle.contract
    found = {
        "org.opencontainers.image.title": contract.name,
        "org.opencontainers.image.description": contract.purpose,
        "org.opencontainers.image.vendor": contract.owner,
        "org.opencontainers.image.version": version,
        DIGEST: bundle.digest,
        "dev.parbake.name": contract.name,
        "dev.parbake.owner": contract.owner,
        "dev.parbake.purpose": contract.purpose,
        "dev.parbake.server.version": server,
    }
    return {name: " ".join(value.split()) for name, value in found.items() if value}


def foundation(base: Base) -> str:
    """How what all images with the same libraries begin with is built, from a folder with ``libraries`` in it.

    It is kept as an image of its own, so that for a new model nobody looks at the libraries again.
    """
    lines = [
        "# Written by parbake image build.",
        base.start.replace("FROM_AS", "AS base"),
        f"LABEL {MARK}=1",
        "FROM base AS libraries",
        f"COPY libraries/ {base.site}/",
        # Some libraries ship files for other Pythons, which this one cannot read.
        f"RUN {_compiled(base.site)} || true",
        "FROM base",
        f"COPY --from=libraries {base.site}/ {base.site}/",
    ]
    return "\n".join(lines) + "\n"


def containerfile(ground: str, site: str, described: Mapping[str, str]) -> str:
    """How the image is built from a folder with ``server``, ``command`` and ``bundle`` in it.

    ``ground`` is the image that `foundation` made, ``site`` the folder in which its Python looks for libraries. What
    changes seldom comes first, so that a new model changes the last layer only.
    """
    lines = [
        "# Written by parbake image build.",
        f"FROM {ground} AS server",
        "COPY server/ /staged/",
        # The compiled files name the folder where they will lie.
        f"RUN {_compiled('/staged', f'-s /staged -p {site}')}",
        f"FROM {ground}",
        f"COPY --from=server /staged/ {site}/",
        "COPY command/ /usr/local/bin/",
        "ENV HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PARBAKE_HOST=0.0.0.0 PARBAKE_LOG_FORMAT=json",
        f'ENTRYPOINT ["parbake", "serve", "{BUNDLE_AT}"]',
        f"USER {USER}:{USER}",
        "LABEL " + " ".join(f"{name}={_quoted(value)}" for name, value in sorted(described.items())),
        f"COPY bundle/ {BUNDLE_AT}/",
    ]
    return "\n".join(lines) + "\n"


def _compiled(folder: str, options: str = "") -> str:
    # Hashes instead of times in the compiled files, and one seed for the order of sets: two builds give the same bytes.
    words = (
        "PYTHONHASHSEED=0 PYTHONDONTWRITEBYTECODE=1 python3 -m compileall -q -f",
        "--invalidation-mode unchecked-hash",
        options,
        folder,
    )
    return " ".join(filter(None, words))


def reference(tag: str) -> str:
    """A name for an image. Raises `SettingsError` for what is none."""
    if not _REFERENCE.match(tag):
        raise SettingsError(
            f"{tag[:100]!r} is no name of an image", hint="REPOSITORY:TAG in small letters, as in eta:3"
        )
    return tag


def _quoted(value: str) -> str:
    # A dollar sign would be taken for a variable.
    return json.dumps(value, ensure_ascii=False).replace("$", "\\$")
