"""Bundles on disk: whole or not there; torn, altered, foreign and newer ones are refused by name."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct

import parbake.contract.bundle as bundle_module
from parbake.contract.bundle import (
    Goldens,
    StoredBundle,
    digest_of,
    pack_tensors,
    read_bundle,
    unpack_tensors,
    write_bundle,
)
from parbake.contract.environment import capture
from parbake.contract.model import (
    FORMAT,
    Batch,
    Contract,
    Environment,
    FileEntry,
    Key,
    Library,
    Manifest,
    Parity,
    Step,
    TensorSpec,
    Tolerance,
)
from parbake.errors import BundleAltered, BundleError, BundleTooNew, BundleTorn, PackRefused

X = np.array([[1.0, 2.0]], dtype=np.float32)
PARTS: tuple[type[Struct], ...] = (
    Manifest, FileEntry, Environment, Library, Contract, TensorSpec, Step, Key, Tolerance, Batch, Parity,
)  # fmt: skip


def write(
    out: Path, *, purpose: str = "p", replace: bool = False, weights: bytes = b"weights"
) -> StoredBundle:
    """A small bundle (its model is never run)."""
    contract = Contract(
        name="eta",
        inputs=(TensorSpec("x", "FP32", (2,)),),
        outputs=(TensorSpec("y", "FP32", (2,)), TensorSpec("why", "BYTES")),
        steps=(Step("onnx", "model.onnx"),),
        purpose=purpose,
        owner="o",
    )
    goldens = Goldens({"x": X}, {"y": 2 * X, "why": np.array(["é"], dtype=object)})
    files = {"model.onnx": weights, "source/a.py": b"x = 1\n"}
    return write_bundle(out, contract, files, goldens, capture(), replace=replace)


def rewrite_manifest(
    bundle: Path, change: Callable[[list[FileEntry]], list[FileEntry]], number: int = FORMAT
) -> None:
    """Change the list of files and give it the digest that fits."""
    import msgspec

    manifest = msgspec.json.decode((bundle / "manifest.json").read_bytes(), type=Manifest)
    entries = tuple(change(list(manifest.files)))
    altered = msgspec.structs.replace(manifest, format=number, files=entries, digest=digest_of(entries))
    (bundle / "manifest.json").write_bytes(msgspec.json.encode(altered))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = write(tmp_path / "eta.bundle")
    stored = read_bundle(tmp_path / "eta.bundle")
    assert stored == written
    assert stored.file("model.onnx").read_bytes() == b"weights"
    goldens = stored.goldens()
    assert goldens.rows == 1
    assert goldens.outputs["y"].tolist() == [[2.0, 4.0]]
    assert goldens.outputs["why"].tolist() == ["é".encode()]


def test_the_digest_is_of_the_content_alone(tmp_path: Path) -> None:
    first = write(tmp_path / "a.bundle")
    time.sleep(1.1)
    second = write(tmp_path / "elsewhere" / "b.bundle")
    assert first.manifest.created != second.manifest.created
    assert first.digest == second.digest
    assert write(tmp_path / "c.bundle", purpose="q").digest != first.digest


def test_a_bundle_that_is_there_stays_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    first = write(tmp_path / "eta.bundle")
    with pytest.raises(PackRefused, match=r"eta\.bundle exists"):
        write(tmp_path / "eta.bundle", purpose="q")
    assert read_bundle(tmp_path / "eta.bundle").digest == first.digest
    second = write(tmp_path / "eta.bundle", purpose="q", replace=True)
    assert read_bundle(tmp_path / "eta.bundle").digest == second.digest
    assert [path.name for path in tmp_path.iterdir()] == ["eta.bundle"]


def test_a_folder_that_is_no_bundle_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.md").write_text("years of work")
    with pytest.raises(PackRefused, match="thesis exists and is not a bundle"):
        write(tmp_path / "thesis", replace=True)
    assert (tmp_path / "thesis" / "chapter1.md").read_text() == "years of work"


@pytest.mark.parametrize(
    "name", ["manifest.json", "contract.json", "environment.json", "goldens.bin", "model.onnx"]
)
def test_a_missing_file_is_torn_and_named(tmp_path: Path, name: str) -> None:
    bundle = write(tmp_path / "eta.bundle").path
    (bundle / name).unlink()
    with pytest.raises(BundleTorn, match=name):
        read_bundle(bundle)


@pytest.mark.parametrize("name", ["manifest.json", "contract.json", "goldens.bin", "model.onnx"])
def test_a_file_cut_short_is_torn_and_named(tmp_path: Path, name: str) -> None:
    bundle = write(tmp_path / "eta.bundle").path
    content = (bundle / name).read_bytes()
    (bundle / name).write_bytes(content[:-3])
    with pytest.raises(BundleTorn, match=name):
        read_bundle(bundle)


@pytest.mark.parametrize(
    "name", ["contract.json", "environment.json", "goldens.bin", "model.onnx", "source/a.py"]
)
def test_one_changed_bit_is_altered_and_named(tmp_path: Path, name: str) -> None:
    bundle = write(tmp_path / "eta.bundle").path
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    with pytest.raises(BundleAltered, match=f"{name} has SHA-256"):
        read_bundle(bundle)


def test_a_file_that_was_added_is_altered_and_named(tmp_path: Path) -> None:
    bundle = write(tmp_path / "eta.bundle").path
    (bundle / "source" / "evil.py").write_text("import os")
    with pytest.raises(BundleAltered, match=r"source/evil\.py is not part of the bundle"):
        read_bundle(bundle)


def test_a_manifest_that_was_edited_is_altered(tmp_path: Path) -> None:
    bundle = write(tmp_path / "eta.bundle").path
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][0]["sha256"] = "0" * 64
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleAltered, match="the list of files does not match the digest"):
        read_bundle(bundle)


def test_a_newer_format_is_refused_before_anything_else_is_understood(tmp_path: Path) -> None:
    bundle = write(tmp_path / "eta.bundle").path
    (bundle / "manifest.json").write_text(f'{{"format": {FORMAT + 1}, "what": "nobody knows yet"}}')
    with pytest.raises(
        BundleTooNew, match=f"has bundle format {FORMAT + 1}, this parbake reads up to {FORMAT}"
    ):
        read_bundle(bundle)


def test_a_bundle_of_the_first_format_is_read_as_ever(tmp_path: Path) -> None:
    written = write(tmp_path / "eta.bundle")
    lock = json.loads((written.path / "environment.json").read_text())
    for later in ("os", "cpu", "gpus"):
        del lock[later]
    content = json.dumps(lock).encode()
    (written.path / "environment.json").write_bytes(content)
    entry = FileEntry("environment.json", len(content), hashlib.sha256(content).hexdigest())
    rewrite_manifest(
        written.path, lambda files: [entry if one.path == entry.path else one for one in files], number=1
    )
    stored = read_bundle(written.path)
    assert stored.manifest.format == 1
    assert stored.digest != written.digest
    assert (stored.environment.os, stored.environment.cpu, stored.environment.gpus) == ("", "", ())
    assert stored.environment.libraries == written.environment.libraries
    assert stored.contract == written.contract


def test_new_fields_are_a_new_format() -> None:
    # Readers refuse fields that they do not know, so whoever adds one raises FORMAT, and says so here.
    assert FORMAT == 2
    assert {kind.__name__: " ".join(kind.__struct_fields__) for kind in PARTS} == {
        "Manifest": "format digest created files",
        "FileEntry": "path bytes sha256",
        "Environment": "python implementation system machine libraries required os cpu gpus",
        "Library": "name version",
        "Contract": (
            "name inputs outputs steps purpose owner key tolerance batch parity default deadline_ms freshness_s "
            "training_data run format"
        ),
        "TensorSpec": "name datatype shape columns unit allow_nan labels",
        "Step": "kind path entry",
        "Key": "columns rounding",
        "Tolerance": "rtol atol",
        "Batch": "dimension invariant_from multiple_of spread one_thread max_rows",
        "Parity": "framework framework_version example_rows threshold_rows exact max_abs_diff ties left_out",
    }


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "source/../../outside", "a\\..\\b", ""])
def test_a_file_name_that_leads_out_of_the_bundle_is_refused(tmp_path: Path, name: str) -> None:
    bundle = write(tmp_path / "eta.bundle").path
    rewrite_manifest(bundle, lambda files: [*files, FileEntry(name, 1, "0" * 64)])
    with pytest.raises(BundleAltered, match="leads out of the bundle"):
        read_bundle(bundle)
    with pytest.raises(BundleAltered, match="leads out of the bundle"):
        read_bundle(bundle, verify=False).file(name)


def test_a_link_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    bundle = write(tmp_path / "eta.bundle").path
    (tmp_path / "elsewhere").write_bytes((bundle / "model.onnx").read_bytes())
    (bundle / "model.onnx").unlink()
    (bundle / "model.onnx").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleTorn, match=r"model\.onnx is missing"):
        read_bundle(bundle)


def test_a_manifest_must_list_the_contract(tmp_path: Path) -> None:
    bundle = write(tmp_path / "eta.bundle").path
    rewrite_manifest(bundle, lambda files: [file for file in files if file.path != "contract.json"])
    with pytest.raises(BundleTorn, match=r"does not list contract\.json"):
        read_bundle(bundle)


@pytest.mark.parametrize("path", ["nowhere", "a_file"])
def test_no_bundle_at_all_is_said_so(tmp_path: Path, path: str) -> None:
    (tmp_path / "a_file").write_text("")
    with pytest.raises(BundleTorn, match="no bundle at"):
        read_bundle(tmp_path / path)


MANIFESTS = st.one_of(
    st.binary(max_size=80),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["format", "digest", "files", "created", "path"]), inner, max_size=4
            )
        ),
        max_leaves=12,
    ).map(lambda value: json.dumps(value).encode()),
)


@given(MANIFESTS)
def test_any_manifest_is_a_bundle_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    bundle = tmp_path_factory.mktemp("bundle")
    (bundle / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError):
        read_bundle(bundle)


def test_a_manifest_nested_without_end_is_torn(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b"[" * 100_000)
    with pytest.raises(BundleTorn, match="is not valid JSON"):
        read_bundle(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b'[{"name": "x", "datatype": "FP32", "shape": [0, 100000000000000000000000], "bytes": 0}]',
        b'[{"name": "x", "datatype": "BYTES", "shape": [0, 100000000000000000000000], "bytes": 0}]',
        b'[{"name": "x", "datatype": "FP32", "shape": [-1, -1], "bytes": 4}]',
        b'[{"name": "x", "datatype": ["FP32"], "shape": [1], "bytes": 4}]',
        b"[" * 100_000,
        b"7",
        b"\xff",
    ],
)
def test_headers_that_no_writer_writes_are_torn(header: bytes) -> None:
    with pytest.raises(BundleTorn, match=r"goldens\.bin is torn"):
        unpack_tensors(b"PBT1" + len(header).to_bytes(4, "little") + header + bytes(4), "goldens.bin")


HEADERS = st.lists(
    st.fixed_dictionaries(
        {
            "name": st.text(max_size=3) | st.none(),
            "datatype": st.sampled_from(["FP32", "BYTES", "BOOL", "FP99", ""]) | st.none(),
            "shape": st.lists(st.integers(-2, 3) | st.sampled_from([2**62, 10**40]), max_size=3)
            | st.text(max_size=2),
            "bytes": st.integers(-8, 40) | st.none(),
        }
    ),
    max_size=3,
)


@given(HEADERS, st.binary(max_size=40))
def test_any_header_is_tensors_or_a_torn_bundle(header: list[object], body: bytes) -> None:
    text = json.dumps(header).encode()
    blob = b"PBT1" + len(text).to_bytes(4, "little") + text + body
    try:
        tensors = unpack_tensors(blob, "goldens.bin")
    except BundleTorn:
        return
    assert all(isinstance(array, np.ndarray) for array in tensors.values())


@given(st.binary(max_size=60))
def test_any_bytes_are_tensors_or_a_torn_bundle(blob: bytes) -> None:
    for content in (blob, b"PBT1" + blob):
        try:
            unpack_tensors(content, "goldens.bin")
        except BundleTorn:
            continue


def test_a_blob_of_tensors_comes_back() -> None:
    spec = TensorSpec("x", "FP32", (2,))
    blob = pack_tensors({"in/x": (X, spec)})
    assert unpack_tensors(blob, "here")["in/x"].tobytes() == X.tobytes()
    with pytest.raises(BundleTorn, match="here is torn"):
        unpack_tensors(blob[:-1], "here")


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.unit.contract.test_bundle import write
write(Path(sys.argv[1]), weights=bytes(96 * 1024 * 1024))
"""


