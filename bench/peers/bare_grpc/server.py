"""What gRPC for Python can do at best: grpc.aio, every call answered with the same bytes: ``server.py PORT``."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import grpc
import uvloop

from bench.rpc import METHOD
from parbake.transports.grpc.messages import message


def reply() -> bytes:
    """An answer of two numbers."""
    response = message("ModelInferResponse")(model_name="eta", model_version="1")
    output = response.outputs.add()
    output.name, output.datatype = "p", "FP32"
    output.shape.extend([1, 2])
    response.raw_output_contents.append(bytes(8))
    data: bytes = response.SerializeToString()
    return data


async def main(port: int) -> None:
    """Serve until killed."""
    answer = reply()

    async def infer(_data: bytes, _context: Any) -> bytes:
        return answer

    _, service, method = METHOD.split("/")
    server = grpc.aio.server()
    handlers = {method: grpc.unary_unary_rpc_method_handler(infer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
