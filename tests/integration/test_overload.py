"""More is asked for than can be answered: who goes first, and what is answered in the model's place."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton

from parbake.app.keys import add_key
from parbake.contract.model import TensorSpec
from parbake.errors import ServerNotFound
from parbake.testing import serving
from parbake.transports import client
from tests.functions import write_function, write_scaled
from tests.traffic import Call, Noted, answer, busy, infer, once, wait_for

SLOW = "import time\ndef predict(x):\n    time.sleep(2.0 if x[0, 0] == 0 else 0.05)\n    return x * 2\n"
FUNCTION = "/v2/models/function/infer"
ECHO = "/v2/models/eta/infer"


def test_the_higher_priority_goes_first(tmp_path: Path) -> None:
    bundle = write_function(tmp_path, SLOW)
    finished: list[str] = []
    with serving(bundle.path, workers=1, max_batch_rows=1, head_rows=0) as server:

        def ask(number: int, **headers: str) -> threading.Thread:
            def run() -> None:
                noted = once(server.url, FUNCTION, infer((number, 1)), **headers)
                assert noted.status == 200
                finished.append(headers.get("parbake_priority", "normal"))

            thread = threading.Thread(target=run)
            thread.start()
            return thread

        threads = [ask(0)]
        wait_for(lambda: busy(server.url, FUNCTION))
        threads += [ask(1, parbake_priority="low"), ask(2), ask(3, parbake_priority="low")]
        threads += [ask(4, parbake_priority="high")]
        for thread in threads:
            thread.join(60)
    assert finished == ["normal", "high", "normal", "low", "low"]


def test_a_priority_that_there_is_not_is_refused(tmp_path: Path) -> None:
    bundle = write_scaled(tmp_path / "eta.bundle", 2, name="eta")
    with serving(bundle.path, grpc=True) as server:
        noted = once(server.url, ECHO, infer((1, 2)), parbake_priority="urgent")
        assert (noted.status, noted.json()["path"]) == (400, "parbake-priority")
        noted = once(server.url, ECHO, infer((1, 2), parameters={"priority": -1}))
        assert (noted.status, noted.json()["path"]) == (400, "$.parameters.priority")
        # As existing clients send it.
        assert answer(once(server.url, ECHO, infer((1, 2), parameters={"priority": 1}))) == [2.0, 4.0]
        with triton.InferenceServerClient(server.grpc) as caller:
            reply = caller.infer("eta", [tensor(1, 2)], priority=7)
            assert reply.as_numpy("y").tolist() == [[2.0, 4.0]]


def tensor(left: float, right: float) -> triton.InferInput:
    given = triton.InferInput("x", [1, 2], "FP32")
    given.set_data_from_numpy(np.array([[left, right]], np.float32))
    return given


CONFIG = """
[[deployments]]
bundle = "{main}"
name = "eta"
placement = "process"
fallback = "{fallback}"
deadline_ms = 500
mode = "dynamic"

