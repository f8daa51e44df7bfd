"""mosec with orjson: ``server.py MODEL.onnx PORT [one|batches|bytes|bytes-batches] [WORKERS]``.

``bytes``: a body is the bytes of one row, and so is the answer.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
import orjson
from mosec import Server, Worker

from bench.peers.model import PATH, Answers, Model, Rows, rows_of


class One(Worker):
    """The model, one row at a time."""

    def __init__(self) -> None:
        super().__init__()
        self._model = Model(os.environ["RACE_MODEL"])

    def deserialize(self, data: bytes) -> Rows:
        """JSON to a row."""
        return rows_of(orjson.loads(data)["inputs"])

    def forward(self, data: Any) -> Any:
        """Answer one row."""
        return self._model.answers(data)

    def serialize(self, data: Answers) -> bytes:
        """An answer to JSON."""
        payload: bytes = orjson.dumps(self._model.reply(data))
        return payload


class Batches(One):
    """The same, with rows that arrive together in one call."""

    def forward(self, data: list[Rows]) -> list[Answers]:
        """Answer a batch."""
        answers = self._model.answers(np.concatenate(data))
        return [answers[i : i + 1] for i in range(len(answers))]


class Bytes(One):
    """Bodies of bytes."""

    def deserialize(self, data: bytes) -> Rows:
        """Bytes to a row."""
        return np.frombuffer(data, np.float32).reshape(1, -1)

    def serialize(self, data: Answers) -> bytes:
        """An answer to bytes."""
        return data.tobytes()


class BytesBatches(Bytes, Batches):
    """Bodies of bytes, in batches."""


VARIANTS: dict[str, type[One]] = {
    "one": One,
    "batches": Batches,
    "bytes": Bytes,
    "bytes-batches": BytesBatches,
}


if __name__ == "__main__":
    _, model_file, port, variant, *workers = sys.argv
    os.environ["RACE_MODEL"] = model_file
    sys.argv = [sys.argv[0], "--address", "127.0.0.1", "--port", port, "--timeout", "60000"]
    server = Server()
    kind = VARIANTS[variant]
    if issubclass(kind, Batches):
        # Half of 64 connections: one batch gathers while the other one runs.
        number = int(workers[0]) if workers else 1
        server.append_worker(kind, num=number, max_batch_size=32, max_wait_time=1, route=PATH)
    else:
        server.append_worker(kind, num=1, route=PATH)
    server.run()
