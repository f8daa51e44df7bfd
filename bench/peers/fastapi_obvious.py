"""A FastAPI + onnxruntime handler written in the obvious way: ``fastapi_obvious.py MODEL.onnx PORT``."""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime as ort
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

DATATYPES = {"float32": "FP32", "float64": "FP64"}


class Tensor(BaseModel):
    """One input."""

    name: str
    shape: list[int]
    datatype: str
    data: list[float]


class Request(BaseModel):
    """A request."""

    inputs: list[Tensor]


def build(model: str) -> FastAPI:
    """The application."""
    app = FastAPI()
    session = ort.InferenceSession(model)
    (output,) = session.get_outputs()

    @app.post("/v2/models/eta/infer")
    async def infer(request: Request) -> dict[str, object]:
        tensor = request.inputs[0]
        x = np.array(tensor.data, dtype=np.float32).reshape(tensor.shape)
        (p,) = session.run(None, {tensor.name: x})
        return {
            "model_name": "eta",
            "model_version": "1",
            "outputs": [
                {
                    "name": output.name,
                    "datatype": DATATYPES[p.dtype.name],
                    "shape": list(p.shape),
                    "data": p.ravel().tolist(),
                }
            ],
        }

    return app


if __name__ == "__main__":
    uvicorn.run(
        build(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]), log_level="warning", access_log=False
    )
