"""The prediction log on real files: what was answered can be read, whatever happened to its writer or its disk."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections import Counter
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parbake.contract.key import key_of
from parbake.contract.where import HEAD, MODEL, TABLE
from parbake.monitoring import log as log_module
from parbake.monitoring import recorder as recorder_module
from parbake.monitoring.files import SCHEMA, OpenFile, log_files
from parbake.monitoring.history import profiles_of
from parbake.monitoring.log import PredictionLog, Skipped, log_keys, read_log
from parbake.monitoring.model import InputsMode, LogOptions
from parbake.monitoring.profile import TrafficProfile, ids_of
from parbake.monitoring.recorder import Recorder
from parbake.monitoring.service import Monitor


def recorder(deployment: str = "eta", version: str = "1", **options: Any) -> Recorder:
    return Recorder(deployment, version, "hybrid", "d1", **options)


def note(to: Recorder, first: int, count: int, where: int = MODEL) -> None:
    for i in range(first, first + count):
        to.note(key_of(str(i).encode()), where, 0.002, None, None)


def write(log: PredictionLog, *recorders: Recorder) -> None:
    log.write([(one, rows) for one in recorders if (rows := one.drain()) is not None])


def rows_of(folder: Path, **options: Any) -> list[dict[str, Any]]:
    return [row for table in read_log(folder, **options) for row in table.to_pylist()]


def names(folder: Path) -> list[str]:
    # The folder of the server's state is every integration test's.
    return sorted(path.name for path in folder.iterdir() if path.name != "runtime")


def test_what_was_noted_is_read_back_before_and_after_the_file_is_finished(tmp_path: Path) -> None:
    log = PredictionLog(tmp_path, LogOptions(outputs=True))
    ring = recorder(wants_outputs=True)
    ring.note(key_of(b"a"), TABLE, 0.0015, None, b"\x01\x02")
    ring.refused("overloaded", 0.1)
    before = datetime.now(UTC)
    write(log, ring)
    first = rows_of(tmp_path)
    log.close()
    assert rows_of(tmp_path) == first
    assert [file.finished for file in log_files(tmp_path)] == [True]
    answered, refused = first
    assert abs((answered.pop("time") - before).total_seconds()) < 5
    assert answered == {
        "deployment": "eta", "version": "1", "mode": "hybrid", "digest": "d1", "key": key_of(b"a"), "where": "table",
        "milliseconds": pytest.approx(1.5), "status": "ok", "inputs": None, "outputs": b"\x01\x02",
    }  # fmt: skip
    assert (refused["key"], refused["where"], refused["status"]) == (None, "refused", "overloaded")
    assert stat.S_IMODE(log_files(tmp_path)[0].path.stat().st_mode) == 0o600
    # Other tools read it as it is.
    assert pq.read_table(log_files(tmp_path)[0].path).num_rows == 2


def test_a_log_can_be_read_in_parts(tmp_path: Path) -> None:
    log = PredictionLog(tmp_path, LogOptions())
    rings = [recorder("eta"), recorder("fraud")]
    for number, ring in enumerate(rings):
        note(ring, number * 100, 10 + number)
    write(log, *rings)
    time.sleep(0.01)
    between = datetime.now(UTC)
    note(rings[0], 500, 5)
    write(log, *rings)
    assert len(rows_of(tmp_path)) == 26
    assert len(rows_of(tmp_path, deployment="fraud")) == 11
    assert len(rows_of(tmp_path, since=between)) == 5
    assert len(rows_of(tmp_path, until=between)) == 21
    assert set(rows_of(tmp_path, columns=["key", "where"])[0]) == {"key", "where"}
    assert {name: sum(map(len, ids)) for name, ids in log_keys(read_log(tmp_path)).items()} == {
        "eta": 15, "fraud": 11,
    }  # fmt: skip
    log.close()


def test_sampling_keeps_whole_keys(tmp_path: Path) -> None:
    log = PredictionLog(tmp_path, LogOptions(rate=0.25))
    ring = recorder()
    for _ in range(3):
        note(ring, 0, 2_000)
        write(log, ring)
    log.close()
    kept = Counter(row["key"] for row in rows_of(tmp_path))
    assert set(kept.values()) == {3}
    assert 400 < len(kept) < 600
    assert all(int.from_bytes(key[:8], "big") < 2**62 for key in kept)
    assert log.counts.written + log.counts.sampled_out == 6_000


def test_files_rotate_by_size_and_by_age(tmp_path: Path) -> None:
    log = PredictionLog(tmp_path / "size", LogOptions(file_bytes=20_000))
    ring = recorder()
    for turn in range(6):
        note(ring, turn * 1000, 1000)
        write(log, ring)
    assert len([file for file in log_files(tmp_path / "size") if file.finished]) >= 3
    log.close()
    assert len(rows_of(tmp_path / "size")) == 6_000
    log = PredictionLog(tmp_path / "age", LogOptions(file_age_s=0.0))
    for turn in range(3):
        note(ring, turn, 1)
        write(log, ring)
    assert [file.finished for file in log_files(tmp_path / "age")] == [True] * 3


def test_the_oldest_files_are_removed_and_foreign_ones_never(tmp_path: Path) -> None:
    foreign = [
        "notes.parquet",
        "predictions-.parquet",
        "predictions-20200101T000000000000Z-f0-p1-abc.parquet",
    ]
    for name in foreign:
        (tmp_path / name).write_bytes(bytes(50_000))
    log = PredictionLog(tmp_path, LogOptions(file_age_s=0.0, keep_bytes=100_000))
    ring = recorder()
    for turn in range(10):
        note(ring, turn * 1000, 1000)
        write(log, ring)
    files = log_files(tmp_path)
    assert 1 < len(files) < 10
    assert sum(file.bytes for file in files) <= 100_000
    assert (log.counts.files, log.counts.bytes) == (len(files), sum(file.bytes for file in files))
    # The newest are those that stay.
    assert key_of(b"9999") in {row["key"] for row in rows_of(tmp_path)}
    for file in files:
        os.utime(file.path, (0, 0))
    PredictionLog(tmp_path, LogOptions(keep_age_s=3600.0))
    assert names(tmp_path) == sorted(foreign)


WRITER = """
    import sys, time
    from pathlib import Path
    from parbake.contract.key import key_of
    from parbake.monitoring.log import PredictionLog
    from parbake.monitoring.model import InputsMode, LogOptions
    from parbake.monitoring.service import Monitor

    front = int(sys.argv[2])
    monitor = Monitor(PredictionLog(Path(sys.argv[1]), LogOptions(front=front)), profiles=False, interval_s=0.1)
    ring = monitor.recorder("eta", "1", "hybrid", "d1")
    rows = 0
    while True:
        for _ in range(100):
            ring.note(key_of(f"{front}:{rows}".encode()), 2, 0.001, None, None)
            rows += 1
        print(rows, time.time(), flush=True)
        time.sleep(0.01)
