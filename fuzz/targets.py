"""What is fuzzed: each target takes bytes, and raises only where there is a bug.

What a parser says of bad input (`ParbakeError`, and `ValueError` where its documentation has it) is no bug. A target is
made once and called many times.
"""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import struct
import tempfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from parbake.app.keys import add_key, read_keys
from parbake.batch.inputs import Input
from parbake.batch.text import CsvReader, JsonReader
from parbake.contract.bundle import (
    Goldens,
    StoredBundle,
    pack_tensors,
    read_bundle,
    unpack_tensors,
    write_bundle,
)
from parbake.contract.environment import capture
from parbake.contract.model import Contract, Step, TensorSpec
from parbake.contract.record import Records
from parbake.contract.tensors import to_raw
from parbake.errors import ParbakeError
from parbake.monitoring.files import read_frames
from parbake.monitoring.trace import read_trace
from parbake.runtime import wire
from parbake.serving.service import ServedVersion
from parbake.serving.stats import Stats
from parbake.settings import read_settings
from parbake.tables.lmdb import read_lineage
from parbake.tables.memory import MemoryTable
from parbake.tables.model import LINEAGE
from parbake.transports.grpc.codec import GrpcCodec
from parbake.transports.grpc.messages import message, parse, serialize
from parbake.transports.http.endpoint import PredictionEndpoint
from parbake.transports.http.memo import ReplyMemo
from parbake.transports.http.oip import InferCodec
from parbake.transports.http.one_row import endpoint
from parbake.transports.http.people import PeopleCodec
from parbake.transports.http.protocol import Exchange, HttpProtocol, Limits, Site, decompress

Run = Callable[[bytes], None]

_LIMIT: Final = 1 << 20
_ONE = (TensorSpec("x", "FP32", (2,), columns=("left", "right")),)
_MANY = (
    TensorSpec("x", "FP32", (2,)),
    TensorSpec("word", "BYTES"),
    TensorSpec("open", "INT64", (-1,)),
    TensorSpec("flag", "BOOL"),
)


@dataclass(frozen=True, slots=True)
class Target:
    """Something that reads bytes. ``seeds`` are examples of what it takes."""

    what: str
    make: Callable[[Path], Run]
    """Given a folder for files."""
    seeds: Callable[[], list[bytes]]


class Answered500Error(Exception):
    """The server answered with a 500: a bug that it caught."""


def _contract(inputs: tuple[TensorSpec, ...]) -> Contract:
    outputs = (TensorSpec("y", "FP32", (2,)), TensorSpec("word", "BYTES"), TensorSpec("open", "INT64", (-1,)))
    return Contract("eta", inputs, outputs, (Step("onnx", "model.onnx"),), purpose="is fuzzed", owner="fuzz")


def _served(inputs: tuple[TensorSpec, ...]) -> ServedVersion:
    contract = _contract(inputs)
    return ServedVersion(
        "eta", "1", contract, "sha256:0", mode="static", table=MemoryTable("sha256:0", {}), batcher=None,
        deadline_s=1.0, stats=Stats(),
    )  # fmt: skip


class _Loop:
    """The part of an event loop that a connection uses, without time."""

    def __init__(self) -> None:
        self._soon: list[Callable[[], None]] = []

    def call_soon(self, callback: Callable[[], None]) -> None:
        self._soon.append(callback)

    def call_later(self, delay: float, callback: Callable[[], None]) -> None:
        """Never comes."""

    def turn(self) -> None:
        while self._soon:
            due, self._soon = self._soon, []
            for callback in due:
                callback()


class _Wire:
    """A transport that looks at what is written."""

    def __init__(self) -> None:
        self.closed = False

    def write(self, data: bytes) -> None:
        if data.startswith(b"HTTP/1.1 500"):
            raise Answered500Error(data.decode("latin-1"))

    def writelines(self, pieces: list[bytes]) -> None:
        self.write(b"".join(pieces))

    def get_extra_info(self, name: str) -> Any:
        return ("127.0.0.1", 1) if name == "peername" else None

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        """Nothing more comes anyway."""

    resume_reading = pause_reading

    def can_write_eof(self) -> bool:
        return False

    def close(self) -> None:
        self.closed = True

    abort = close


