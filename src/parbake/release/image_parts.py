"""The folder that an image is built from: base, libraries, server and bundle, each the same bytes every time."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Final

import msgspec

from parbake.contract.bundle import SIGNATURES, StoredBundle
from parbake.errors import BuildFailed, MissingProgram, NotFound, SettingsError
from parbake.release.image import EPOCH, FOUNDATIONS, Base, Pin, Wanted, canonical

BOOTSTRAP: Final = "debootstrap:"
_SUITE: Final = re.compile(r"^[a-z][a-z0-9-]{1,30}$")
_REQUIREMENTS: Final = "requirements.txt"
_PACKAGES: Final = ("python3", "libstdc++6", "libgomp1")
"""Python, and what wheels expect of a system."""
_LEFT_OUT: Final = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*")
_TESTS: Final = ("tests", "test")
_HEADERS: Final = (".pyi", ".pxd", ".pyx", ".pxi", ".h", ".hpp", ".c", ".cpp", ".cc", ".a", ".pyc")


def requirements() -> str:
    """The pins of the server's own libraries, as this version of parbake was tested with. Raises `NotFound`."""
    here = Path(__file__)
    for path in (here.with_name(_REQUIREMENTS), here.parents[3] / "requirements" / "base.txt"):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise NotFound(
        "this parbake came without the pins of its libraries", hint="pip install --force-reinstall parbake"
    )


# Base ---------------------------------------------------------------------------------------------------------


def bootstrap(base: str, folder: Path, mirrors: Sequence[str] = ()) -> tuple[Base, Path]:
    """A root file system of Debian with Python and nothing to install things with, made once for each suite.

    ``folder`` keeps it. Raises `SettingsError`, `MissingProgram`, `BuildFailed`.
    """
    suite = base.removeprefix(BOOTSTRAP)
    if not _SUITE.match(suite):
        raise SettingsError(f"{suite[:50]!r} is no suite of Debian", hint=f"--base {BOOTSTRAP}bookworm")
    key = hashlib.sha256(msgspec.json.encode([suite, mirrors, _PACKAGES, _LEFT_OUT, _shell()])).hexdigest()[
        :16
    ]
    kept = folder / f"{suite}-{key}.tar"
    if not kept.exists():
        if shutil.which("mmdebstrap") is None:
            raise missing("mmdebstrap")
        folder.mkdir(parents=True, exist_ok=True)
        with staging(folder) as made:
            target = made / "base.tar"
            command = [
                "mmdebstrap", "--quiet", "--variant=essential", f"--include={','.join(_PACKAGES)}", "--format=tar",
                "--dpkgopt=force-unsafe-io", *(f"--dpkgopt=path-exclude={path}" for path in _LEFT_OUT),
                f"--customize-hook={_shell()}", suite, str(target), *mirrors,
            ]  # fmt: skip
            execute(command, {"SOURCE_DATE_EPOCH": str(EPOCH), "PYTHONHASHSEED": "0"})
            target.rename(kept)
    return _facts(kept), kept


def _shell() -> str:
    """What is done in the new root: files compiled without times in them, nothing left that says when or where."""
    return (
        'set -e; r="$1"; '
        'for p in "$r"/usr/lib/python3*; do chroot "$r" python3 -m compileall -q -f --invalidation-mode unchecked-hash '
        '"${p#$r}" || true; done; '
        'rm -rf "$r"/var/cache/debconf "$r"/var/cache/ldconfig "$r"/var/log/* "$r"/etc/hostname "$r"/etc/resolv.conf '
        '"$r"/etc/machine-id "$r"/var/lib/dbus/machine-id "$r"/var/lib/dpkg/*-old "$r"/var/lib/systemd '
        # What apt is told of this root lies in /tmp, and is needed once more.
        '"$r"/usr/share/perl* "$r"/usr/lib/*/gconv '
        '"$r"/usr/lib/*/perl "$r"/usr/share/info/* "$r"/usr/share/lintian; '
        'for p in pydoc_data test idlelib lib2to3; do rm -rf "$r"/usr/lib/python3.*/$p; done; '
        'echo "nonroot:x:65532:65532::/:/usr/sbin/nologin" >> "$r/etc/passwd"; '
        'echo "nonroot:x:65532:" >> "$r/etc/group"'
    )


