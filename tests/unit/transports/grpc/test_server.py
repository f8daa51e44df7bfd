"""gRPC as its clients see it: tritonclient, unchanged, against a front in this process."""

from __future__ import annotations

import asyncio
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.utils import InferenceServerException

from parbake.app.control import Load, Unload
from parbake.app.front import Front
from parbake.contract.model import TensorSpec
from parbake.errors import NotAllowed, SettingsError
from parbake.settings import ServerSettings
from parbake.transports.access import Access
from parbake.transports.grpc.messages import HEALTH, INFERENCE, message
from parbake.transports.grpc.server import serve_grpc
from parbake.transports.grpc.service import address_of
from tests.echo import ONNX_TYPES, write_echo
from tests.unit.transports.grpc.conftest import GrpcFront


@pytest.fixture
def client(echo: GrpcFront) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(echo.address) as opened:
        yield opened


def x(*rows: list[float]) -> triton.InferInput:
    tensor = triton.InferInput("x", [len(rows), 2], "FP32")
    tensor.set_data_from_numpy(np.array(rows, dtype=np.float32))
    return tensor


def call(
    channel: grpc.Channel, method: str, data: bytes = b"", service: str = INFERENCE, **rest: Any
) -> bytes:
    reply: bytes = channel.unary_unary(f"/{service}/{method}")(data, timeout=10, **rest)
    return reply


def refused(
    channel: grpc.Channel, method: str, data: bytes = b"", **rest: Any
) -> tuple[grpc.StatusCode, str, dict[str, Any]]:
    with pytest.raises(grpc.RpcError) as caught:
        call(channel, method, data, **rest)
    error: Any = caught.value
    return error.code(), error.details(), dict(error.trailing_metadata())


# Predictions ---------------------------------------------------------------------------------------


def test_a_row_is_answered(client: triton.InferenceServerClient) -> None:
    result = client.infer("echo", [x([1.5, -2.0])], request_id="mine")
    assert result.as_numpy("x_out").tolist() == [[1.5, -2.0]]
    reply = result.get_response()
    assert (reply.id, reply.model_name, reply.model_version) == ("mine", "echo", "1")


def test_every_datatype_comes_back_as_it_went(client: triton.InferenceServerClient) -> None:
    tensors: dict[str, np.ndarray] = {}
    for name in ONNX_TYPES:
        if name == "BYTES":
            tensors[name] = np.array([["a", ""], ["über", "x" * 300]], dtype=object)
        elif name == "BOOL":
            tensors[name] = np.array([[True, False], [False, True]])
        else:
            dtype = triton.InferInput and np.dtype(
                name.lower().replace("fp", "float").replace("uint", "uint")
            )
            tensors[name] = np.array([[0, 1], [2, 3]], dtype=dtype)
    inputs = []
    for name, tensor in tensors.items():
        item = triton.InferInput(name.lower(), tensor.shape, name)
        item.set_data_from_numpy(tensor)
        inputs.append(item)
    wanted = [triton.InferRequestedOutput(f"{name.lower()}_out") for name in reversed(ONNX_TYPES)]
    for outputs in (None, wanted):
        result = client.infer("mixed", inputs, outputs=outputs)
        for name, tensor in tensors.items():
            back = result.as_numpy(f"{name.lower()}_out")
            if name == "BYTES":
                back = np.array([item.decode() for item in back.ravel()], object).reshape(back.shape)
            assert np.array_equal(back, tensor)


def test_many_callers_get_their_own_answers(client: triton.InferenceServerClient) -> None:
    done: queue.Queue[tuple[int, Any, Any]] = queue.Queue()
    for number in range(100):
        inputs = [x(*([[float(number), 0.0]] * (1 + number % 3)))]
        client.async_infer(
            "echo", inputs, lambda result, error, number=number: done.put((number, result, error))
        )
    for _ in range(100):
        number, result, error = done.get(timeout=10)
        assert error is None
        assert result.as_numpy("x_out").tolist() == [[float(number), 0.0]] * (1 + number % 3)


