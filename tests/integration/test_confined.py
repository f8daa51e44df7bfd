"""A model with code of its own keeps neither the network nor privileges, and comes back as fast as ever."""

from __future__ import annotations

import errno
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

import parbake
from parbake.errors import ServerNotFound
from parbake.runtime.confine import Confinement
from parbake.testing import Server, serving
from parbake.transports import client
from tests.functions import write_function
from tests.traffic import answer, infer, once, wait_for

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux takes these things from a process"
)

SPY = """
import os, socket

def status(name):
    with open("/proc/self/status") as lines:
        return next(line.split()[1] for line in lines if line.startswith(name + ":"))

def connects(port):
    with socket.socket() as here:
        here.settimeout(5)
        return here.connect_ex(("127.0.0.1", port))

def interfaces():
    return len(socket.if_nameindex())

def reads(pid):
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            file.read()
    except OSError as error:
        return error.errno
    return 0

ANSWERS = {
    0: lambda _: os.getuid(),
    1: lambda _: int(status("NoNewPrivs")),
    2: lambda _: int(status("CapEff"), 16) + int(status("CapPrm"), 16) + int(status("CapBnd"), 16),
    3: connects,
    4: lambda _: interfaces(),
    5: lambda _: "PARBAKE_ADMIN_TOKEN" in os.environ,
    6: lambda _: os.getpid(),
    7: reads,
}

def predict(x):
    x[:, 0] = [ANSWERS[int(question)](int(more)) for question, more in x]
    return x
"""
UID, NEW_PRIVILEGES, CAPABILITIES, CONNECT, INTERFACES, TOKEN, PID, READ = range(8)


def _open_to_all(*paths: str) -> bool:
    """Whether other users can reach these files."""
    folders = {folder for path in paths for folder in Path(path).resolve().parents}
    return all(folder.stat().st_mode & 0o001 for folder in folders)


HERE = os.geteuid() == 0 and _open_to_all(sys.executable, numpy.__file__, parbake.__file__)


def as_root(test: Callable[..., None]) -> Callable[..., None] | None:
    """A test that there only is where the tests run as root, with a Python that others can run too."""
    return test if HERE else None


@pytest.fixture
def bundle() -> Iterator[Path]:
    """A model that tells about its process, where everybody can read it."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield write_function(folder, SPY).path
    shutil.rmtree(folder)


def asked(server: Server, question: int, more: int = 0) -> float:
    return answer(once(server.url, "/v2/models/function/infer", infer((question, more))))[0]


@pytest.fixture
def listening() -> Iterator[int]:
    """A port of this machine that accepts connections."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def can_leave_the_network() -> bool:
    """Whether this platform lets a process do it (containers often do not)."""
    script = "from parbake.runtime.confine import *; import sys; sys.exit(len(confine(Confinement())))"
    return subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_runner_has_no_network_and_no_privileges(bundle: Path, listening: int) -> None:
    with serving(bundle, workers=1, environment={"PARBAKE_ADMIN_TOKEN": "secret"}) as server:
        if can_leave_the_network():
            assert asked(server, CONNECT, listening) == errno.ENETUNREACH
            assert asked(server, INTERFACES) == 1  # its own loopback, which is down
            # Nor does it see into the processes that gave it the work, though they are of the same user.
            for pid in (server.process.pid, *client.status(port=server.port).front_pids):
                assert asked(server, READ, pid) == errno.EACCES
            assert "runner.not_confined" not in server.log()
        else:
            assert server.log().count("runner.not_confined") == 1
        assert asked(server, NEW_PRIVILEGES) == 1
        assert asked(server, CAPABILITIES) == 0
        assert asked(server, UID) == os.getuid()
        assert asked(server, TOKEN) == 0


def test_a_runner_sees_the_network_if_it_is_told(bundle: Path, listening: int) -> None:
    with serving(bundle, workers=1, runner_network=True) as server:
        assert asked(server, CONNECT, listening) == 0
        assert asked(server, NEW_PRIVILEGES) == 1
        assert asked(server, CAPABILITIES) == 0


