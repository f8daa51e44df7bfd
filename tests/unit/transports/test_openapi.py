"""The OpenAPI document: every contract in it, every reference in it resolved, every example in it accepted."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from parbake.contract.model import Batch, Contract, Key, TensorSpec
from parbake.errors import InvalidInput
from parbake.serving.service import Mode, ServedVersion
from parbake.serving.stats import Stats
from parbake.tables.memory import MemoryTable
from parbake.transports.http.oip import InferCodec
from parbake.transports.http.openapi import openapi
from parbake.transports.http.people import PeopleCodec, bounds_of
from parbake.transports.http.replies import STATUSES
from parbake.transports.inputs import pack_values

INPUTS = (
    TensorSpec("city", "BYTES", (1,)),
    TensorSpec("x", "FP32", (2,), columns=("petal length", "width"), unit="cm"),
    TensorSpec("image", "UINT8", (2, 3)),
    TensorSpec("gap", "FP64", (), allow_nan=True),
)
OUTPUTS = (
    TensorSpec("label", "INT64", (1,)),
    TensorSpec("odds", "FP32", (2,), labels=("no", "yes")),
    TensorSpec("price", "FP64", (), unit="EUR"),
)


def serve(
    name: str = "shop",
    version: str = "1",
    inputs: Sequence[TensorSpec] = INPUTS,
    *,
    mode: Mode = "dynamic",
    **rest: Any,
) -> ServedVersion:
    contract = Contract(
        name, tuple(inputs), OUTPUTS, (), purpose="guesses prices", owner="shop@example.org", **rest
    )
    table = MemoryTable("sha256:0", {}) if mode == "static" else None
    return ServedVersion(
        name,
        version,
        contract,
        "sha256:0",
        mode=mode,
        table=table,
        batcher=None,
        deadline_s=1.0,
        stats=Stats(),
    )


def document(*versions: ServedVersion) -> Any:
    return json.loads(openapi(versions))


def schema(of: Any, kind: str, name: str = "shop-1") -> Any:
    return of["components"]["schemas"][f"{name}.{kind}"]


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from references(item)


def test_every_reference_leads_somewhere() -> None:
    found = document(serve(), serve(version="2"), serve("other"))
    targets = set(references(found))
    assert len(targets) > 15
    for target in targets:
        node = found
        for part in target.removeprefix("#/").split("/"):
            node = node[part]


def test_a_row_has_the_columns_of_the_contract() -> None:
    row = schema(document(serve()), "Row")
    assert row["required"] == ["city", "petal length", "width", "image", "gap"]
    assert row["additionalProperties"] is False
    columns = row["properties"]
    assert columns["city"]["type"] == "string"
    assert columns["width"]["x-unit"] == "cm"
    assert columns["width"]["description"] == "FP32 in cm"
    assert columns["image"]["items"] == {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": 255},
        "minItems": 3,
        "maxItems": 3,
    }
    assert {"enum": ["NaN", "Infinity", "-Infinity", None]} in columns["gap"]["anyOf"]


def test_an_answer_has_the_outputs_with_their_labels() -> None:
    answer = schema(document(serve()), "Answer")
    assert list(answer["properties"]) == ["label", "odds", "price"]
    assert list(answer["properties"]["odds"]["properties"]) == ["no", "yes"]
    assert answer["properties"]["price"]["description"] == "FP64 in EUR"


def test_static_mode_requires_only_the_key() -> None:
    static = serve(mode="static", key=Key(columns=("city", "width")))
    assert schema(document(static), "Row")["required"] == ["city", "width"]
    assert list(
        document(static)["paths"]["/predict/shop"]["post"]["requestBody"]["content"]["application/json"][
            "example"
        ]
    ) == [
        "city",
        "width",
    ]


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_the_examples_are_accepted(mode: Mode) -> None:
    served = serve(mode=mode, key=Key(columns=("city", "width")))
    found = document(served)
    row = found["paths"]["/predict/shop"]["post"]["requestBody"]["content"]["application/json"]["example"]
    assert PeopleCodec(served).read(json.dumps(row).encode(), None).inputs.rows == 1
    (request,) = schema(found, "InferRequest")["examples"]
    assert InferCodec(served).read(json.dumps(request).encode(), None).inputs.rows == 1


def test_the_last_version_of_a_name_answers_without_a_number() -> None:
    paths = document(serve(version="1"), serve(version="2"))["paths"]
    for version in ("1", "2"):
        assert f"/predict/shop/versions/{version}" in paths
        assert f"/v2/models/shop/versions/{version}/infer" in paths
    assert paths["/predict/shop"]["post"]["x-parbake"]["version"] == "2"
    rows = paths["/predict/shop"]["post"]["requestBody"]["content"]["application/json"]["schema"]["oneOf"]
    assert rows[0] == {"$ref": "#/components/schemas/shop-2.Row"}


def test_names_that_would_give_the_same_schema_are_kept_apart() -> None:
    narrow = serve("a", "b-1", [TensorSpec("x", "INT8", ())])
    wide = serve("a-b", "1", [TensorSpec("y", "INT8", ())])
    paths = document(narrow, wide)["paths"]
    bodies = [
        paths[f"/predict/{name}"]["post"]["requestBody"]["content"]["application/json"]
        for name in ("a", "a-b")
    ]
    assert bodies[0]["schema"] != bodies[1]["schema"]


def test_what_people_want_to_know_stands_in_it() -> None:
    operation = document(serve(batch=Batch(max_rows=7)))["paths"]["/predict/shop"]["post"]
    assert operation["description"].startswith(
        "guesses prices\n\nOwner: shop@example.org. Mode: dynamic. Key: the whole row."
    )
    assert operation["x-parbake"] == {
        "name": "shop",
        "version": "1",
        "mode": "dynamic",
        "purpose": "guesses prices",
        "owner": "shop@example.org",
        "key": [],
        "digest": "sha256:0",
    }
    assert operation["requestBody"]["content"]["application/json"]["schema"]["oneOf"][1]["maxItems"] == 7


def test_every_status_that_is_given_is_known_to_the_server() -> None:
    found = document(serve())
    assert {int(status) for status in found["components"]["responses"]} <= set(STATUSES.values())


def test_what_is_asked_of_a_model_is_there_with_and_without_its_version() -> None:
    paths = document(serve())["paths"]
    ends = {path.removeprefix("/v2/models/{name}") for path in paths if path.startswith("/v2/models/{name}")}
    unnumbered = {"", "/ready", "/config", "/stats"}
    # Labels say themselves which version they are about.
    assert ends == unnumbered | {f"/versions/{{version}}{end}" for end in unnumbered} | {"/labels"}
    for path in ("/predict/shop", "/v2/models/shop"):
        end = "" if path.startswith("/predict") else "/infer"
        assert {path + end, f"{path}/versions/1{end}"} <= set(paths)


def test_a_server_without_models_has_a_document() -> None:
    paths = document()["paths"]
    assert "/v2/health/live" in paths
    assert not [path for path in paths if "{name}" in path or path.startswith("/predict")]


@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64"])
def test_the_bounds_of_a_float_are_the_last_that_are_accepted(datatype: Any) -> None:
    spec = TensorSpec("x", datatype, ())
    low, high = bounds_of(spec)
    assert low is not None
    assert high is not None
    for bound in (low, high):
        assert math.isfinite(
            struct.unpack(
                {"FP16": "<e", "FP32": "<f", "FP64": "<d"}[datatype], pack_values(spec, [bound], "$")
            )[0]
        )
        with pytest.raises(InvalidInput, match=f"expected {datatype}"):
            pack_values(spec, [math.nextafter(bound, math.copysign(math.inf, bound))], "$")


@pytest.mark.parametrize(
    "datatype", ["INT8", "UINT8", "INT16", "UINT16", "INT32", "UINT32", "INT64", "UINT64"]
)
def test_the_bounds_of_an_integer_are_the_last_that_are_accepted(datatype: Any) -> None:
    spec = TensorSpec("x", datatype, ())
    low, high = bounds_of(spec)
    assert pack_values(spec, [low, high], "$")
    for beyond in (low - 1, high + 1):  # type: ignore[operator]  # an integer has bounds
        with pytest.raises(InvalidInput, match=f"expected {datatype}, got {beyond}"):
            pack_values(spec, [beyond], "$")
