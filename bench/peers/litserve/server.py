"""LitServe: ``server.py MODEL.onnx PORT [one|batches]``."""

# Annotations are not put off here: LitServe looks at them to know what a request is.

import sys
from typing import Any

import litserve
import numpy as np

from bench.peers.model import PATH, Answers, Model, Rows, rows_of


class Eta(litserve.LitAPI):
    """The model as an API, one row at a time."""

    def __init__(self, model_file: str, **options: Any) -> None:
        super().__init__(api_path=PATH, **options)
        self._model_file = model_file

    def setup(self, device: str) -> None:
        """Load the model, in the worker."""
        self._model = Model(self._model_file)

    def decode_request(self, request: dict[str, Any]) -> Rows:
        """JSON to a row."""
        return rows_of(request["inputs"])

    def predict(self, x: Rows) -> Answers:
        """Answer one row."""
        return self._model.answers(x)

    def encode_response(self, output: Answers) -> dict[str, Any]:
        """An answer to JSON."""
        return self._model.reply(output)


class Batches(Eta):
    """The same, with rows that arrive together in one call."""

    def batch(self, inputs: list[Rows]) -> Rows:
        """Rows to a batch."""
        return np.concatenate(inputs)

    def predict(self, x: Rows) -> Answers:
        """Answer a batch."""
        return self._model.answers(x)

    def unbatch(self, output: Answers) -> list[Answers]:
        """A batch to answers."""
        return [output[i : i + 1] for i in range(len(output))]


if __name__ == "__main__":
    _, file, port, *variant = sys.argv
    api = Batches(file, max_batch_size=64, batch_timeout=0.001) if variant == ["batches"] else Eta(file)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, fast_queue=True, timeout=60)
    server.run(host="127.0.0.1", port=int(port), generate_client_file=False, log_level="warning")
