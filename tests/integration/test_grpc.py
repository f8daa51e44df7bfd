"""gRPC on a real server: several fronts, runners that die, load and unload, TLS, an orderly end."""

from __future__ import annotations

import os
import queue
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from parbake.contract.model import TensorSpec
from parbake.testing import Server, serving
from parbake.transports.client import status
from parbake.transports.grpc.messages import HEALTH, message
from tests.echo import write_echo

X = [TensorSpec("x", "FP32", (2,))]


def tensor(*rows: list[float]) -> triton.InferInput:
    item = triton.InferInput("x", [len(rows), 2], "FP32")
    item.set_data_from_numpy(np.array(rows, dtype=np.float32))
    return item


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    bundle = write_echo(tmp_path_factory.mktemp("grpc"), "echo", X)
    with serving(bundle.path, grpc=True, workers=2) as running:
        yield running
        assert "Traceback" not in running.log()


def test_rest_and_grpc_of_the_same_client_give_the_same_bits(server: Server) -> None:
    rows = np.array([[0.1, -2.5], [3e38, 1e-45]], dtype=np.float32)
    answers = []
    for library, address in ((triton, server.grpc), (triton_http, f"127.0.0.1:{server.port}")):
        client = library.InferenceServerClient(address)
        item = library.InferInput("x", list(rows.shape), "FP32")
        item.set_data_from_numpy(rows)
        answers.append(client.infer("echo", [item]).as_numpy("x_out").tobytes())
        client.close()
    assert answers == [rows.tobytes()] * 2


def test_what_is_asked_of_any_front_is_counted_once(server: Server) -> None:
    def rows() -> int:
        with triton.InferenceServerClient(server.grpc) as client:
            stats = client.get_inference_statistics("echo", as_json=True)["model_stats"]
        return int(stats[0].get("inference_count", 0))

    before = rows()
    # Each connection may land on another front.
    for _ in range(12):
        options = [("grpc.use_local_subchannel_pool", 1)]
        with triton.InferenceServerClient(server.grpc, channel_args=options) as client:
            client.infer("echo", [tensor([1.0, 2.0])])
    assert rows() == before + 12


def test_unload_and_load_over_grpc_hold_for_every_front(server: Server) -> None:
    with triton.InferenceServerClient(server.grpc) as client:
        client.unload_model("echo")
        assert not client.is_model_ready("echo")
        for _ in range(6):
            with pytest.raises(InferenceServerException, match="model 'echo' is not loaded"):
                client.infer("echo", [tensor([1.0, 2.0])])
        client.load_model("echo")
        assert client.infer("echo", [tensor([1.0, 2.0])]).as_numpy("x_out").tolist() == [[1.0, 2.0]]


def test_a_token_is_asked_for_where_the_settings_say_so(tmp_path: Path) -> None:
    bundle = write_echo(tmp_path, "echo", X)
    with (
        serving(bundle.path, grpc=True, repository_api="token", admin_token="open sesame") as server,
        triton.InferenceServerClient(server.grpc) as client,
    ):
        with pytest.raises(InferenceServerException, match="need the admin token"):
            client.load_model("echo")
        client.load_model("echo", headers={"authorization": "Bearer open sesame"})


def test_a_killed_runner_is_unavailable_over_grpc_until_it_is_back(tmp_path: Path) -> None:
    # Given a model in a process of its own
    bundle = write_echo(tmp_path, "echo", X)
    with (
        serving(bundle.path, grpc=True, placement="process") as server,
        triton.InferenceServerClient(server.grpc) as client,
    ):
        client.infer("echo", [tensor([1.0, 2.0])])
        # When that process is killed
        (version,) = status(port=server.port).versions
        for pid in version.runner_pids:
            os.kill(pid, signal.SIGKILL)
        refusals: list[Any] = []
        started = time.monotonic()
        back = False
        while not back:
            try:
                client.infer("echo", [tensor([1.0, 2.0])])
                back = time.monotonic() - started > 0.1
            except InferenceServerException as error:
                refusals.append(error)
                assert time.monotonic() - started < 10
                time.sleep(0.01)
        (after,) = status(port=server.port).versions
    # Then callers waited, or were told so by name, until it was back by itself
    assert after.runner_restarts == 1
    assert {error.status() for error in refusals} <= {"StatusCode.UNAVAILABLE"}
    assert all("is being started again" in refusal.message() for refusal in refusals)


