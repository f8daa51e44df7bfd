"""Jobs that were acknowledged, while runners and fronts are killed and stopped, and at last everything is killed."""

from __future__ import annotations

import math
import os
import signal
import time
from contextlib import ExitStack, suppress
from typing import Any, Final

from bench.processes import with_descendants
from chaos.bundles import TAIL, asking, function, multiplier
from chaos.jobs import STAMPED, begun_again, fetch, posting, send_again
from chaos.load import BROKEN, SILENT, calling
from chaos.model import Observed, Scenario, Stage, at_least, at_most, no_failures, none
from chaos.servers import PATIENCE_S, is_there, status, version, wait_for
from parbake.testing import Server, serving
from parbake.transports import client

_CONNECTIONS: Final = 2
_LEASE_S: Final = 0.4
_STOPPED_S: Final = 1.3
"""Longer than the lease, so that others begin its jobs again; shorter than it takes until it would be replaced."""


def _kill_runner(server: Server) -> float:
    before = version(server, "slow")
    os.kill(before.runner_pids[0], signal.SIGKILL)
    return wait_for(lambda: version(server, "slow").runner_restarts > before.runner_restarts)


def _kill_front(server: Server) -> float:
    before = status(server)
    os.kill(before.front_pids[0], signal.SIGKILL)
    return wait_for(lambda: status(server).front_restarts > before.front_restarts)


def _stop_front(server: Server) -> float:
    pid = status(server).front_pids[-1]
    os.kill(pid, signal.SIGSTOP)
    time.sleep(_STOPPED_S)
    # It has answers at hand now that others have given; where this program stood still itself, it was replaced.
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    return 0.0


def _kill_all(server: Server) -> float:
    pids = with_descendants(server.process.pid)
    for pid in pids:
        # Some end by themselves when the first has.
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    server.process.wait()
    return wait_for(lambda: not any(map(is_there, pids)))


def _kill_with_jobs(stage: Stage) -> Observed:
    stage.say("starting a server")
    pause_s = min(1.0, stage.seconds / 8)
    bundles = (
        multiplier(stage.folder / "sound.bundle", 3, name="sound"),
        function(stage.folder / "slow.bundle", STAMPED, name="slow"),
    )
    options: dict[str, Any] = {
        "workers": 2,
        "placement": "process",
        "head_rows": 0,
        "state_dir": stage.folder / "state",
        "job_lease_s": _LEASE_S,
        # A machine that stands still is longer silent than that.
        "job_attempts": 50,
    }
    with ExitStack() as servers:
        server = servers.enter_context(serving(*bundles, **options))
        port = server.port
        with calling(
            port, asking("other model", "sound", TAIL, 3, connections=_CONNECTIONS, pause_s=0.01)
        ) as calls:
            with posting(port, "slow") as posted:
                until = time.monotonic() + stage.seconds
                kills = 0
                waits: list[float] = []
                while time.monotonic() < until or not kills:
                    kills += 1
                    stage.say(f"kill {kills}")
                    for harm in (_kill_runner, _stop_front, _kill_front):
                        time.sleep(pause_s)
                        waits.append(harm(server))
                time.sleep(pause_s)
                stage.say("killing everything")
                killed = time.monotonic()
                last = max(posted.acknowledged, key=lambda job: job.heard, default=None)
                waits.append(_kill_all(server))
                again = serving(*bundles, arguments=("--port", str(port)), **options)
                seconds = servers.enter_context(again).seconds
                back = time.monotonic()
                waits.append(wait_for(lambda: any(job.heard > back for job in posted.acknowledged)))
                time.sleep(2 * pause_s)
            leaving = time.monotonic()
        stage.say("fetching the answers")
        others = send_again(posted)
        jobs, changed = fetch(posted)
        repeated = begun_again(posted)
        there = sum(tally.count for tally in client.jobs(port=port).tallies)
    direct = calls["other model"]
    before = [noted for noted in direct.failed if noted.began < killed and noted.ended < killed]
    after = [noted for noted in direct.failed if back < noted.began < noted.ended < leaving]
    unanswered = sum(noted.status == SILENT for noted in jobs.noted)
    checks = [
        at_least("jobs that were acknowledged", len(jobs.noted), 20),
        at_least("of them unanswered when everything was killed", last.ahead if last else 0, 1),
        none("killed processes that did not go or come back, or took no new jobs then", sum(map(math.isinf, waits))),
        at_least("jobs that were begun more than once", repeated, 1, measured=False),
        at_least("answers that were fetched in between", sum(bool(job.early) for job in posted.sent), 1),
        none("jobs that nobody took or refused", sum(not job.id for job in posted.sent) - len(posted.refused)),
        none(f"acknowledged jobs without an answer after {PATIENCE_S:g} s", unanswered),
        none("acknowledged jobs that were lost, or answered with an error", len(jobs.failed) - unanswered),
        none("answers that were others when they were fetched again", changed),
        none("jobs that were others when they were sent again", others),
        at_most("jobs that there are, of those that were sent", there, len(posted.sent), measured=False),
        no_failures("jobs that were refused for another reason than want of a server", posted.refused),
        no_failures("failed requests for the other model, but for broken connections", [
            noted for noted in before if noted.status != BROKEN
        ]),
        at_most(
            "of those, before everything was killed: each at most once for each front that was killed or stopped",
            sum(noted.status == BROKEN for noted in before),
            2 * kills * _CONNECTIONS,
            measured=False,
        ),
        no_failures("its requests failed after the server was started again", after),
        at_least("answers after that", sum(noted.began > back for noted in direct.good), 20),
    ]  # fmt: skip
    figures = {
        "times that a runner was killed, a front stopped, and a front killed": kills,
        "everything was started again in, ms": seconds * 1e3,
    }
    return Observed([direct, jobs], checks, figures, (jobs.name,))


SCENARIOS: Final = (
    Scenario(
        "kill-with-jobs",
        "kill -9 of a runner and of a front and SIGSTOP of a front while there are jobs; then kill -9 of all processes,"
        " and the same command again",
        "every job that was acknowledged is answered, once and rightly; whoever sends it again gets the same job",
        _kill_with_jobs,
    ),
)
