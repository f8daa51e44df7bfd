"""Parameters of requests, the same over REST and gRPC."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from parbake.errors import InvalidInput
from parbake.runtime.waiting import HIGH, LOW, NORMAL
from parbake.serving.service import ServedVersion

_MOST_US: Final = 1 << 63
"""What the protocol's integers hold."""

_UNSUPPORTED: Final = {
    "classification": "ask for the probabilities instead",
    "shared_memory_region": "send the tensor in the request",
    "sequence_id": "this server keeps no sequences",
}


def refuse_unsupported(parameters: Mapping[str, Any], path: str) -> None:
    """Raise `InvalidInput` for parameters that would change the answer and are not known here."""
    for name, hint in _UNSUPPORTED.items():
        if parameters.get(name):
            raise InvalidInput(f"{name} is not supported", path=f"{path}.{name}", hint=hint)


def timeout_s(parameters: Mapping[str, Any]) -> float:
    """The ``timeout`` parameter, in microseconds as existing clients send it; 0 where there is none."""
    value = parameters.get("timeout")
    if value is None or value == 0:
        return 0.0
    if type(value) is not int or not 0 <= value <= _MOST_US:
        raise InvalidInput(
            f"expected microseconds as a whole number, got {str(value)[:60]!r}", path="$.parameters.timeout"
        )
    return value / 1e6


def priority_of(parameters: Mapping[str, Any]) -> int:
    """The ``priority`` parameter, as existing clients send it: 1 goes first, 0 means as usual."""
    value = parameters.get("priority")
    if value is None or value == 0:
        return NORMAL
    if type(value) is not int or value < 0:
        raise InvalidInput(
            f"expected {HIGH} (first), {NORMAL} (as usual) or {LOW} (when nothing else waits), got {str(value)[:60]!r}",
            path="$.parameters.priority",
        )
    return min(value, LOW)


def output_position(served: ServedVersion, name: str, path: str) -> int:
    """The position of an output that is asked for. Raises `InvalidInput`."""
    names = [spec.name for spec in served.contract.outputs]
    if name not in names:
        raise InvalidInput(
            f"model {served.name!r} has no output {name[:60]!r}",
            path=path,
            hint=f"its outputs are {', '.join(names[:12])}",
        )
    return names.index(name)


def refuse_overrides(parameters: Mapping[str, Any]) -> None:
    """Raise `InvalidInput` for parameters of a load that would bring a model in over the network."""
    for name in parameters:
        if name == "config" or name.startswith("file:"):
            raise InvalidInput(
                f"{name[:80]!r} is not accepted over the network",
                path=f"$.parameters.{name[:80]}",
                hint="parbake reload BUNDLE puts another bundle under a deployment",
            )
