"""Models that misbehave: one row ends the process, one never comes back, rows get lost, memory leaks."""

from __future__ import annotations

import time
from typing import Final

from chaos.bundles import BAKED, POISON, TAIL, asking, function, multiplier, table
from chaos.load import Calls, Heard, Stream, calling
from chaos.model import Check, Observed, Scenario, Stage, at_least, at_most, held, no_failures, none
from chaos.servers import memory_mb, version
from parbake.testing import Server, serving

_DEADLINE_MS: Final = 1000.0
_BACK_MS: Final = 1000.0

_DIES: Final = """
import os, time

def predict(x):
    time.sleep(0.005)
    if (x == 666).any():
        os._exit(3)
    return x * 2
"""
_HANGS: Final = """
import time

def predict(x):
    while (x == 666).any():
        time.sleep(1)
    return x * 2
"""
_LOSES: Final = """
import time

def predict(x):
    time.sleep(0.005)
    return x[x[:, 0] != 666] * 2
"""
_LEAKS: Final = """
import numpy

kept = []

def predict(x):
    kept.append(numpy.ones(len(x) * 32_768))
    return x * 2
"""
_ROW_MB: Final = 0.25
_MOST_MB: Final = 150
_LEAKING_S: Final = 15.0


def _serve(stage: Stage, source: str, *streams: Stream, seconds: float) -> tuple[Calls, int, str]:
    """Model ``broken`` with baked rows beside a sound one, asked by everybody; gives restarts and log too."""
    stage.say("starting a server")
    sound = multiplier(stage.folder / "sound.bundle", 3, name="sound")
    broken = function(stage.folder / "broken.bundle", source, name="broken")
    baked = table(broken, stage.folder / "broken.table")
    arguments = ("--table", f"broken={baked}", "--head-rows", "0")
    with serving(sound, broken, arguments=arguments, deadline_ms=_DEADLINE_MS, workers=1) as server:
        with calling(
            server.port,
            asking("other model", "sound", TAIL, 3),
            asking("baked rows", "broken", BAKED, 2),
            asking("its other rows", "broken", TAIL, 2, connections=8),
            *streams,
        ) as calls:
            stage.say("asking")
            time.sleep(seconds)
        return calls, version(server, "broken").runner_restarts, server.log()


def _nobody_else(calls: Calls) -> list[Check]:
    return [
        no_failures("failed requests for the other model", calls["other model"].failed),
        no_failures("failed requests for baked rows", calls["baked rows"].failed),
        at_least("requests that they made meanwhile", len(calls["other model"].good), 100),
    ]


def _known(bad: Heard, neighbours: Heard) -> float:
    """When the row was known, and the process that it ended was there again."""
    named = min((n.ended for n in bad.noted if n.code == "row_quarantined"), default=bad.ended)
    return min((n.ended for n in neighbours.good if n.began > named), default=neighbours.ended)


def _poison(stage: Stage) -> Observed:
    bad = asking("poison", "broken", [POISON], connections=1, pause_s=0.2)
    calls, restarts, _ = _serve(stage, _DIES, bad, seconds=max(stage.seconds, 4.0))
    neighbours, poison = calls["its other rows"], calls["poison"]
    known = _known(poison, neighbours)
    checks = [
        *_nobody_else(calls),
        none("answers to the poison row", len(poison.good)),
        no_failures("refusals of the poison row by another name", poison.but("row_quarantined", "runner_down")),
        at_least("times that it was named", sum(n.code == "row_quarantined" for n in poison.noted), 2),
        no_failures("its neighbours' failures that are not runner_down", neighbours.but("runner_down")),
        none("of those without Retry-After", sum(not n.retry_after for n in neighbours.failed)),
        no_failures("its neighbours' failures from then on", [n for n in neighbours.failed if n.began > known]),
        at_most("longest time without an answer for its neighbours", neighbours.outage_ms(), _BACK_MS, "ms"),
    ]  # fmt: skip
    return Observed(
        list(calls.heard.values()),
        checks,
        {"restarts": restarts, "its neighbours' failures before": len(neighbours.failed)},
        ("poison",),
    )