"""


def writer(folder: Path, front: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(folder), str(front)],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_writers_killed_lose_no_more_than_their_last_interval(tmp_path: Path) -> None:
    writers = [writer(tmp_path, front) for front in (0, 1)]
    said: list[list[tuple[int, float]]] = []
    killed: list[float] = []
    for process in writers:
        assert process.stdout is not None
        said.append([(int(n), float(at)) for n, at in (process.stdout.readline().split() for _ in range(80))])
    for process in writers:
        killed.append(time.time())
        process.send_signal(signal.SIGKILL)
        assert process.stdout is not None
        rest = process.stdout.read().splitlines()
        said[len(killed) - 1] += [(int(n), float(at)) for n, at in (line.split() for line in rest)]
        process.wait()
        process.stdout.close()
    assert [file.finished for file in log_files(tmp_path)] == [False, False]
    skipped: list[Skipped] = []
    torn = rows_of(tmp_path, skipped=skipped)
    found = {row["key"] for row in torn}
    for front, (lines, when) in enumerate(zip(said, killed, strict=True)):
        # The interval is 0.1 s; the rest is for a machine that has other things to do.
        sure = max(rows for rows, at in lines if at < when - 0.6)
        assert all(key_of(f"{front}:{i}".encode()) in found for i in range(sure))
    assert [row["time"] for row in torn] == sorted(row["time"] for row in torn)
    # The next start makes Parquet of what the dead have left, and loses nothing of it.
    PredictionLog(tmp_path, LogOptions())
    assert [file.finished for file in log_files(tmp_path)] == [True, True]
    assert Counter(row["key"] for row in rows_of(tmp_path)) == Counter(row["key"] for row in torn)


def test_a_file_of_a_living_writer_is_left_alone_by_others(tmp_path: Path) -> None:
    log = PredictionLog(tmp_path, LogOptions())
    ring = recorder()
    note(ring, 0, 10)
    write(log, ring)
    PredictionLog(tmp_path, LogOptions(keep_bytes=0, keep_age_s=0.0))
    assert [file.finished for file in log_files(tmp_path)] == [False]
    note(ring, 10, 10)
    write(log, ring)
    log.close()
    assert len(rows_of(tmp_path)) == 20


@pytest.mark.parametrize("cut", [1, 11, 500])
def test_a_torn_file_gives_all_rows_before_the_tear_and_is_told(tmp_path: Path, cut: int) -> None:
    log = PredictionLog(tmp_path, LogOptions())
    ring = recorder()
    for turn in range(3):
        note(ring, turn * 10, 10)
        write(log, ring)
    path = log_files(tmp_path)[0].path
    copy = tmp_path / "copy" / path.name
    copy.parent.mkdir()
    copy.write_bytes(path.read_bytes()[:-cut])
    skipped: list[Skipped] = []
    assert len(rows_of(copy.parent, skipped=skipped)) == 20
    assert [(one.path, "cut short" in one.reason) for one in skipped] == [(copy, True)]
    PredictionLog(copy.parent, LogOptions())
    assert len(rows_of(copy.parent)) == 20
    log.close()


def test_files_that_only_look_like_a_log_are_told_and_skipped(tmp_path: Path) -> None:
    log = PredictionLog(tmp_path, LogOptions())
    ring = recorder()
    note(ring, 0, 10)
    write(log, ring)
    log.close()
    (tmp_path / "predictions-20200101T000000000000Z-f0-p1-00000000.parquet").write_bytes(b"PAR1 nonsense")
    pq.write_table(
        pa.table({"x": [1]}), tmp_path / "predictions-20200101T000000000000Z-f0-p1-00000001.parquet"
    )
    skipped: list[Skipped] = []
    assert len(rows_of(tmp_path, skipped=skipped)) == 10
    assert len(skipped) == 2


def test_a_full_disk_drops_rows_and_counts_them_until_there_is_space_again(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs a small file system: run as root in a container that may mount tmpfs")
    try:
        ballast = tmp_path / "ballast"
        ballast.write_bytes(bytes(150_000))
        log = PredictionLog(tmp_path, LogOptions())
        ring = recorder()
        for turn in range(10):
            note(ring, turn * 1000, 1000)
            write(log, ring)
        full = log.counts
        assert full.dropped_disk > 0
        assert full.written > 0
        assert full.written + full.dropped_disk == 10_000
        assert len(rows_of(tmp_path)) == full.written
        ballast.unlink()
        note(ring, 0, 1000)
        write(log, ring)
        log.close()
        assert log.counts.written == full.written + 1000
        assert len(rows_of(tmp_path)) == full.written + 1000
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_rows_that_are_written_only_in_part_are_cut_off_again(tmp_path: Path) -> None:
    log = PredictionLog(tmp_path, LogOptions())
    ring = recorder()
    note(ring, 0, 100)
    write(log, ring)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (log_files(tmp_path)[0].bytes + 100, before[1]))
        note(ring, 100, 5_000)
        write(log, ring)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    assert (log.counts.written, log.counts.dropped_disk) == (100, 5_000)
    note(ring, 6_000, 50)
    write(log, ring)
    log.close()
    skipped: list[Skipped] = []
    assert len(rows_of(tmp_path, skipped=skipped)) == 150
    assert skipped == []


def test_a_folder_that_is_gone_costs_rows_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "log"
    log = PredictionLog(folder, LogOptions())
    folder.rmdir()
    ring = recorder()
    for _ in range(3):
        note(ring, 0, 10)
        write(log, ring)
    assert log.counts.dropped_disk == 30
    assert capsys.readouterr().err.count("log.failing") == 1
    folder.mkdir()
    note(ring, 0, 10)
    write(log, ring)
    log.close()
    assert len(rows_of(folder)) == 10
    assert "log.writing_again" in capsys.readouterr().err


def test_a_file_that_cannot_be_finished_stays_readable_and_is_finished_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = PredictionLog(tmp_path, LogOptions())
    ring = recorder()
    note(ring, 0, 10)
    write(log, ring)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        log.rotate()
    assert [file.finished for file in log_files(tmp_path)] == [False]
    assert len(rows_of(tmp_path)) == 10
    note(ring, 10, 10)
    write(log, ring)
    log.close()
    assert [file.finished for file in log_files(tmp_path)] == [True, True]
    assert len(names(tmp_path)) == 2
    assert len(rows_of(tmp_path)) == 20


def test_a_clock_that_jumps_back_begins_a_new_file_and_order_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = PredictionLog(tmp_path, LogOptions())
    ring = recorder()
    for turn, now in enumerate((5_000.0, 5_001.0, 2_000.0, 2_001.0, 5_000.5)):
        monkeypatch.setattr(recorder_module, "time", lambda now=now: now)
        note(ring, turn * 10, 10)
        write(log, ring)
    assert len(log_files(tmp_path)) == 2
    log.close()
    times = [row["time"].timestamp() for row in rows_of(tmp_path)]
    assert len(times) == 50
    assert times == sorted(times)


def test_fronts_are_merged_in_order_of_time_with_little_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "_READ_ROWS", 64)
    logs = [PredictionLog(tmp_path, LogOptions(front=front, file_bytes=8_000)) for front in range(3)]
    rings = [recorder(version=str(front)) for front in range(3)]
    for turn in range(12):
        for front, (log, ring) in enumerate(zip(logs, rings, strict=True)):
            note(ring, turn * 1000 + front * 100, 80)
            write(log, ring)
    for log in logs[:2]:
        log.close()
    tables = list(read_log(tmp_path))
    times = [value for table in tables for value in table.column("time").to_pylist()]
    assert len(times) == 12 * 3 * 80
    assert times == sorted(times)
    assert max(table.num_rows for table in tables) <= 3 * 64
    logs[2].close()


def test_inputs_are_left_out_hashed_or_plain(tmp_path: Path) -> None:
    found = {}
    for mode in ("off", "hashed", "plain"):
        folder = tmp_path / mode
        log = PredictionLog(folder, LogOptions(inputs=mode))
        ring = recorder(wants_inputs=True)
        for _ in range(2):
            ring.note(key_of(b"secret"), MODEL, 0.1, [b"secret", b"more"], None)
        ring.refused("overloaded", 0.1)
        write(log, ring)
        log.close()
        found[mode] = rows_of(folder)
        assert found[mode][2]["inputs"] is None
    assert found["off"][0]["inputs"] is None
    assert found["plain"][0]["inputs"] == [b"secret", b"more"]
    hashed = found["hashed"][0]
    assert [len(value) for value in hashed["inputs"]] == [16, 16]
    # The same value has the same hash, and neither it nor the key can be computed without the secret.
    assert hashed["inputs"] == found["hashed"][1]["inputs"]
    assert hashed["key"] == found["hashed"][1]["key"]
    assert hashed["key"] not in (key_of(b"secret"), None)
    assert hashed["inputs"][0] != key_of(b"secret")
    assert stat.S_IMODE((tmp_path / "hashed" / ".secret").stat().st_mode) == 0o600
    again = PredictionLog(tmp_path / "hashed", LogOptions(inputs="hashed"))
    ring = recorder(wants_inputs=True)
    ring.note(key_of(b"secret"), MODEL, 0.1, [b"secret", b"more"], None)
    write(again, ring)
    again.close()
    assert rows_of(tmp_path / "hashed")[-1]["inputs"] == hashed["inputs"]


VALUES = st.binary(max_size=3)


@given(
    st.sampled_from(["off", "hashed", "plain"]),
    st.booleans(),
    st.lists(
        st.tuples(
            st.sampled_from(["note", "turn", "bare", "refused"]),
            st.lists(st.tuples(st.lists(VALUES, max_size=2), VALUES), min_size=1, max_size=3),
        ),
        max_size=6,
    ),
    st.sampled_from([0, 500, 1 << 20]),
)
def test_however_rows_are_noted_the_log_has_what_each_was(
    mode: InputsMode, outputs: bool, steps: list[tuple[str, list[tuple[list[bytes], bytes]]]], known: int
) -> None:
    """Also when hashes are remembered, forgotten in between, or not kept at all."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        patched.setattr(log_module, "_KNOWN_BYTES", known)
        log = PredictionLog(Path(folder), LogOptions(inputs=mode, outputs=outputs))
        ring = recorder(wants_inputs=mode != "off", wants_outputs=outputs)
        secret = blake2b(b"eta", key=log._secret, digest_size=32).digest() if mode == "hashed" else b""

        def shown(value: bytes) -> bytes:
            return blake2b(value, key=secret, digest_size=16).digest() if secret else value

        alone: list[Any] = []
        together: list[Any] = []
        for how, rows in steps:
            keys = [key_of(record) for _, record in rows]
            if how == "refused":
                ring.refused("overloaded", 0.1)
                alone.append((None, None, None))
            for key, (raws, record) in zip(keys, rows, strict=True):
                inputs = [shown(raw) for raw in raws] if mode != "off" and how != "bare" else None
                row = (shown(key), inputs, record if outputs and how != "bare" else None)
                if how in ("turn", "bare"):
                    together.append(row)
                elif how == "note":
                    ring.note(key, MODEL, 0.1, raws if mode != "off" else None, record if outputs else None)
                    alone.append(row)
            if how == "turn":
                raws_of = [raws for raws, _ in rows] if mode != "off" else None
                records = [record for _, record in rows] if outputs else None
                ring.note_turn(MODEL, keys, [0.1] * len(keys), raws_of, records)
            elif how == "bare":
                ring.note_turn(MODEL, keys, [0.1] * len(keys))
        write(log, ring)
        log.close()
        found = [(row["key"], row["inputs"], row["outputs"]) for row in rows_of(Path(folder))]
        assert sorted(map(repr, found)) == sorted(map(repr, alone + together))


