"""Each process role under load: killed with -9, and stopped (SIGSTOP: there, and dead to the world)."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from bench.processes import with_descendants
from chaos.bundles import BAKED, TAIL, asking, multiplier, table
from chaos.load import Calls, Heard, Stream, calling, silence_ms
from chaos.model import Check, Observed, Scenario, Stage, at_least, at_most, held, no_failures, none
from chaos.servers import is_there, status, version, wait_for
from parbake.testing import Server, serving

_DEADLINE_MS: Final = 1000.0
_BACK_MS: Final = 1000.0
"""A runner that died is back in less than this."""


@contextmanager
def _two_models(stage: Stage, workers: int) -> Iterator[Server]:
    """Model ``sound``, and model ``broken`` with a table; each in a process of its own."""
    stage.say("starting a server")
    sound = multiplier(stage.folder / "sound.bundle", 2, name="sound")
    broken = multiplier(stage.folder / "broken.bundle", 3, name="broken")
    baked = table(broken, stage.folder / "broken.table")
    arguments = ("--table", f"broken={baked}", "--placement", "process", "--head-rows", "0")
    with serving(sound, broken, arguments=arguments, deadline_ms=_DEADLINE_MS, workers=workers) as server:
        wait_for(lambda: status(server).spare_pid)
        yield server


@contextmanager
def _callers(server: Server, connections: int = 2, *more: Stream) -> Iterator[Calls]:
    """Callers of the sound model, of baked rows of the other one, and of rows that need its runner."""
    with calling(
        server.port,
        asking("other model", "sound", TAIL, 2, connections=connections),
        asking("baked rows", "broken", BAKED, 3, connections=connections),
        asking("its other rows", "broken", TAIL, 3, connections=connections),
        *more,
    ) as calls:
        yield calls


def _nobody_else(calls: Calls) -> list[Check]:
    """Neighbours have noticed nothing."""
    return [
        no_failures("failed requests for the other model", calls["other model"].failed),
        no_failures("failed requests for baked rows", calls["baked rows"].failed),
        at_least("requests that they made meanwhile", len(calls["other model"].good), 100),
    ]


def _honest(heard: Heard, *codes: str) -> list[Check]:
    """Those who cannot be answered are told so by name, and when to come again."""
    words = " or ".join(codes)
    return [
        no_failures(f"refusals that are not {words}", heard.but(*codes)),
        none("of those without Retry-After", sum(not noted.retry_after for noted in heard.failed)),
    ]


def _kill_runner(stage: Stage) -> Observed:
    with _two_models(stage, workers=1) as server, _callers(server) as calls:
        until = time.monotonic() + stage.seconds
        kills = 0
        while time.monotonic() < until or not kills:
            stage.say(f"kill {kills + 1}")
            (pid,) = version(server, "broken").runner_pids
            os.kill(pid, signal.SIGKILL)
            kills += 1
            wait_for(lambda n=kills: version(server, "broken").runner_restarts >= n)  # type: ignore[misc]
            wait_for(lambda: status(server).spare_pid)
            # Long enough to count as steady, the second time: without back-off.
            time.sleep(min(1.0, stage.seconds / 4))
    heard = calls["its other rows"]
    checks = [
        *_nobody_else(calls),
        *_honest(heard, "runner_down"),
        at_most("longest time without an answer for its other rows", heard.outage_ms(), _BACK_MS, "ms"),
    ]
    return Observed(list(calls.heard.values()), checks, {"kills": kills})


def _stop_runner(stage: Stage) -> Observed:
    with _two_models(stage, workers=1) as server, _callers(server) as calls:
        time.sleep(0.3)
        (pid,) = version(server, "broken").runner_pids
        stage.say("stopped")
        os.kill(pid, signal.SIGSTOP)
        gone_s = wait_for(lambda: not is_there(pid))
        wait_for(lambda: version(server, "broken").runner_restarts == 1)
        time.sleep(min(stage.seconds / 4, 2.0))
    heard = calls["its other rows"]
    checks = [
        *_nobody_else(calls),
        *_honest(heard, "runner_down", "deadline_exceeded", "overloaded"),
        at_most(
            "longest time without an answer for its other rows: its deadline, and a restart",
            heard.outage_ms(),
            _DEADLINE_MS + _BACK_MS,
            "ms",
        ),
    ]
    return Observed(list(calls.heard.values()), checks, {"found and killed after, ms": gone_s * 1e3})


def _of_spare(stage: Stage, number: signal.Signals) -> Observed:
    with _two_models(stage, workers=1) as server, _callers(server) as calls:
        spare = status(server).spare_pid
        assert spare is not None
        os.kill(spare, number)
        time.sleep(min(stage.seconds / 2, 2.0))
        unnoticed = time.monotonic()
        # Now it is needed.
        (pid,) = version(server, "broken").runner_pids
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: version(server, "broken").runner_restarts == 1, 20)
        time.sleep(min(stage.seconds / 4, 2.0))
    heard = calls["its other rows"]
    before = [noted for noted in heard.failed if noted.began < unnoticed]
    checks = [
        *_nobody_else(calls),
        no_failures("failed requests before a runner was killed too", before),
        *_honest(heard, "runner_down"),
        at_most(
            "longest time without an answer for its other rows, the runner killed too",
            heard.outage_ms(),
            _BACK_MS,
            "ms",
        ),
    ]
    return Observed(list(calls.heard.values()), checks, {})


def _kill_spare(stage: Stage) -> Observed:
    return _of_spare(stage, signal.SIGKILL)


def _stop_spare(stage: Stage) -> Observed:
    return _of_spare(stage, signal.SIGSTOP)


_PER_STREAM: Final = 4


def _broken_connections(calls: Calls) -> int:
    return sum(noted.status != 200 for heard in calls.heard.values() for noted in heard.noted)


def _kill_front(stage: Stage) -> Observed:
    with _two_models(stage, workers=2) as server, _callers(server, connections=_PER_STREAM) as calls:
        until = time.monotonic() + stage.seconds
        kills = 0
        back_s: list[float] = []
        while time.monotonic() < until or not kills:
            stage.say(f"kill {kills + 1}")
            pid = status(server).front_pids[0]
            os.kill(pid, signal.SIGKILL)
            kills += 1
            back_s.append(wait_for(lambda n=kills: status(server).front_restarts >= n))  # type: ignore[misc]
            time.sleep(min(1.0, stage.seconds / 4))
    everybody = list(calls.heard.values())
    told = [noted for heard in everybody for noted in heard.failed if noted.status > 0]
    checks = [
        none("fronts that did not come back", sum(map(math.isinf, back_s))),
        no_failures("errors in place of answers", told),
        at_most(
            "broken connections: each at most once a kill",
            _broken_connections(calls),
            kills * _PER_STREAM * len(everybody),
            measured=False,
        ),
        none("connections that were refused or not answered", sum(
            noted.status < 0 for heard in everybody for noted in heard.failed
        )),
        at_most(
            "longest time in which nobody was answered", silence_ms(everybody), _BACK_MS, "ms"
        ),
    ]  # fmt: skip
    return Observed(
        everybody, checks, {"kills": kills, "at the latest another was there after, s": max(back_s)}
    )


def _stop_front(stage: Stage) -> Observed:
    fresh = asking(
        "new connections", "sound", TAIL, 2, connections=4, pause_s=0.02, headers=("connection: close",)
    )
    with _two_models(stage, workers=2) as server, _callers(server, _PER_STREAM, fresh) as calls:
        time.sleep(0.3)
        first, second = status(server).front_pids
        stage.say("stopped")
        os.kill(first, signal.SIGSTOP)
        found_s = wait_for(lambda: not is_there(first))
        wait_for(lambda: status(server).front_restarts == 1)
        time.sleep(min(stage.seconds / 4, 2.0))
        other_lives = is_there(second)
    everybody = list(calls.heard.values())
    fresh_ms = calls["new connections"].outage_ms()
    checks = [
        no_failures("errors in place of answers", [
            noted for heard in everybody for noted in heard.failed if noted.status > 0
        ]),
        at_most(
            "broken connections: each of its own at most once",
            _broken_connections(calls),
            _PER_STREAM * len(everybody),
            measured=False,
        ),
        held("other front unharmed", other_lives),
        at_most("longest time in which no new connection was answered", fresh_ms, _BACK_MS, "ms"),
        at_most("time until it was replaced: twice 2.5 s of silence, and a look a second", found_s * 1e3, 7000, "ms"),
    ]  # fmt: skip
    return Observed(everybody, checks, {})


def _kill_supervisor(stage: Stage) -> Observed:
    with _two_models(stage, workers=1) as server:
        pids = [pid for pid in with_descendants(server.process.pid) if pid != server.process.pid]
        port = server.port
        with _callers(server) as calls:
            time.sleep(min(stage.seconds / 4, 1.0))
            server.process.kill()
            server.process.wait()
            ended_s = wait_for(lambda: not any(map(is_there, pids)), 20)
            stage.say("starting it again")
            bundle = stage.folder / "sound.bundle"
            other = stage.folder / "broken.bundle"
            with serving(
                bundle,
                other,
                arguments=("--port", str(port), "--table", f"broken={stage.folder / 'broken.table'}"),
                placement="process",
                head_rows=0,
            ) as again:
                seconds = again.seconds
                back = time.monotonic()
                time.sleep(min(stage.seconds / 2, 2.0))
                leaving = time.monotonic()
    everybody = list(calls.heard.values())
    after = [n for h in everybody for n in h.failed if back < n.began < n.ended < leaving]
    hung = sum(noted.status == -2 for h in everybody for noted in h.failed)
    checks = [
        at_most("time until none of its processes was left", ended_s * 1e3, 5000, "ms"),
        none("callers left waiting for an answer that never comes", hung),
        no_failures("requests failed after it was started again on the same port", after),
        at_least("answers after that", sum(n.began > back for h in everybody for n in h.good), 100),
    ]
    figures = {
        "its processes had ended after, ms": ended_s * 1e3,
        "it was started again in, ms": seconds * 1e3,
    }
    return Observed(everybody, checks, figures)


def _stop_supervisor(stage: Stage) -> Observed:
    with _two_models(stage, workers=2) as server:
        before = status(server)
        with _callers(server) as calls:
            stage.say("stopped")
            server.process.send_signal(signal.SIGSTOP)
            time.sleep(min(stage.seconds, 8.0))
            server.process.send_signal(signal.SIGCONT)
            time.sleep(min(stage.seconds / 2, 4.0))
        after = status(server)
    everybody = list(calls.heard.values())
    checks = [
        no_failures(
            "failed requests, while it was stopped and when it went on",
            [n for h in everybody for n in h.failed],
        ),
        at_least("answers", sum(len(h.good) for h in everybody), 300),
        none(
            "processes that it replaced afterwards, though nothing ailed them",
            len(set(before.front_pids) - set(after.front_pids))
            + sum(v.runner_restarts for v in after.versions),
        ),
    ]
    return Observed(everybody, checks, {})


SCENARIOS: Final = (
    Scenario(
        "kill-runner",
        "kill -9 of a model's runner, again and again",
        "other models and baked rows notice nothing; the rest get 503 with Retry-After, for less than a second",
        _kill_runner,
    ),
    Scenario(
        "stop-runner",
        "SIGSTOP of a model's runner",
        "it is found by its deadline and replaced; nobody else notices",
        _stop_runner,
    ),
    Scenario(
        "kill-front",
        "kill -9 of one of two fronts, again and again",
        "its connections break, once each; who connects again is answered",
        _kill_front,
    ),
    Scenario(
        "stop-front",
        "SIGSTOP of one of two fronts",
        "it is found and replaced; those at the other front notice nothing",
        _stop_front,
    ),
    Scenario(
        "kill-supervisor",
        "kill -9 of the supervisor, and the same command again",
        "no process outlives it and nobody is left waiting; started again on the same port, it answers",
        _kill_supervisor,
    ),
    Scenario(
        "stop-supervisor",
        "SIGSTOP of the supervisor, then SIGCONT",
        "predictions do not need it: no request fails",
        _stop_supervisor,
    ),
    Scenario(
        "kill-spare",
        "kill -9 of the spare, then of a runner",
        "nobody notices the first; the second is back within a second all the same",
        _kill_spare,
    ),
    Scenario(
        "stop-spare",
        "SIGSTOP of the spare, then kill -9 of a runner",
        "nobody notices the first; the second is back within a second all the same",
        _stop_spare,
    ),
)
