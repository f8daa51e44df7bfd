"""Each peer's own virtual environment: made once from the exact versions in its requirements.txt."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
PEERS: Final = Path(__file__).parent / "peers"
VENVS: Final = ROOT / ".race"
_STAMP: Final = "installed"
_INSTALL_S: Final = 1200.0


class NotInstalled(RuntimeError):
    """A peer that cannot be had here; the message is one line that says why."""


def python_of(peer: str, *, install: bool, say: Callable[[str], None], venvs: Path = VENVS) -> Path:
    """The interpreter of a peer's environment, which is made if ``install``. Raises `NotInstalled`."""
    requirements = PEERS / peer / "requirements.txt"
    wanted = hashlib.blake2b(requirements.read_bytes(), digest_size=16).hexdigest()
    folder = venvs / peer
    python, stamp = folder / "bin" / "python", folder / _STAMP
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    if not install:
        raise NotInstalled("not installed here: `make race` without --quick installs it")
    say(f"installing {peer} (once)")
    shutil.rmtree(folder, ignore_errors=True)
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", "-r", str(requirements)],
    ):
        _run(command, peer)
    stamp.write_text(wanted)
    return python


def _run(command: list[str], peer: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise NotInstalled(f"{peer} was not installed within {_INSTALL_S:g} s") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()
        raise NotInstalled(lines[-1].strip() if lines else f"pip ended with {done.returncode}")


def version_of(peer: str, distribution: str) -> str:
    """The version of a distribution that a peer's requirements pin."""
    for line in (PEERS / peer / "requirements.txt").read_text().splitlines():
        name, _, version = line.partition("==")
        if name.lower() == distribution:
            return version.split()[0]
    raise metadata.PackageNotFoundError(distribution)


def environment() -> dict[str, str]:
    """Variables for a peer's server: ours and our settings stay out, the repository can be imported."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PARBAKE_", "PYTHON"))}
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