def test_a_refusal_has_status_text_and_trailers(
    client: triton.InferenceServerClient, channel: grpc.Channel
) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.infer("echo", [x([1.0, float("nan")])])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert caught.value.message() == (
        "input 'x' holds nan and the contract allows only finite numbers at $.inputs[0].data[1]\n"
        "hint: pack with --allow-nan if the model takes missing values"
    )
    asked = message("ModelInferRequest")(model_name="nobody").SerializeToString()
    code, details, trailers = refused(channel, "ModelInfer", asked)
    assert code is grpc.StatusCode.NOT_FOUND
    assert details == "no model 'nobody'\nhint: models here: echo, mixed"
    assert trailers["parbake-code"] == "model_not_found"
    asked = message("ModelInferRequest")(model_name="resting").SerializeToString()
    code, details, trailers = refused(channel, "ModelInfer", asked)
    assert code is grpc.StatusCode.UNAVAILABLE
    assert trailers["retry-after"] == "5"


def test_a_caller_without_time_is_refused_before_the_model_runs(
    echo: GrpcFront, client: triton.InferenceServerClient
) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.infer("echo", [x([1.0, 2.0])], timeout=1)
    assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
    assert "past the deadline" in caught.value.message()
    assert (
        client.infer("echo", [x([1.0, 2.0])], timeout=2_000_000, client_timeout=5).as_numpy("x_out")
        is not None
    )


def test_a_message_over_the_limit_is_refused_and_the_next_is_answered(
    client: triton.InferenceServerClient,
) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.infer("echo", [x(*([[1.0, 2.0]] * 200_000))])
    assert caught.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
    assert client.infer("echo", [x([1.0, 2.0])]).as_numpy("x_out").shape == (1, 2)


@given(st.binary(max_size=40))
def test_whatever_bytes_come_the_server_answers_and_goes_on(echo: GrpcFront, data: bytes) -> None:
    with grpc.insecure_channel(echo.address) as channel:
        code, details, _ = refused(channel, "ModelInfer", data)
        assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
        assert "Traceback" not in details
        assert call(channel, "ServerLive") == b"\x08\x01"


def test_an_unknown_rpc_is_unimplemented(channel: grpc.Channel) -> None:
    code, _, _ = refused(channel, "CudaSharedMemoryStatus")
    assert code is grpc.StatusCode.UNIMPLEMENTED


def test_a_bug_of_ours_is_counted_and_a_number_without_a_traceback(
    echo: GrpcFront, channel: grpc.Channel, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(name: str, version: str = "") -> Any:
        raise ZeroDivisionError("a secret")

    find = echo.front.find
    counted = echo.front.refused.get("error", 0)
    try:
        echo.front.find = broken  # type: ignore[method-assign]  # a bug that cannot be had otherwise
        assert refused(channel, "ModelInfer")[0] is grpc.StatusCode.INTERNAL
        code, details, trailers = refused(channel, "ModelMetadata")
    finally:
        echo.front.find = find  # type: ignore[method-assign]  # as it was
    assert code is grpc.StatusCode.INTERNAL
    assert "secret" not in details
    assert trailers["parbake-correlation-id"] in details
    logged = capsys.readouterr()
    assert trailers["parbake-correlation-id"] in logged.out + logged.err
    assert echo.front.refused["error"] == counted + 2


# Streams -------------------------------------------------------------------------------------------


def stream(
    client: triton.InferenceServerClient, work: Callable[[], None], replies: int
) -> list[tuple[Any, Any]]:
    got: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: got.put((result, error)))
    work()
    answers = [got.get(timeout=10) for _ in range(replies)]
    client.stop_stream()
    return answers


