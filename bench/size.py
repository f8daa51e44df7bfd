"""How large a base install is, and what makes it so large."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Final

from bench.machine import this_machine
from bench.report import Section, Table, at_most

ROOT: Final = Path(__file__).parents[1]
_LOCK: Final = ROOT / "requirements" / "base.txt"
_SHOWN: Final = 8
_MOST_MB: Final = 400.0


def run(folder: Path, *, install: bool, say: Callable[[str], None]) -> Section:
    """Install the base lock into an environment of its own, or (``install`` false) look at what is installed here."""
    names = _locked()
    if install:
        say("installing requirements/base.txt")
        sizes = _installed_sizes(_install(folder / "venv"))
        how = "`requirements/base.txt` and parbake in a new environment, without pip and setuptools"
    else:
        sizes = {name: _size(metadata.distribution(name)) for name in names if _there(name)}
        how = "what `requirements/base.txt` names as it is installed here, and parbake"
    sizes["parbake"] = sum(
        path.stat().st_size for path in (ROOT / "src" / "parbake").rglob("*.*") if path.is_file()
    )
    total = sum(sizes.values())
    largest = sorted(sizes.items(), key=lambda item: -item[1])
    rows = [(name, f"{count / 1e6:.1f}") for name, count in largest[:_SHOWN]]
    rest = sum(count for _, count in largest[_SHOWN:])
    rows += [(f"{len(largest) - _SHOWN} others", f"{rest / 1e6:.1f}"), ("together", f"{total / 1e6:.1f}")]
    return Section(
        key="size",
        title="Size of a base install",
        how=f"Sum of all files in MB (10^6 bytes), compiled modules included: {how}.",
        tables=(Table("Size by distribution", ("distribution", "MB"), tuple(rows)),),
        targets=(at_most("base install", total / 1e6, _MOST_MB, "MB"),),
        machine=this_machine(),
        figures={"bytes": sizes},
    )


def _locked() -> list[str]:
    return re.findall(r"^([A-Za-z0-9._-]+)==", _LOCK.read_text(), re.MULTILINE)


def _there(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _install(venv: Path) -> Path:
    """Make the environment; gives its site-packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(venv / "bin" / "python"),
        "--disable-pip-version-check",
    ]
    done = subprocess.run(
        [*pip, "install", "--quiet", "--require-hashes", "--requirement", str(_LOCK)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"pip could not install {_LOCK}: {done.stderr.strip()[-2000:]}")
    return next((venv / "lib").glob("python3*/site-packages"))


def _installed_sizes(site: Path) -> dict[str, int]:
    return {found.name: _size(found) for found in metadata.distributions(path=[str(site)])}


def _size(distribution: metadata.Distribution) -> int:
    """Bytes of all files of a distribution that are there, caches included."""
    return sum(path.stat().st_size for path in _paths(distribution))


def _paths(distribution: metadata.Distribution) -> Iterable[Path]:
    for file in distribution.files or ():
        path = Path(str(distribution.locate_file(file)))
        if path.is_file():
            yield path
