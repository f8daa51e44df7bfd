"""The learned head of hybrid mode: what it covers beside other ways to choose, what it gains, and what it costs.

Coverage is replayed without a server. The rest is measured on servers under load: a model of about a millisecond a
row asked for by a trace, with and without the head; a fixed table against a head of the same content; the prediction
log on and off; baking in idle moments; and a release in the middle of traffic.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Final, TypeVar

import numpy as np

from bench import policies
from bench.clients import Client, Replay
from bench.load import Load, Measured, pouring, put
from bench.machine import this_machine
from bench.network import convolutions_of, packed_network, row_body, rows_of, seconds_a_row
from bench.quiet import LOOKS, MOST_STOLEN, Quiet, Stolen
from bench.report import Section, Table, Target, at_least, at_most
from bench.samples import rows_and_hits, rows_warmed
from bench.traces import Trace, generated, real
from parbake.app.bake import bake
from parbake.app.supervisor import Change
from parbake.runtime.pace import Pace
from parbake.testing import Server, serving
from parbake.transports import client as admin

BUDGETS: Final = (0.01, 0.05, 0.2)
_POLICIES: Final[dict[str, Callable[[int, Sequence[int]], float]]] = {
    "learned": policies.learned,
    "LRU": policies.lru,
    "W-TinyLFU": policies.tiny_lfu,
    "fixed, hindsight": policies.best_fixed,
    "hazards, hindsight": policies.known_hazards,
    "Belady": policies.belady,
}
_CONNECTIONS: Final = 64
_PATH: Final = "/v2/models/eta/infer"
_ROW_S: Final = 1e-3
"""What a row takes of the model, about."""
_BATCH: Final = 32
"""Rows of the batches that this is measured with: about as many misses wait at a time."""
_EXAMPLES: Final = 256
_BUDGET: Final = 0.2
_ALLOWED: Final = 0.01
_FRESH_S: Final = 4.0
_COST_ROUNDS: Final = 8
"""What costs a few per cent takes so many times as many rounds as the rest to be seen."""
_IDLE_ROUNDS: Final = 2
"""So many times as many rounds of idle moments: each look is short."""
_RELEASES: Final = 3
"""At most: each takes half a minute."""
_FEW: Final = 4
_LEARNT: Final = 8
"""Part of the trace, one in so many requests, after which the cold start counts as over."""
_TRACE_S: Final = 120.0
"""The longest that is waited for a trace to be over."""
_LATENCY_ROUNDS: Final = 3

_Found = TypeVar("_Found")


def run(
    client: Client, folder: Path, *, rounds: int, seconds: float, quick: bool, say: Callable[[str], None]
) -> Section:
    """Measure everything. ``seconds`` is the length of one measurement under load."""
    traces = real()
    source = "the traces of a shop's pages"
    if not traces:
        source = "traffic made up with a fixed seed (the traces of a shop's pages are not here)"
        traces = generated()
    examples, fresh_s = _EXAMPLES, _FRESH_S
    if quick:
        traces = (Trace(traces[0].name, traces[0].keys[:5000]),)
        examples, fresh_s = 32, 1.0
    table, figures, targets = _coverage(traces, say)
    say("looking for a model of about 1 ms a row")
    layers = 1 if quick else convolutions_of(folder / "tried", _ROW_S, _BATCH)
    say(f"packing models of {layers} convolutions")
    trace = traces[0]
    rows = rows_of(trace.distinct)
    packed = packed_network(folder / "network", layers, rows[:examples])
    bundle, row_s = packed.path, seconds_a_row(packed, _BATCH)
    ageing = packed_network(folder / "ageing", layers, rows[:examples], freshness_s=fresh_s).path
    second = packed_network(folder / "second", layers, rows[:examples], seed=8).path
    bodies = tuple(row_body(row) for row in rows)
    quiet = Quiet()
    gain, gained, gain_figures = _gain(client, bundle, trace, bodies, rounds, seconds, quiet, say)
    many = rounds if quick else _COST_ROUNDS * rounds
    costs, costed, cost_figures = _costs(client, folder, bundle, rows, many, min(seconds, 1.0), quiet, say)
    often = rounds if quick else _IDLE_ROUNDS * rounds
    idle, idled, idle_figures = _idle(bundle, ageing, fresh_s, rows, often, quiet, say)
    releases = min(rounds, _RELEASES)
    release, released = _release(bundle, second, trace, bodies, releases, seconds, say)
    return Section(
        "head",
        "The learned head",
        f"Coverage: share of requests answered from what is kept, replaying {source} from a cold start under a budget "
        "of rows, in per cent of the trace's keys; the fixed set is the best one chosen in hindsight (first touches "
        "not counted); hazards in hindsight are what how often and how long ago a key was asked for tells, "
        "measured on the whole trace beforehand; Belady's bound is what no cache can do better. Under load: "
        f"{_CONNECTIONS} connections in a closed loop on the same CPUs, a model of {layers} convolutions: "
        f"{row_s * 1e3:.2f} ms a row in batches of {_BATCH} on all CPUs, while nothing else ran. Medians of {rounds} "
        f"rounds with and without a head ({min(rounds, _LATENCY_ROUNDS)} more for the latencies), {many} of what it "
        f"costs, {often} of idle moments and {releases} releases. Except for releases: ratios to the mean of the other "
        "way before and after, what it costs at the same pace of the machine "
        "(`parbake.runtime.pace`); looks during which more than "
        f"{MOST_STOLEN:.0%} of the CPU time was taken from the machine were done again, up to {LOOKS - 1} times each "
        f"({quiet.again} in all).",
        (table, gain, costs, idle, release),
        (*targets, *gained, *costed, *idled, *released),
        this_machine(),
        {
            "coverage": figures,
            "gain": gain_figures,
            "costs": cost_figures,
            "idle": idle_figures,
            "row_s": row_s,
        },
    )


def _coverage(
    traces: Sequence[Trace], say: Callable[[str], None]
) -> tuple[Table, dict[str, Any], list[Target]]:
    lines: list[tuple[str, ...]] = []
    figures: dict[str, Any] = {}
    targets: list[Target] = []
    for trace in traces:
        for budget in BUDGETS:
            say(f"coverage of {trace.name} with {budget:.0%} of the keys")
            rows = max(1, round(budget * trace.distinct))
            found = {name: policy(rows, trace.keys) for name, policy in _POLICIES.items()}
            what = f"{trace.name}, {budget:.0%} ({rows:,} rows)"
            figures[what] = found
            lines.append((what, *(f"{value:.3f}" for value in found.values())))
            best = max(found[name] for name in ("LRU", "W-TinyLFU", "fixed, hindsight"))
            targets.append(
                at_least(
                    f"coverage of {trace.name} with {budget:.0%}, less the best of LRU, W-TinyLFU and fixed",
                    found["learned"] - best,
                    -_ALLOWED,
                )
            )
    return Table("Coverage", ("trace, budget", *_POLICIES), tuple(lines)), figures, targets


@dataclass(frozen=True, slots=True)
class _Rates:
    """Requests per second: of all, and of those after the cold start."""

    whole: float
    learnt: float


def _gain(
    client: Client,
    bundle: Path,
    trace: Trace,
    bodies: tuple[bytes, ...],
    rounds: int,
    seconds: float,
    quiet: Quiet,
    say: Callable[[str], None],
) -> tuple[Table, list[Target], dict[str, Any]]:
    """All of the trace in hybrid mode, from a cold start, with some of it in dynamic mode before and after.

    Not at the same pace: `parbake.runtime.pace` is slowed by what a model does to the caches, and that is no change of
    the machine where one way has the model at work all the time and the other one has not.
    """
    learnt = len(trace.keys) // _LEARNT

    def served(mode: str) -> AbstractContextManager[Server]:
        return serving(bundle, mode=mode, workers=1, head_rows=round(_BUDGET * trace.distinct))

    def length(mode: str) -> float:
        return seconds if mode == "dynamic" else _TRACE_S

    def rates(mode: str) -> tuple[_Rates, float]:
        with served(mode) as server:
            theft = Stolen()
            found = client.replay(server.port, _PATH, bodies, trace.keys, _CONNECTIONS, length(mode), learnt)
            share = theft.share()
        must_be_whole(mode, found)
        after = (found.requests - learnt) / (found.seconds - found.marked_s) if found.marked_s else 0.0
        return _Rates(found.requests_per_s, after), share

    def must_be_whole(mode: str, found: Replay | Measured) -> None:
        if mode == "hybrid" and not found.whole:
            raise RuntimeError(
                f"{found.requests:,} of the {len(trace.keys):,} requests of {trace.name} were answered in "
                f"{found.seconds:g} s; to wait for longer raise _TRACE_S in bench/head.py"
            )

    def latencies(mode: str) -> tuple[Measured, float]:
        with served(mode) as server:
            theft = Stolen()
            load = Load(
                server.port,
                _PATH,
                bodies,
                trace.keys,
                _CONNECTIONS,
                length(mode),
                once=True,
                warm_up_s=0.0,
            )
            found, share = _sound(put(load)), theft.share()
        must_be_whole(mode, found)
        return found, share

    ways = (partial(rates, "dynamic"), partial(rates, "hybrid"))
    dynamic, hybrid = _in_turn(*ways, rounds, quiet, f"{trace.name}, requests/s", say)
    waits = (partial(latencies, "dynamic"), partial(latencies, "hybrid"))
    few = min(rounds, _LATENCY_ROUNDS)
    slow, quick = _in_turn(*waits, few, quiet, f"{trace.name}, latencies", say)
    usual = [one.whole for one in dynamic]
    figures = {
        "whole": _ratios([one.whole for one in hybrid], usual),
        "learnt": _ratios([one.learnt for one in hybrid], usual),
        "p50": [1 / ratio for ratio in _ratios([one.p50_ms for one in quick], [one.p50_ms for one in slow])],
    }
    table = Table(
        f"{trace.name}, a model of about 1 ms a row, a head of {_BUDGET:.0%} of the keys that knows nothing at first",
        ("", f"requests/s ({client.name})", "p50 ms (bench/load.py)", "p99 ms (bench/load.py)"),
        tuple(
            (
                mode,
                f"{median(one.whole for one in speeds):,.0f}",
                f"{median(one.p50_ms for one in times):.3f}",
                f"{median(one.p99_ms for one in times):.3f}",
            )
            for mode, speeds, times in (("dynamic", dynamic, slow), ("hybrid", hybrid, quick))
        ),
    )
    targets = [
        at_least("hybrid, the whole trace: requests/s in ratio to dynamic", median(figures["whole"]), 4),
        at_least(
            f"hybrid, without the first {learnt:,} requests: requests/s in ratio to dynamic",
            median(figures["learnt"]),
            4,
        ),
        at_least("dynamic: p50 in ratio to hybrid, the whole trace", median(figures["p50"]), 8),
    ]
    return table, targets, figures


def _in_turn(
    usual: Callable[[], tuple[_Found, float]],
    other: Callable[[], tuple[_Found, float]],
    rounds: int,
    quiet: Quiet,
    what: str,
    say: Callable[[str], None],
) -> tuple[list[_Found], list[_Found]]:
    """Looks at the usual way, and one at the other way between each of them and the next."""
    say(what)
    usually = [quiet.look(usual)]
    otherwise: list[_Found] = []
    for number in range(rounds):
        say(f"{what}, round {number + 1} of {rounds}")
        otherwise.append(quiet.look(other))
        usually.append(quiet.look(usual))
    return usually, otherwise


def _ratios(others: Sequence[float], usual: Sequence[float]) -> list[float]:
    """Each in ratio to the mean of what was usual before and after it."""
    return [
        other / ((before + after) / 2) for other, (before, after) in zip(others, pairwise(usual), strict=True)
    ]


def _costs(
    client: Client,
    folder: Path,
    bundle: Path,
    rows: Any,
    rounds: int,
    seconds: float,
    quiet: Quiet,
    say: Callable[[str], None],
) -> tuple[Table, list[Target], dict[str, Any]]:
    """Requests per second with something switched on, in ratio to without it before and after.

    Each at the pace that the machine had meanwhile.
    """

    def rate(server: Server) -> tuple[float, float]:
        since, theft = time.monotonic(), Stolen()
        found = client.put(server.port, _PATH, bodies, _CONNECTIONS, seconds).requests_per_s
        return found / pace.between(since), theft.share()

    count = 1000
    bodies = tuple(row_body(row) for row in rows[:count])
    table = _baked(folder, bundle, rows[:count], "fixed")
    log = str(folder / "log")
    pairs: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        (
            "a head that learns, in ratio to a fixed table of the same content",
            {"mode": "hybrid", "table": str(table), "head_rows": 0},
            {"mode": "hybrid", "head_rows": count},
        ),
        (
            "the prediction log on, in ratio to off: table hits",
            {"mode": "static", "table": str(table)},
            {"mode": "static", "table": str(table), "prediction_log": log},
        ),
    ]
    lines: list[tuple[str, ...]] = []
    targets: list[Target] = []
    figures: dict[str, Any] = {}
    for what, without, with_ in pairs:
        with (
            serving(bundle, workers=1, **without) as one,
            serving(bundle, workers=1, **with_) as other,
            Pace() as pace,
        ):
            # All of them have been asked for before it counts.
            _put(other, bodies, range(count), 1.5 * seconds)
            usual, rates = _in_turn(partial(rate, one), partial(rate, other), rounds, quiet, what, say)
        ratios = _ratios(rates, usual)
        ratio = median(ratios)
        figures[what] = ratios
        lines.append((what, f"{ratio:.3f}", f"{min(ratios):.3f}", f"{max(ratios):.3f}"))
        targets.append(at_least(f"requests/s, {what}", ratio, 0.95))
    return (
        Table("What it costs: requests/s in ratio", ("", "median", "least", "most"), tuple(lines)),
        targets,
        figures,
    )


def _idle(
    bundle: Path,
    ageing: Path,
    fresh_s: float,
    rows: Any,
    rounds: int,
    quiet: Quiet,
    say: Callable[[str], None],
) -> tuple[Table, list[Target], list[float]]:
    """What live requests feel of rows being baked again in idle moments, before they are too old.

    Each look lasts as long as a row may: all of them are baked again meanwhile.
    """
    count = 1000
    bodies = tuple(row_body(row) for row in rows[:count])

    def look(server: Server) -> tuple[tuple[Measured, float], float]:
        theft, before, started = Stolen(), rows_warmed(server.url), time.monotonic()
        found = _put(server, bodies, range(count), fresh_s, _FEW)
        warmed = (rows_warmed(server.url) - before) / (time.monotonic() - started)
        return (found, warmed), theft.share()

    with (
        serving(bundle, mode="hybrid", workers=1, head_rows=count) as still,
        serving(ageing, mode="hybrid", workers=1, head_rows=count) as busy,
    ):
        for server in (still, busy):
            _put(server, bodies, range(count), 2 * fresh_s, _FEW)
        ways = (partial(look, still), partial(look, busy))
        looks = _in_turn(*ways, rounds, quiet, "baking in idle moments", say)
    usual, baking = ([found for found, _ in some] for some in looks)
    warmed = median(rows_per_s for _, rows_per_s in looks[1])
    again = f"each row lasts {fresh_s:g} s, {warmed:,.0f} rows/s baked again in idle moments"
    lines = tuple(
        (
            what,
            f"{median(one.requests_per_s for one in found):,.0f}",
            f"{median(one.p50_ms for one in found):.3f}",
            f"{median(one.p99_ms for one in found):.3f}",
        )
        for what, found in (("nothing to bake", usual), (again, baking))
    )
    ratios = _ratios([one.p50_ms for one in baking], [one.p50_ms for one in usual])
    table = Table(
        f"Baking in idle moments: {count:,} keys, all held, {_FEW} connections",
        ("", "requests/s", "p50 ms", "p99 ms"),
        lines,
    )
    target = at_most("p50 while rows are baked again, in ratio to without", median(ratios), 1.1)
    return table, [target], ratios


def _release(
    bundle: Path,
    second: Path,
    trace: Trace,
    bodies: tuple[bytes, ...],
    rounds: int,
    seconds: float,
    say: Callable[[str], None],
) -> tuple[Table, list[Target]]:
    """Coverage in the second after a new version took over, in ratio to the second before, several times over.

    In the second before, the old version answers while the new one's head is being baked.
    """
    with serving(bundle, mode="hybrid", workers=1, head_rows=round(_BUDGET * trace.distinct)) as server:
        samples: list[tuple[float, float, float]] = []
        over = threading.Event()
        watching = threading.Thread(target=_watch, args=(server, samples, over))
        load = Load(server.port, _PATH, bodies, trace.keys, 8, seconds=3600.0, warm_up_s=0.2)
        swaps: list[tuple[float, float]] = []
        with pouring(load):
            watching.start()
            for number in range(rounds):
                say(f"a release under traffic, {number + 1} of {rounds}")
                time.sleep(3 * seconds if not swaps else seconds)
                took_s = admin.reload(
                    [Change(bundle=str(bundle if number % 2 else second))], port=server.port
                ).seconds
                swaps.append((time.monotonic(), took_s))
            time.sleep(1.5)
            over.set()
            watching.join()
    covered = [
        (_covered(samples, swapped - 1, swapped), _covered(samples, swapped, swapped + 1))
        for swapped, _ in swaps
    ]
    ratio = median(after / before if before else 0.0 for before, after in covered)
    table = Table(
        f"Releases in the middle of traffic: {trace.name}, 8 connections",
        ("", "coverage in the second before", "in the second after", "the release took s"),
        tuple(
            (str(number), f"{before:.3f}", f"{after:.3f}", f"{took_s:.1f}")
            for number, ((before, after), (_, took_s)) in enumerate(zip(covered, swaps, strict=True), 1)
        ),
    )
    return table, [at_least("coverage after a release, in ratio to before", ratio, 0.95)]


def _put(
    server: Server,
    bodies: tuple[bytes, ...],
    order: Sequence[int],
    seconds: float,
    connections: int = _CONNECTIONS,
) -> Measured:
    return _sound(put(Load(server.port, _PATH, bodies, tuple(order), connections, seconds, warm_up_s=0.2)))


def _sound(found: Measured) -> Measured:
    if found.failed or found.unknown:
        raise RuntimeError(f"{found.failed + found.unknown} failures; first: {found.complaint}")
    return found


def _baked(folder: Path, bundle: Path, rows: Any, name: str) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    lists = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
    pq.write_table(pa.table({"x": lists}), folder / f"{name}.parquet")
    bake(bundle, folder / f"{name}.parquet", folder / f"{name}.table", workers=1)
    return folder / f"{name}.table"


def _watch(server: Server, samples: list[tuple[float, float, float]], over: threading.Event) -> None:
    """Note time, rows and rows answered without the model, until it is over."""
    while not over.is_set():
        samples.append((time.monotonic(), *rows_and_hits(server.url)))
        time.sleep(0.05)


def _covered(samples: Sequence[tuple[float, float, float]], start: float, end: float) -> float:
    """Coverage between two moments."""
    times, rows, hits = zip(*samples, strict=True)
    asked, found = (float(np.diff(np.interp((start, end), times, counts))[0]) for counts in (rows, hits))
    return found / asked if asked else 0.0