def test_remembered_hashes_take_no_more_than_their_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "_KNOWN_BYTES", 50_000)
    hidden = log_module._Hidden(bytes(32))
    largest = 0
    for turn in range(50):
        values = [b"%d" % (turn * 20 + i) for i in range(100)]
        assert hidden.of(values) == [blake2b(v, key=bytes(32), digest_size=16).digest() for v in values]
        largest = max(largest, len(hidden._known))
    assert 100 < largest <= 50_000 // 200
    hidden.of([bytes([i]) * 1000 for i in range(200)])
    assert len(hidden._known) <= 50_000 // 200


def test_a_monitor_fills_log_and_profile_and_counts_everything(tmp_path: Path) -> None:
    monitor = Monitor(PredictionLog(tmp_path, LogOptions()), interval_s=0.05)
    ring = monitor.recorder("eta", "1", "hybrid", "d1", rows=1000)
    for i in range(1500):
        ring.note(key_of(str(i % 7).encode()), HEAD, 0.001, None, None)
        if i == 700:
            ring.refused("overloaded", 0.001)
    monitor.retire(ring)
    deadline = time.monotonic() + 5
    while monitor.counts().written < 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    monitor.close()
    counts = monitor.counts()
    assert counts.written + counts.dropped_ring == 1501
    assert len(rows_of(tmp_path)) == counts.written
    traffic = TrafficProfile.from_bytes(monitor.profiles()["eta"]).traffic()
    assert traffic.cardinality.value == 7
    assert traffic.requests in (counts.written, counts.written - 1)