def _facts(tar: Path) -> Base:
    """What libraries need to know of a root file system. Raises `BuildFailed`."""
    with tarfile.open(tar) as archive:
        names = {member.name.removeprefix("./"): member for member in archive}
        link = names.get("usr/bin/python3")
        python = (link.linkname if link is not None else "").removeprefix("python")
        status = archive.extractfile(names["var/lib/dpkg/status"])
        text = status.read().decode() if status is not None else ""
    found = re.search(
        r"^Package: libc6\n(?:.+\n)*?Architecture: (\S+)\n(?:.+\n)*?Version: (\d+\.\d+)", text, re.M
    )
    if not python or found is None:
        raise BuildFailed(f"{tar} has no Python or no C library", hint=f"remove {tar}, and it is made again")
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(found[1], found[1])
    site = f"/usr/local/lib/python{python}/dist-packages"
    return Base(python, machine, found[2], site, "FROM scratch FROM_AS\nADD base.tar /")


# Libraries ----------------------------------------------------------------------------------------------------


def locked(wanted: Wanted, base: Base) -> tuple[Pin, ...]:
    """Every library with its hashes: the index is asked for those of the bundle's lock, and for what they need.

    Raises `BuildFailed`.
    """
    if not wanted.unknown:
        return wanted.known
    with tempfile.TemporaryDirectory(prefix="parbake-image-") as name:
        folder = Path(name)
        (folder / "wanted.txt").write_text("".join(f"{p.name}=={p.version}\n" for p in wanted.unknown))
        # What the server needs stays as it was tested, unless the bundle says otherwise.
        fixed = {**wanted.within, **{pin.name: pin.version for pin in wanted.known}}
        fixed |= {pin.name: pin.version for pin in wanted.unknown}
        (folder / "within.txt").write_text("".join(f"{n}=={v}\n" for n, v in sorted(fixed.items())))
        report = folder / "report.json"
        _pip(
            [
                "--dry-run", "--ignore-installed", "--report", str(report), "--target", str(folder / "none"),
                "-c", str(folder / "within.txt"), "-r", str(folder / "wanted.txt"),
            ],
            base,
        )  # fmt: skip
        installed = msgspec.json.decode(report.read_bytes())["install"]
    found = {pin.name: pin for pin in wanted.known}
    for item in installed:
        name = canonical(item["metadata"]["name"])
        digest = item["download_info"]["archive_info"]["hashes"]["sha256"]
        if name not in found:
            found[name] = Pin(name, item["metadata"]["version"], (f"sha256:{digest}",))
    return tuple(found[name] for name in sorted(found))


def libraries(pinned: Sequence[Pin], base: Base, folder: Path) -> Path:
    """The libraries, as the base's Python finds them, installed once for the same pins. Raises `BuildFailed`."""
    lines = "".join(f"{pin.line}\n" for pin in sorted(pinned, key=lambda pin: pin.name))
    key = hashlib.sha256(msgspec.json.encode([lines, base.python, base.machine, base.glibc, 1])).hexdigest()[
        :16
    ]
    kept = folder / f"libraries-{key}"
    if not kept.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with staging(folder) as made:
            (made / "requirements.txt").write_text(lines)
            target = made / "libraries"
            _pip(
                ["--require-hashes", "--no-deps", "--no-compile", "--target", str(target), "-r",
                 str(made / "requirements.txt")],
                base,
            )  # fmt: skip
            _strip(target)
            (target / "parbake-libraries.txt").write_text(lines)
            settle(target)
            target.rename(kept)
    return kept


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def foundation_tag(base: str, libraries: str, recipe: str) -> str:
    """Name of the image that has this base and these libraries, made by this Containerfile."""
    key = hashlib.sha256(msgspec.json.encode([base, libraries, recipe])).hexdigest()[:16]
    return f"{FOUNDATIONS}:{key}"


def _strip(root: Path) -> None:
    """Take out what no server reads: tests, headers, sources of compiled code, and commands."""
    shutil.rmtree(root / "bin", ignore_errors=True)
    for folder, names, files in os.walk(root, topdown=True):
        where = Path(folder)
        for name in [name for name in names if name in (*_TESTS, "__pycache__", "include")]:
            shutil.rmtree(where / name)
            names.remove(name)
        for file in files:
            if file.endswith(_HEADERS):
                (where / file).unlink()
    for record in root.glob("*.dist-info/RECORD"):
        kept = [line for line in record.read_text().splitlines() if not line.startswith(("../", "bin/"))]
        record.write_text("".join(f"{line}\n" for line in sorted(kept)))
    for only_here in ("direct_url.json", "REQUESTED", "INSTALLER"):
        for path in root.glob(f"*.dist-info/{only_here}"):
            path.unlink()


