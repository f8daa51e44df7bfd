"""MLServer, over REST and gRPC: ``server.py MODEL.onnx PORT GRPC_PORT [one|batches]``.

Its settings are written to the working folder.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse

from bench.peers.model import Model


class Eta(MLModel):
    """The model as a runtime."""

    async def load(self) -> bool:
        """Load the model."""
        self._model = Model(os.environ["RACE_MODEL"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Answer one request, or some that MLServer has put together."""
        rows = NumpyCodec.decode_input(payload.inputs[0]).astype(np.float32, copy=False)
        output = NumpyCodec.encode_output(self._model.output, self._model.answers(rows))
        return InferenceResponse(model_name=self.name, outputs=[output])


if __name__ == "__main__":
    _, model_file, port, grpc_port, *variant = sys.argv
    os.environ["RACE_MODEL"] = model_file
    settings = {
        "host": "127.0.0.1",
        "http_port": int(port),
        "grpc_port": int(grpc_port),
        "metrics_endpoint": None,
        # In the process that reads the requests: a hop to another one costs more than these models.
        "parallel_workers": 0,
        "debug": False,
        "gzip_enabled": False,
        "use_structured_logging": False,
    }
    model: dict[str, object] = {"name": "eta", "implementation": "bench.peers.mlserver.server.Eta"}
    if variant == ["batches"]:
        model |= {"max_batch_size": 64, "max_batch_time": 0.001}
    Path("settings.json").write_text(json.dumps(settings))
    Path("model-settings.json").write_text(json.dumps(model))
    program = str(Path(sys.executable).with_name("mlserver"))
    os.execv(program, [program, "start", "."])
