"""A thousand models on one machine, with memory for most of them: how long a cold one takes, and who stays."""

from __future__ import annotations

import http.client
import random
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any, Final

import msgspec
import numpy as np

from bench.machine import this_machine
from bench.processes import proportional_bytes, with_descendants
from bench.report import Section, Table, at_least, at_most
from parbake.app.supervisor import Status
from parbake.contract.bundle import Goldens, write_bundle
from parbake.contract.environment import capture
from parbake.contract.model import Contract, Step, TensorSpec, Tolerance
from parbake.testing import Server, serving
from parbake.transports import client

_FEATURES: Final = 10
_WIDTH: Final = 64
_OVER: Final = 1.2
"""All models together take so many times the budget."""
_FRONTS: Final = (1, 4)
_SAMPLE: Final = 20
"""Models that are loaded to find out what one takes."""
_BODY: Final = msgspec.json.encode(
    {"inputs": [{"name": "x", "shape": [1, _FEATURES], "datatype": "FP32", "data": [0.5] * _FEATURES}]}
)


def run(folder: Path, *, models: int, quick: bool, say: Callable[[str], None]) -> Section:
    """Write so many bundles, and serve them under a budget for fewer."""
    say(f"writing {models} bundles")
    bundles = _write(folder / "bundles", models)
    size = _one_model_bytes(bundles[:_SAMPLE])
    budget = round(models * size / _OVER)
    asked = 3 * models
    cold: list[float] = []
    ready: dict[int, float] = {}
    memory: dict[int, dict[str, int]] = {}
    popular: dict[str, dict[str, float]] = {}
    for fronts in _FRONTS:
        say(f"{models} models, {fronts} fronts")
        with serving(
            *bundles, load="on-demand", workers=fronts, memory_bytes=budget, timeout_s=300
        ) as server:
            ready[fronts] = server.seconds
            order = list(range(models))
            random.Random(1).shuffle(order)
            first = _ask(server, order, connections=fronts)
            if fronts == _FRONTS[0]:
                cold = first
                for what, chosen in (("uniform", _uniform(models, asked)), ("Zipf", _zipf(models, asked))):
                    say(f"{models} models, {what} popularity")
                    popular[what] = _popularity(server, chosen, models)
            memory[fronts] = _memory(server)
    p50, p99 = (float(np.percentile(cold, q)) * 1e3 for q in (50, 99))
    one, most = (memory[fronts]["rooms"] for fronts in (_FRONTS[0], _FRONTS[-1]))
    return Section(
        key="many",
        title="Many models",
        how=(
            f"{models} bundles of a small network (10 x {_WIDTH} x 1), each loaded on demand, with a budget for "
            f"1/{_OVER:g} of them ({budget / 1e6:.1f} MB). First each is asked once, in random order: every answer is "
            f"cold. Then {asked} requests one after another, of uniform and of Zipf popularity (weight 1/rank). The "
            "hit rate is the share of requests that found their model loaded. Memory is proportional (PSS), by role."
        ),
        tables=(
            Table(
                "Cold first answers, milliseconds",
                ("", "median", "p99", "worst", "answers"),
                (
                    (
                        "first answer of a model",
                        f"{p50:.1f}",
                        f"{p99:.1f}",
                        f"{max(cold) * 1e3:.1f}",
                        str(len(cold)),
                    ),
                ),
            ),
            Table(
                "Under the budget",
                ("popularity", "share that fits", "hit rate", "p50 ms", "p99 ms", "loads", "evictions"),
                tuple(
                    (
                        what,
                        f"{found['fits']:.3f}",
                        f"{found['hit_rate']:.3f}",
                        f"{found['p50_ms']:.2f}",
                        f"{found['p99_ms']:.1f}",
                        f"{found['loads']:.0f}",
                        f"{found['evictions']:.0f}",
                    )
                    for what, found in popular.items()
                ),
            ),
            Table(
                "Memory in MB, and seconds until ready",
                ("fronts", "supervisor", "fronts' memory", "models' processes", "all", "ready"),
                tuple(
                    (
                        str(fronts),
                        *(f"{found[role] / 1e6:.0f}" for role in ("supervisor", "fronts", "rooms")),
                        f"{sum(found.values()) / 1e6:.0f}",
                        f"{ready[fronts]:.1f}",
                    )
                    for fronts, found in memory.items()
                ),
            ),
        ),
        targets=(
            at_most("cold first answer: p99", p99, 150, "ms"),
            at_least(
                "uniform popularity: hit rate / share that fits", _against_share(popular["uniform"]), 0.95
            ),
            at_least("Zipf popularity: hit rate / share that fits", _against_share(popular["Zipf"]), 1),
            at_most(f"memory of the models' processes: {_FRONTS[-1]} fronts / one", most / one, 1.1),
        ),
        machine=this_machine(),
        figures={
            "models": models,
            "model_bytes": size,
            "budget_bytes": budget,
            "cold_s": cold,
            "popularity": popular,
            "memory_bytes": {str(fronts): found for fronts, found in memory.items()},
            "ready_s": {str(fronts): seconds for fronts, seconds in ready.items()},
            "quick": quick,
        },
    )


