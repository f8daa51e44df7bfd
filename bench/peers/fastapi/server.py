"""FastAPI, the handler that people write first: ``server.py MODEL.onnx PORT [PROCESSES]``."""

from __future__ import annotations

import os
import sys

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from bench.peers.model import PATH, Model, rows_of


class Tensor(BaseModel):
    """One input."""

    name: str
    shape: list[int]
    datatype: str
    data: list[float]


class Request(BaseModel):
    """A request."""

    inputs: list[Tensor]


def build() -> FastAPI:
    """The application, in each process."""
    app = FastAPI()
    model = Model(os.environ["RACE_MODEL"])

    @app.post(PATH)
    async def infer(request: Request) -> dict[str, object]:
        return model.reply(model.answers(rows_of([tensor.model_dump() for tensor in request.inputs])))

    return app


if __name__ == "__main__":
    _, model_file, port, *processes = sys.argv
    os.environ["RACE_MODEL"] = model_file
    uvicorn.run(
        "bench.peers.fastapi.server:build",
        factory=True,
        host="127.0.0.1",
        port=int(port),
        workers=int(processes[0]) if processes else 1,
        log_level="warning",
        access_log=False,
    )