def test_a_writer_killed_half_way_leaves_no_bundle_and_the_next_removes_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "eta.bundle"
    root = Path(__file__).parents[3]
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(out), str(root)])
    deadline = time.monotonic() + 30
    # The folder it is writing to, then the file in it: killed before everything is there.
    while not list(tmp_path.glob(".eta.bundle.*/goldens.bin")) and not list(
        tmp_path.glob(".eta.bundle.*/*.onnx")
    ):
        assert time.monotonic() < deadline
        assert writer.poll() is None
        time.sleep(0.001)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert not out.exists()
    # Left by one that was killed between its two renames, and what belongs to others.
    (tmp_path / ".eta.bundle.old-1").mkdir()
    for name in (".eta.bundle.new-file", ".eta.bundle2.new-x", "eta.bundle.new-x"):
        (tmp_path / name).touch()
    others = {path.name for path in tmp_path.iterdir() if not path.is_dir()}
    # Young ones may be somebody's who is still writing.
    before = {path.name for path in tmp_path.iterdir()}
    assert write(out).path == out
    assert {path.name for path in tmp_path.iterdir()} == before | {"eta.bundle"}
    monkeypatch.setattr(bundle_module, "_LEFT_AFTER_S", 0.0)
    assert write(out, purpose="again", replace=True).contract.purpose == "again"
    assert {path.name for path in tmp_path.iterdir()} == others | {"eta.bundle"}
    assert read_bundle(out).contract.name == "eta"


def test_what_another_writer_is_writing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "eta.bundle"
    root = Path(__file__).parents[3]
    with subprocess.Popen([sys.executable, "-c", WRITER, str(out), str(root)]) as writer:
        deadline = time.monotonic() + 30
        # The first file, and the one that takes longest.
        while not (found := list(tmp_path.glob(".eta.bundle.*/model.onnx"))):
            assert time.monotonic() < deadline
            assert writer.poll() is None
            time.sleep(0.001)
        writer.send_signal(signal.SIGSTOP)
        monkeypatch.setattr(bundle_module, "_LEFT_AFTER_S", 0.0)
        write(out)
        assert found[0].parent.is_dir()
        writer.kill()


def test_everything_is_on_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    bundle = write(tmp_path / "eta.bundle").path
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert {Path(name).name for name in synced[:-1]} == {Path(name).name for name in files}
    assert synced[-1] == str(tmp_path)
