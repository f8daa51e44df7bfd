"""The manifests of a bundle, with resources from a server that was started and asked on this machine."""

from __future__ import annotations

import http.client
import math
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Final

from parbake.app.image import Resolve, resolve_path
from parbake.app.measure import examples_of
from parbake.contract.bundle import StoredBundle, read_bundle
from parbake.errors import NotReady
from parbake.release.kubernetes import Manifest, Measured, Pods, manifests

_START_S: Final = 120.0
_ASK_S: Final = 1.0
_FEWEST: Final = 50


def write(
    ref: str,
    *,
    image: str = "",
    model_load: str = "",
    kserve: bool = False,
    replicas: int = 2,
    most_replicas: int = 10,
    cpus: int = 1,
    drain_s: float = 30.0,
    namespace: str = "",
    allow_pickle: bool = False,
    resolve: Resolve = resolve_path,
    stage: Callable[[str], None] = lambda _: None,
) -> tuple[Manifest, ...]:
    """The manifests of one deployment. Without ``image`` that which `parbake.app.image.build` calls so.

    Raises `NotFound`, `SettingsError`, `NotReady` where the bundle cannot be served here.
    """
    source = resolve(ref)
    stored = read_bundle(source.path)
    contract = stored.contract
    version = source.version or stored.digest.removeprefix("sha256:")[:12]
    pods = Pods(
        name=contract.name,
        image=image or f"localhost/parbake/{contract.name.lower()}:{version}",
        model_load=model_load,
        digest=stored.digest,
        owner=contract.owner,
        purpose=contract.purpose,
        replicas=replicas,
        most_replicas=most_replicas,
        cpus=cpus,
        drain_s=drain_s,
        namespace=namespace,
    )
    stage("a server of its own")
    return manifests(pods, measure(stored, allow_pickle=allow_pickle), kserve=kserve)


def measure(stored: StoredBundle, *, allow_pickle: bool = False) -> Measured:
    """Start a server with the bundle, ask it for its goldens one by one, and see what that takes.

    Raises `NotReady` where it does not start, `PackRefused` where the bundle has no goldens.
    """
    bodies = examples_of(stored).bodies
    path = f"/v2/models/{stored.contract.name}/infer"
    started = time.perf_counter()
    with _server(stored.path, allow_pickle) as (process, port):
        while not _asked(port, path, bodies[:1], 0.0):
            if process.poll() is not None or time.perf_counter() - started > _START_S:
                raise NotReady(
                    f"no server with {stored.path} answered", hint=f"parbake serve {stored.path} says why"
                )
            time.sleep(0.02)
        start_s = time.perf_counter() - started
        before = _cpu_s(_family(process.pid))
        answered = _asked(port, path, bodies, _ASK_S)
        pids = _family(process.pid)
        row_ms = (_cpu_s(pids) - before) * 1000 / max(answered, 1)
        return Measured(sum(map(_memory, pids)), row_ms, start_s, _processor())


@contextmanager
def _server(bundle: Path, allow_pickle: bool) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="parbake-k8s-") as folder:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PARBAKE_")}
        environment["XDG_RUNTIME_DIR"] = folder
        command = [sys.executable, "-m", "parbake", "serve", str(bundle.absolute()), "--port", str(port)]
        process = subprocess.Popen(
            [*command, "--workers", "1", *(["--allow-pickle"] if allow_pickle else [])],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield process, port
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _asked(port: int, path: str, bodies: Sequence[bytes], seconds: float) -> int:
    """How many requests were answered within some seconds, `_FEWEST` at least; one where it is 0."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    count = 0
    until = time.perf_counter() + seconds
    try:
        for body in cycle(bodies):
            connection.request("POST", path, body, {"content-type": "application/json"})
            reply = connection.getresponse()
            reply.read()
            if reply.status != http.client.OK:
                return count
            count += 1
            if time.perf_counter() >= until and count >= (_FEWEST if seconds else 1):
                return count
    except (OSError, http.client.HTTPException):
        return count
    finally:
        connection.close()
    return count


def _family(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            found += [int(child) for child in task.read_text().split()]
    return found


def _memory(pid: int) -> int:
    """Bytes of a process; what it shares with others counts in parts, so that a sum is right (PSS)."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return 0
    return 0


def _cpu_s(pids: Sequence[int]) -> float:
    """CPU time of processes so far."""
    total = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            total += int(task.read_text().split()[0])
    return total / 1e9 if total else math.nan


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
