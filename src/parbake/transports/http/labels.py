"""Labels as callers send them: by the id of a request, by a key, or by the columns that make a key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Struct

from parbake.app.labels import MOST_LABELS, Labelled
from parbake.contract.key import KEY_BYTES, key_of
from parbake.contract.model import Contract, TensorSpec
from parbake.errors import InvalidInput, RequestTooLarge
from parbake.serving.observer import LONGEST_ID
from parbake.transports.http.oip import decode_json
from parbake.transports.inputs import pack_values


class GivenLabel(Struct, frozen=True, forbid_unknown_fields=True):
    """One label: of row ``row`` of request ``id``, or of ``key`` (hexadecimal, or the values of its columns)."""

    label: float | Annotated[str, msgspec.Meta(max_length=LONGEST_ID)] | bool
    id: Annotated[str, msgspec.Meta(max_length=LONGEST_ID)] = ""
    row: Annotated[int, msgspec.Meta(ge=0)] = 0
    key: str | dict[str, Any] = ""
    at: float | None = None
    """Unix time at which it became known."""


class LabelsRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``POST /labels`` and ``POST /v2/models/NAME/labels``."""

    labels: Annotated[list[GivenLabel], msgspec.Meta(min_length=1)]
    """At most `MOST_LABELS`."""
    deployment: str = ""


def read_labels(
    contract_of: Callable[[str], Contract], body: bytes, name: str = ""
) -> tuple[str, tuple[Labelled, ...]]:
    """The deployment that the labels in a body are for, and the labels. Raises `ParbakeError`."""
    request = decode_json(msgspec.json.Decoder(LabelsRequest), body)
    if len(request.labels) > MOST_LABELS:
        raise RequestTooLarge(
            f"{len(request.labels)} labels in one request, the limit is {MOST_LABELS}",
            path="$.labels",
            hint="send several requests",
        )
    if name and request.deployment not in ("", name):
        raise InvalidInput(
            f"the URL says {name!r}, the body {request.deployment[:80]!r}", path="$.deployment"
        )
    if not (name or request.deployment):
        raise InvalidInput(
            "no deployment is named", path="$.deployment", hint="or POST /v2/models/NAME/labels"
        )
    name = name or request.deployment
    contract = contract_of(name)
    labels: list[Labelled] = []
    for i, given in enumerate(request.labels):
        path = f"$.labels[{i}]"
        if bool(given.id) == bool(given.key):
            raise InvalidInput("a label has an id or a key", path=path, hint="id is that of the request")
        key = _key(contract, given.key, f"{path}.key") if given.key else b""
        labels.append(Labelled(given.label, given.id, given.row, key, given.at))
    return name, tuple(labels)


def _key(contract: Contract, given: str | Mapping[str, Any], path: str) -> bytes:
    """The key that a label names. Raises `InvalidInput`."""
    if isinstance(given, str):
        try:
            key = bytes.fromhex(given)
        except ValueError:
            key = b""
        if len(key) != KEY_BYTES:
            raise InvalidInput(
                f"expected {2 * KEY_BYTES} hexadecimal digits, got {given[:40]!r}",
                path=path,
                hint="the prediction log has the key of each row",
            )
        return key
    if contract.key.rounding:
        raise InvalidInput(
            f"the key of {contract.name!r} is made of rounded values",
            path=path,
            hint="send the id of the request",
        )
    columns = _columns(contract)
    names = list(contract.key.columns or columns)
    if set(given) != set(names) or not set(names) <= columns.keys():
        raise InvalidInput(
            f"the key of {contract.name!r} has the columns {', '.join(names[:12])}",
            path=path,
            hint="send all of them, or the id of the request",
        )
    return key_of(
        b"".join(pack_values(columns[name], [given[name]], path, [f"{path}.{name}"]) for name in names)
    )


def _columns(contract: Contract) -> dict[str, TensorSpec]:
    """The inputs and the named columns of matrices, each as an input of one value."""
    return {
        name: spec
        for spec in contract.inputs
        if spec.columns or (spec.fixed and spec.elements == 1)
        for name in (spec.columns or (spec.name,))
    }