def _http(_: Path) -> Run:
    one = _served(_ONE)
    many = _served(_MANY)
    infer = {
        b"/v2/models/one/infer": endpoint(one, InferCodec(one), _LIMIT, ReplyMemo()),
        b"/v2/models/many/infer": endpoint(many, InferCodec(many), _LIMIT, ReplyMemo()),
        b"/predict/one": PredictionEndpoint(one, PeopleCodec(one), _LIMIT),
    }

    def answer(exchange: Exchange) -> None:
        found = infer.get(exchange.path)
        if found is not None:
            found.answer(exchange)
            return
        try:
            exchange.content(_LIMIT)
        except ParbakeError as error:
            exchange.fail(error)
            return
        exchange.reply_json(b"{}")

    def run(data: bytes) -> None:
        loop = _Loop()
        site = Site(answer, Limits(max_body_bytes=4096), cast(asyncio.AbstractEventLoop, loop))
        protocol, transport = HttpProtocol(site), _Wire()
        protocol.connection_made(cast(asyncio.Transport, transport))
        # The first byte says in how large pieces the rest arrives.
        size = (data[0] if data else 0) or len(data) or 1
        for at in range(1, len(data), size):
            if transport.closed:
                break
            protocol.data_received(data[at : at + size])
            loop.turn()
        protocol.connection_lost(None)

    return run


def _post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: localhost", f"content-length: {len(body)}", *headers]
    return b"\0" + "\r\n".join(lines).encode() + b"\r\n\r\n" + body


_JSON_ONE = json.dumps(
    {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1.5, -2.5]}], "id": "a"}
).encode()
_JSON_MANY = json.dumps(
    {
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": [2, 2], "data": [[1.5, -2.5], [3, 4]]},
            {"name": "word", "datatype": "BYTES", "shape": [2], "data": ["über", ""]},
            {"name": "open", "datatype": "INT64", "shape": [2, 1], "data": [7, -9]},
            {"name": "flag", "datatype": "BOOL", "shape": [2], "data": [True, False]},
        ],
        "outputs": [{"name": "y", "parameters": {"binary_data": True}}],
        "parameters": {"timeout": 1000, "priority": 1},
    }
).encode()


def _binary_many() -> bytes:
    raws = {
        "x": to_raw(np.ones((1, 2), "f4"), "FP32"),
        "word": to_raw(np.array(["über"], object), "BYTES"),
        "open": to_raw(np.array([[7]]), "INT64"),
        "flag": b"\1",
    }
    shapes = {"x": [1, 2], "word": [1], "open": [1, 1], "flag": [1]}
    inputs = [
        {
            "name": spec.name, "datatype": spec.datatype, "shape": shapes[spec.name],
            "parameters": {"binary_data_size": len(raws[spec.name])},
        }
        for spec in _MANY
    ]  # fmt: skip
    head = json.dumps({"inputs": inputs}).encode()
    return struct.pack("<H", len(head)) + head + b"".join(raws.values())


def _infer(_: Path) -> Run:
    codecs = [InferCodec(_served(_ONE)), InferCodec(_served(_MANY))]

    def run(data: bytes) -> None:
        for codec in codecs:
            if codec.has_short_way:
                codec.read_row(data)
            try:
                codec.read(data, None)
            except ParbakeError:
                continue

    return run


def _infer_binary(_: Path) -> Run:
    codec = InferCodec(_served(_MANY))

    def run(data: bytes) -> None:
        size = int.from_bytes(data[:2], "little")
        try:
            codec.read(data[2:], size)
        except ParbakeError:
            return

    return run


def _people(_: Path) -> Run:
    codecs = [PeopleCodec(_served(_ONE)), PeopleCodec(_served(_MANY))]

    def run(data: bytes) -> None:
        for codec in codecs:
            try:
                codec.read(data, None)
            except ParbakeError:
                continue

    return run


def _grpc(_: Path) -> Run:
    codec, kind = GrpcCodec(_served(_MANY)), message("ModelInferRequest")

    def run(data: bytes) -> None:
        try:
            codec.read(parse(kind, data))
        except ParbakeError:
            return

    return run


def _grpc_seeds() -> list[bytes]:
    request = message("ModelInferRequest")(model_name="eta", id="a")
    request.parameters["timeout"].int64_param = 5
    for name, datatype, shape in (
        ("x", "FP32", (1, 2)), ("word", "BYTES", (1,)), ("open", "INT64", (1, 1)), ("flag", "BOOL", (1,)),
    ):  # fmt: skip
        tensor = request.inputs.add(name=name, datatype=datatype, shape=shape)
        if name == "x":
            tensor.contents.fp32_contents.extend([1.5, 2.5])
        elif name == "word":
            tensor.contents.bytes_contents.append(b"word")
        elif name == "open":
            tensor.contents.int64_contents.append(7)
        else:
            tensor.contents.bool_contents.append(True)
    typed = serialize(request)
    for tensor, raw in zip(
        request.inputs, (bytes(8), struct.pack("<I", 2) + b"hi", bytes(8), b"\1"), strict=True
    ):
        tensor.ClearField("contents")
        request.raw_input_contents.append(raw)
    return [typed, serialize(request)]