[[deployments]]
bundle = "{small}"
name = "small"
placement = "inline"
mode = "dynamic"
"""


@pytest.mark.parametrize("fallback", ["default", "last", "small"])
def test_while_the_model_hangs_the_fallback_answers_every_protocol(tmp_path: Path, fallback: str) -> None:
    main = write_scaled(tmp_path / "eta.bundle", 2, name="eta", default={"y": [-1.0, -1.0]})
    small = write_scaled(tmp_path / "small.bundle", 3, name="small")
    config = tmp_path / "parbake.toml"
    config.write_text(CONFIG.format(main=main.path, small=small.path, fallback=fallback))
    expected = {"default": [-1.0, -1.0], "last": [2.0, 4.0], "small": [3.0, 6.0]}[fallback]
    with (
        serving(arguments=["--config", str(config)], grpc=True, workers=1) as server,
        Call(server.url) as call,
        triton.InferenceServerClient(server.grpc) as caller,
    ):

        def outputs(noted: Noted) -> tuple[list[float], str]:
            return answer(noted), noted.headers.get("parbake-fallback", "")

        def by_column(noted: Noted) -> tuple[list[float], str]:
            return noted.json()["y"], noted.headers.get("parbake-fallback", "")

        def over_grpc() -> tuple[list[float], str]:
            reply = caller.infer("eta", [tensor(1, 2)])
            (row,) = reply.as_numpy("y").tolist()
            return row, reply.get_response().parameters["parbake_fallback"].string_param

        asks: list[Callable[[], tuple[list[float], str]]] = [
            lambda: outputs(call(ECHO, infer((1, 2)))),
            lambda: outputs(call(ECHO, infer((1, 2), parameters={"priority": 1}))),
            lambda: by_column(call("/predict/eta", b'{"left": 1, "right": 2}')),
            over_grpc,
        ]
        for ask in asks:
            wait_for(lambda ask=ask: ask() == ([2.0, 4.0], ""))  # type: ignore[misc]
            versions = {version.name: version for version in client.status(port=server.port).versions}
            os.kill(versions["eta"].runner_pids[0], signal.SIGSTOP)
            assert ask() == (expected, fallback)
        # And when the model is there again, it answers.
        wait_for(lambda: asks[0]() == ([2.0, 4.0], ""))
        page = call("/metrics").body.decode()
    assert 'parbake_fallbacks_total{deployment="eta",reason="deadline_exceeded",version="1"}' in page
    assert 'outcome="error"' not in page


@pytest.mark.parametrize(
    ("fallback", "words"),
    [
        ("default", "has no default"),
        ("nobody", "which is no other deployment"),
        ("small", "their inputs differ"),
    ],
)
def test_a_fallback_that_could_not_answer_is_refused_at_the_start(
    tmp_path: Path, fallback: str, words: str
) -> None:
    main = write_scaled(tmp_path / "eta.bundle", 2, name="eta")
    other = TensorSpec("z", "FP32", (2,))
    small = write_function(
        tmp_path, "def predict(z):\n    return z\n", name="small", inputs=[other], outputs=[other]
    )
    config = tmp_path / "parbake.toml"
    config.write_text(CONFIG.format(main=main.path, small=small.path, fallback=fallback))
    with (
        pytest.raises(ServerNotFound, match=words),
        serving(arguments=["--config", str(config)]),
    ):
        pass


def test_who_asks_for_much_waits_for_his_own_and_not_others_for_him(tmp_path: Path) -> None:
    bundle = write_function(
        tmp_path, "import time\ndef predict(x):\n    time.sleep(0.05)\n    return x * 2\n"
    )
    keys = tmp_path / "keys.toml"
    greedy, modest = add_key(keys, "greedy"), add_key(keys, "modest")
    times: list[float] = []
    with serving(bundle.path, workers=1, max_batch_rows=1, head_rows=0, api_keys=keys) as server:
        stop = threading.Event()

        def ask(number: int) -> None:
            with Call(server.url) as call:
                at = 0
                while not stop.is_set():
                    at += 1
                    noted = call(FUNCTION, infer((number, at)), {"authorization": f"Bearer {greedy}"})
                    assert noted.status == 200, noted

        crowd = [threading.Thread(target=ask, args=(number,)) for number in range(40)]
        for thread in crowd:
            thread.start()
        with Call(server.url) as call:
            for at in range(10):
                noted = call(FUNCTION, infer((-1, at)), {"authorization": f"Bearer {modest}"})
                assert answer(noted) == [-2.0, 2.0 * at]
                times.append(noted.ended - noted.began)
        stop.set()
        for thread in crowd:
            thread.join(60)
    # Forty rows of 50 ms wait all the time. Behind them it would take two seconds; in turns it takes the batch that
    # runs, one more, and its own.
    assert sorted(times)[5] < 1.0
