"""One row has one answer: bit-equal by REST, gRPC, the people's form, the table and in Python."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http

from parbake.contract.datatypes import NUMPY
from parbake.contract.key import Keys
from parbake.contract.model import Contract, TensorSpec
from parbake.contract.record import Records
from parbake.contract.tensors import Tensor, Tensors, from_raw, to_raw
from parbake.tables.lmdb import open_table
from parbake.testing import Server, serving
from tests.acceptance.zoo import NEEDS, ROWS, ZOO, Animal
from tests.conftest import Parbake

Raw = dict[str, bytes]
"""The raw bytes of each output."""
Ask = Callable[[str, Tensors], Raw]
"""Asks a deployment about rows."""


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.needs(*NEEDS.get(k, ()))) for k in ZOO])
def test_a_row_has_the_same_bits_whichever_way_it_is_asked(
    kind: str, tmp_path: Path, parbake: Parbake
) -> None:
    # Given a model of this kind, and its predictions in Python
    animal = ZOO[kind](tmp_path)
    bundle, contract = animal.bundle, animal.bundle.contract
    expected = _raw(contract, bundle.predict(animal.rows))

    # When half of the rows are baked, and all are asked for in every way, alone and together
    pq.write_table(animal.table[: ROWS // 2], tmp_path / "some.parquet")
    pq.write_table(animal.table, tmp_path / "all.parquet")
    for name in ("some", "all"):
        done = parbake("bake", bundle.path, "--input", f"{name}.parquet", "--out", f"{name}.table")
        assert done.returncode == 0, done.stderr
    (tmp_path / "parbake.toml").write_text(
        "".join(
            f"[[deployments]]\nname = {name!r}\nbundle = {str(bundle.path)!r}\n{more}\n"
            for name, more in {
                "inline": "placement = 'inline'",
                "process": "placement = 'process'",
                "static": "mode = 'static'\ntable = 'all.table'",
                "hybrid": "mode = 'hybrid'\ntable = 'some.table'",
                "learned": "mode = 'hybrid'",
            }.items()
        )
    )
    answers: dict[str, Raw] = {"table": _table(animal, tmp_path / "all.table")}
    with serving(config=tmp_path / "parbake.toml", grpc=True) as server:
        rest = triton_http.InferenceServerClient(server.url.removeprefix("http://"))
        grpc = triton_grpc.InferenceServerClient(server.grpc)
        ways: dict[str, Ask] = {
            "REST JSON": lambda name, rows: _json(contract, server, name, rows),
            "REST binary": lambda name, rows: _triton(triton_http, rest, contract, name, rows),
            "gRPC": lambda name, rows: _triton(triton_grpc, grpc, contract, name, rows),
            "predict": lambda name, rows: _people(contract, server, name, rows),
        }
        for name in ("inline", "process", "static", "hybrid", "learned"):
            for way, ask in ways.items():
                answers[f"{way}, {name}, together"] = ask(name, animal.rows)
                answers[f"{way}, {name}, alone"] = _alone(animal, name, ask)
        rest.close()
        grpc.close()

    # Then they are the same, bit by bit
    for way, answer in answers.items():
        assert answer == expected, way


def _alone(animal: Animal, name: str, ask: Ask) -> Raw:
    parts = [ask(name, {n: a[i : i + 1] for n, a in animal.rows.items()}) for i in range(ROWS)]
    outputs = animal.bundle.contract.outputs
    return {spec.name: b"".join(part[spec.name] for part in parts) for spec in outputs}


def _raw(contract: Contract, outputs: Tensors) -> Raw:
    return {spec.name: to_raw(outputs[spec.name], spec.datatype) for spec in contract.outputs}


def _post(url: str, body: Any) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def _values(spec: TensorSpec, array: Tensor) -> list[Any]:
    return [v.decode() if isinstance(v, bytes) else v for v in array.reshape(-1).tolist()]


def _tensor(spec: TensorSpec, values: Any, shape: list[int]) -> Tensor:
    array = np.asarray(values, dtype=NUMPY[spec.datatype])
    return array.reshape(shape)


def _json(contract: Contract, server: Server, name: str, rows: Tensors) -> Raw:
    inputs = [
        {
            "name": s.name,
            "datatype": s.datatype,
            "shape": list(rows[s.name].shape),
            "data": _values(s, rows[s.name]),
        }
        for s in contract.inputs
    ]
    reply = _post(f"{server.url}/v2/models/{name}/infer", {"inputs": inputs})
    found = {output["name"]: output for output in reply["outputs"]}
    return _raw(
        contract,
        {s.name: _tensor(s, found[s.name]["data"], found[s.name]["shape"]) for s in contract.outputs},
    )


def _triton(library: Any, client: Any, contract: Contract, name: str, rows: Tensors) -> Raw:
    inputs = []
    for spec in contract.inputs:
        array = rows[spec.name]
        tensor = library.InferInput(spec.name, list(array.shape), spec.datatype)
        if spec.datatype == "BYTES":
            array = np.array([str(v).encode() for v in array.reshape(-1)], dtype=object).reshape(array.shape)
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    result = client.infer(name, inputs)
    return _raw(contract, {spec.name: result.as_numpy(spec.name) for spec in contract.outputs})


def _people(contract: Contract, server: Server, name: str, rows: Tensors) -> Raw:
    asked: list[dict[str, Any]] = []
    for i in range(len(next(iter(rows.values())))):
        row: dict[str, Any] = {}
        for spec in contract.inputs:
            values = _values(spec, rows[spec.name][i])
            if spec.columns:
                row.update(zip(spec.columns, values, strict=True))
            else:
                row[spec.name] = values[0] if spec.shape in ((), (1,)) else values
        asked.append(row)
    reply = _post(f"{server.url}/predict/{name}", asked if len(asked) > 1 else asked[0])
    answered = reply if len(asked) > 1 else [reply]
    outputs: dict[str, Tensor] = {}
    for spec in contract.outputs:
        values = [row[spec.name] for row in answered]
        if spec.labels:
            values = [[value[label] for label in spec.labels] for value in values]
        outputs[spec.name] = _tensor(spec, values, [len(asked), *spec.shape])
    return _raw(contract, outputs)


def _table(animal: Animal, path: Path) -> Raw:
    contract = animal.bundle.contract
    table = open_table(path, bundle_digest=animal.bundle.digest, verify=True)
    raws = [to_raw(animal.rows[spec.name], spec.datatype) for spec in contract.inputs]
    parts: list[list[bytes]] = []
    for key in Keys(contract).of(raws, ROWS):
        record = table.get(key)
        assert record is not None
        parts.append(Records(contract).split(record)[0])
    table.close()
    return {
        spec.name: to_raw(
            from_raw(b"".join(part[i] for part in parts), spec.datatype, (ROWS, *spec.shape)), spec.datatype
        )
        for i, spec in enumerate(contract.outputs)
    }