def _frames(_: Path) -> Run:
    def run(data: bytes) -> None:
        for read in (wire.frame_length, wire.read_request, wire.read_reply):
            try:
                read(data)
            except ValueError:
                continue

    return run


def _frame_seeds() -> list[bytes]:
    return [
        b"".join(wire.request_frame(1, 2, [bytes(16), b"text"], [(2,), ()])),
        b"".join(wire.reply_frame(1, wire.OK, 0.5, [bytes(8)], [(2,)])),
        b"".join(wire.reply_frame(1, wire.FAILED, 0.5, [b"words"], [()])),
    ]


def _records(_: Path) -> Run:
    records = [Records(_contract(_ONE))]

    def run(data: bytes) -> None:
        for one in records:
            try:
                raws, shapes = one.split(data)
            except ValueError:
                continue
            if one.join(raws, shapes) != data[: len(one.join(raws, shapes))]:
                raise AssertionError("a record that was taken apart does not go together again")

    return run


def _record_seeds() -> list[bytes]:
    record = Records(_contract(_ONE)).join([bytes(8), b"\3\0\0\0abc", bytes(16)], [(2,), (), (2,)])
    return [record]


def _tensors(_: Path) -> Run:
    def run(data: bytes) -> None:
        try:
            unpack_tensors(data, "fuzz")
        except ParbakeError:
            return

    return run


def _tensor_seeds() -> list[bytes]:
    spec = TensorSpec("word", "BYTES")
    return [
        pack_tensors(
            {"x": (np.ones((2, 2), np.float32), _ONE[0]), "word": (np.array(["a", "b"], object), spec)}
        )
    ]


def _in_file(path: Path, read: Callable[[Path], object]) -> Run:
    """A target that reads a file which is written anew each time."""

    def run(data: bytes) -> None:
        path.write_bytes(data)
        path.chmod(0o600)
        try:
            read(path)
        except ParbakeError:
            return

    return run


def _bundle_in(folder: Path) -> StoredBundle:
    x = np.ones((1, 2), np.float32)
    contract = Contract(
        "eta",
        _ONE,
        (TensorSpec("y", "FP32", (2,)),),
        (Step("onnx", "model.onnx"),),
        purpose="is fuzzed",
        owner="fuzz",
    )
    return write_bundle(folder, contract, {"model.onnx": b"model"}, Goldens({"x": x}, {"y": x}), capture())


def _bundle(folder: Path) -> Run:
    """Manifest, contract and environment take turns; the digests of contract and environment are not looked at."""
    stored = _bundle_in(folder / "eta.bundle")
    names = sorted(path.name for path in stored.path.iterdir() if path.suffix == ".json")
    whole = {name: (stored.path / name).read_bytes() for name in names}

    def run(data: bytes) -> None:
        if not data:
            return
        name = names[data[0] % len(names)]
        target = stored.path / name
        # As long as what was there, because sizes are checked first.
        size = len(whole[name])
        content = data[1:]
        target.write_bytes(content if name == "manifest.json" else content[:size].ljust(size))
        try:
            read_bundle(stored.path, verify=False)
        except ParbakeError:
            pass
        finally:
            target.write_bytes(whole[name])

    return run


def _bundle_seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        stored = _bundle_in(Path(folder) / "eta.bundle")
        names = sorted(path.name for path in stored.path.iterdir() if path.suffix == ".json")
        # Without the libraries of this machine.
        return [
            bytes([at]) + (b"{}" if "environment" in name else (stored.path / name).read_bytes())
            for at, name in enumerate(names)
        ]


def _lineage(folder: Path) -> Run:
    return _in_file(folder / LINEAGE, lambda path: read_lineage(path.parent))


def _rows(folder: Path, kind: str) -> Run:
    contract = _contract(_MANY)

    def read(path: Path) -> None:
        with Input(str(path), kind=kind) as given:  # type: ignore[arg-type]  # one of the formats
            source = given.source(contract, (), 1)
            try:
                reader = CsvReader(source.layout) if kind == "csv" else JsonReader(source.layout, contract)
                while (task := source.next(0, 0.0)) is not None:
                    for rows in reader.rows(task):
                        if len(rows.numbers) != rows.batch.num_rows:
                            raise AssertionError("rows and their numbers do not agree")
                source.finish()
            finally:
                source.close()

    return _in_file(folder / f"rows.{kind}", read)


def _log(_: Path) -> Run:
    def run(data: bytes) -> None:
        # Length and checksum are made right, so that what they guard is reached.
        head = b"PBL1" + struct.pack("<II", len(data), zlib.crc32(data))
        try:
            list(read_frames(io.BytesIO(head + data)))
        except ValueError:
            return

    return run