def _hang(stage: Stage) -> Observed:
    bad = asking("stuck", "broken", [POISON], connections=1, pause_s=0.2)
    calls, restarts, log = _serve(stage, _HANGS, bad, seconds=max(1.5 * stage.seconds, 8.0))
    neighbours, stuck = calls["its other rows"], calls["stuck"]
    named = ("deadline_exceeded", "row_quarantined", "runner_down", "overloaded")
    known = _known(stuck, neighbours)
    checks = [
        *_nobody_else(calls),
        none("answers to the row that never comes back", len(stuck.good)),
        no_failures("its refusals by another name", stuck.but(*named)),
        none("callers left without any reply", sum(n.status <= 0 for h in calls.heard.values() for n in h.noted)),
        no_failures("its neighbours' failures by another name", neighbours.but(*named)),
        held("the row was named", any(n.code == "row_quarantined" for n in stuck.noted)),
        no_failures("its neighbours' failures from then on", [n for n in neighbours.failed if n.began > known]),
        at_most(
            "longest time without an answer for its neighbours: its deadline, and a restart",
            neighbours.outage_ms(),
            _DEADLINE_MS + _BACK_MS,
            "ms",
        ),
    ]  # fmt: skip
    return Observed(
        list(calls.heard.values()),
        checks,
        {"restarts": restarts, "found hanging": log.count("runner.wedged")},
        ("stuck",),
    )


def _too_few(stage: Stage) -> Observed:
    bad = asking("lost", "broken", [POISON], connections=1, pause_s=0.02)
    calls, restarts, _ = _serve(stage, _LOSES, bad, seconds=stage.seconds)
    neighbours, lost = calls["its other rows"], calls["lost"]
    checks = [
        *_nobody_else(calls),
        none("answers to the row that gets lost", len(lost.good)),
        no_failures("its failures that are not model_failed", lost.but("model_failed")),
        no_failures("failures of those who shared a batch with it", neighbours.failed),
        none("restarts", restarts),
    ]
    return Observed(list(calls.heard.values()), checks, {}, ("lost",))


def _leak(stage: Stage) -> Observed:
    stage.say("starting a server")
    sound = multiplier(stage.folder / "sound.bundle", 3, name="sound")
    leaky = function(stage.folder / "broken.bundle", _LEAKS, name="broken")
    sizes: list[float] = []

    def measure(server: Server) -> int:
        now = version(server, "broken")
        sizes.append(memory_mb(now.runner_pids))
        return now.runner_restarts

    with (
        serving(
            sound, leaky, deadline_ms=_DEADLINE_MS, workers=1, max_runner_bytes=_MOST_MB * 1024 * 1024
        ) as server,
        calling(
            server.port,
            asking("other model", "sound", TAIL, 3),
            asking("leaking model", "broken", TAIL, 2, pause_s=0.01),
        ) as calls,
    ):
        renewed = measure(server)
        until = time.monotonic() + max(stage.seconds, _LEAKING_S)
        while time.monotonic() < until and not (stage.quick and renewed):
            time.sleep(0.2)
            renewed = measure(server)
    leaked_mb = _ROW_MB * len(calls["leaking model"].good)
    checks = [
        no_failures("failed requests for the other model", calls["other model"].failed),
        no_failures("failed requests for the model that leaks", calls["leaking model"].failed),
        # It is looked at every second.
        at_most(f"memory of its process, with a limit of {_MOST_MB} MB", max(sizes), 1.5 * _MOST_MB, "MB"),
        at_least("processes that took the place of another", renewed, 1, measured=False),
    ]  # fmt: skip
    return Observed(
        list(calls.heard.values()),
        checks,
        {"leaked, MB": leaked_mb, "its process at first, MB": sizes[0], "at last, MB": sizes[-1]},
    )


SCENARIOS: Final = (
    Scenario(
        "poison-row",
        "a row that ends the process of its model (os._exit), asked again and again among others",
        "the row alone fails, with 422; its neighbours are answered, or told 503 while the process restarts",
        _poison,
    ),
    Scenario(
        "hanging-row",
        "a row on which the model never comes back, asked again and again among others",
        "the runner is found by its deadline and replaced, the row is quarantined, and everybody gets a reply",
        _hang,
    ),
    Scenario(
        "too-few-rows",
        "a model that returns fewer rows than it was given, because of one of them",
        "that row alone fails, by name, and nobody gets the answer of somebody else",
        _too_few,
    ),
    Scenario(
        "leaking-model",
        "a model whose process keeps 250 kB for each row that it answers",
        "its memory is kept in bounds, and nobody notices",
        _leak,
    ),
)
