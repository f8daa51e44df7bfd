"""Jobs on a real server: taken, answered as any request would be, and never lost, whatever is killed or full."""

from __future__ import annotations

import gzip
import json
import os
import resource
import signal
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from parbake.app.jobs import options_of
from parbake.app.keys import add_key
from parbake.app.routes import RouteChange
from parbake.app.supervisor import Change
from parbake.cli.main import main
from parbake.contract.model import TensorSpec
from parbake.queue.sqlite import SqliteJobs
from parbake.serving.route import Arm, Route, Rule
from parbake.settings import QueueSettings
from parbake.testing import Server, serving
from parbake.transports import client, statefile
from tests.functions import write_function, write_scaled
from tests.traffic import Call, Noted, answer, infer, once, wait_for

ASYNC = {"prefer": "respond-async"}
SLOW = "/v2/models/slow/infer"
SOURCE = """
import os, time
def predict(x):
    ends = time.monotonic() + 60
    while (x == 668).any() and not os.path.exists("GATE") and time.monotonic() < ends:
        time.sleep(0.01)
    if (x == 666).any():
        raise ValueError("no such age")
    if (x == 667).any():
        os._exit(3)
    time.sleep(float(x[0, 1]) / 1000)
    return x * 2
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def bundles(folder: Path) -> list[Path]:
    """slow (waits as many milliseconds as its second input says, for 668 until the gate is open) and quick."""
    return [
        write_function(folder, SOURCE.replace("GATE", str(folder / "gate")), name="slow").path,
        write_scaled(folder / "quick.bundle", 3, name="quick").path,
    ]


@pytest.fixture
def gate(folder: Path) -> Iterator[Path]:
    """A file; while there is none, 668 waits."""
    file = folder / "gate"
    file.unlink(missing_ok=True)
    yield file
    file.touch()


@pytest.fixture(scope="module")
def server(folder: Path, bundles: list[Path]) -> Iterator[Server]:
    third = write_scaled(folder / "third.bundle", 5, name="third").path
    with serving(
        *bundles,
        third,
        workers=2,
        deadline_ms=60_000,
        state_dir=folder / "state",
        environment={"XDG_RUNTIME_DIR": str(folder)},
    ) as running:
        # Nothing is made before the first job.
        assert not (folder / "state").exists()
        yield running
        assert "Traceback" not in running.log()


def post(call: Call, path: str, body: bytes, **headers: str) -> str:
    """Send a request as a job; gives its URL."""
    noted = call(path, body, ASYNC | {name.replace("_", "-"): value for name, value in headers.items()})
    assert noted.status == 202, noted
    assert noted.headers["preference-applied"] == "respond-async"
    url = noted.headers["location"]
    told = noted.json()
    assert (told["result"], url) == (f"{url}/result", f"/v2/jobs/{told['id']}")
    return url


def result(call: Call, url: str) -> Noted:
    """The answer to a job, as soon as there is one."""
    noted = call(f"{url}/result?wait=20")
    for _ in range(3):
        if noted.status != 202:
            break
        assert noted.headers["retry-after"] == "1"
        noted = call(f"{url}/result?wait=20")
    return noted


def jobs_of(url: str) -> dict[str, float]:
    """The metrics of jobs, by name and labels."""
    page = once(url, "/metrics").body.decode()
    lines = [line for line in page.splitlines() if line.startswith("parbake_jobs")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


QUICK = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 0.1]}]}
BINARY = {
    "inputs": [
        {"name": "x", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}},
    ],
    "outputs": [{"name": "y", "parameters": {"binary_data": True}}],
}


@pytest.mark.parametrize(
    ("path", "body", "headers"),
    [
        ("/v2/models/quick/infer", json.dumps(QUICK).encode(), {}),
        ("/v2/models/quick/infer", json.dumps({**QUICK, "id": "seven"}).encode(), {}),
        ("/v2/models/quick/versions/1/infer", infer((1, 2, 3, 4, 5, 6)), {"x-request-id": "eight"}),
        ("/v2/models/quick/infer", infer(range(600)), {"accept-encoding": "gzip"}),
        # Without the time of day: each worker must collect the same test.
        ("/v2/models/quick/infer", gzip.compress(infer((1, 2)), mtime=0), {"content-encoding": "gzip"}),
        (
            "/v2/models/quick/infer",
            json.dumps(BINARY).encode() + bytes(8),
            {"inference-header-content-length": str(len(json.dumps(BINARY)))},
        ),
        ("/predict/quick", b'{"left": 1, "right": 0.1}', {}),
        ("/predict/quick?a=b", b'[{"left": 1, "right": 0.1}]', {}),
        ("/predict/%71uick/versions/1", b'{"left": 1, "right": 0.1}', {}),
        ("/predict/slow", b'{"left": 3, "right": 1}', {}),
        ("/predict/slow", b'{"left": 666, "right": 1}', {}),
        (SLOW, infer((1, 2)), {"parbake-deadline-ms": "9000", "parbake-priority": "high"}),
    ],
)
def test_the_answer_is_the_reply_that_a_caller_would_have_waited_for(
    server: Server, path: str, body: bytes, headers: dict[str, str]
) -> None:
    with Call(server.url) as call:
        waited = call(path, body, headers)
        url = post(call, path, body, **{name.replace("-", "_"): value for name, value in headers.items()})
        kept = [result(call, url) for _ in range(2)]
        told = call(url).json()
    for noted in kept:
        assert (noted.status, noted.body, noted.headers) == (waited.status, waited.body, waited.headers)
    assert (told["state"], told["status"]) == ("done" if waited.status == 200 else "failed", waited.status)
    assert told["attempts"] == 1


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (SLOW, b"{", 400),
        (SLOW, infer((1, 2)).replace(b"FP32", b"FP64"), 400),
        ("/predict/slow", b'{"left": 1}', 400),
        ("/v2/models/none/infer", infer((1, 2)), 404),
        ("/v2/models/slow/versions/9/infer", infer((1, 2)), 404),
    ],
)
def test_a_bad_request_is_refused_at_once_as_it_always_is(
    server: Server, path: str, body: bytes, status: int
) -> None:
    with Call(server.url) as call:
        waited, refused = call(path, body), call(path, body, ASYNC)
    assert (refused.status, refused.body, refused.headers) == (status, waited.body, waited.headers)
    assert refused.status == waited.status


def test_what_is_no_prediction_does_not_become_a_job(server: Server) -> None:
    with Call(server.url) as call:
        assert call("/v2/repository/index", b"{}", ASYNC).status == 200
        assert call("/v2", None, ASYNC).status == 200
        assert call(SLOW, None, ASYNC).status == 405
        assert call("/v2/nothing", b"", ASYNC).status == 404


def test_one_idempotency_key_is_one_job(server: Server) -> None:
    with Call(server.url) as call, Call(server.url) as other:
        first = post(call, SLOW, infer((1, 30)), idempotency_key="one")
        assert post(other, SLOW, infer((1, 30)), idempotency_key="one", accept_encoding="gzip") == first
        for path, body in ((SLOW, infer((2, 30))), ("/v2/models/quick/infer", infer((1, 30)))):
            refused = call(path, body, {**ASYNC, "idempotency-key": "one"})
            assert (refused.status, refused.json()["code"]) == (409, "conflict")
            assert "use a new key" in refused.json()["hint"]
        assert result(call, first).status == 200
        assert post(call, SLOW, infer((1, 30)), idempotency_key="one") == first
        assert post(call, SLOW, infer((1, 30)), idempotency_key="two") != first
        assert call(SLOW, infer((1, 30)), {**ASYNC, "idempotency-key": "x" * 256}).status == 400


def test_a_request_that_is_sent_again_is_the_same_job_whatever_is_served_by_now(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    path, body = "/v2/models/third/infer", infer((1, 2))
    with Call(server.url) as call:
        first = post(call, path, body, idempotency_key="swapped")
        assert answer(result(call, first)) == [5.0, 10.0]
        other = write_function(
            folder,
            "def predict(z): return z",
            name="third",
            inputs=(TensorSpec("z", "FP32", (2,)),),
            replace=True,
        )
        client.reload([Change("third", str(other.path))], port=server.port)
        assert call(path, body).status == 400
        assert post(call, path, body, idempotency_key="swapped") == first
        assert answer(result(call, first)) == [5.0, 10.0]
        for headers in (
            {},
            {"idempotency-key": "new"},
            {"idempotency-key": "swapped", "content-encoding": "gzip"},
        ):
            refused = call(path, body, {**ASYNC, **headers})
            assert (refused.status, "location" in refused.headers) == (400, False)
        assert call(path, infer((1, 2, 3, 4)), {**ASYNC, "idempotency-key": "swapped"}).status == 400


def test_a_job_can_be_watched_and_waited_for_by_any_front(server: Server, gate: Path) -> None:
    # Which front gets a connection is chance, and of so many both get some.
    calls = [Call(server.url) for _ in range(8)]
    url = post(calls[0], SLOW, infer((668, 1)))
    told = calls[1](url).json()
    assert told["state"] in ("queued", "running")
    assert told["model_name"] == "slow"
    early = calls[2](f"{url}/result")
    assert (early.status, early.headers["location"]) == (202, url)
    done: list[Noted] = []
    waiting = [
        threading.Thread(target=lambda call=call: done.append(call(f"{url}?wait=20"))) for call in calls[:4]
    ]
    waiting += [
        threading.Thread(target=lambda call=call: done.append(call(url, None, {"prefer": "wait=20"})))
        for call in calls[4:]
    ]
    for thread in waiting:
        thread.start()
    gate.touch()
    for thread in waiting:
        thread.join()
    assert [noted.json()["state"] for noted in done] == ["done"] * 8
    assert {call(f"{url}/result").body for call in calls} == {calls[0](SLOW, infer((668, 1))).body}
    assert calls[0](f"{url}?wait=soon").status == 400
    assert calls[0](f"{url}/result", b"").status == 405
    assert calls[0](f"{url}/else").status == 404
    assert calls[0]("/v2/jobs/" + "x" * 22).json()["code"] == "job_not_found"
    for call in calls:
        call.close()


def test_a_job_that_waits_can_be_cancelled_and_one_that_is_answered_be_removed(
    server: Server, gate: Path
) -> None:
    with Call(server.url) as call:
        urls = [post(call, SLOW, infer((668, 1 + i))) for i in range(24)]
        wait_for(lambda: call(urls[0]).json()["state"] == "running")
        told = call(urls[-1], method="DELETE")
        assert (told.status, told.json()["state"]) == (200, "cancelled")
        assert call(urls[-1], method="DELETE").status == 200
        gone = call(f"{urls[-1]}/result")
        assert (gone.status, gone.json()["code"]) == (409, "job_cancelled")
        for url in urls[1:-1]:
            call(url, method="DELETE")
        refused = call(urls[0], method="DELETE")
        assert refused.status == 409
        assert "only one that waits" in refused.json()["error"]
        gate.touch()
        assert result(call, urls[0]).status == 200
        # What is answered goes, with its answer.
        told = call(urls[0], method="DELETE")
        assert (told.status, told.json()["state"]) == (200, "done")
        assert call(f"{urls[0]}/result").status == 404


def test_a_job_over_which_the_models_process_ends_fails_alone(server: Server) -> None:
    with Call(server.url) as call:
        bad = post(call, SLOW, infer((667, 1)))
        good = [post(call, SLOW, infer((i, 1))) for i in range(6)]
        assert [answer(result(call, url)) for url in good] == [[2.0 * i, 2.0] for i in range(6)]
        failed = result(call, bad)
    assert (failed.status, failed.json()["code"]) == (422, "row_quarantined")


def test_jobs_are_counted(server: Server, gate: Path) -> None:
    before = jobs_of(server.url)
    with Call(server.url) as call:
        urls = [post(call, SLOW, infer((668, 1 + i))) for i in range(3)]
        waiting = jobs_of(server.url)
        assert (
            waiting['parbake_jobs{deployment="slow",state="queued"}']
            + waiting['parbake_jobs{deployment="slow",state="running"}']
            == 3
        )
        assert waiting['parbake_jobs_oldest_age_seconds{deployment="slow"}'] > 0
        gate.touch()
        for url in urls:
            assert result(call, url).status == 200
        after = jobs_of(server.url)
    for name, grown in (("taken_total", 3), ('ended_total{deployment="slow",outcome="done"}', 3)):
        full = f"parbake_jobs_{name}" if "{" in name else f'parbake_jobs_{name}{{deployment="slow"}}'
        assert after[full] - before.get(full, 0) == grown
    assert after['parbake_jobs{deployment="slow",state="queued"}'] == 0
    assert after["parbake_jobs_bytes"] > 0


def test_people_see_what_was_given_up_and_have_it_begun_again(
    server: Server,
    folder: Path,
    gate: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))

    def parbake(*words: str) -> Any:
        assert main(["jobs", *words, "--port", str(server.port), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    with Call(server.url) as call, closing(SqliteJobs(folder / "state" / "queue" / "jobs.db")) as store:
        # More than the fronts have places for, so that another server on the same directory gets the last ones.
        urls = [post(call, SLOW, infer((668, 1 + i))) for i in range(12)]
        wait_for(lambda: call(urls[0]).json()["state"] == "running")
        last, url = [item.removeprefix("/v2/jobs/") for item in urls[-2:]]
        claims = store.claim({"slow": 100}, 100, options_of(QueueSettings()), idle=True)
        for claim in claims:
            if claim.id in (last, url):
                store.give_up(claim, "no more")
            else:
                store.put_off(claim, 0, counted=False, error="")
        assert call(f"{urls[-1]}/result").json()["code"] == "job_dead"
        told = parbake()
        assert {item["id"]: item["error"] for item in told["dead"]} == dict.fromkeys((last, url), "no more")
        counted = {item["state"]: item["count"] for item in told["tallies"] if item["deployment"] == "slow"}
        assert counted["dead"] == 2
        assert counted["running"] >= 1
        assert counted["running"] + counted["queued"] == 10
        assert parbake("remove", last)[0] == {"id": last, "deployment": "slow", "state": "dead", "gone": True}
        assert parbake("retry", "--all-dead", "--deployment", "slow") == {
            "retried": [url],
            "left": 0,
            "stopped": "",
        }
        assert main(["jobs", "retry", url, "--port", str(server.port)]) == 1
        assert "only one that is dead" in capsys.readouterr().err
        assert main(["jobs", "remove", last, "--port", str(server.port)]) == 3
        assert parbake("remove", "--all-dead") == {"removed": 0, "more": False}
        gate.touch()
        assert answer(result(call, urls[-1])) == [1336.0, 24.0]
        assert call(urls[-2]).status == 404
        for url in urls[:-2]:
            assert result(call, url).status == 200
    running = statefile.find(server.port)
    with Call(running.admin_url) as admin:
        token = {"authorization": f"Bearer {running.token}"}
        for body in (b"{}", b'{"id": "x", "all_dead": true}', b'{"id": "x", "deployment": "slow"}'):
            assert admin("/admin/jobs/retry", body, token).json()["code"] == "invalid_input"
        for path in ("retry", "remove"):
            refused = admin(f"/admin/jobs/{path}", b'{"all_dead": true, "deployment": ""}', token).json()
            assert refused["error"] == "no deployment has an empty name"
        assert admin("/admin/jobs/remove", b"{}", token).json()["code"] == "invalid_input"


@contextmanager
def alone(folder: Path, bundles: Sequence[Path], **options: object) -> Iterator[Server]:
    """A server with one front and a queue of its own."""
    settings: dict[str, Any] = {
        "workers": 1,
        "state_dir": folder / "state",
        "job_lease_s": 0.5,
        "deadline_ms": 60_000,
        **options,
    }
    with serving(*bundles, **settings) as running:
        yield running


def test_a_front_that_is_killed_and_a_server_that_stops_lose_nothing(
    tmp_path: Path, bundles: list[Path]
) -> None:
    asked: dict[str, list[float]] = {}
    with (
        alone(tmp_path, bundles[:1], drain_timeout_s=2, jobs_at_once=2) as server,
        Call(server.url) as call,
    ):
        for i in range(8):
            asked[post(call, SLOW, infer((i, 40)), idempotency_key=f"k{i}")] = [2.0 * i, 80.0]
        early = {url: result(call, url) for url in list(asked)[:2]}
        (front,) = client.status(port=server.port).front_pids
        os.kill(front, signal.SIGKILL)
        wait_for(lambda: call("/v2/health/ready").status == 200)
        # Whoever heard nothing asks again, and it is the same job.
        assert [post(call, SLOW, infer((i, 40)), idempotency_key=f"k{i}") for i in range(8)] == [*asked]
        answers = {url: result(call, url) for url in asked}
        assert {url: answer(noted) for url, noted in answers.items()} == asked
        assert all(answers[url].body == noted.body for url, noted in early.items())
        assert jobs_of(server.url)['parbake_jobs{deployment="slow",state="running"}'] == 0
        late = [post(call, SLOW, infer((i, 700))) for i in range(6)]
        wait_for(lambda: call(late[0]).json()["state"] == "running")
        assert server.stop() == 0
    with sqlite3.connect(tmp_path / "state" / "queue" / "jobs.db") as db:
        states = {f"/v2/jobs/{row[0]}": row[1:] for row in db.execute("SELECT id, state, attempts FROM jobs")}
        (requests,) = db.execute("SELECT count(*) FROM requests").fetchone()
    db.close()
    # What was left is as if it had not been begun, and whoever comes next need not wait for a lease to end.
    assert {states[url][0] for url in asked} == {"done"}
    assert {states[url] for url in late} <= {("done", 1), ("queued", 0)}
    assert requests == sum(state == ("queued", 0) for state in states.values()) > 0


@pytest.fixture(scope="module")
def small(folder: Path, bundles: list[Path]) -> Iterator[Server]:
    """A server with narrow limits, and garbage where the queue is to be."""
    file = folder / "small" / "state" / "queue" / "jobs.db"
    file.parent.mkdir(parents=True)
    file.write_bytes(GARBAGE)
    environment = {"XDG_RUNTIME_DIR": str(folder)}
    limits = {"jobs_waiting": 2, "job_keep_s": 1, "jobs_bytes": 400_000}
    with alone(folder / "small", bundles, environment=environment, **limits) as running:
        yield running
        assert "Traceback" not in running.log()


GARBAGE = b"no database at all" * 1000


def test_a_queue_that_is_garbage_is_named_and_keeps_nobody_from_being_answered(
    small: Server, folder: Path
) -> None:
    file = folder / "small" / "state" / "queue" / "jobs.db"
    with Call(small.url) as call:
        path, body = "/v2/models/quick/infer", infer((1, 2))
        for _ in range(2):
            assert answer(call(path, body)) == [3.0, 6.0]
            refused = call(path, body, ASYNC)
            assert (refused.status, refused.json()["code"]) == (503, "queue_torn")
            assert "rename its folder as a whole" in refused.json()["hint"]
        assert call("/metrics").status == 200
        assert file.read_bytes() == GARBAGE
        file.parent.rename(folder / "aside")
        assert answer(result(call, post(call, path, body))) == [3.0, 6.0]
        assert "jobs.away" in small.log()


def test_limits_refuse_by_name_and_results_are_removed_in_time(
    small: Server, folder: Path, gate: Path
) -> None:
    without_garbage(folder)
    with Call(small.url) as call:
        urls = [post(call, SLOW, infer((668, 1))) for _ in range(2)]
        refused = call(SLOW, infer((1, 1)), ASYNC)
        assert (refused.status, refused.json()["code"]) == (503, "overloaded")
        assert "2 jobs of 'slow'" in refused.json()["error"]
        assert int(refused.headers["retry-after"]) >= 1
        urls.append(post(call, "/v2/models/quick/infer", infer((1, 2))))
        large = call("/predict/quick", b'{"left": 1, "right": 2}' + b" " * 400_000, ASYNC)
        assert (large.status, large.json()["code"]) == (503, "overloaded")
        assert "400000 is the limit" in large.json()["error"]
        gate.touch()
        for url in urls:
            assert result(call, url).status in (200, 404)
        for url in urls:
            wait_for(lambda url=url: call(f"{url}/result").status == 404)  # type: ignore[misc]  # of this turn


def test_a_full_disk_refuses_what_does_not_fit_and_loses_nothing(
    small: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_garbage(folder)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    (front,) = client.status(port=small.port).front_pids
    with Call(small.url) as call:
        body = b'{"left": 3, "right": 2}'
        urls = [post(call, "/predict/slow", b'{"left": 3, "right": 300}')]
        largest = max(file.stat().st_size for file in (folder / "small" / "state" / "queue").iterdir())
        before = resource.prlimit(front, resource.RLIMIT_FSIZE)
        resource.prlimit(front, resource.RLIMIT_FSIZE, (largest, before[1]))
        refused = call("/predict/slow", body + b" " * 60_000, ASYNC)
        assert (refused.status, refused.json()["code"]) == (503, "queue_away")
        assert "free space" in refused.json()["hint"]
        assert call("/predict/quick", body).status == 200
        resource.prlimit(front, resource.RLIMIT_FSIZE, before)
        urls.append(post(call, "/predict/quick", body + b" " * 60_000))
        assert [result(call, url).json() for url in urls] == [{"y": [6.0, 600.0]}, {"y": [9.0, 6.0]}]


def without_garbage(folder: Path) -> None:
    """Put aside what the first test does, where it has not run."""
    file = folder / "small" / "state" / "queue" / "jobs.db"
    if file.exists() and file.read_bytes()[:9] == GARBAGE[:9]:
        file.parent.rename(folder / "aside")


def test_a_job_is_its_keys_own_and_goes_by_the_route(tmp_path: Path, bundles: list[Path]) -> None:
    file = tmp_path / "keys.toml"
    ann, bob, eve = (
        add_key(file, name, only) for name, only in (("ann", []), ("bob", []), ("eve", ["else"]))
    )
    second = write_scaled(tmp_path / "second.bundle", 5, name="quick").path
    route = Route(
        "quick",
        "1",
        (Arm("1", 1.0), Arm("2", 0.0)),
        rules=(Rule("2", {"x-team": ("new",)}), Rule("1", {"prefer": ("no",), "authorization": ()})),
        sticky="header:x-api-key",
    )
    with alone(tmp_path, [bundles[1], second], api_keys=file) as server, Call(server.url) as call:
        client.set_route("quick", RouteChange(route), port=server.port)
        path, body = "/v2/models/quick/infer", infer((1, 2))
        assert call(path, body, ASYNC).status == 401
        assert call(path, body, {**ASYNC, "x-api-key": eve}).status == 403
        url = post(call, path, body, x_api_key=ann, idempotency_key="k")
        hers = f"{url}/result?wait=20"
        assert call(hers, None, {"x-api-key": ann}).json()["outputs"][0]["data"] == [3.0, 6.0]
        for suffix, method in (("", "GET"), ("/result", "GET"), ("", "DELETE")):
            refused = call(url + suffix, None, {"x-api-key": bob}, method)
            assert (refused.status, refused.json()["code"]) == (404, "job_not_found")
            assert call(url + suffix, None, {}, method).status == 401
        assert post(call, path, body, x_api_key=bob, idempotency_key="k") != url

        plain = post(call, path, body, x_api_key=ann)
        named = post(call, path, body, x_api_key=ann, x_team="new")
        by = [call(f"{u}/result?wait=20", None, {"x-api-key": ann}) for u in (plain, named)]
        assert [noted.headers["parbake-version"] for noted in by] == ["1", "2"]
        assert [noted.json()["outputs"][0]["data"] for noted in by] == [[3.0, 6.0], [5.0, 10.0]]
    with sqlite3.connect(tmp_path / "state" / "queue" / "jobs.db") as db:
        everything = "".join(db.iterdump())
    db.close()
    assert ann not in everything
