"""Where commands find a running server: for its owner only, and never somebody else's word."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from parbake.errors import ServerNotFound
from parbake.transports.statefile import Running, find, forget, remember


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


def server(port: int = 8000, pid: int | None = None, **changed: Any) -> Running:
    given = Running(
        pid or os.getpid(), "127.0.0.1", port, None, "http://127.0.0.1:1", "secret", False, ("eta",)
    )
    return msgspec.structs.replace(given, **changed)


def ended(running: Running) -> None:
    """Remember a server whose process is no more, and did not forget it."""
    code = (
        "import msgspec, os, sys\n"
        "from parbake.transports.statefile import Running, remember\n"
        "remember(msgspec.json.decode(sys.argv[1], type=Running))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    process = subprocess.run([sys.executable, "-c", code, msgspec.json.encode(running)], check=False)
    assert process.returncode == -9


def test_what_was_remembered_is_found_until_it_is_forgotten() -> None:
    running = server()
    remembered = remember(running)
    assert remembered is not None
    assert find() == find(8000) == running
    forget(remembered)
    with pytest.raises(ServerNotFound, match="no server of yours is running on this machine"):
        find()


def test_servers_that_start_at_the_same_time_do_not_take_each_others_file(runtime: Path) -> None:
    together = threading.Barrier(8)

    def start(number: int) -> object:
        together.wait()
        return remember(server(host=f"127.0.0.{number + 1}"))

    for _ in range(20):
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(start, range(8)))
        assert find(8000).port == 8000
        assert [path.name for path in (runtime / "parbake").iterdir()] == ["8000.json"]


def test_the_token_is_for_the_owner_only(runtime: Path) -> None:
    old = os.umask(0)
    try:
        remember(server())
    finally:
        os.umask(old)
    folder = runtime / "parbake"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "8000.json").stat().st_mode) == 0o600
    assert [path.name for path in folder.iterdir()] == ["8000.json"]


def test_a_folder_that_others_may_look_into_is_not_used(runtime: Path) -> None:
    folder = runtime / "parbake"
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    remember(server())
    assert not list(folder.iterdir())
    (folder / "8000.json").write_bytes(msgspec.json.encode(server()))
    with pytest.raises(ServerNotFound):
        find()


def test_a_folder_of_somebody_else_is_not_used(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remember(server())
    # Only root could give the folder away.
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(ServerNotFound):
        find()
    remember(server(8001))
    assert [path.name for path in (runtime / "parbake").iterdir()] == ["8000.json"]


def test_a_link_in_place_of_the_folder_is_not_followed(runtime: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    runtime.mkdir()
    (runtime / "parbake").symlink_to(elsewhere)
    remember(server())
    assert not list(elsewhere.iterdir())


def test_a_server_that_cannot_be_remembered_serves_all_the_same(runtime: Path) -> None:
    runtime.write_text("a file where the folder should be")
    assert remember(server()) is None
    with pytest.raises(ServerNotFound):
        find()


def test_a_server_that_was_killed_is_not_found_and_its_token_is_removed(runtime: Path) -> None:
    # Its number may be that of another process by now.
    ended(server(pid=os.getpid()))
    assert (runtime / "parbake" / "8000.json").exists()
    with pytest.raises(ServerNotFound):
        find()
    assert not list((runtime / "parbake").iterdir())
    remember(server(8001))
    assert find().port == 8001


def test_of_several_servers_one_must_be_named() -> None:
    remember(server(8000))
    remember(server(8001))
    with pytest.raises(ServerNotFound, match="several servers are running") as caught:
        find()
    assert caught.value.hint == "say which with --port: 8000, 8001"
    assert find(8001).port == 8001
    with pytest.raises(ServerNotFound, match="on port 9"):
        find(9)


def test_a_server_forgets_only_itself() -> None:
    ours = remember(server(token="ours"))
    assert ours is not None
    theirs = server(token="theirs")
    remember(theirs)
    forget(ours)
    assert find() == theirs


def test_what_is_torn_is_passed_over(runtime: Path) -> None:
    remember(server())
    (runtime / "parbake" / "1.json").write_text("{")
    (runtime / "parbake" / "2.json").write_text('{"pid": 1}')
    assert find().port == 8000


@pytest.mark.parametrize(
    ("host", "tls", "url"),
    [
        ("127.0.0.1", False, "http://127.0.0.1:8000"),
        ("0.0.0.0", True, "https://127.0.0.1:8000"),
        ("::1", False, "http://[::1]:8000"),
        ("example.org", True, "https://example.org:8000"),
    ],
)
def test_the_address_is_one_that_a_person_can_use(host: str, tls: bool, url: str) -> None:
    assert server(host=host, tls=tls).url == url
