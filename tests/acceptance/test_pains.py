"""What users of other model servers complain of, one test each: it must not happen here.

The numbers are those of the project's list of such complaints; the threads are public. Some come with later parts of
the product and have no test yet: 17 (promotion by hand).
"""

from __future__ import annotations

import os
import pickle
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import parbake as library
from parbake.app.supervisor import Change
from parbake.contract.bundle import write_bundle
from parbake.contract.model import Step
from parbake.errors import ServerNotFound
from parbake.runtime import cpu
from parbake.testing import serving
from parbake.transports import client
from tests.conftest import Parbake
from tests.functions import large_bundle, write_function, write_scaled
from tests.traffic import (
    Call,
    answer,
    bake_rows,
    calling,
    infer,
    memory_mb,
    once,
    rows,
    wait_for,
)

FUNCTION = "/v2/models/function/infer"
SCALED = "/v2/models/scaled/infer"


def test_pain_01_dead_workers_while_the_server_says_healthy(tmp_path: Path) -> None:
    """MLServer#707, MLServer#1431, LitServe#660, pytorch/serve#2933."""
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    with serving(bundle.path, placement="process", workers=1) as server, Call(server.url) as call:
        # A worker that cannot be started again, because its files are gone.
        bundle.path.rename(tmp_path / "away")
        for pid in client.status(port=server.port).versions[0].runner_pids:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: call("/v2/health/ready").status == 503)
        began = time.monotonic()
        refused = call(SCALED, infer((1, 2)))
        assert (refused.status, refused.json()["code"]) == (503, "runner_down")
        # It was told at once, with a deadline of ten seconds.
        assert time.monotonic() - began < 5
        (tmp_path / "away").rename(bundle.path)
        wait_for(lambda: call("/v2/health/ready").status == 200)
        assert answer(call(SCALED, infer((1, 2)))) == [2.0, 4.0]


def test_pain_02_batching_returns_wrong_rows_and_one_bad_request_fails_its_neighbours(tmp_path: Path) -> None:
    """MLServer#1306, MLServer#1911, LitServe#340, BentoML#3710."""
    source = (
        "import time\ndef predict(x):\n    time.sleep(0.02)\n"
        "    if (x == 666).any():\n        raise ValueError('no such age')\n    return x * 2\n"
    )
    bundle = write_function(tmp_path, source)
    asked = [[float(v) for v in range(2 * i, 2 * i + 2 + 2 * (i % 3))] for i in range(60)]
    with serving(bundle.path, workers=1) as server, ThreadPoolExecutor(24) as crowd:
        noted = list(
            crowd.map(lambda values: once(server.url, FUNCTION, infer(values)), [*asked, [666.0, 1.0]])
        )
        page = once(server.url, "/metrics").body.decode()
    for values, one in zip(asked, noted, strict=False):
        if 666.0 not in values:
            assert answer(one) == [2 * value for value in values]
    assert (noted[-1].status, noted[-1].json()["code"]) == (422, "row_rejected")
    executions = float(page.split("parbake_batch_rows_count")[1].split()[1])
    assert executions < len(asked), "they were batched"


def test_pain_03_an_opaque_batcher(tmp_path: Path) -> None:
    """BentoML#3200, BentoML#4265, triton server#8251."""
    bundle = write_function(tmp_path, "import time\ndef predict(x):\n    time.sleep(0.01)\n    return x\n")
    with serving(bundle.path, workers=1, head_rows=0) as server, ThreadPoolExecutor(32) as crowd:
        statuses = list(
            crowd.map(
                lambda i: once(server.url, FUNCTION, infer((i, 1))).status, [float(i) for i in range(96)]
            )
        )
        page = once(server.url, "/metrics").body.decode()
    # What could be done in time is done, and where the time went can be read off.
    assert statuses == [200] * 96
    for stage in ("parse", "queue", "model", "total"):
        assert f'stage="{stage}"' in page
    assert 'parbake_batch_rows_bucket{deployment="function",le="1.0"' in page


def test_pain_04_memory_is_kept_after_unload(tmp_path: Path) -> None:
    """triton server#4528, triton server#4966, triton server#5841."""
    large = large_bundle(tmp_path, 60)
    small = write_scaled(tmp_path / "scaled.bundle", 2)
    with serving(small.path, large.path, workers=1) as server, Call(server.url) as call:
        loaded = memory_mb(server)
        assert call("/v2/models/large/infer", infer((1, 2))).status == 200
        assert call("/v2/repository/models/large/unload", b"").status == 200
        wait_for(lambda: memory_mb(server) < loaded - 45)


