"""A PostgreSQL server of a test's own: made in an empty folder, reached over a Unix socket, killed at will."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

HOW_TO_INSTALL = "no PostgreSQL server here: apt-get install postgresql"
ROLE = "parbake"


class Postgres:
    """One server. Refuses to run as root, so root gives it to a user that has nothing else.

    ``synced`` false does not wait for the disk: for tests that do not kill it.
    """

    def __init__(self, *, synced: bool = True) -> None:
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        initdb = str(found[-1]) if found else shutil.which("initdb")
        if initdb is None:
            pytest.skip(HOW_TO_INSTALL)
        self._programs = Path(initdb).resolve().parent
        # The path of a socket has 107 bytes at most, and pytest's folders are for their owner only.
        self.folder = Path(tempfile.mkdtemp(prefix="parbake-pg-", dir="/tmp"))
        self._user = _user()
        if self._user is not None:
            shutil.chown(self.folder, self._user, pwd.getpwnam(self._user).pw_gid)
        self._data = self.folder / "data"
        self._process: subprocess.Popen[bytes] | None = None
        self._synced = synced
        self._databases = 0
        self._run("initdb", "-D", str(self._data), "-U", ROLE, "-A", "trust", "-E", "UTF8", "--no-sync")
        self.start()

    def start(self) -> None:
        """Start, and wait until it answers."""
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    self._programs / "postgres", "-D", self._data, "-k", self.folder,
                    "-c", "listen_addresses=", "-c", "max_connections=60", "-c", "shared_buffers=16MB",
                    "-c", f"fsync={'on' if self._synced else 'off'}",
                ],
                user=self._user,
                extra_groups=None if self._user is None else [],
                stdout=log,
                stderr=log,
                cwd=self.folder,
            )  # fmt: skip
        for _ in range(600):
            asked = subprocess.run(
                [self._programs / "pg_isready", "-q", "-h", self.folder, "-U", ROLE], check=False
            )
            if asked.returncode == 0:
                return
            assert self._process.poll() is None, (self.folder / "log").read_text()
            time.sleep(0.05)
        raise AssertionError((self.folder / "log").read_text())

    def kill(self) -> None:
        """End all its processes with SIGKILL, as the kernel does when memory runs out."""
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        self._process.kill()
        for child in children:
            try:
                os.kill(int(child), signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._process.wait()

    def database(self) -> str:
        """The URL of a new, empty database."""
        self._databases += 1
        name = f"test{self._databases}"
        self.sql("postgres", f"CREATE DATABASE {name}")
        return f"postgresql://{ROLE}@/{name}?host={self.folder}"

    def sql(self, database: str, statement: str) -> subprocess.CompletedProcess[str]:
        """Run a statement as the database's owner."""
        return subprocess.run(
            [
                self._programs / "psql", "-X", "-A", "-t", "-v", "ON_ERROR_STOP=1",
                "-h", self.folder, "-U", ROLE, "-d", database, "-c", statement,
            ],
            capture_output=True,
            text=True,
            check=True,
        )  # fmt: skip

    def close(self) -> None:
        """Stop it and remove what it wrote."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(timeout=30)
        shutil.rmtree(self.folder)

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self._programs / program, *arguments],
            user=self._user,
            extra_groups=None if self._user is None else [],
            capture_output=True,
            text=True,
            cwd=self.folder,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def _user() -> str | None:
    """Whom the server runs as; None for whoever runs the tests."""
    if os.getuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"
