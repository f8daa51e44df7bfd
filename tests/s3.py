"""An S3-compatible store of a test's own: moto's server in a process, killed at will."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping

import pytest

from tests.sockets import free_port

BUCKET = "models"


class Moto:
    """One server, with an empty bucket. What it holds ends with it."""

    def __init__(self) -> None:
        if importlib.util.find_spec("moto") is None or importlib.util.find_spec("obstore") is None:
            pytest.skip("no S3 server here: pip install 'moto[s3,server]' 'parbake[s3]'")
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def environment(self) -> Mapping[str, str]:
        """What tells a client where it is."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_REGION": "us-east-1",
        }

    def tell(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let this process, and those that it starts, find it for the length of a test."""
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)

    def start(self) -> None:
        """Start, wait until it answers, and make the bucket."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(600):
            try:
                request = urllib.request.Request(f"{self.url}/{BUCKET}", method="PUT")
                urllib.request.urlopen(request, timeout=5).close()
                return
            except (OSError, urllib.error.HTTPError):
                assert self.process.poll() is None, "moto's server ended"
                time.sleep(0.05)
        raise AssertionError("moto's server did not start")

    def kill(self) -> None:
        """End it without a word."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