def test_pain_05_memory_is_models_times_workers(tmp_path: Path) -> None:
    """MLServer#1232, MLServer#434."""
    large = large_bundle(tmp_path, 60)
    used: list[float] = []
    for workers in (1, 4):
        with serving(large.path, placement="process", workers=workers, threads=1) as server:
            assert once(server.url, "/v2/models/large/infer", infer((1, 2))).status == 200
            used.append(memory_mb(server))
    # Three more fronts, and not three more models: 60 MB each, and as much again while they are used.
    assert used[1] - used[0] < 3 * 60


def test_pain_06_no_update_without_a_restart(tmp_path: Path) -> None:
    """BentoML#754, pytorch/serve#949, cortex#1252."""
    first = write_scaled(tmp_path / "first.bundle", 2)
    second = write_scaled(tmp_path / "second.bundle", 3)
    with (
        serving(first.path, workers=1) as server,
        calling(server.url, rows("scaled", (1.0, 2.0))) as (caller,),
    ):
        (before,) = client.status(port=server.port).front_pids
        client.reload([Change(bundle=str(second.path))], port=server.port)
        caller.wait(5)
        assert client.status(port=server.port).front_pids == (before,)
    assert caller.failures == []
    answers = [answer(noted) for noted in caller.noted]
    assert answers[0] == [2.0, 4.0]
    assert answers[-1] == [3.0, 6.0]


LAZY = """
import time

_ready = []

def predict(x):
    if not _ready:
        time.sleep(1.5)
        _ready.append(True)
    return x * {factor}
"""


def test_pain_07_the_first_call_after_a_reload_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tensorflow/serving#385, tensorflow/serving#910, triton server#708."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    bundles = []
    for factor in (2, 3):
        (tmp_path / f"lazy{factor}.py").write_text(LAZY.format(factor=factor))
        bundles.append(
            library.pack(
                f"lazy{factor}:predict", name="lazy", example={"x": np.ones((3, 2), np.float32)},
                purpose="is slow at first", owner="tests", out=tmp_path / f"{factor}.bundle",
            ).path
        )  # fmt: skip
    with (
        serving(bundles[0], workers=1, head_rows=0) as server,
        calling(server.url, rows("lazy", (1.0, 2.0))) as (caller,),
    ):
        client.reload([Change(bundle=str(bundles[1]))], port=server.port)
        caller.wait(5)
    assert answer(caller.noted[-1]) == [3.0, 6.0]
    assert caller.failures == []
    # Nobody was there for the first call, neither at the start nor after the change.
    assert max(noted.ended - noted.began for noted in caller.noted) < 1.4


def test_pain_08_requests_are_lost_on_rollout_and_shutdown(tmp_path: Path) -> None:
    """ray#64181, kuberay PR#3166, MLServer PR#2292."""
    bundles = [write_scaled(tmp_path / f"{factor}.bundle", factor) for factor in (2, 3, 4)]
    with (
        serving(bundles[0].path, workers=2) as server,
        calling(server.url, *[rows("scaled", (1.0, float(i))) for i in range(4)]) as callers,
    ):
        for bundle in bundles[1:]:
            client.reload([Change(bundle=str(bundle.path))], port=server.port)
            callers[0].wait(5)
        assert all(caller.failures == [] for caller in callers)
        assert server.stop() == 0
    for caller in callers:
        # After the end there is nobody to answer (0); until then everything was.
        assert {noted.status for noted in caller.noted} <= {200, 0, 503}
        last = max(i for i, noted in enumerate(caller.noted) if noted.status == 200)
        assert all(noted.status == 200 for noted in caller.noted[:last])


def test_pain_09_the_proxy_costs_more_than_the_model(tmp_path: Path) -> None:
    """ray#42565, ray#46693, ray#55473."""
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    with serving(bundle.path) as server:
        assert answer(once(server.url, SCALED, infer((1, 2)))) == [2.0, 4.0]
        (version,) = client.status(port=server.port).versions
    # Who takes the request runs the model, because that was measured to be cheaper than to hand it on.
    assert (version.placement, version.runner_pids) == ("inline", ())
    assert version.row_us < version.hop_us