def _pip(arguments: Sequence[str], base: Base) -> None:
    """``pip install`` of wheels for the base's Python and system, whatever this one is."""
    command = [
        sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--no-input", "install",
        "--only-binary=:all:", "--implementation", "cp", "--python-version", base.python,
        *(word for tag in base.tags for word in ("--platform", tag)), *arguments,
    ]  # fmt: skip
    execute(command, {})


# Server and bundle ----------------------------------------------------------------------------------------------


def server(target: Path) -> str:
    """Write this parbake as its wheel has it; gives its version."""
    package = Path(__file__).parents[1]
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", _REQUIREMENTS)
    shutil.copytree(package, target / "parbake", ignore=ignored)
    (target / "parbake" / "release" / _REQUIREMENTS).write_text(requirements())
    described = metadata.distribution("parbake")
    info = target / f"parbake-{described.version}.dist-info"
    info.mkdir()
    for name in ("METADATA", "entry_points.txt", "WHEEL"):
        if text := described.read_text(name):
            (info / name).write_text(text)
    files = sorted(path for path in target.rglob("*") if path.is_file())
    (info / "RECORD").write_text("".join(f"{path.relative_to(target).as_posix()},,\n" for path in files))
    settle(target)
    return described.version


def command(target: Path) -> None:
    """Write the command as it lies on the path of the image."""
    target.mkdir()
    script = target / "parbake"
    script.write_text(
        "#!/usr/bin/env python3\nimport sys\n\nfrom parbake.cli.main import main\n\nsys.exit(main())\n"
    )
    settle(target, executable=("parbake",))


def bundle(stored: StoredBundle, target: Path) -> None:
    """Copy the bundle's own files, and its signatures; what else lies in its folder stays there."""
    target.mkdir()
    own = [entry.path for entry in stored.manifest.files]
    for name in (*own, "manifest.json", SIGNATURES):
        source = stored.path / name
        if source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target / name)
    settle(target)


def settle(root: Path, executable: Iterable[str] = ()) -> None:
    """Give everything under a folder the same owner's rights and the same time."""
    commands = set(executable)
    for folder, _, files in os.walk(root, topdown=False):
        for name in files:
            path = Path(folder) / name
            path.chmod(0o755 if name in commands or path.suffix == ".so" else 0o644)
            os.utime(path, (EPOCH, EPOCH))
        Path(folder).chmod(0o755)
        os.utime(folder, (EPOCH, EPOCH))


# Work in folders --------------------------------------------------------------------------------------------------


@contextmanager
def staging(parent: Path) -> Iterator[Path]:
    """A folder for half-done work, gone afterwards. Those of builds that were killed go as well.

    To be used by one build at a time: see `alone`.
    """
    for left in parent.glob(".new-*"):
        shutil.rmtree(left, ignore_errors=True)
    made = Path(tempfile.mkdtemp(prefix=".new-", dir=parent))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until nobody else builds with this folder, nor a program of a build that was killed.

    Programs inherit the lock, so that what a killed build has started is waited for too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.set_inheritable(descriptor, True)
        yield
    finally:
        os.close(descriptor)


def missing(program: str) -> MissingProgram:
    """The error for a program that is not installed."""
    package = {"docker": "docker.io"}.get(program, program)
    return MissingProgram(f"{program} is not installed", hint=f"apt install {package}")


def execute(command: Sequence[str], environment: dict[str, str]) -> str:
    """Run a program to its end, and give what it wrote. Raises `BuildFailed` with its last words."""
    try:
        done = subprocess.run(
            command, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, errors="replace", close_fds=False, check=False,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise missing(command[0]) from error
    if done.returncode != 0:
        said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        said = [line for line in said if "level=warning" not in line]
        full = any("No space left" in line or "ENOSPC" in line for line in said)
        raise BuildFailed(
            f"{Path(command[0]).name} failed: {' / '.join(said[-3:] or ['it said nothing'])[:500]}",
            hint="the disk is full: parbake image prune" if full else "",
        )
    return done.stdout
