"""Hold the advisor to its word: what it predicts for three models and two traces, and what the server then does.

Each model is measured as ``parbake advise`` does it. For each trace and way of serving the advisor's model of the
server is followed from a cold start for as long as the real server is put under load afterwards, with as many
connections; what the load generator itself costs, on the same CPUs, is measured beforehand against a server that
does nothing, and the advisor is told.
"""

from __future__ import annotations

import lzma
import os
import time
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, replace
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Final

import msgspec
import numpy as np

from bench.load import Load as Requests
from bench.load import put
from bench.machine import this_machine
from bench.network import packed_network, row_body, rows_of
from bench.processes import cpu_seconds, peer, with_descendants
from bench.report import Section, Table, at_most
from parbake.advisor.model import Costs, Load
from parbake.advisor.queueing import Answers, Simulated, simulate
from parbake.advisor.traffic import Keys, numbered
from parbake.app.advise import LearnedHead
from parbake.app.measure import examples_of, measure, quick_table
from parbake.contract.bundle import StoredBundle
from parbake.contract.key import Keys as RowKeys
from parbake.monitoring.trace import shifting_keys, zipf_keys
from parbake.testing import serving

TRACES: Final = Path(__file__).parents[2] / "shared" / "traces"
_CONSTANT: Final = Path(__file__).parent / "peers" / "bare" / "server.py"
_CONNECTIONS: Final = 32
_MODELS: Final = (("microseconds", 0), ("about 1 ms", 6), ("about 20 ms", 80))
"""What a row takes, about, and the convolutions for that."""

_SEED: Final = 7
_BUDGET: Final = 0.05
_WARM_UP_S: Final = 0.5
_CLIENT_START_S: Final = 0.3
"""About what the load generator takes to start: Python and its imports."""
_NEVER: Final = 1 << 60


@dataclass(frozen=True, slots=True)
class Observed:
    """What a server did, in the median of some runs from a cold start."""

    requests_per_s: float
    p50_ms: float
    p99_ms: float
    coverage: float
    client_busy: float
    """Share of the time in which the load generator was on a CPU."""
    cpus_of_others: float
    """CPUs that other programs took meanwhile; the prediction was told."""


@dataclass(frozen=True, slots=True)
class Case:
    """One way of serving one model under one trace."""

    model: str
    trace: str
    way: str
    predicted: Simulated
    predicted_coverage: float
    observed: Observed

    def ratios(self) -> dict[str, float]:
        """Predicted in ratio to observed."""
        found = {
            "requests/s": self.predicted.per_s / self.observed.requests_per_s,
            "p50": self.predicted.p50_s * 1e3 / self.observed.p50_ms,
        }
        if self.observed.coverage:
            found["coverage"] = self.predicted_coverage / self.observed.coverage
        return found


def run(folder: Path, *, seconds: float, rounds: int, quick: bool, say: Callable[[str], None]) -> Section:
    """Predict, run and compare. ``quick`` takes the first model and trace only."""
    say("the load generator")
    client_s = _client_s(min(seconds, 1.0))
    traces, generated = _traces()
    cases: list[Case] = []
    sizes: dict[str, tuple[float, float]] = {}
    models: tuple[tuple[str, int], ...] = _MODELS
    if quick:
        models, traces = models[:1], traces[:1]
    measured: dict[str, Costs] = {}
    for what, layers in models:
        say(f"{what}: packing")
        rows = rows_of(max(int(keys.max()) + 1 for _, keys in traces))
        bundle = packed_network(folder / what.replace(" ", "-"), layers, rows[: 64 if layers < 10 else 8])
        costs = measured[what] = measure(
            bundle,
            connections=_CONNECTIONS,
            deadline_s=10.0,
            stage=lambda words, what=what: say(f"{what}: {words}"),  # type: ignore[misc]
        )
        bodies = tuple(row_body(row) for row in rows)
        keys_of = RowKeys(bundle.contract)
        hashes = [keys_of.of([row.tobytes()], 1)[0] for row in rows]
        # A lookup takes as long whatever it finds: one record for all keys.
        every = cycle(examples_of(bundle).records)
        for trace, keys in traces:
            distinct = int(keys.max()) + 1
            table = bundle.path.parent / f"{trace}.table"
            real = quick_table(bundle, hashes[:distinct], [next(every) for _ in range(distinct)], table)
            sizes[f"{what}, {trace}"] = (distinct * costs.table_row_bytes, float(real))
            for way in ("dynamic", "static", "hybrid"):
                words = ["--mode", way, "--workers", "1"]
                words += ["--table", str(table)] if way == "static" else []
                head_rows = max(int(distinct * _BUDGET), 1)
                words += ["--head-rows", str(head_rows)] if way == "hybrid" else []
                order = tuple(keys.tolist())
                runs: list[Observed] = []
                for number in range(rounds):
                    say(f"{what}, {trace}: {way}, {number + 1} of {rounds}")
                    runs.append(_observe(bundle, words, bodies[:distinct], order, seconds))
                ways = _Ways(way, order, head_rows)
                observed = _median(runs)
                predicted = simulate(
                    replace(costs, cores=max(costs.cores - observed.cpus_of_others, 0.5)),
                    Load(_CONNECTIONS),
                    ways.answers,
                    requests=_NEVER,
                    most_s=_WARM_UP_S + seconds,
                    warm_up_s=_WARM_UP_S,
                    client_s=client_s,
                )
                cases.append(Case(what, trace, way, predicted, ways.coverage, observed))
    return _section(cases, sizes, measured, client_s, seconds, rounds, generated)


