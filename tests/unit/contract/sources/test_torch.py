"""PyTorch modules as sources: named inputs, a free batch, one clean file; and files that could run code."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from parbake.contract.model import TensorSpec
from parbake.contract.sources.torch import from_torch, read_torch
from parbake.errors import NotAllowed, NotConvertible, PackRefused

pytestmark = pytest.mark.needs("torch", "onnxscript")
torch: Any = pytest.importorskip("torch")


class Net(torch.nn.Module):  # type: ignore[misc]  # torch is optional, so Any
    """Two inputs, two outputs, and dropout, which must be off."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 3)
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, features: Any, weight: Any) -> Any:
        """Scores and the best class."""
        scores = self.drop(torch.relu(self.layer(features))) * weight
        return scores, scores.argmax(dim=1)


EXAMPLE = {"features": np.random.default_rng(0).normal(size=(5, 4)), "weight": np.ones((5, 1))}


def test_a_module_is_exported_in_evaluation_mode_with_its_own_names() -> None:
    source = from_torch(Net().train(), EXAMPLE)
    # Doubles of the example become what the weights are.
    assert source.inputs == (TensorSpec("features", "FP32", (4,)), TensorSpec("weight", "FP32", (1,)))
    assert source.outputs == (TensorSpec("output0", "FP32", (3,)), TensorSpec("output1", "INT64"))
    assert (source.framework, source.framework_version) == ("torch", str(torch.__version__))
    assert source.batch_dimension == "any"
    assert source.smooth
    first, second = (source.predict(source.example)["output0"] for _ in range(2))
    assert first.tobytes() == second.tobytes()
    model = onnx.load_model_from_string(source.files["model.onnx"])
    assert list(source.files) == ["model.onnx"]
    assert [item.name for item in model.graph.input] == ["features", "weight"]
    assert [item.name for item in model.graph.output] == ["output0", "output1"]
    assert all(
        item.type.tensor_type.shape.dim[0].dim_param for item in [*model.graph.input, *model.graph.output]
    )
    # No stack traces and paths of the machine that exported it.
    assert b"test_torch" not in source.files["model.onnx"]


def test_a_batch_that_the_module_fixes_makes_it_one_row_at_a_time() -> None:
    class Fixed(torch.nn.Module):  # type: ignore[misc]  # see above
        def forward(self, x: Any) -> Any:
            return x.reshape(1, -1).sum(dim=1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fixed = torch.jit.trace(Fixed(), torch.ones(1, 2))
    source = from_torch(fixed, np.arange(6.0, dtype=np.float32).reshape(3, 2), batch="one")
    assert source.batch_dimension == "one"
    assert source.outputs == (TensorSpec("output", "FP32"),)
    assert source.predict(source.example)["output"].tolist() == [1.0, 5.0, 9.0]


def test_a_module_that_cannot_be_exported_is_refused_with_the_reason() -> None:
    class Roots(torch.nn.Module):  # type: ignore[misc]  # see above
        def forward(self, x: Any) -> Any:
            return torch.special.bessel_j0(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        roots = torch.jit.trace(Roots(), torch.ones(1, 2))
    with pytest.raises(NotConvertible, match=r"torch cannot export the model to ONNX: .*bessel_j0") as caught:
        from_torch(roots, np.ones((2, 2), dtype=np.float32))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"features": np.ones((2, 4))}, r"forward\(\) needs 'weight', which the example lacks"),
        ({**EXAMPLE, "bias": np.ones((5, 1))}, r"forward\(\) has no parameter 'bias'"),
        (np.ones((2, 4)), r"forward\(\) has no parameter 'x'"),
        ({"features": np.ones((2, 5)), "weight": np.ones((2, 1))}, "the module fails on the example"),
        ({"features": np.array([["a"]]), "weight": np.ones((1, 1))}, "input 'features' holds strings"),
    ],
)
def test_an_example_that_does_not_fit_is_refused(example: object, message: str) -> None:
    with pytest.raises(PackRefused, match=message):
        from_torch(Net(), example)


def test_torchscript_is_read_and_packed_without_a_pickle(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = tuple(torch.from_numpy(array.astype(np.float32)) for array in EXAMPLE.values())
        torch.jit.trace(Net().eval(), arguments).save(str(tmp_path / "net.pt"))
    source = from_torch(read_torch(tmp_path / "net.pt", allow_pickle=False), EXAMPLE)
    assert [spec.name for spec in source.inputs] == ["features", "weight"]
    assert source.outputs == (TensorSpec("output0", "FP32", (3,)), TensorSpec("output1", "INT64"))
    expected = Net().eval()(*arguments)[0]
    assert source.predict(source.example)["output0"].tolist() == expected.tolist()


class Plain(torch.nn.Module):  # type: ignore[misc]  # see above
    """A module that pickles."""

    def forward(self, x: Any) -> Any:
        """Twice."""
        return x + x


def test_files_that_can_run_code_need_permission(tmp_path: Path) -> None:
    torch.save(Plain(), tmp_path / "whole.pt")
    torch.save(Net().state_dict(), tmp_path / "weights.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(Plain(), (torch.ones(2, 2),))
        torch.export.save(program, tmp_path / "program.pt2")
    for name, kind in [("whole.pt", "pickled module"), ("program.pt2", r"torch\.export program")]:
        with pytest.raises(NotAllowed, match=f"is a {kind}, and loading one can run any code"):
            read_torch(tmp_path / name, allow_pickle=False)
    assert isinstance(read_torch(tmp_path / "whole.pt", allow_pickle=True), torch.nn.Module)
    assert isinstance(read_torch(tmp_path / "program.pt2", allow_pickle=True), torch.export.ExportedProgram)
    with pytest.raises(PackRefused, match="holds a OrderedDict, not a module"):
        read_torch(tmp_path / "weights.pt", allow_pickle=True)
    (tmp_path / "torn.pt").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(PackRefused, match="torch cannot load"):
        read_torch(tmp_path / "torn.pt", allow_pickle=True)