def test_the_profiles_of_a_log_are_those_of_its_traffic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = PredictionLog(tmp_path, LogOptions())
    rings = [recorder("eta"), recorder("fraud")]
    live = TrafficProfile()
    for second in range(400):
        now = 6_000.0 + second
        monkeypatch.setattr(recorder_module, "time", lambda now=now: now)
        for ring in rings:
            note(ring, second % 50, 10)
        rings[0].refused("overloaded", 0.1, key_of(b"refused"))
        live.feed(ids_of([key_of(str(second % 50 + i).encode()) for i in range(10)]), now)
        if second % 100 == 99:
            write(log, *rings)
    log.close()
    found = profiles_of(read_log(tmp_path))
    assert set(found) == {"eta", "fraud"}
    assert found["eta"].traffic() == live.traffic()
    assert found["fraud"].rate_per_s() == pytest.approx(10)


def test_counting_and_new_recorders_do_not_wait_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor = Monitor(PredictionLog(tmp_path, LogOptions(file_age_s=0.0)), interval_s=0.02)
    slow, go_on = threading.Event(), threading.Event()
    real = os.fsync

    def fsync(descriptor: int) -> None:
        slow.set()
        go_on.wait(10)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    ring = monitor.recorder("eta", "1", "hybrid", "d1")
    note(ring, 0, 10)
    assert slow.wait(5)
    began = time.monotonic()
    assert monitor.counts().written == 10
    monitor.retire(monitor.recorder("eta", "2", "hybrid", "d2"))
    assert len(monitor.profiles()) == 1
    assert time.monotonic() - began < 2
    go_on.set()
    monitor.close()


def test_either_consumer_may_be_off(tmp_path: Path) -> None:
    for log, profiles in ((None, True), (None, False), (PredictionLog(tmp_path, LogOptions()), False)):
        monitor = Monitor(log, profiles=profiles, interval_s=10)
        ring = monitor.recorder("eta", "1", "hybrid", "d1")
        # Without a log, keys are all that is wanted.
        assert (ring.note_key is not None) == (log is None)
        if ring.note_key is not None:
            for number in range(20):
                ring.note_key(number.to_bytes(16, "big"))
        else:
            note(ring, 0, 20)
        monitor.close()
        assert bool(monitor.profiles()) == profiles
        assert monitor.counts().written == (20 if log is not None else 0)


def test_an_open_file_has_the_columns_that_are_documented(tmp_path: Path) -> None:
    empty = OpenFile(tmp_path, 1e9, 0)
    empty.finish()
    assert names(tmp_path) == []
    assert SCHEMA.names == [
        "time", "deployment", "version", "mode", "digest", "key", "where", "milliseconds", "status", "inputs",
        "outputs",
    ]  # fmt: skip