def _observe(
    bundle: StoredBundle, words: list[str], bodies: tuple[bytes, ...], order: tuple[int, ...], seconds: float
) -> Observed:
    """Put one server under load, from its start."""
    with serving(bundle.path, arguments=words) as server:
        path = f"/v2/models/{bundle.contract.name}/infer"
        pids = with_descendants(server.process.pid)
        machine, own = _busy_s(), cpu_seconds(pids)
        started = time.perf_counter()
        seen = put(Requests(server.port, path, bodies, order, _CONNECTIONS, seconds, warm_up_s=_WARM_UP_S))
        passed = time.perf_counter() - started
        ours = cpu_seconds(pids) - own + seen.busy * (seen.seconds + _WARM_UP_S) + _CLIENT_START_S
        others = max(_busy_s() - machine - ours, 0.0) / passed
        if seen.failed or seen.unknown:
            raise RuntimeError(f"{' '.join(words)}: {seen.failed} failures; first: {seen.complaint}")
        return Observed(
            seen.requests_per_s, seen.p50_ms, seen.p99_ms, _coverage(server.url), seen.busy, others
        )


def _median(runs: list[Observed]) -> Observed:
    return Observed(*(median(column) for column in zip(*map(astuple, runs), strict=True)))


class _Ways:
    """What is kept in each way of serving, and how much of it all requests found."""

    def __init__(self, way: str, order: tuple[int, ...], head_rows: int) -> None:
        self._way = way
        self._order = order
        self._head = LearnedHead(head_rows, None)
        self.asked = self.found = 0
        self.answers = Answers(self._hit, self._computed)
        if way == "hybrid":
            self.answers = Answers(self._hit, self._computed, self._key, self._joined)

    @property
    def coverage(self) -> float:
        """Of all requests, the warm-up too."""
        return self.found / self.asked if self.asked else 0.0

    def _key(self, number: int) -> int:
        return self._order[number % len(self._order)]

    def _hit(self, number: int) -> bool:
        hit = self._way == "static" or (self._way == "hybrid" and self._head.hit(self._key(number)))
        self.asked += 1
        self.found += hit
        return hit

    def _computed(self, number: int) -> None:
        if self._way == "hybrid":
            self._head.computed(self._key(number))

    def _joined(self, number: int) -> None:
        self._head.joined(self._key(number))


def _coverage(url: str) -> float:
    import urllib.request

    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    found = {"parbake_rows_total{": 0.0, "parbake_table_hits_total{": 0.0}
    for line in text.splitlines():
        for name in found:
            if line.startswith(name):
                found[name] += float(line.rpartition(" ")[2])
    rows, hits = found.values()
    return hits / rows if rows else 0.0