def _write(folder: Path, count: int) -> list[Path]:
    """Bundles m0, m1, ... of networks that differ in their weights."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(7)
    environment = capture()
    found: list[Path] = []
    for number in range(count):
        first = rng.normal(size=(_FEATURES, _WIDTH)).astype(np.float32)
        second = rng.normal(size=(_WIDTH, 1)).astype(np.float32)
        graph = helper.make_graph(
            [
                helper.make_node("MatMul", ["x", "w1"], ["z"]),
                helper.make_node("Relu", ["z"], ["a"]),
                helper.make_node("MatMul", ["a", "w2"], ["y"]),
            ],
            "small",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", _FEATURES])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 1])],
            [numpy_helper.from_array(first, "w1"), numpy_helper.from_array(second, "w2")],
        )
        model: Any = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        onnx.checker.check_model(model)
        contract = Contract(
            name=f"m{number}",
            inputs=(TensorSpec("x", "FP32", (_FEATURES,)),),
            outputs=(TensorSpec("y", "FP32", (1,)),),
            steps=(Step("onnx", "model.onnx"),),
            purpose="measured by bench/",
            owner="bench@parbake.example",
            tolerance=Tolerance(rtol=1e-4, atol=1e-4),
        )
        x = rng.normal(size=(4, _FEATURES)).astype(np.float32)
        goldens = Goldens({"x": x}, {"y": np.maximum(x @ first, 0) @ second})
        path = folder / f"m{number}.bundle"
        write_bundle(path, contract, {"model.onnx": model.SerializeToString()}, goldens, environment)
        found.append(path)
    return found


def _one_model_bytes(bundles: Sequence[Path]) -> float:
    """What one of them takes, as the server measures it."""
    with serving(*bundles, load="on-demand", workers=1) as server:
        _ask(server, range(len(bundles)))
        return median(version.memory_bytes for version in _status(server).versions)


def _ask(server: Server, numbers: Iterable[int], connections: int = 1) -> list[float]:
    """Ask these models, one after another; gives the seconds of each answer."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    lines = [http.client.HTTPConnection(host, int(port), timeout=60) for _ in range(connections)]
    times: list[float] = []
    try:
        for turn, number in enumerate(numbers):
            line = lines[turn % connections]
            started = time.perf_counter()
            line.request("POST", f"/v2/models/m{number}/infer", _BODY, {"content-type": "application/json"})
            reply = line.getresponse()
            body = reply.read()
            times.append(time.perf_counter() - started)
            if reply.status != 200:
                raise RuntimeError(f"m{number} answered {reply.status}: {body[:300]!r}")
    finally:
        for line in lines:
            line.close()
    return times


def _popularity(server: Server, numbers: Sequence[int], models: int) -> dict[str, float]:
    # As long again beforehand: what is measured is where it settles.
    _ask(server, numbers[: models // 2])
    before = _status(server)
    times = _ask(server, numbers)
    after = _status(server)
    loads = _sum(after, "loads") - _sum(before, "loads")
    return {
        "hit_rate": 1 - loads / len(times),
        "fits": sum(version.state == "loaded" for version in after.versions) / models,
        "p50_ms": float(np.percentile(times, 50)) * 1e3,
        "p99_ms": float(np.percentile(times, 99)) * 1e3,
        "loads": loads,
        "evictions": _sum(after, "evictions") - _sum(before, "evictions"),
    }


def _against_share(found: dict[str, float]) -> float:
    """The hit rate, against that of models chosen blindly: the share of all that is in memory."""
    return found["hit_rate"] / found["fits"]


def _uniform(models: int, count: int) -> list[int]:
    return random.Random(2).choices(range(models), k=count)


def _zipf(models: int, count: int) -> list[int]:
    weights = list(accumulate(1 / (rank + 1) for rank in range(models)))
    ranks = list(range(models))
    rng = random.Random(3)
    rng.shuffle(ranks)
    return rng.choices(ranks, cum_weights=weights, k=count)


def _status(server: Server) -> Status:
    return client.status(port=server.port)


def _sum(status: Status, what: str) -> int:
    return sum(getattr(version, what) for version in status.versions)


def _memory(server: Server) -> dict[str, int]:
    """Bytes by role; the process that stands by counts with the models' processes."""
    now = _status(server)
    others = set(with_descendants(now.pid)) - {now.pid, *now.front_pids}
    return {
        "supervisor": proportional_bytes([now.pid]),
        "fronts": proportional_bytes(now.front_pids),
        "rooms": proportional_bytes(sorted(others)),
    }
