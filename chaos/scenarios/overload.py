"""Ten times as many requests as the model can answer, whatever it answers to them."""

from __future__ import annotations

import time
from typing import Final

from chaos.bundles import TAIL, asking, function
from chaos.load import Heard, calling
from chaos.model import Observed, Scenario, Stage, at_least, at_most, no_failures, none
from chaos.servers import server_memory_mb
from parbake.testing import serving

_ROW_S: Final = 0.004
_DEADLINE_MS: Final = 500.0
_TIMES: Final = 10
_SHARE: Final = 0.9
_GROWTH: Final = 0.1
_SLOW: Final = f"""
import time

def predict(x):
    time.sleep({_ROW_S} * len(x))
    return x * 2
"""


def _rate(heard: Heard, skip_s: float = 0.0) -> float:
    """Right answers a second, after a while."""
    from_ = heard.began + skip_s
    return sum(from_ <= n.ended <= heard.ended for n in heard.good) / max(heard.ended - from_, 1e-9)


def _overload(stage: Stage) -> Observed:
    stage.say("starting a server")
    bundle = function(stage.folder / "slow.bundle", _SLOW, name="slow")
    seconds = max(3 * stage.seconds, 6.0)
    sizes: list[float] = []
    with serving(bundle, workers=1, deadline_ms=_DEADLINE_MS) as server:
        stage.say("looking for the peak")
        rates: list[float] = []
        everybody: list[Heard] = []
        for connections in (8, 32):
            load = asking("callers", "slow", TAIL, 2, connections=connections, pause_s=0.0)
            with calling(server.port, load) as calls:
                time.sleep(max(stage.seconds / 2, 2.0))
            rates.append(_rate(calls["callers"]))
            everybody.append(calls["callers"])
        peak = max(rates)
        stage.say(f"{_TIMES * peak:.0f} requests a second")
        load = asking("crowd", "slow", TAIL, 2, rate=_TIMES * peak, patience_s=10.0)
        with calling(server.port, load) as calls:
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                time.sleep(0.25)
                sizes.append(server_memory_mb(server))
    crowd = calls["crowd"]
    everybody.append(crowd)
    asked = len(crowd.noted) / (crowd.ended - crowd.began)
    latencies = crowd.latencies_ms()
    p99 = latencies[int(0.99 * (len(latencies) - 1))] if latencies else float("inf")
    third = len(sizes) // 3
    growth = max(sizes[third:]) / max(sizes[:third]) - 1
    checks = [
        at_least("requests a second, of what can be answered", asked / peak, 0.9 * _TIMES, "times"),
        at_least("right answers a second, of the peak", _rate(crowd, 0.5) / peak, _SHARE),
        at_most("p99 of what was admitted: the deadline", p99, _DEADLINE_MS, "ms"),
        no_failures("failures by another name", crowd.but("overloaded", "deadline_exceeded")),
        none("of those without Retry-After", sum(not n.retry_after for n in crowd.failed)),
        at_most("growth of its memory after the first third", growth, _GROWTH),
    ]
    figures = {
        "peak, answers a second": peak,
        "asked, requests a second": asked,
        "memory at most, MB": max(sizes),
        "of the failures, after waiting (504)": sum(n.code == "deadline_exceeded" for n in crowd.failed),
    }
    return Observed(everybody, checks, figures)


SCENARIOS: Final = (
    Scenario(
        "overload",
        f"{_TIMES} times as many requests as the model can answer, at a rate that does not depend on the answers",
        "goodput at least 0.9 of the peak, p99 of the admitted within the deadline, the rest refused; memory bounded",
        _overload,
    ),
)
