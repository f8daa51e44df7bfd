"""What all tests share: optional modules that a test needs, the installed command, and one small bundle."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from parbake.contract.bundle import Goldens, StoredBundle, write_bundle
from parbake.contract.environment import capture
from parbake.contract.model import Contract, Parity, Step, TensorSpec
from tests.mlflow_server import MlflowServer

# Time limits per example say more about the machine than about the code.
settings.register_profile("parbake", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("parbake")

HOW_TO_INSTALL: Mapping[str, str] = {
    "torch": ".venv/bin/pip install torch==2.13.0 onnxscript==0.7.2",
    "onnxscript": ".venv/bin/pip install torch==2.13.0 onnxscript==0.7.2",
}

Parbake = Callable[..., "subprocess.CompletedProcess[str]"]
Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose modules are missing, with a line that says how to get them."""
    for marker in item.iter_markers("needs"):
        for module in marker.args:
            if importlib.util.find_spec(module) is None:
                pytest.skip(
                    f"{module} is not installed: {HOW_TO_INSTALL.get(module, 'make test installs it')}"
                )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let groups of tests be groups: xdist 3.8 writes them into an attribute that pytest 9.2 does not read."""
    if not getattr(config.option, "loadgroup", False):
        return
    for item in items:
        mark = item.get_closest_marker("xdist_group")
        if mark is not None and not item.nodeid.endswith(f"@{mark.args[0]}"):
            item._id = type(item.id).parse(f"{item.nodeid}@{mark.args[0]}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """On CI everything is there, so a test that is skipped has failed."""
    return _no_skip_on_ci((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a whole module that is skipped."""
    return _no_skip_on_ci((yield))


def _no_skip_on_ci(report: Report) -> Report:
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"skipped on CI, where everything must run: {reason}"
    return report


@pytest.fixture
def parbake(tmp_path: Path) -> Parbake:
    """The installed command, run in ``tmp_path`` as a person would: ``parbake("inspect", "eta.bundle")``.

    Gives the finished process with its stdout and stderr as text. ``env`` adds variables.
    """
    command = Path(sys.executable).with_name("parbake")

    def run(
        *arguments: str | Path, env: Mapping[str, str] | None = None, timeout_s: float = 60
    ) -> subprocess.CompletedProcess[str]:
        # pytest-xdist sets COLUMNS.
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("PARBAKE_") and name != "COLUMNS"
        }
        return subprocess.run(
            [command, *map(str, arguments)],
            cwd=tmp_path,
            env={**inherited, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def only_mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """One MLflow server for all: it takes long to start."""
    server = MlflowServer(tmp_path_factory.mktemp("mlflow") / "server")
    yield server
    server.close()


@pytest.fixture
def mlflow_server(only_mlflow_server: MlflowServer) -> MlflowServer:
    """That server, running again if the test before has killed it."""
    if not only_mlflow_server.runs:
        only_mlflow_server.start()
    return only_mlflow_server


@pytest.fixture(scope="session")
def mlflow_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """MLflow on SQLite, made once: that takes seconds."""
    pytest.importorskip("mlflow", reason="no MLflow here: pip install 'parbake[mlflow]'")
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'kept' / 'mlflow.db'}"


@pytest.fixture
def doubler_onnx(tmp_path: Path) -> Path:
    """An ONNX file: input ``x`` FP32 [N, 2], output ``y`` = 2 x."""
    return write_doubler(tmp_path / "doubler.onnx")


@pytest.fixture
def doubler_bundle(tmp_path: Path, doubler_onnx: Path) -> StoredBundle:
    """A bundle of that model at ``tmp_path / "doubler.bundle"``, written without the pack use case."""
    x = np.array([[1.0, 2.0], [3.0, 4.5]], dtype=np.float32)
    contract = Contract(
        name="doubler",
        inputs=(TensorSpec("x", "FP32", (2,), columns=("left", "right"), unit="m"),),
        outputs=(TensorSpec("y", "FP32", (2,)),),
        steps=(Step("onnx", "model.onnx"),),
        purpose="shows that a number can be doubled",
        owner="tests@parbake.example",
        parity=Parity("onnx", "1.0", 2, 0, exact=True, max_abs_diff=0.0),
    )
    return write_bundle(
        tmp_path / "doubler.bundle",
        contract,
        {"model.onnx": doubler_onnx.read_bytes()},
        Goldens({"x": x}, {"y": 2 * x}),
        capture(),
    )


def write_doubler(path: Path) -> Path:
    """Write the ONNX file of `doubler_onnx`."""
    import onnx
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])],
        "doubler",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path)
    return path
