"""What the OpenAPI document says is what the server does: a real server, fuzzed by its own document."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from parbake.contract.model import Batch, Key, TensorSpec
from parbake.testing import Server, serving
from tests.conftest import Parbake
from tests.echo import write_echo

MIXED = [
    TensorSpec("age", "FP32", (1,), unit="years"),
    TensorSpec("city", "BYTES", ()),
    TensorSpec("visits", "INT8", ()),
    TensorSpec("member", "BOOL", (1,)),
    TensorSpec("gap", "FP64", (), allow_nan=True),
]
FLOWER = [TensorSpec("x", "FP16", (2,), columns=("petal length", "width"))]
IMAGE = [TensorSpec("image", "UINT8", (2, 2)), TensorSpec("tokens", "INT64", (-1,))]

SETTINGS = """
[server]
repository_api = "off"
[[deployments]]
bundle = "mixed.bundle"
[[deployments]]
bundle = "flower.bundle"
[[deployments]]
bundle = "image.bundle"
[[deployments]]
name = "baked"
bundle = "store.bundle"
mode = "static"
table = "store.table"
"""

# Three things that JSON Schema cannot say: how many values a shape takes, that a list is too long in another way
# (413) than a value is wrong (400), and that labels are for deployments that expect some.
CHECKS = """
[checks.negative_data_rejection]
expected-statuses = [400, 403, 404, 405, 413]
[[operations]]
include-path-regex = "/(infer|labels)$"
[operations.checks.positive_data_acceptance]
enabled = false
"""

# To JSON Schema 65.0 is an integer; to the contract it is none.
HOOKS = """
import schemathesis


def whole(value):
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, list):
        return [whole(item) for item in value]
    if isinstance(value, dict):
        return {name: whole(item) for name, item in value.items()}
    return value


@schemathesis.hook
def map_body(context, body):
    return whole(body)
"""


@pytest.fixture
def server(tmp_path: Path, parbake: Parbake) -> Iterator[Server]:
    write_echo(tmp_path, "mixed", MIXED)
    write_echo(tmp_path, "flower", FLOWER)
    # Rows of an open size go together only if they have the same one.
    write_echo(tmp_path, "image", IMAGE, batch=Batch(max_rows=1))
    write_echo(tmp_path, "store", [TensorSpec("store", "INT64", ()), *FLOWER], key=Key(columns=("store",)))
    (tmp_path / "rows.csv").write_text("store,petal length,width\n0,1.5,2.5\n1,0.5,0.25\n")
    done = parbake("bake", "store.bundle", "--input", "rows.csv", "--out", "store.table")
    assert done.returncode == 0, done.stderr
    (tmp_path / "parbake.toml").write_text(SETTINGS)
    with serving(config=tmp_path / "parbake.toml") as running:
        yield running


def test_the_document_and_the_server_agree(server: Server, tmp_path: Path) -> None:
    # Given the document; a short deadline is answered with 504 on purpose, so none is sent
    with urllib.request.urlopen(f"{server.url}/openapi.json") as reply:
        document = json.load(reply)
    for path in document["paths"].values():
        for operation in path.values():
            kept = [item for item in operation.get("parameters", []) if item["name"] != "parbake-deadline-ms"]
            operation["parameters"] = kept
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    (tmp_path / "schemathesis.toml").write_text(CHECKS)
    (tmp_path / "fuzz_hooks.py").write_text(HOOKS)

    # When every operation is asked with values at the bounds of its schema, beyond them, and at random
    command = [
        str(Path(sys.executable).with_name("schemathesis")), "--config-file", "schemathesis.toml",
        "run", "openapi.json", "--url", server.url, "--phases", "examples,coverage,fuzzing",
        "--exclude-path-regex", "/versions/", "--max-examples", "8", "--generation-deterministic",
        "--workers", "1", "--no-color",
    ]  # fmt: skip
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={"SCHEMATHESIS_HOOKS": "fuzz_hooks", "PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    # Then no status, schema or content type was another than the document says, and nothing was logged as a bug
    assert done.returncode == 0, done.stdout
    assert "request.failed" not in server.log()
    with urllib.request.urlopen(f"{server.url}/v2/health/ready") as reply:
        assert reply.status == 200
