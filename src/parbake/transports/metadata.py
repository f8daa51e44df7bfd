"""What the Open Inference Protocol tells of server and models, the same over REST and gRPC."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from typing import Any, Final

from parbake.app.control import AllCounts
from parbake.app.repository import Listed
from parbake.contract.model import TensorSpec
from parbake.serving.service import ServedVersion
from parbake.serving.stats import Counts, no_counts
from parbake.transports.inputs import wire_shape

EXTENSIONS: Final = (
    "binary_tensor_data",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "statistics",
)

_CONFIG_TYPES: Final = {"BYTES": "TYPE_STRING"}


def server_metadata() -> dict[str, Any]:
    """``$metadata_server_response``."""
    return {"name": "parbake", "version": _version(), "extensions": list(EXTENSIONS)}


@cache
def _version() -> str:
    return version("parbake")


def platform_of(served: ServedVersion) -> str:
    """What runs it, in the words of existing servers."""
    return "python" if served.contract.own_code else "onnxruntime_onnx"


def model_metadata(served: ServedVersion, versions: Sequence[str]) -> dict[str, Any]:
    """``$metadata_model_response``; the contract's own words stand under ``parameters``."""
    contract = served.contract
    return {
        "name": served.name,
        "versions": list(versions),
        "platform": platform_of(served),
        "inputs": [_tensor(served, spec) for spec in contract.inputs],
        "outputs": [_tensor(served, spec) for spec in contract.outputs],
        "parameters": {
            "version": served.version,
            "digest": served.digest,
            "mode": served.mode,
            "purpose": contract.purpose,
            "owner": contract.owner,
            "key": ", ".join(contract.key.columns) or "row",
        },
    }


def _tensor(served: ServedVersion, spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(wire_shape(served.contract, spec))}


def model_config(served: ServedVersion) -> dict[str, Any]:
    """The model configuration extension's view of a contract."""
    contract = served.contract
    batched = contract.batch.dimension != "none"

    def tensor(spec: TensorSpec) -> dict[str, Any]:
        return {
            "name": spec.name,
            "data_type": config_type(spec),
            "dims": list(spec.shape) if spec.shape or batched else [1],
        }

    platform = platform_of(served)
    return {
        "name": served.name,
        "platform": platform if platform != "python" else "",
        "backend": "onnxruntime" if platform != "python" else "python",
        "version_policy": {"specific": {"versions": [served.version]}},
        "max_batch_size": contract.batch.max_rows if batched else 0,
        "input": [tensor(spec) for spec in contract.inputs],
        "output": [tensor(spec) for spec in contract.outputs],
    }


def config_type(spec: TensorSpec) -> str:
    """The model configuration's word for a datatype."""
    return _CONFIG_TYPES.get(spec.datatype, f"TYPE_{spec.datatype}")


def repository_index(listed: Sequence[Listed]) -> list[dict[str, str]]:
    """The model repository extension's index."""
    return [
        {
            "name": item.name,
            "version": item.version,
            "state": "READY" if item.ready else "UNAVAILABLE",
            "reason": item.reason,
        }
        for item in listed
    ]


def statistics(served: Sequence[ServedVersion], counts: AllCounts) -> dict[str, Any]:
    """The statistics extension: counts over all fronts since the start; times are in nanoseconds.

    ``batch_stats`` is empty: it wants exact sizes of batches, and what is counted is ranges of them
    (``/metrics`` has these).
    """
    by_version = {(item.name, item.version): item.counts for item in counts.versions}
    return {
        "model_stats": [_statistics(s, by_version.get((s.name, s.version)) or no_counts()) for s in served]
    }


def _statistics(served: ServedVersion, counts: Counts) -> dict[str, Any]:
    answered = counts.outcomes.get("ok", 0)
    failed = sum(count for outcome, count in counts.outcomes.items() if outcome != "ok")
    by_model = sum(counts.stages["model"].counts)

    def times(stage: str, count: int) -> dict[str, int]:
        return {"count": count, "ns": round(counts.stages[stage].sum * 1e9)}

    return {
        "name": served.name,
        "version": served.version,
        "last_inference": counts.last_ms,
        "inference_count": counts.rows,
        "execution_count": counts.executions,
        "inference_stats": {
            "success": times("total", answered),
            "fail": {"count": failed, "ns": 0},
            "queue": times("queue", by_model),
            "compute_input": times("parse", answered),
            "compute_infer": times("model", by_model),
            "compute_output": {"count": 0, "ns": 0},
            "cache_hit": {"count": counts.baked_rows, "ns": 0},
            "cache_miss": {"count": counts.rows - counts.baked_rows, "ns": 0},
        },
        "batch_stats": [],
    }