def test_a_stream_is_answered_in_order_and_a_bad_request_does_not_end_it(
    client: triton.InferenceServerClient,
) -> None:
    def work() -> None:
        for number in range(200):
            model = "nobody" if number == 77 else "echo"
            client.async_stream_infer(model, [x([float(number), 0.0])], request_id=str(number))

    answers = stream(client, work, 200)
    for number, (result, error) in enumerate(answers):
        if number == 77:
            assert "no model 'nobody'" in error.message()
            continue
        assert error is None
        assert result.get_response().id == str(number)
        assert result.as_numpy("x_out")[0, 0] == number


def test_a_stream_says_which_reply_is_the_last_to_those_who_ask(client: triton.InferenceServerClient) -> None:
    def work() -> None:
        client.async_stream_infer("echo", [x([1.0, 2.0])], enable_empty_final_response=True)

    ((result, _),) = stream(client, work, 1)
    assert result.get_response().parameters["triton_final_response"].bool_param


def test_a_caller_who_leaves_a_stream_disturbs_nobody(
    echo: GrpcFront, client: triton.InferenceServerClient
) -> None:
    asked = message("ModelInferRequest")(model_name="echo").SerializeToString()
    with grpc.insecure_channel(echo.address) as channel:
        replies = channel.stream_stream(f"/{INFERENCE}/ModelStreamInfer")(iter([asked] * 500))
        next(replies)
        replies.cancel()
    assert client.infer("echo", [x([1.0, 2.0])]).as_numpy("x_out").shape == (1, 2)


# What is served ------------------------------------------------------------------------------------


