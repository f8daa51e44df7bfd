"""The processes that look at the machine's pace: they tell of it, and they end."""

import os
import signal
import subprocess
import sys
import time

from parbake.runtime.pace import Pace

_CHILDREN = """
import sys, time
from parbake.runtime.pace import Pace
with Pace() as pace:
    print(*(one.pid for one in pace._processes), flush=True)
    time.sleep(60)
"""


def _gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    with open(f"/proc/{pid}/stat") as status:
        return status.read().rpartition(")")[2].split()[0] == "Z"


def test_a_pace_is_told_of_now_and_of_each_part_of_what_was() -> None:
    with Pace() as pace:
        started = time.monotonic()
        time.sleep(0.5)
        now = time.monotonic()
        parts = pace.parts(started, now, 0.1)

        assert len(parts) == 5
        assert (parts > 0).all()
        assert min(parts) <= pace.between(started) <= max(parts) * 1.1


def test_they_end_with_the_block_and_with_who_wanted_to_know() -> None:
    with Pace() as pace:
        pids = [one.pid for one in pace._processes]
        assert not any(map(_gone, pids))
    assert all(map(_gone, pids))

    with subprocess.Popen([sys.executable, "-c", _CHILDREN], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        process.send_signal(signal.SIGKILL)
        process.wait()
        limit = time.monotonic() + 20
        while not all(map(_gone, pids)):
            assert time.monotonic() < limit, "processes were left behind"
            time.sleep(0.02)
