"""What the store does when things break: killed writers and servers, full disks, torn files, clocks that jump."""

from __future__ import annotations

import random
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from parbake.cli.main import main
from parbake.errors import Conflict, LeaseLost, NotFound, StateAway, StateTorn
from parbake.release.connect import address_of
from parbake.release.database import Database, open_database
from parbake.release.model import Proposal
from tests.postgres import Postgres

WRITER = """
import sys
from parbake.release.database import open_database
from parbake.release.model import Proposal
state = open_database(sys.argv[1])
name = sys.argv[2]
number = 0
while True:
    number += 1
    release = state.begin_release(Proposal(name, str(number), "d", steps=(0.5, 1.0)), by="w")
    print("begun", number, flush=True)
    release = state.advance(release, 0, by="w")
    release = state.advance(release, 1, by="w")
    print("advanced", number, flush=True)
    state.finish(release, "live", by="w")
    print("live", number, flush=True)
"""


class Writer:
    """A process that releases one version after the other, and says on a file what was acknowledged."""

    def __init__(self, url: str, name: str, folder: Path) -> None:
        self._said, self._errors = folder / f"{name}.out", folder / f"{name}.err"
        with self._said.open("w") as said, self._errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", WRITER, url, name], stdout=said, stderr=errors, text=True
            )
        for _ in range(2400):
            if "live 2\n" in self._said.read_text():
                return
            assert self.process.poll() is None, self._errors.read_text()
            time.sleep(0.025)
        raise AssertionError(f"{name} is slow: {self._said.read_text()}")

    def ended(self) -> tuple[str, str]:
        """Wait for its end; gives whole lines only: a torn one was never acknowledged to anybody."""
        self.process.wait(timeout=60)
        return self._said.read_text().rpartition("\n")[0], self._errors.read_text()


def check_nothing_half_done(state: Database, name: str, acknowledged: str) -> None:
    """Every state has its events, every event its state, and what was acknowledged is there."""
    history = state.history(name, limit=1_000_000)
    told: dict[int, list[str]] = {}
    for event in history:
        told.setdefault(event.release, []).append(event.what.removeprefix("release."))
    full = ["begun", "advanced", "advanced", "live", "superseded"]
    ends = {("pending", 1), ("running", 2), ("running", 3), ("live", 4), ("superseded", 5)}
    releases = state.releases(name)
    assert {release.id for release in releases} == set(told)
    for release in releases:
        events = told[release.id]
        assert events == full[: len(events)]
        assert (release.state, len(events)) in ends
        assert release.revision == len(events)
    for line in acknowledged.splitlines():
        what, _, version = line.partition(" ")
        assert any(e.what == f"release.{what}" and e.version == version for e in history), line


def test_a_writer_killed_at_any_moment_leaves_nothing_half_done(url: str, tmp_path: Path) -> None:
    state = open_database(url)
    for turn in range(4):
        name = f"eta{turn}"
        victim = Writer(url, name, tmp_path)
        time.sleep(random.random() * 0.2)
        victim.process.kill()
        check_nothing_half_done(state, name, victim.ended()[0])
        if state.releases(name, under_way=True):
            state.roll_back(name, by="next")
        release = state.begin_release(Proposal(name, "next", "d"), by="next")
        assert state.finish(release, "live", by="next").state == "live"
    state.close()


