"""Changes under load: one bundle in the place of another, again and again; and the end of the server."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Final

from chaos.bundles import TAIL, asking, function, multiplier
from chaos.load import calling
from chaos.model import Observed, Scenario, Stage, at_least, at_most, no_failures, none
from chaos.servers import is_there, server_memory_mb, status, wait_for
from parbake.app.supervisor import Change
from parbake.settings import Placement
from parbake.testing import Server, serving
from parbake.transports import client

_SWAPS: Final = 200
_QUICK_SWAPS: Final = 24
_SETTLED: Final = 3
"""The swap after which memory is compared with that after the last one."""
_GROWTH: Final = 0.05
_SLOWER: Final = 2.0
_PAUSE_S: Final = 0.15
_DOUBLES_SLOWLY: Final = """
import time

def predict(x):
    time.sleep(0.3)
    return x * 2
"""


def _percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[max(math.ceil(share * len(ordered)), 1) - 1] if ordered else math.nan


def _memory(server: Server, placement: Placement) -> float:
    """When everything that a swap leaves behind has ended, and what stands by for the next is there."""
    if placement == "process":
        wait_for(lambda: status(server).spare_pid)
        # The spare imports its libraries.
        time.sleep(1.0)
    return server_memory_mb(server)


def _swaps(stage: Stage, placement: Placement) -> Observed:
    stage.say("starting a server")
    bundles = [multiplier(stage.folder / f"{f}.bundle", f, name="eta") for f in (3, 5)]
    count = _QUICK_SWAPS if stage.quick else _SWAPS
    windows: list[tuple[float, float]] = []
    with serving(bundles[0], workers=1, placement=placement) as server:  # noqa: SIM117  the memory is taken without callers
        with calling(server.port, asking("callers", "eta", TAIL, 3, 5, connections=4)) as calls:
            time.sleep(0.5)
            first_mb = 0.0
            for number in range(1, count + 1):
                stage.say(f"swap {number} of {count}")
                began = time.monotonic()
                client.reload([Change("eta", str(bundles[number % 2]))], port=server.port)
                windows.append((began, time.monotonic()))
                time.sleep(_PAUSE_S)
                if number == _SETTLED:
                    first_mb = _memory(server, placement)
            last_mb = _memory(server, placement)
    heard = calls["callers"]
    inside: list[float] = []
    outside: list[float] = []
    stale = 0
    # Windows and answers are both in the order of time.
    at = 0
    for noted in sorted(heard.good, key=lambda n: n.began):
        while at < len(windows) and windows[at][1] < noted.began:
            at += 1
        within = at < len(windows) and noted.ended >= windows[at][0]
        (inside if within else outside).append((noted.ended - noted.began) * 1e3)
        # Between two swaps there is one right answer.
        stale += not within and noted.answer != at % 2
    p99_in, p99_out = _percentile(sorted(inside), 0.99), _percentile(sorted(outside), 0.99)
    checks = [
        no_failures("failed requests", heard.failed),
        none("answers of the old bundle after a swap, or of the new one before", stale),
        at_most("p99 in the swaps, of that outside", p99_in / p99_out, _SLOWER, "times"),
        at_most(f"growth of memory from the {_SETTLED}rd swap to the last", last_mb / first_mb - 1, _GROWTH),
    ]
    figures = {
        "swaps": len(windows),
        "p99 in the swaps, ms": p99_in,
        "outside, ms": p99_out,
        "a swap took, median, ms": _percentile(sorted((b - a) * 1e3 for a, b in windows), 0.5),
        f"memory after the {_SETTLED}rd, MB": first_mb,
        "after the last, MB": last_mb,
    }
    return Observed([heard], checks, figures)


def _swaps_of_runners(stage: Stage) -> Observed:
    return _swaps(stage, "process")


def _swaps_in_fronts(stage: Stage) -> Observed:
    return _swaps(stage, "inline")


def _drain(stage: Stage) -> Observed:
    stage.say("starting a server")
    quick = multiplier(stage.folder / "quick.bundle", 3, name="quick")
    slow = function(stage.folder / "slow.bundle", _DOUBLES_SLOWLY, name="slow")
    with serving(quick, slow, workers=2) as server:
        now = status(server)
        pids = [*now.front_pids, *(pid for v in now.versions for pid in v.runner_pids), now.pid]
        with calling(
            server.port,
            asking("quick", "quick", TAIL, 3, connections=8, pause_s=0.001),
            asking("slow", "slow", TAIL, 2, connections=8),
        ) as calls:
            time.sleep(min(stage.seconds, 2.0))
            stage.say("stopping")
            told = time.monotonic()
            code = server.stop()
            took_s = time.monotonic() - told
            left = sum(map(is_there, pids))
    everybody = list(calls.heard.values())
    # Sent a while before the signal, and so accepted.
    under_way = [n for h in everybody for n in h.noted if n.began < told - 0.05 and n.ended > told]
    broken = [n for h in everybody for n in h.failed if n.status == 0]
    checks = [
        no_failures("requests under way that were not answered", [n for n in under_way if n.status != 200]),
        at_least("of those there were", len(under_way), 8),
        no_failures("errors in place of answers", [n for h in everybody for n in h.failed if n.status > 0]),
        at_most(
            "connections closed between two requests: each at most once", len(broken), 16, measured=False
        ),
        none("callers left without any reply", sum(n.status == -2 for h in everybody for n in h.failed)),
        none("exit status", code),
        none("processes left", left),
    ]
    return Observed(everybody, checks, {"it took, s": took_s})


_PROMISED: Final = (
    "no request fails; p99 in the swaps at most twice that outside; "
    "memory after the last within 5 % of that after the 3rd"
)

SCENARIOS: Final = (
    Scenario(
        "swaps",
        f"{_SWAPS} times another bundle in the place of the old one, the model in a process of its own",
        _PROMISED,
        _swaps_of_runners,
    ),
    Scenario(
        "swaps-inline",
        f"{_SWAPS} times another bundle in the place of the old one, the model inside the front",
        _PROMISED,
        _swaps_in_fronts,
    ),
    Scenario(
        "drain",
        "SIGTERM under load",
        "everything that was accepted is answered, then all processes end",
        _drain,
    ),
)