def test_pain_10_long_requests_need_durable_asynchronous_results(tmp_path: Path) -> None:
    """ray#32292, kserve#2620."""
    gate = tmp_path / "gate"
    source = f"""
import os, time
def predict(x):
    ends = time.monotonic() + 60
    while x[0, 0] > 0 and not os.path.exists({str(gate)!r}) and time.monotonic() < ends:
        time.sleep(0.01)
    return x * 2
"""
    bundle = write_function(tmp_path, source)
    options: dict[str, Any] = {
        "workers": 1,
        "state_dir": tmp_path / "state",
        "max_batch_rows": 1,
        "deadline_ms": 60_000,
        "job_lease_s": 1,
    }
    urls: list[str] = []
    with serving(bundle.path, **options) as server, Call(server.url) as call:
        for i in range(20):
            taken = call(
                FUNCTION, infer((i, 1)), {"prefer": "respond-async", "idempotency-key": f"order {i}"}
            )
            assert taken.status == 202
            urls.append(taken.headers["location"])
        # Nobody holds a connection for them, and only the first can be answered yet.
        first = call(f"{urls[0]}/result?wait=30")
        assert answer(first) == [0.0, 2.0]
        now = client.status(port=server.port)
        for pid in (now.pid, *now.front_pids, *now.versions[0].runner_pids):
            os.kill(pid, signal.SIGKILL)
        server.process.wait(60)
    gate.touch()
    with serving(bundle.path, **options) as server, Call(server.url) as call:
        assert [answer(call(f"{url}/result?wait=30")) for url in urls] == [[2.0 * i, 2.0] for i in range(20)]
        assert call(f"{urls[0]}/result").body == first.body
        again = call(FUNCTION, infer((3, 1)), {"prefer": "respond-async", "idempotency-key": "order 3"})
        assert again.headers["location"] == urls[3]


def test_pain_11_no_batch_no_precomputed_no_cached_predictions(tmp_path: Path) -> None:
    """kubeflow/community#732, feast#4288, kserve#369."""
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    table = bake_rows(bundle, [(1.0, 2.0)], tmp_path / "scaled.table")
    with serving(bundle.path, "--table", table, mode="static", workers=1) as server:
        assert answer(once(server.url, SCALED, infer((1, 2)))) == [2.0, 4.0]
        unknown = once(server.url, SCALED, infer((3, 4)))
        assert (unknown.status, unknown.json()["code"]) == (404, "key_not_baked")
    with serving(bundle.path, mode="hybrid", workers=1) as server:
        for _ in range(3):
            assert answer(once(server.url, SCALED, infer((1, 2)))) == [2.0, 4.0]
        page = once(server.url, "/metrics").body.decode()
    assert 'parbake_table_hits_total{deployment="scaled",version="1"} 2.0' in page


def test_pain_12_no_shedding_no_timeout_no_cancel(tmp_path: Path) -> None:
    """ray#22670, MLServer#999, triton server#4618."""
    slow = "import time\ndef predict(x):\n    time.sleep(0.4)\n    return x * 2\n"
    bundle = write_function(tmp_path, slow)
    with (
        serving(bundle.path, workers=1, max_batch_rows=1, head_rows=0) as server,
        ThreadPoolExecutor(12) as crowd,
    ):
        for i in range(2):
            assert once(server.url, FUNCTION, infer((i, 1))).status == 200
        began = time.monotonic()
        noted = list(
            crowd.map(
                lambda i: once(server.url, FUNCTION, infer((i, 2)), parbake_deadline_ms="900"), range(12)
            )
        )
        took = time.monotonic() - began
    assert {one.status for one in noted} <= {200, 503, 504}
    shed = [one for one in noted if one.status == 503]
    assert shed, "twelve rows of 0.4 s do not fit into 0.9 s"
    assert all(one.json()["code"] == "overloaded" and int(one.headers["retry-after"]) >= 1 for one in shed)
    # All of them one after the other would have taken 4.8 s.
    assert took < 4


def test_pain_13_threads_are_oversubscribed_in_containers(tmp_path: Path) -> None:
    """kserve#1031, triton onnxruntime_backend#245."""
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    threads: list[int] = []
    allowed = os.sched_getaffinity(0)
    for cpus in ({min(allowed)}, allowed):
        os.sched_setaffinity(0, cpus)
        try:
            with serving(bundle.path, placement="process", workers=1) as server:
                (pid,) = client.status(port=server.port).versions[0].runner_pids
                threads.append(len(list(Path(f"/proc/{pid}/task").iterdir())))
        finally:
            os.sched_setaffinity(0, allowed)
    # The process itself and its allocator; and a pool of the runtime and of numpy for what it may use, not for what
    # the host has.
    assert threads[0] <= 2
    assert threads[1] <= threads[0] + 2 * (cpu.quota() - 1)