def test_health(echo: GrpcFront, client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("echo")
    assert client.is_model_ready("echo", "1")
    for name, version in (("echo", "9"), ("resting", ""), ("nobody", "")):
        assert not client.is_model_ready(name, version)
    echo.front.draining = True
    try:
        assert client.is_server_live()
        assert not client.is_server_ready()
        assert not client.is_model_ready("echo")
    finally:
        echo.front.draining = False


def test_metadata(client: triton.InferenceServerClient) -> None:
    server = client.get_server_metadata(as_json=True)
    assert server["name"] == "parbake"
    assert "statistics" in server["extensions"]
    model = client.get_model_metadata("echo", as_json=True)
    assert model == {
        "name": "echo",
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": ["-1", "2"]}],
        "outputs": [{"name": "x_out", "datatype": "FP32", "shape": ["-1", "2"]}],
    }
    config = client.get_model_config("mixed", as_json=True)["config"]
    assert config["max_batch_size"] == 4096
    assert config["version_policy"] == {"specific": {"versions": ["1"]}}
    types = {item["name"]: item["data_type"] for item in config["input"]}
    assert types == {n.lower(): "TYPE_STRING" if n == "BYTES" else f"TYPE_{n}" for n in ONNX_TYPES}
    with pytest.raises(InferenceServerException, match="no model 'nobody'"):
        client.get_model_metadata("nobody")
    with pytest.raises(InferenceServerException, match="has no version '9'"):
        client.get_model_config("echo", "9")


def test_requests_are_counted(client: triton.InferenceServerClient) -> None:
    def stats(name: str) -> dict[str, Any]:
        (found,) = client.get_inference_statistics(name, as_json=True)["model_stats"]
        result: dict[str, Any] = found
        return result

    before = stats("mixed")["inference_stats"]["fail"].get("count", "0")
    with pytest.raises(InferenceServerException, match="no input 'x'"):
        client.infer("mixed", [x([1.0, 2.0])])
    assert int(stats("mixed")["inference_stats"]["fail"]["count"]) == int(before) + 1
    rows = int(stats("echo").get("inference_count", 0))
    client.infer("echo", [x([1.0, 2.0], [3.0, 4.0])])
    assert int(stats("echo")["inference_count"]) == rows + 2
    assert len(client.get_inference_statistics(as_json=True)["model_stats"]) == 2
    with pytest.raises(InferenceServerException, match="no model 'nobody'"):
        client.get_inference_statistics("nobody")


# Repository ----------------------------------------------------------------------------------------


def test_the_index_shows_what_is_loaded_and_what_is_not(client: triton.InferenceServerClient) -> None:
    index = client.get_model_repository_index(as_json=True)["models"]
    assert index == [
        {"name": "echo", "version": "1", "state": "READY"},
        {"name": "mixed", "version": "1", "state": "READY"},
        {"name": "resting", "state": "UNAVAILABLE", "reason": "unloaded"},
    ]
    asked = message("RepositoryIndexRequest")(ready=True).SerializeToString()
    with grpc.insecure_channel(client._channel._channel.target().decode()) as channel:
        reply = message("RepositoryIndexResponse").FromString(call(channel, "RepositoryIndex", asked))
    assert [model.name for model in reply.models] == ["echo", "mixed"]


def test_load_and_unload_reach_the_supervisor(echo: GrpcFront, client: triton.InferenceServerClient) -> None:
    echo.supervisor.changes.clear()
    client.load_model("echo")
    client.unload_model("echo")
    assert echo.supervisor.changes == [Load("echo"), Unload("echo")]
    with pytest.raises(InferenceServerException, match="'nobody' is not configured"):
        client.load_model("nobody")
    with pytest.raises(InferenceServerException, match=r"no model '../echo' is configured"):
        client.load_model("../echo")
    with pytest.raises(InferenceServerException, match="'config' is not accepted over the network"):
        client.load_model("echo", config="{}")
    with pytest.raises(InferenceServerException, match="is not accepted over the network"):
        client.load_model("echo", files={"file:1/model.onnx": b"weights"}, config="{}")
    assert len(echo.supervisor.changes) == 2


def test_a_proxy_on_this_machine_is_nobody_local(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.load_model("echo", headers={"x-forwarded-for": "203.0.113.9"})
    assert caught.value.status() == "StatusCode.PERMISSION_DENIED"
    client.load_model("echo", headers={"x-forwarded-for": "203.0.113.9", "authorization": "Bearer secret"})


def test_peers_are_told_apart() -> None:
    access = Access("local", "", loopback_only=True)
    for peer in ("ipv4:127.0.0.1:5000", "ipv6:%5B::1%5D:5000", "ipv6:[::1]:5000"):
        access.check(address_of(peer), "")
    for peer in ("ipv4:192.0.2.1:5000", "ipv6:%5B2001:db8::1%5D:5000", "unix:", ""):
        with pytest.raises(NotAllowed):
            access.check(address_of(peer), "")


# Health checking protocol --------------------------------------------------------------------------


def test_probes_are_answered(channel: grpc.Channel) -> None:
    ask, tell = (message(f"grpc.health.v1.HealthCheck{part}") for part in ("Request", "Response"))

    def status(service: str) -> int:
        found: int = tell.FromString(
            call(channel, "Check", ask(service=service).SerializeToString(), HEALTH)
        ).status
        return found

    assert [status(name) for name in ("", INFERENCE, "echo", "resting")] == [1, 1, 1, 2]
    code, details, _ = refused(channel, "Check", ask(service="nobody").SerializeToString(), service=HEALTH)
    assert code is grpc.StatusCode.NOT_FOUND
    assert "nobody" in details
    code, _, _ = refused(channel, "Check", b"\xff", service=HEALTH)
    assert code is grpc.StatusCode.INVALID_ARGUMENT


def test_a_watcher_hears_of_every_change(echo: GrpcFront, channel: grpc.Channel) -> None:
    tell = message("grpc.health.v1.HealthCheckResponse")
    watching = channel.unary_stream(f"/{HEALTH}/Watch")(b"", timeout=10)
    assert tell.FromString(next(watching)).status == 1
    echo.front.draining = True
    try:
        assert tell.FromString(next(watching)).status == 2
    finally:
        echo.front.draining = False
    assert tell.FromString(next(watching)).status == 1
    watching.cancel()


# Life ----------------------------------------------------------------------------------------------


@pytest.fixture
def short_lived(tmp_path: Path) -> Iterator[GrpcFront]:
    bundle = write_echo(tmp_path, "echo", [TensorSpec("x", "FP32", (2,))])
    with GrpcFront([bundle], ServerSettings(drain_timeout_s=5)) as front:
        yield front


def test_stopping_answers_what_was_accepted_and_ends_quiet_streams(short_lived: GrpcFront) -> None:
    asked = message("ModelInferRequest")(
        model_name="echo",
        inputs=[{"name": "x", "datatype": "FP32", "shape": [1, 2]}],
        raw_input_contents=[bytes(8)],
    ).SerializeToString()
    hold = threading.Event()

    def requests() -> Iterator[bytes]:
        yield asked
        hold.wait(10)

    with grpc.insecure_channel(short_lived.address) as channel:
        replies = channel.stream_stream(f"/{INFERENCE}/ModelStreamInfer")(requests())
        assert message("ModelStreamInferResponse").FromString(next(replies)).error_message == ""
        started = time.monotonic()
        short_lived.run(short_lived.stop())
        assert time.monotonic() - started < 3
        with pytest.raises(grpc.RpcError) as caught:
            next(replies)
        hold.set()
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.UNAVAILABLE


def test_an_answer_that_takes_long_is_waited_for(short_lived: GrpcFront) -> None:
    """A batch that the model holds back while the server stops."""
    served = short_lived.front.find("echo")
    assert served.batcher is not None
    backend: Any = served.batcher._backends[0]
    run = backend.run

    def later(*arguments: Any) -> None:
        short_lived.loop.call_later(0.3, run, *arguments)

    backend.run = later
    with triton.InferenceServerClient(short_lived.address) as client:
        got: queue.Queue[tuple[Any, Any]] = queue.Queue()
        client.async_infer("echo", [x([1.0, 2.0])], lambda result, error: got.put((result, error)))
        while not served.batcher.running_rows:
            time.sleep(0.005)
        short_lived.run(short_lived.stop())
        result, error = got.get(timeout=5)
    assert error is None
    assert result.as_numpy("x_out").tolist() == [[1.0, 2.0]]


def test_a_caller_who_has_gone_costs_the_model_nothing(short_lived: GrpcFront) -> None:
    served = short_lived.front.find("echo")
    assert served.batcher is not None
    backend: Any = served.batcher._backends[0]
    run, ran = backend.run, []

    def first_waits(raws: Any, rows: int, shapes: Any, done: Any) -> None:
        ran.append(rows)
        short_lived.loop.call_later(0.3 if len(ran) == 1 else 0.0, run, raws, rows, shapes, done)

    backend.run = first_waits
    with triton.InferenceServerClient(short_lived.address) as client:
        got: queue.Queue[tuple[Any, Any]] = queue.Queue()
        client.async_infer("echo", [x([1.0, 2.0])], lambda result, error: got.put((result, error)))
        while not served.batcher.running_rows:
            time.sleep(0.005)
        gone = client.async_infer("echo", [x([3.0, 4.0])], lambda result, error: got.put((result, error)))
        while not served.batcher.queued_rows:
            time.sleep(0.005)
        gone.cancel()
        outcomes = [got.get(timeout=5) for _ in range(2)]
        assert sorted(error is None for _, error in outcomes) == [False, True]
        client.infer("echo", [x([5.0, 6.0])])
    assert ran == [1, 1]


def test_a_port_that_is_taken_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    async def attempt(port: int) -> None:
        front = Front(asyncio.get_running_loop(), lambda: None)
        access = Access("off", "", loopback_only=True)
        settings = ServerSettings()
        await serve_grpc(front, settings, access, port)

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SettingsError, match="for gRPC"):
            asyncio.run(attempt(taken.getsockname()[1]))