def test_where_the_platform_keeps_the_network_the_log_says_so_once(bundle: Path, listening: int) -> None:
    """With both kinds of namespaces used up, nobody can leave: a limit that root can set for itself."""
    script = (
        "import ctypes, os, sys\n"
        "for name in ('net', 'user'):\n"
        "    open(f'/proc/sys/user/max_{name}_namespaces', 'w').write('0')\n"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
    )
    # In a user namespace of its own the limits are its own too.
    probe = ["unshare", "--user", "--map-root-user", sys.executable, "-c", script, "-c", "pass"]
    if shutil.which("unshare") is None or subprocess.run(probe, check=False, capture_output=True).returncode:
        pytest.skip("needs unshare(1), and user namespaces with limits that can be set")
    command = [
        *probe[:6],
        "-m",
        "parbake",
        "serve",
        str(bundle),
        "--port",
        "0",
        "--runners",
        "2",
        "--workers",
        "1",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found is not None
        try:
            call = once(found[0], "/v2/models/function/infer", infer((CONNECT, listening)))
            assert answer(call)[0] == 0
            for question, expected in ((NEW_PRIVILEGES, 1), (CAPABILITIES, 0)):
                assert (
                    answer(once(found[0], "/v2/models/function/infer", infer((question, 0))))[0] == expected
                )
        finally:
            process.terminate()
        log = process.stderr.read()
    assert log.count("runner.not_confined") == 1
    assert "the network: unshare: No space left on device" in log


@as_root
def test_a_runner_is_another_user_where_the_server_is_root(bundle: Path, listening: int) -> None:
    with serving(bundle, workers=2, runners=2, runner_user="nobody") as server:
        nobody = pwd.getpwnam("nobody").pw_uid
        for _ in range(4):
            assert asked(server, UID) == nobody
        assert asked(server, CAPABILITIES) == 0
        assert asked(server, CONNECT, listening) == errno.ENETUNREACH
        for pid in client.status(port=server.port).versions[0].runner_pids:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: once(server.url, "/v2/models/function/infer", infer((UID, 0))).status == 200)
        assert asked(server, UID) == nobody
        # It ends with its server, also when that has no time to say so.
        pids = client.status(port=server.port).versions[0].runner_pids
        server.stop(signal.SIGKILL)
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def test_a_user_that_cannot_be_is_refused_at_the_start(bundle: Path) -> None:
    refusals = [("no-such-user", "there is no user 'no-such-user' here")]
    if os.geteuid() == 0:
        refusals.append(("root", "is root, as the server is"))
    else:
        refusals.append(("root", "only a server that runs as root"))
    for user, message in refusals:
        with pytest.raises(ServerNotFound, match=message), serving(bundle, runner_user=user):
            pass


@as_root
def test_somebody_who_is_not_root_leaves_the_network_too(listening: int) -> None:
    script = (
        "import os, socket, sys\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "import ctypes; ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)\n"
        "from parbake.runtime.confine import *\n"
        "kept = confine(Confinement())\n"
        "status = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
        "here = socket.socket()\n"
        "print(kept, os.getuid(), int(status['CapEff'], 16), here.connect_ex(('127.0.0.1', int(sys.argv[1]))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(listening)], check=True, capture_output=True, text=True
    )
    if "unshare" in done.stdout:
        return  # no user namespaces here
    assert done.stdout == f"() 65534 0 {errno.ENETUNREACH}\n"


def test_a_killed_runner_is_back_within_moments(bundle: Path) -> None:
    """The spare has left the network long before it is needed."""
    with serving(bundle, workers=1) as server:
        times: list[float] = []
        for _ in range(3):
            wait_for(lambda: client.status(port=server.port).spare_pid)
            time.sleep(1.0)
            pid = int(asked(server, PID))
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda pid=pid: _pid(server) not in (0, pid))  # type: ignore[misc]  # bound per turn
            restarted = [
                json.loads(line) for line in server.log().splitlines() if '"runner.restarted"' in line
            ]
            times.append(restarted[-1]["ms"])
        assert min(times) < 100


def _pid(server: Server) -> int:
    noted = once(server.url, "/v2/models/function/infer", infer((PID, 0)))
    return int(answer(noted)[0]) if noted.status == 200 else 0


def test_the_options_survive_the_way_to_the_process() -> None:
    import msgspec

    wanted: Callable[[bytes], Any] = msgspec.json.Decoder(Confinement).decode
    for confinement in (Confinement(), Confinement(True, "nobody")):
        assert wanted(msgspec.json.encode(confinement)) == confinement