def _log_seeds() -> list[bytes]:
    batch = pa.record_batch({"key": [b"a", None], "seconds": [0.5, 1.0]})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return [bytes(sink.getvalue())]


def _traces(folder: Path) -> Run:
    kinds = (".trace", ".csv", ".txt", ".csv.gz", ".txt.xz")
    runs = [_in_file(folder / f"keys{kind}", lambda path: read_trace(path, "", _LIMIT)) for kind in kinds]

    def run(data: bytes) -> None:
        if data:
            runs[data[0] % len(runs)](data[1:])

    return run


def _keys_seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "keys.toml"
        add_key(path, "one", ["eta"], 5.0)
        add_key(path, "two")
        return [path.read_bytes()]


def _packed(_: Path) -> Run:
    def run(data: bytes) -> None:
        for encoding in (b"gzip", b"deflate"):
            try:
                if len(decompress(data, encoding, _LIMIT)) > _LIMIT:
                    raise AssertionError("more than the limit came out")
            except ParbakeError:
                continue

    return run


_SETTINGS: Final = b"""
[server]
port = 0
workers = 2

[[deployments]]
bundle = "eta.bundle"
mode = "hybrid"
head_rows = 5
"""

_LINEAGE: Final = json.dumps(
    {
        "format": 1, "bundle_digest": "sha256:a", "contract": "eta", "keys": 3, "input_digest": "blake2b:b",
        "data_digest": "blake2b:c", "data_bytes": 8192, "digest": "x",
    }
).encode()  # fmt: skip

TARGETS: Final[Mapping[str, Target]] = {
    "http": Target(
        "a connection: heads, bodies, chunks, and all that reads predictions behind them",
        _http,
        lambda: [
            _post("/predict/one", b'{"left": 1, "right": 2}'),
            _post("/v2/models/one/infer", _JSON_ONE),
            _post("/v2/models/many/infer", _JSON_MANY, "parbake-deadline-ms: 5", "parbake-priority: low"),
            _post("/v2/models/one/infer", gzip.compress(_JSON_ONE, mtime=0), "content-encoding: gzip"),
            _post("/v2/models/many/infer", _binary_many()[2:], "inference-header-content-length: 400"),
            b"\7POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
            b"\0GET / HTTP/1.0\r\n\r\n",
        ],
    ),
    "infer": Target("a request of the Open Inference Protocol", _infer, lambda: [_JSON_ONE, _JSON_MANY]),
    "infer-binary": Target("the same with binary tensors", _infer_binary, lambda: [_binary_many()]),
    "predict": Target(
        "a request by column name",
        _people,
        lambda: [
            b'{"left": 1, "right": 2}',
            b'[{"left": 1, "right": 2}, {"left": null, "right": -1e400}]',
            b'{"x": [1, 2], "word": "w", "open": [3], "flag": true}',
        ],
    ),
    "grpc": Target("a ModelInferRequest", _grpc, _grpc_seeds),
    "frame": Target("a frame between front and runner", _frames, _frame_seeds),
    "record": Target("a record of a table", _records, _record_seeds),
    "tensors": Target("the goldens of a bundle", _tensors, _tensor_seeds),
    "bundle": Target("manifest, contract and environment of a bundle", _bundle, _bundle_seeds),
    "lineage": Target("the lineage of a table", _lineage, lambda: [_LINEAGE, b"{}"]),
    "csv": Target(
        "rows to bake, CSV",
        lambda folder: _rows(folder, "csv"),
        lambda: [
            b"x_0,x_1,word,open,flag\n1,2,w,3,true\n",
            b'\xef\xbb\xbfx;word;open;flag\n"[1,2]";"a\nb";[3];0\n',
        ],
    ),
    "jsonl": Target(
        "rows to bake, JSON lines",
        lambda folder: _rows(folder, "jsonl"),
        lambda: [b'{"x": [1, 2], "word": "w", "open": [3], "flag": true}\n{"x": 1}\n'],
    ),
    "log": Target("an open file of the prediction log", _log, _log_seeds),
    "trace": Target(
        "a trace of keys",
        _traces,
        lambda: [
            b"\0" + bytes(8),
            b"\1key\n1\n2\n",
            b"\2a\nb\n",
            b"\3" + gzip.compress(b"key\n1\n", mtime=0),
        ],
    ),
    "settings": Target(
        "parbake.toml", lambda folder: _in_file(folder / "parbake.toml", read_settings), lambda: [_SETTINGS]
    ),
    "keys": Target(
        "a file of API keys", lambda folder: _in_file(folder / "keys.toml", read_keys), _keys_seeds
    ),
    "packed": Target(
        "gzip and deflate", _packed, lambda: [gzip.compress(b"a" * 99, mtime=0), zlib.compress(b"b" * 99)]
    ),
}
"""By name."""
