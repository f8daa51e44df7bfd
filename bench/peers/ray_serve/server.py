"""Ray Serve: ``server.py MODEL.onnx PORT``."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

# What Ray calls throughput mode: fewer hops between threads.
os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")

import orjson
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from bench.peers.model import PATH, Model, rows_of


@serve.deployment(num_replicas=1, max_ongoing_requests=128, ray_actor_options={"num_cpus": 0.1})
class Eta:
    """The model as a deployment."""

    def __init__(self, model_file: str) -> None:
        self._model = Model(model_file)

    async def __call__(self, request: Request) -> Any:
        """Answer one request."""
        rows = rows_of(orjson.loads(await request.body())["inputs"])
        reply = self._model.reply(self._model.answers(rows))
        return Response(orjson.dumps(reply), media_type="application/json")


if __name__ == "__main__":
    model_file, port = sys.argv[1:3]
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100_000_000,
        runtime_env={"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}},
    )
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    deployment: Any = Eta
    serve.run(deployment.bind(model_file), route_prefix=PATH)
    threading.Event().wait()