def test_what_was_accepted_is_answered_when_the_server_is_told_to_stop(tmp_path: Path) -> None:
    # Given a server under load by callers that each wait for their answer
    bundle = write_echo(tmp_path, "echo", X)
    failed: queue.Queue[Any] = queue.Queue()
    answered = [0] * 4
    with serving(bundle.path, grpc=True) as server:

        def call(number: int) -> None:
            with triton.InferenceServerClient(server.grpc) as client:
                while True:
                    try:
                        result = client.infer("echo", [tensor([float(number), 2.0])])
                    except InferenceServerException as error:
                        failed.put(error)
                        return
                    assert result.as_numpy("x_out")[0, 0] == number
                    answered[number] += 1

        callers = [threading.Thread(target=call, args=(number,)) for number in range(4)]
        for caller in callers:
            caller.start()
        while min(answered) < 20:
            time.sleep(0.01)
        # When it is told to stop
        assert server.stop() == 0
        for caller in callers:
            caller.join(10)
    # Then each caller's first failure is that nobody takes new calls, and none was cut off
    errors = [failed.get_nowait() for _ in callers]
    assert {error.status() for error in errors} == {"StatusCode.UNAVAILABLE"}


def test_probes_see_the_server_come_and_go(tmp_path: Path) -> None:
    bundle = write_echo(tmp_path, "echo", X)
    tell = message("grpc.health.v1.HealthCheckResponse")
    with serving(bundle.path, grpc=True) as server, grpc.insecure_channel(server.grpc) as channel:
        check = channel.unary_unary(f"/{HEALTH}/Check")
        assert tell.FromString(check(b"", timeout=5)).status == 1
        watching = channel.unary_stream(f"/{HEALTH}/Watch")(b"", timeout=20)
        assert tell.FromString(next(watching)).status == 1
        server.process.send_signal(signal.SIGTERM)
        # A watcher hears that the server stops, and does not hold it up.
        assert tell.FromString(next(watching)).status == 2
        assert server.process.wait(10) == 0


def test_tls_is_spoken_where_a_certificate_is_given(tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed: apt install openssl")
    request = (
        "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    subprocess.run(
        [openssl, *request.split(), "-keyout", "key.pem", "-out", "cert.pem"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    bundle = write_echo(tmp_path, "echo", X)
    with serving(
        bundle.path, grpc=True, tls_cert=tmp_path / "cert.pem", tls_key=tmp_path / "key.pem"
    ) as server:
        address = f"localhost:{server.grpc.rpartition(':')[2]}"
        with triton.InferenceServerClient(
            address, ssl=True, root_certificates=str(tmp_path / "cert.pem")
        ) as client:
            assert client.infer("echo", [tensor([1.0, 2.0])]).as_numpy("x_out").tolist() == [[1.0, 2.0]]
        with triton.InferenceServerClient(address) as plain, pytest.raises(InferenceServerException):
            plain.is_server_live(client_timeout=2)


def test_a_packed_message_that_unpacks_without_end_is_refused(tmp_path: Path) -> None:
    bundle = write_echo(tmp_path, "echo", X)
    with serving(bundle.path, grpc=True, workers=1, max_body_bytes=1_000_000) as server:
        (pid,) = status(port=server.port).front_pids
        before = _most_memory(pid)
        with grpc.insecure_channel(
            server.grpc, options=[("grpc.max_send_message_length", -1)], compression=grpc.Compression.Gzip
        ) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(
                    bytes(200_000_000), timeout=60
                )
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert channel.unary_unary("/inference.GRPCInferenceService/ServerLive")(b"", timeout=20)
        assert _most_memory(pid) - before < 50_000_000


def _most_memory(pid: int) -> int:
    """Bytes that a process has had at most."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