def test_a_writer_that_stands_still_in_a_transaction_is_named(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'state.db'}"
    state = open_database(url)
    blocker = sqlite3.connect(tmp_path / "state.db", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    assert state.history() == []
    with pytest.raises(StateAway, match="is busy: another process holds it for over 5 s"):
        state.set_parameters("eta", {}, after=0, by="x")
    blocker.execute("ROLLBACK")
    blocker.close()
    assert state.set_parameters("eta", {}, after=0, by="x").version == 1
    state.close()


def test_a_writer_that_stands_still_in_postgres_is_named(postgres: Postgres) -> None:
    url = postgres.database()
    state = open_database(url)
    release = state.begin_release(Proposal("eta", "1", "d"), by="x")
    blocker = sa.create_engine(address_of(url))
    with blocker.connect() as connection:
        connection.exec_driver_sql("SELECT name FROM deployments FOR UPDATE")
        with pytest.raises(StateAway, match="is busy: another process holds it for over 5 s"):
            state.advance(release, 0, by="x")
        other = state.begin_release(Proposal("else", "1", "d"), by="x")
        assert other.state == "pending"
        connection.rollback()
    blocker.dispose()
    assert state.advance(release, 0, by="x").step == 0
    state.close()


@pytest.fixture(params=["limit", "disk"])
def full_soon(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A folder for half a megabyte, and what makes it larger: by a limit on files, and by a disk where that may be."""
    if request.param == "disk":
        folder = tmp_path / "disk"
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
        if subprocess.run(mount, capture_output=True, check=False).returncode == 0:
            remount = ["mount", "-o", "remount,size=16m", str(folder)]
            yield folder, lambda: subprocess.run(remount, check=True).check_returncode()
            subprocess.run(["umount", "-l", folder], check=True)
            return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512 * 1024, before[1]))
    yield tmp_path, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_refuses_what_does_not_fit_and_loses_nothing(
    full_soon: tuple[Path, Callable[[], None]],
) -> None:
    folder, make_room = full_soon
    state = open_database(f"sqlite:///{folder / 'state.db'}")
    release = state.begin_release(Proposal("eta", "1", "d"), by="x")
    kept = 0
    refused: StateAway | None = None
    while refused is None and kept < 1000:
        try:
            kept = state.set_parameters("eta", {"a": "x" * 20_000}, after=kept, by="x").version
        except StateAway as error:
            refused = error
    assert refused is not None
    assert "cannot be written" in refused.message
    assert "free space" in refused.hint
    assert kept > 0
    assert state.parameters("eta").version == kept
    assert state.release(release.id) == release
    make_room()
    assert state.set_parameters("eta", {"b": 1}, after=kept, by="x").version == kept + 1
    assert state.finish(release, "live", by="x").state == "live"
    assert len(state.history("eta")) == kept + 3
    state.close()


@pytest.mark.parametrize("how", ["no database", "cut", "overwritten", "empty pages"])
def test_a_torn_file_is_said_to_be_torn_when_it_is_opened(tmp_path: Path, how: str) -> None:
    path = tmp_path / "state.db"
    url = f"sqlite:///{path}"
    state = open_database(url)
    for number in range(60):
        state.set_parameters("eta", {"a": "x" * 2000}, after=number, by="x")
    state.close()
    assert not (tmp_path / "state.db-wal").exists()
    raw = bytearray(path.read_bytes())
    assert len(raw) > 200_000
    match how:
        case "no database":
            raw[:100] = b"x" * 100
        case "cut":
            del raw[len(raw) // 2 :]
        case "overwritten":
            raw[40_000:80_000] = random.Random(7).randbytes(40_000)
        case _:
            raw[100_000:140_000] = bytes(40_000)
    path.write_bytes(raw)
    with pytest.raises(StateTorn, match="is damaged") as caught:
        open_database(url)
    assert "bring back a copy" in caught.value.hint
    assert path.read_bytes() == bytes(raw)


def test_a_file_that_is_removed_is_missed_and_its_copy_is_taken_up(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    state = open_database(f"sqlite:///{path}")
    state.set_parameters("eta", {"a": 1}, after=0, by="x")
    copy = sqlite3.connect(tmp_path / "copy.db")
    source = sqlite3.connect(path)
    source.backup(copy)
    source.close()
    copy.close()
    for file in tmp_path.glob("state.db*"):
        file.unlink()
    for _ in range(2):
        with pytest.raises(StateAway, match="cannot be opened: is the file there"):
            state.set_parameters("eta", {"a": 2}, after=1, by="x")
    assert not path.exists()
    (tmp_path / "copy.db").rename(path)
    assert state.set_parameters("eta", {"a": 2}, after=1, by="x").version == 2
    state.close()


def test_a_folder_where_nothing_can_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateAway, match="cannot be opened"):
        open_database(f"sqlite:///{tmp_path / 'file' / 'state.db'}")
    with pytest.raises(NotFound, match="no state at"):
        open_database(f"sqlite:///{tmp_path / 'none.db'}", create=False)
    assert not (tmp_path / "none.db").exists()


def test_the_file_is_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "state.db"
    state = open_database(f"sqlite:///{path}")
    state.lease("c", "x", 5)
    assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {0o600}
    state.close()


def test_a_clock_that_jumps_never_lets_two_write(tmp_path: Path) -> None:
    now = [1_000_000.0]
    state = open_database(f"sqlite:///{tmp_path / 'state.db'}", clock=lambda: now[0])
    one = state.lease("controller", "one", 10)
    release = state.begin_release(Proposal("eta", "1", "d", steps=(0.5, 1.0)), by="one", fence=one)

    now[0] += 86_400
    two = state.lease("controller", "two", 10)
    assert two is not None
    with pytest.raises(LeaseLost, match="two has it"):
        state.advance(release, 0, by="one", fence=one)
    assert state.advance(release, 0, by="two", fence=two).step == 0

    # A clock set back a day must not leave the dead holder's lease valid for that day.
    now[0] -= 86_400
    three = state.lease("controller", "three", 10)
    assert three is not None
    assert three.token == two.token + 1
    with pytest.raises(LeaseLost, match="three has it"):
        state.advance(state.release(release.id), 1, by="two", fence=two)
    now[0] += 11
    with pytest.raises(LeaseLost, match="it is over"):
        state.advance(state.release(release.id), 1, by="three", fence=three)
    state.close()


@pytest.fixture
def fragile() -> Iterator[Postgres]:
    """A PostgreSQL server that a test may kill."""
    server = Postgres()
    yield server
    server.close()


def test_a_postgres_that_is_killed_loses_nothing_and_is_found_again(fragile: Postgres) -> None:
    url = fragile.database()
    state = open_database(url)
    lease = state.lease("controller", "one", 60)
    release = state.begin_release(Proposal("eta", "1", "d", steps=(0.1, 1.0)), by="ana", fence=lease)
    release = state.advance(release, 0, by="ana", fence=lease)
    before = state.history()
    for _ in range(2):
        fragile.kill()
        started = time.monotonic()
        with pytest.raises(StateAway, match="does not answer") as caught:
            state.advance(release, 1, by="ana", fence=lease)
        assert time.monotonic() - started < 10
        assert "parbake serves on without it" in caught.value.hint
        with pytest.raises(StateAway, match="does not answer"):
            state.history()
        fragile.start()
        assert state.history() == before
        assert state.release(release.id) == release
    assert state.advance(release, 1, by="ana", fence=lease).step == 1
    with pytest.raises(Conflict):
        state.advance(release, 1, by="ana", fence=lease)
    state.close()


def test_a_controller_goes_on_through_deaths_of_postgres_and_takes_every_step_once(fragile: Postgres) -> None:
    state = open_database(fragile.database())
    steps = tuple((number + 1) / 300 for number in range(300))
    begun = state.begin_release(Proposal("eta", "1", "d", kind="canary", steps=steps), by="ana")
    away: list[str] = []

    def control() -> None:
        while True:
            try:
                now = state.release(begun.id)
                if now.step == len(steps) - 1:
                    return
                state.advance(now, now.step + 1, by="controller")
            except StateAway as error:
                away.append(error.message)
                time.sleep(0.05)

    with ThreadPoolExecutor(1) as threads:
        done = threads.submit(control)
        for _ in range(3):
            reached = state.release(begun.id).step
            while state.release(begun.id).step < min(reached + 20, len(steps) - 1):
                time.sleep(0.01)
            fragile.kill()
            fragile.start()
        done.result(timeout=60)
    assert away
    advanced = [event.details["step"] for event in state.history("eta") if event.what == "release.advanced"]
    assert advanced == list(range(len(steps)))
    assert state.release(begun.id).revision == len(steps) + 1
    state.close()


def test_a_postgres_killed_under_a_writer_keeps_all_that_was_acknowledged(
    fragile: Postgres, tmp_path: Path
) -> None:
    url = fragile.database()
    open_database(url).close()
    busy = Writer(url, "eta", tmp_path)
    fragile.kill()
    said, errors = busy.ended()
    assert "StateAway" in errors
    fragile.start()
    state = open_database(url)
    check_nothing_half_done(state, "eta", said)
    state.close()


def test_the_command_says_where_the_store_is_missing_or_away(tmp_path: Path) -> None:
    assert main(["history", "--store", f"sqlite:///{tmp_path / 'none.db'}"]) == 3
    assert main(["history", "--store", "postgresql://x@127.0.0.1:1/x"]) == 4
    (tmp_path / "torn.db").write_bytes(b"x" * 5000)
    assert main(["history", "--store", f"sqlite:///{tmp_path / 'torn.db'}"]) == 5