def test_pain_14_libraries_differ_between_training_and_serving(tmp_path: Path) -> None:
    """mlflow#12638, MLServer#1801."""
    sound = write_function(tmp_path, "def predict(x):\n    return x * 2\n")
    libraries = tuple(
        msgspec.structs.replace(found, version="0.1") if found.name == "numpy" else found
        for found in sound.environment.libraries
    )
    environment = msgspec.structs.replace(sound.environment, libraries=libraries, required=("numpy",))
    other = write_bundle(
        tmp_path / "other.bundle", sound.contract,
        {"source/model.py": sound.file("source/model.py").read_bytes()}, sound.goldens(), environment,
    )  # fmt: skip
    with pytest.raises(ServerNotFound, match=r"numpy 0\.1 \(here "), serving(other.path):
        pass


def test_pain_15_bad_input_gives_a_500_or_an_unreadable_error(tmp_path: Path) -> None:
    """mlflow#4897, seldon-core#5188, kserve#402."""
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    bad = {
        b"{": "",
        b"[]": "$",
        b'{"inputs": []}': "$.inputs",
        b'{"inputs": [{"name": "z", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}': "$.inputs[0].name",
        b'{"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]}': "$.inputs[0].shape",
        b'{"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, "two"]}]}': "$.inputs[0].data",
    }
    with serving(bundle.path, workers=1) as server, Call(server.url) as call:
        for body, path in bad.items():
            noted = call(SCALED, body)
            told = noted.json()
            assert 400 <= noted.status < 500, noted
            assert told["error"], body
            assert told.get("path", "").startswith(path), told
            assert "Traceback" not in noted.body.decode()
        assert answer(call(SCALED, infer((1, 2)))) == [2.0, 4.0]


class Bomb:
    """Runs code when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def test_pain_16_many_models_thrash_and_start_slowly(tmp_path: Path) -> None:
    count = 24
    bundles = [write_scaled(tmp_path / f"m{i}.bundle", i, name=f"m{i}").path for i in range(count)]
    with serving(*bundles, load="on-demand", workers=1) as server, Call(server.url) as call:
        for i in range(count):
            assert call(f"/v2/models/m{i}/infer", infer((1, 2))).status == 200
        everything = sum(version.memory_bytes for version in client.status(port=server.port).versions)
    # All together take 1.2 times the budget, and are asked in turn, which is the worst for whoever keeps the latest.
    budget = round(everything / 1.2)
    with (
        serving(*bundles, load="on-demand", workers=1, memory_bytes=budget) as server,
        Call(server.url) as call,
    ):
        cold: list[float] = []
        for turn in range(8):
            for i in range(count):
                noted = call(f"/v2/models/m{i}/infer", infer((1, 2)))
                assert answer(noted) == [i, 2 * i]
                if not turn:
                    cold.append(noted.ended - noted.began)
        versions = client.status(port=server.port).versions
    assert sorted(cold)[count // 2] < 0.15
    assert sum(version.memory_bytes for version in versions) <= budget
    # Keeping the latest would load one for each request.
    assert sum(version.loads for version in versions) < 8 * count * 0.85


def test_pain_18_a_pickle_runs_the_code_of_whoever_made_it(tmp_path: Path, parbake: Parbake) -> None:
    """CVE-2025-32375, mlflow#12256."""
    mark = tmp_path / "it ran"
    sound = write_function(tmp_path, "def predict(x):\n    return x\n")
    contract = msgspec.structs.replace(
        sound.contract, name="bomb", steps=(Step("pickle", "p.joblib", "y=predict"),)
    )
    bomb = write_bundle(
        tmp_path / "bomb.bundle", contract, {"p.joblib": pickle.dumps(Bomb(mark))}, sound.goldens(),
        sound.environment,
    )  # fmt: skip
    with pytest.raises(ServerNotFound, match="pickle"), serving(bomb.path):
        pass
    for arguments in (["check"], ["inspect"], ["bake", "--input", "rows.jsonl", "--out", "t"]):
        (tmp_path / "rows.jsonl").write_text('{"left": 1, "right": 2}\n')
        parbake(arguments[0], bomb.path, *arguments[1:])
    assert not mark.exists()
    # The trap itself works: it is the flag that keeps it shut.
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()
