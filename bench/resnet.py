"""A network built as ResNet-18 is, of about ten milliseconds a row: eight residual blocks in four stages.

A row is a few numbers that a first matrix spreads to an image, so that it takes as few bytes as those of the other
models and a server is measured, not how it reads megabytes of digits. Weights come from a fixed seed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

_SIDE: Final = 112
_STAGES: Final = (64, 128, 256, 512)
_SEED: Final = 7


def write_resnet(path: Path, features: int) -> None:
    """Write the graph: ``x`` [N, features] to ``p`` [N, 2], each FP32."""
    import onnx
    from onnx import TensorProto, helper

    graph = _Graph()
    image = graph.image("x", features)
    name = graph.conv(image, 3, _STAGES[0], size=7, stride=2)
    name = graph.node("Relu", name)
    name = graph.node("MaxPool", name, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    channels = _STAGES[0]
    for stage, width in enumerate(_STAGES):
        for block in range(2):
            stride = 2 if stage and not block else 1
            name = graph.block(name, channels, width, stride)
            channels = width
    name = graph.node("Flatten", graph.node("GlobalAveragePool", name))
    name = graph.node("MatMul", name, graph.normal(channels, 2, fan_in=channels))
    graph.nodes.append(helper.make_node("Softmax", [name], ["p"]))
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "eta",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", features])],
            [helper.make_tensor_value_info("p", TensorProto.FLOAT, ["N", 2])],
            graph.weights,
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    onnx.save(model, path)


class _Graph:
    """Nodes and weights so far; each method adds some and gives the name of what comes out."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self._random = np.random.default_rng(_SEED)

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """One operator."""
        from onnx import helper

        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def normal(self, *shape: int, fan_in: int) -> str:
        """Weights of a size that keeps what goes through about as large as it was."""
        values = self._random.normal(size=shape) * np.sqrt(2 / fan_in)
        return self._tensor(values.astype(np.float32))

    def image(self, rows: str, features: int) -> str:
        """Rows of numbers as images."""
        flat = self.node("MatMul", rows, self.normal(features, 3 * _SIDE * _SIDE, fan_in=features))
        return self.node("Reshape", flat, self._tensor(np.array([-1, 3, _SIDE, _SIDE])))

    def conv(self, name: str, channels: int, width: int, *, size: int, stride: int) -> str:
        """A convolution, its normalization folded into its weights and bias."""
        kernel = self.normal(width, channels, size, size, fan_in=channels * size * size)
        bias = self._tensor((self._random.normal(size=width) * 0.1).astype(np.float32))
        pads = [size // 2] * 4
        return self.node("Conv", name, kernel, bias, strides=[stride, stride], pads=pads)

    def block(self, name: str, channels: int, width: int, stride: int) -> str:
        """Two convolutions and a way around them."""
        inner = self.node("Relu", self.conv(name, channels, width, size=3, stride=stride))
        inner = self.conv(inner, width, width, size=3, stride=1)
        around = name
        if stride != 1 or channels != width:
            around = self.conv(name, channels, width, size=1, stride=stride)
        return self.node("Relu", self.node("Add", inner, around))

    def _tensor(self, values: npt.NDArray[Any]) -> str:
        from onnx import numpy_helper

        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(values, name))
        return name