def _busy_s() -> float:
    """CPU time that the whole machine has spent on anything, or that was taken from it."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _client_s(seconds: float) -> float:
    """CPU time of the load generator per request."""
    body = row_body(rows_of(1)[0])
    with peer(_CONSTANT) as (_, port):
        seen = put(Requests(port, "/", (body,), (0,), _CONNECTIONS, seconds, warm_up_s=0.2))
    return seen.busy * seen.seconds / seen.requests


def _traces() -> tuple[list[tuple[str, Keys]], bool]:
    """Two traces; made with a fixed seed where the real ones are not there."""
    paths = [TRACES / f"{name}.trace.xz" for name in ("web12", "web07")]
    if all(path.exists() for path in paths):
        return [
            (path.name.partition(".")[0], numbered(np.frombuffer(lzma.decompress(path.read_bytes()), ">u4")))
            for path in paths
        ], False
    return [
        ("zipf", numbered(zipf_keys(1.0, 15_000, 80_000, seed=_SEED))),
        ("shifting head", numbered(shifting_keys(1.0, 10_000, 80_000, every=4_000, share=0.1, seed=_SEED))),
    ], True


def _section(
    cases: list[Case],
    sizes: dict[str, tuple[float, float]],
    measured: dict[str, Costs],
    client_s: float,
    seconds: float,
    rounds: int,
    generated: bool,
) -> Section:
    lines = tuple(
        (
            f"{case.model}, {case.trace}, {case.way}",
            f"{case.predicted.per_s:,.0f}",
            f"{case.observed.requests_per_s:,.0f}",
            f"{case.ratios()['requests/s']:.2f}",
            f"{case.predicted.p50_s * 1e3:.3f}",
            f"{case.observed.p50_ms:.3f}",
            f"{case.ratios()['p50']:.2f}",
            f"{case.predicted_coverage:.3f}",
            f"{case.observed.coverage:.3f}",
            f"{case.observed.cpus_of_others:.2f}",
        )
        for case in cases
    )
    targets = []
    for figure in ("requests/s", "p50", "coverage"):
        off = [
            (abs(ratio - 1), f"{case.model}, {case.trace}, {case.way}")
            for case in cases
            if (ratio := case.ratios().get(figure)) is not None
        ]
        if off:
            worst, where = max(off)
            targets.append(
                at_most(f"{figure}: predicted against observed, off by (worst: {where})", worst, 0.15)
            )
    off_size = max(abs(predicted / real - 1) for predicted, real in sizes.values())
    targets.append(at_most("table size: predicted against real, off by", off_size, 0.05))
    source = (
        "generated with a fixed seed (the traces of a shop are not here)"
        if generated
        else "of a shop's pages"
    )
    return Section(
        key="advise",
        title="The advisor's word",
        how=(
            f"Predicted by the advisor from what it measured on this machine, and observed: {_CONNECTIONS} connections "
            f"that never rest for {seconds:g} s after {_WARM_UP_S:g} s, from a cold start, in the median of {rounds} "
            f"runs, hybrid with a learned head of {100 * _BUDGET:g} % of the keys. Load from bench/load.py on the same "
            f"CPUs, which takes {client_s * 1e6:.1f} us of CPU time for a request; the prediction counts that in, and "
            f"the CPUs that other programs took meanwhile. Traces {source}."
        ),
        tables=(
            Table(
                "Predicted and observed",
                (
                    "model, trace, way",
                    "req/s predicted",
                    "observed",
                    "ratio",
                    "p50 ms predicted",
                    "observed",
                    "ratio",
                    "coverage predicted",
                    "observed",
                    "CPUs of others",
                ),
                lines,
            ),
            Table(
                "Bytes of the table of all keys",
                ("model, trace", "predicted", "real", "ratio"),
                tuple(
                    (name, f"{predicted:,.0f}", f"{real:,.0f}", f"{predicted / real:.3f}")
                    for name, (predicted, real) in sizes.items()
                ),
            ),
        ),
        targets=tuple(targets),
        machine=this_machine(),
        figures={
            "cases": [
                {
                    "model": case.model,
                    "trace": case.trace,
                    "way": case.way,
                    "predicted": {**msgspec.to_builtins(case.predicted), "coverage": case.predicted_coverage},
                    "observed": asdict(case.observed),
                }
                for case in cases
            ],
            "costs": {what: msgspec.to_builtins(costs) for what, costs in measured.items()},
            "client_s": client_s,
        },
    )
