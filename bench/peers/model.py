"""What every peer's server needs, so that all of them run one model with the same options: graph, rows, answer.

A peer runs in a virtual environment of its own; only numpy and onnxruntime are imported here.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

PATH: Final = "/v2/models/eta/infer"
_DATATYPES: Final = {"float32": "FP32", "float64": "FP64"}

Rows = npt.NDArray[np.float32]
Answers = npt.NDArray[Any]


class Model:
    """A graph with the input ``x`` ([N, 10] FP32) and one output."""

    def __init__(self, path: str) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        # Spinning threads burn whole cores at low load.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        (output,) = self._session.get_outputs()
        self.output: str = output.name
        self._names = [output.name]
        example = self.answers(np.zeros((1, 10), np.float32))
        self.width = example.shape[1]
        self.datatype = _DATATYPES[example.dtype.name]

    def answers(self, rows: Rows) -> Answers:
        """One answer for each row: [N, width]."""
        (found,) = self._session.run(self._names, {"x": rows})
        answers: Answers = found.reshape(len(rows), -1)
        return answers

    def reply(self, answers: Answers) -> dict[str, Any]:
        """Answers as the Open Inference Protocol has them in JSON."""
        return {
            "model_name": "eta",
            "outputs": [
                {
                    "name": self.output,
                    "datatype": self.datatype,
                    "shape": list(answers.shape),
                    "data": answers.ravel().tolist(),
                }
            ],
        }


def rows_of(inputs: list[dict[str, Any]]) -> Rows:
    """The rows of a request: its ``inputs``, decoded."""
    (tensor,) = inputs
    return np.array(tensor["data"], np.float32).reshape(tensor["shape"])
