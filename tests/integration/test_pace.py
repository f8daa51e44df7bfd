"""The processes that look at the machine's pace: they tell of it, and they end."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from parbake.app import measure as module
from parbake.app.measure import measure
from parbake.contract.bundle import StoredBundle, write_bundle
from parbake.contract.model import Step
from parbake.errors import NotAllowed
from parbake.runtime.pace import Pace

_HOLDER = """
import sys, time
from parbake.runtime.pace import Pace
with Pace() as pace:
    print(*(one.pid for one in pace._processes), flush=True)
    time.sleep(60)
"""


def _gone(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return status.rpartition(")")[2].split()[0] == "Z"


def _wait_until_gone(pids: list[int]) -> None:
    limit = time.monotonic() + 20
    while not all(map(_gone, pids)):
        assert time.monotonic() < limit, "processes were left behind"
        time.sleep(0.02)


def test_a_pace_is_told_of_a_span_and_of_each_part_of_it() -> None:
    with Pace() as pace:
        started = time.monotonic()
        time.sleep(0.5)
        parts = pace.parts(started, started + 0.5, 0.1)

        assert pace.seen
        assert pace.whole
        assert len(parts) == 5
        assert (parts > 1).all()
        assert 0.8 * min(parts) <= pace.between(started, started + 0.5) <= 1.2 * max(parts)


def test_they_end_with_the_block() -> None:
    with Pace() as pace:
        pids = [one.pid for one in pace._processes]
        assert pids
        assert not any(map(_gone, pids))

    assert all(map(_gone, pids))


def test_they_end_with_a_process_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", _HOLDER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        assert pids
        process.send_signal(signal.SIGKILL)
        process.wait()
        _wait_until_gone(pids)


def test_one_whose_parent_was_gone_before_it_began_ends_at_once(tmp_path: Path) -> None:
    nobody = subprocess.Popen(["true"])
    nobody.wait()
    command = [sys.executable, "-P", "-m", "parbake.runtime.pacer", "0", str(tmp_path / "0"), str(nobody.pid)]

    assert subprocess.run(command, timeout=20, check=False).returncode == 0


def test_modules_of_the_folder_that_one_is_in_are_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "socket.py").write_text("raise RuntimeError('this is not Python's')")
    monkeypatch.chdir(tmp_path)

    with Pace() as pace:
        assert pace.seen


def test_where_it_cannot_be_seen_the_pace_is_1_and_one_that_ends_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Pace() as pace:
        pace._processes[0].kill()
        pace._processes[0].wait()
        assert pace.seen
        assert not pace.whole

    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Pace() as pace:
        assert not pace.seen
        assert pace.whole
        assert pace.of([(0.0, 1.0), (1.0, 2.0)]).tolist() == np.ones(2).tolist()


def test_a_model_that_may_not_be_loaded_is_refused_as_it_is_anywhere(
    tmp_path: Path, doubler_bundle: StoredBundle
) -> None:
    contract = msgspec.structs.replace(
        doubler_bundle.contract, steps=(Step("pickle", "p.joblib", "y=predict"),)
    )
    files = {"p.joblib": b"x"}
    pickled = write_bundle(
        tmp_path / "pickled", contract, files, doubler_bundle.goldens(), doubler_bundle.environment
    )

    with pytest.raises(NotAllowed, match="pickle"):
        measure(pickled, connections=4, deadline_s=1.0)


class _Quick(Pace):
    """A machine that does a million pieces of work in a second, all the time."""

    def of(self, spans: Sequence[tuple[float, float]]) -> npt.NDArray[np.float64]:
        return np.full(len(spans), 1e6)


def test_what_was_measured_is_told_at_the_mean_pace(
    monkeypatch: pytest.MonkeyPatch, doubler_bundle: StoredBundle
) -> None:
    def twice() -> Pace:
        raise AssertionError("the pace was looked at twice")

    monkeypatch.setattr(module, "Pace", twice)

    with _Quick() as pace:
        costs = measure(doubler_bundle, connections=4, deadline_s=1.0, pace=pace)
        # It goes on for whoever looked at it before.
        assert pace.whole

    assert (costs.pace, costs.unsteady) == (1e6, 0.0)
    # Microseconds each, and not a million times that.
    assert 0 < costs.model.one_s < 0.1
    assert 0 < costs.front.hit_s < 0.1
