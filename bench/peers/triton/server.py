"""Triton as nvidia-pytriton packages it: ``server.py MODEL.onnx PORT GRPC_PORT [one|batches]``.

That package has Triton's own server, C++, with its Python backend; pytriton's proxy is not in the way here. The
model repository is written to the working folder.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

from bench.peers.model import Model

CONFIG = """
name: "eta"
backend: "python"
max_batch_size: 64
input [{ name: "x", data_type: TYPE_FP32, dims: [10] }]
output [{ name: "%s", data_type: TYPE_%s, dims: [%d] }]
instance_group [{ count: 1, kind: KIND_CPU }]
"""
BATCHES = "dynamic_batching { }\n"
"""Takes what waits, without a delay."""


class TritonPythonModel:
    """What Triton's Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model."""
        self._model = Model(os.environ["RACE_MODEL"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer the requests of one batch."""
        import numpy as np
        import triton_python_backend_utils as pb

        rows = [pb.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        answers = self._model.answers(np.concatenate(rows))
        replies = []
        start = 0
        for part in rows:
            own = answers[start : start + len(part)]
            start += len(part)
            replies.append(pb.InferenceResponse([pb.Tensor(self._model.output, own)]))
        return replies


def main(model_file: str, port: str, grpc_port: str, variant: str) -> None:
    """Lay out what the server reads, and become it."""
    import pytriton

    package = Path(pytriton.__file__).parent / "tritonserver"
    model = Model(model_file)
    repository = Path("models").absolute()
    (repository / "eta" / "1").mkdir(parents=True)
    config = CONFIG % (model.output, model.datatype, model.width)
    (repository / "eta" / "config.pbtxt").write_text(config + (BATCHES if variant == "batches" else ""))
    # The backend's process does not look where PYTHONPATH says.
    paths = [str(Path(__file__).parents[3]), sysconfig.get_path("purelib")]
    (repository / "eta" / "1" / "model.py").write_text(
        f"import sys\nsys.path[:0] = {paths}\nfrom bench.peers.triton.server import TritonPythonModel\n"
    )
    # The backend's process is one program for each version of Python.
    backends = Path("backends").absolute()
    shutil.copytree(package / "backends", backends)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for file in (package / "python_backend_stubs" / version).iterdir():
        shutil.copy(file, backends / "python")
    os.environ["RACE_MODEL"] = model_file
    libraries = [sysconfig.get_path("purelib") + "/nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR")]
    os.environ["LD_LIBRARY_PATH"] = ":".join(libraries)
    program = str(package / "bin" / "tritonserver")
    os.execv(
        program,
        [
            program, f"--model-repository={repository}", f"--backend-directory={backends}",
            "--http-address=127.0.0.1", f"--http-port={port}", "--grpc-address=127.0.0.1",
            f"--grpc-port={grpc_port}", "--allow-metrics=false", "--log-info=false",
            f"--cache-directory={package / 'caches'}",
        ],
    )  # fmt: skip


if __name__ == "__main__":
    _, file, http_port, rpc_port, how = sys.argv
    main(file, http_port, rpc_port, how)
