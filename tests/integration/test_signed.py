"""Where keys are trusted, no byte of a bundle runs that none of them has signed: at the start or later."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from parbake.app.supervisor import Change
from parbake.contract.bundle import SIGNATURES
from parbake.contract.signatures import new_key, sign
from parbake.errors import BundleUnsigned, ServerNotFound
from parbake.testing import serving
from parbake.transports import client
from tests.functions import write_function, write_scaled
from tests.traffic import answer, infer, once, wait_for

pytestmark = pytest.mark.needs("cryptography")


@pytest.fixture
def ann(tmp_path: Path) -> Path:
    """Ann's private key; her public one is trusted."""
    new_key(tmp_path / "ann")
    (tmp_path / "trusted").mkdir()
    shutil.copy(tmp_path / "ann.pub", tmp_path / "trusted")
    return tmp_path / "ann"


def leaves_a_trace(folder: Path, trace: Path, *, factor: int = 2, replace: bool = False) -> Any:
    """A bundle whose code leaves a file when it is imported."""
    source = (
        f"import pathlib\npathlib.Path({str(trace)!r}).touch()\ndef predict(x):\n    return x * {factor}\n"
    )
    return write_function(folder, source, replace=replace)


def test_nothing_of_an_unsigned_bundle_runs_at_the_start(tmp_path: Path, ann: Path, parbake: Any) -> None:
    trace = tmp_path / "trace"
    bundle = leaves_a_trace(tmp_path, trace)
    with (
        pytest.raises(ServerNotFound, match=r"function\.bundle has no signature"),
        serving(bundle.path, trusted_keys=tmp_path / "trusted"),
    ):
        pass
    new_key(tmp_path / "bob")
    sign(bundle, tmp_path / "bob")
    with (
        pytest.raises(ServerNotFound, match="whom nobody here trusts"),
        serving(bundle.path, trusted_keys=tmp_path / "trusted"),
    ):
        pass
    refused = parbake("check", bundle.path, "--trusted-keys", "trusted")
    assert refused.returncode == 1
    assert "whom nobody here trusts" in refused.stderr
    assert not trace.exists()
    sign(bundle, ann)
    with serving(bundle.path, workers=1, trusted_keys=tmp_path / "trusted") as server:
        assert answer(once(server.url, "/v2/models/function/infer", infer((1, 2)))) == [2.0, 4.0]
    assert trace.exists()


def test_a_reload_takes_in_only_what_is_signed(tmp_path: Path, ann: Path) -> None:
    trace = tmp_path / "trace"
    inline = write_scaled(tmp_path / "scaled.bundle", 2)
    own = leaves_a_trace(tmp_path, trace)
    for bundle in (inline, own):
        sign(bundle, ann)
    other = write_scaled(tmp_path / "new.bundle", 7)
    with serving(inline.path, own.path, workers=1, trusted_keys=tmp_path / "trusted") as server:
        path = "/v2/models/scaled/infer"
        with pytest.raises(BundleUnsigned, match=r"new\.bundle has no signature"):
            client.reload([Change("scaled", str(other.path))], port=server.port)
        # A signature does not move to another bundle.
        shutil.copy(inline.path / SIGNATURES, other.path)
        with pytest.raises(BundleUnsigned, match="has a signature of something else"):
            client.reload([Change("scaled", str(other.path))], port=server.port)
        assert answer(once(server.url, path, infer((1, 2)))) == [2.0, 4.0]
        sign(other, ann)
        assert client.reload([Change("scaled", str(other.path))], port=server.port).changed == ("scaled:1",)
        assert answer(once(server.url, path, infer((1, 2)))) == [7.0, 14.0]
        # Whoever is trusted no more has nothing taken in.
        new_key(tmp_path / "bob")
        (tmp_path / "trusted" / "ann.pub").unlink()
        shutil.copy(tmp_path / "bob.pub", tmp_path / "trusted")
        with pytest.raises(BundleUnsigned, match="whom nobody here trusts"):
            client.reload(port=server.port)
        assert answer(once(server.url, path, infer((1, 2)))) == [7.0, 14.0]


def test_code_that_was_changed_after_it_was_verified_does_not_run(tmp_path: Path, ann: Path) -> None:
    """A file of the same size: only its hash tells."""
    trace, evil = tmp_path / "trace1", tmp_path / "trace2"
    bundle = leaves_a_trace(tmp_path, trace)
    sign(bundle, ann)
    source = bundle.path / "source" / "model.py"
    with serving(bundle.path, workers=1, trusted_keys=tmp_path / "trusted") as server:
        source.write_bytes(source.read_bytes().replace(b"trace1", b"trace2"))
        (pid,) = client.status(port=server.port).versions[0].runner_pids
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: "runner.refused" in server.log())
        assert once(server.url, "/v2/models/function/infer", infer((1, 2))).status == 503
        source.write_bytes(source.read_bytes().replace(b"trace2", b"trace1"))
        wait_for(lambda: once(server.url, "/v2/models/function/infer", infer((1, 2))).status == 200)
    assert trace.exists()
    assert not evil.exists()


def test_the_commands_make_a_key_sign_and_say_who_signed(tmp_path: Path, parbake: Any) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    made = parbake("sign", "--new-key", "ann", "--json")
    identity = json.loads(made.stdout)["id"]
    assert "no signature" not in parbake("check", "scaled.bundle").stdout
    signed = parbake("sign", "scaled.bundle", "--key", "ann")
    assert (signed.returncode, signed.stderr) == (
        0,
        f"signed scaled {bundle.digest[:19]}... with key {identity}\n",
    )
    told = parbake("check", "scaled.bundle")
    assert told.returncode == 0
    assert f"by key {identity}" in told.stdout
    told = parbake("check", "scaled.bundle", "--trusted-keys", "ann.pub", "--json")
    assert told.returncode == 0
    report = json.loads(told.stdout)
    assert (report["trusted"], report["signatures"][0]["name"]) == (True, "ann")
    # What was altered cannot be signed.
    (bundle.path / "contract.json").write_bytes(
        (bundle.path / "contract.json").read_bytes().replace(b"p", b"q")
    )
    assert parbake("sign", "scaled.bundle", "--key", "ann").returncode == 5
    for words in (["sign"], ["sign", "scaled.bundle"], ["sign", "scaled.bundle", "--new-key", "x"]):
        assert parbake(*words).returncode == 2
