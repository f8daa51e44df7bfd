"""BentoML: ``server.py MODEL.onnx PORT``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import bentoml

from bench.peers.model import PATH, Model, rows_of


@bentoml.service(workers=1, traffic={"timeout": 60}, metrics={"enabled": False})
class Eta:
    """The model as a service."""

    def __init__(self) -> None:
        self._model = Model(os.environ["RACE_MODEL"])

    @bentoml.api(route=PATH)
    async def infer(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Answer one request."""
        return self._model.reply(self._model.answers(rows_of(inputs)))


if __name__ == "__main__":
    model_file, port = sys.argv[1:3]
    os.environ |= {"RACE_MODEL": model_file, "BENTOML_DO_NOT_TRACK": "True"}
    program = str(Path(sys.executable).with_name("bentoml"))
    os.execv(
        program,
        [
            program,
            "serve",
            "bench.peers.bentoml.server:Eta",
            "--host",
            "127.0.0.1",
            "--port",
            port,
            "--quiet",
        ],
    )
