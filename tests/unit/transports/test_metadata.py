"""What the protocol tells of server and models."""

from __future__ import annotations

from typing import Any

from parbake.app.control import AllCounts, VersionCounts
from parbake.contract.model import Batch, Contract, Key, Step, TensorSpec
from parbake.serving.service import ServedVersion
from parbake.serving.stats import Stats
from parbake.transports.metadata import model_config, model_metadata, server_metadata, statistics


def served(version: str = "1", stats: Stats | None = None, **changed: Any) -> ServedVersion:
    given: dict[str, Any] = {
        "name": "eta",
        "inputs": (TensorSpec("x", "FP32", (2,)), TensorSpec("name", "BYTES")),
        "outputs": (TensorSpec("y", "FP64"), TensorSpec("open", "INT64", (-1, 3))),
        "steps": (Step("onnx", "model.onnx"),),
        "purpose": "arrival times",
        "owner": "eta@example.org",
    }
    return ServedVersion(
        "eta", version, Contract(**{**given, **changed}), "sha256:0", mode="dynamic", table=None, batcher=None,
        deadline_s=1.0, stats=stats or Stats(),
    )  # fmt: skip


def test_the_server_names_its_extensions() -> None:
    metadata = server_metadata()
    assert metadata["name"] == "parbake"
    assert {"binary_tensor_data", "model_repository", "statistics", "model_configuration"} <= set(
        metadata["extensions"]
    )


def test_a_model_shows_its_tensors_with_the_rows_as_any_size() -> None:
    metadata = model_metadata(served(key=Key(columns=("name",))), ["1", "2"])
    assert metadata["versions"] == ["1", "2"]
    assert metadata["platform"] == "onnxruntime_onnx"
    assert metadata["inputs"] == [
        {"name": "x", "datatype": "FP32", "shape": [-1, 2]},
        {"name": "name", "datatype": "BYTES", "shape": [-1]},
    ]
    assert metadata["outputs"][1] == {"name": "open", "datatype": "INT64", "shape": [-1, -1, 3]}
    assert metadata["parameters"]["key"] == "name"
    assert metadata["parameters"]["owner"] == "eta@example.org"
    alone = model_metadata(served(batch=Batch(dimension="none")), ["1"])
    assert alone["inputs"][0]["shape"] == [2]


def test_a_models_configuration_has_existing_servers_words() -> None:
    config = model_config(served())
    assert config["max_batch_size"] == 4096
    assert config["input"][0] == {"name": "x", "data_type": "TYPE_FP32", "dims": [2]}
    assert config["input"][1] == {"name": "name", "data_type": "TYPE_STRING", "dims": []}
    assert model_config(served(batch=Batch(dimension="none")))["max_batch_size"] == 0
    assert model_config(served(steps=(Step("python", "source", "m:f"),)))["backend"] == "python"


def test_statistics_are_those_of_the_counts_and_zero_where_nothing_was_counted() -> None:
    stats = Stats()
    stats.answered(0.001, 0.002, 0.004, 0.01, 3, 0)
    stats.answered(0.001, 0.0, 0.0, 0.002, 2, 2)
    stats.refused("overloaded")
    stats.batch(3, 0.004)
    first, second = statistics(
        [served("1", stats), served("2")], AllCounts((VersionCounts("eta", "1", stats.counts(1234)),))
    )["model_stats"]
    assert (first["name"], first["version"], first["last_inference"]) == ("eta", "1", 1234)
    assert (first["inference_count"], first["execution_count"]) == (5, 1)
    details = first["inference_stats"]
    assert details["success"] == {"count": 2, "ns": 12_000_000}
    assert details["fail"]["count"] == 1
    assert details["queue"] == {"count": 1, "ns": 2_000_000}
    assert details["compute_infer"] == {"count": 1, "ns": 4_000_000}
    assert (details["cache_hit"]["count"], details["cache_miss"]["count"]) == (2, 3)
    assert first["batch_stats"] == []
    assert second["inference_count"] == second["execution_count"] == second["last_inference"] == 0
