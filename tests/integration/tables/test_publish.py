"""Tables on disk: published in one step, and refused by name when they are not what they should be."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from parbake.contract.model import Contract, TensorSpec
from parbake.errors import TableError, TableForeign, TableMissing, TableTooNew, TableTorn
from parbake.tables.lmdb import is_table, open_table, read_lineage
from parbake.tables.model import DATA, FORMAT, LINEAGE, Lineage, layout_of, sealed
from parbake.tables.service import Built, build, check_place, publish

BUNDLE = "sha256:" + "a" * 64
KEYS = np.frombuffer(
    b"".join(sorted(hashlib.blake2b(bytes([i]), digest_size=16).digest() for i in range(100))), np.uint8
).reshape(100, 16)
LAYOUT = layout_of(
    Contract("c", (TensorSpec("x", "FP32", (2,)),), (TensorSpec("y", "FP32", (2,)),), (), "p", "o")
)


def _lineage(built: Built, bundle: str = BUNDLE) -> Lineage:
    return Lineage(
        bundle, "c", "in.csv", "csv", "sha256:b", 10, built.keys, built.keys, 0, 0, "2026-01-01T00:00:00+00:00",
        LAYOUT, built.data_bytes, built.data_digest,
    )  # fmt: skip


def _bake(out: Path, fill: int, *, replace: bool = False) -> None:
    """A table at ``out`` whose records are eight times the byte ``fill``."""
    folder = out.with_name("staging")
    records = np.full((100, 8), fill, np.uint8)
    built = build(
        folder, LAYOUT, [(KEYS[:40], records[:40]), (KEYS[40:], records[40:])], most_keys=100, most_bytes=800
    )
    publish(folder, out, _lineage(built), replace=replace)
    assert folder.exists() == replace
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder that nobody else writes to."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


@pytest.fixture
def table(place: Path) -> Path:
    """A sound table of 100 keys."""
    _bake(place / "t", 7)
    return place / "t"


def test_a_published_table_answers_and_tells_where_it_came_from(table: Path) -> None:
    opened = open_table(table, bundle_digest=BUNDLE)
    assert opened.rows == 100
    assert opened.get(KEYS[3].tobytes()) == b"\x07" * 8
    opened.close()
    lineage = read_lineage(table)
    assert (lineage.contract, lineage.keys, lineage.input_digest) == ("c", 100, "sha256:b")
    assert lineage.data_bytes == (table / DATA).stat().st_size


def test_who_reads_a_table_goes_on_when_another_takes_its_place(table: Path) -> None:
    # Given two readers of the old table, one of them in another process
    old = open_table(table)
    script = (
        "import sys; from parbake.tables.lmdb import open_table; t = open_table(sys.argv[1]);"
        "print(t.rows, flush=True); sys.stdin.readline(); print(t.get(bytes.fromhex(sys.argv[2])).hex(), flush=True)"
    )
    arguments = [sys.executable, "-c", script, str(table), KEYS[0].tobytes().hex()]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "100\n"
        # When a new one is published at the same path
        _bake(table, 9, replace=True)
        # Then they read what they opened, and who opens now reads the new one
        answer, _ = process.communicate("go\n", timeout=30)
    assert answer.strip() == "07" * 8
    new = open_table(table)
    assert old.get(KEYS[0].tobytes()) == b"\x07" * 8
    assert new.get(KEYS[0].tobytes()) == b"\x09" * 8
    old.close()
    new.close()
    assert sorted(path.name for path in table.parent.iterdir()) == ["t"]


def test_a_table_is_replaced_only_when_asked(table: Path, tmp_path: Path) -> None:
    before = (table / LINEAGE).read_bytes()
    with pytest.raises(TableError, match="exists") as caught:
        _bake(table, 9)
    assert "--replace" in caught.value.hint
    assert (table / LINEAGE).read_bytes() == before
    other = tmp_path / "other"
    other.mkdir()
    check_place(other, replace=False)
    (other / "precious").write_text("x")
    for place in (other, other / "precious"):
        with pytest.raises(TableError, match="not a prediction table"):
            check_place(place, replace=True)


def _truncate(table: Path) -> None:
    with (table / DATA).open("r+b") as handle:
        handle.truncate(8192)


def _alter(table: Path) -> None:
    with (table / DATA).open("r+b") as handle:
        handle.seek(4096 * 2 + 2000)
        handle.write(b"\xff" * 600)


def _edit(**changes: object) -> Callable[[Path], None]:
    def edit(table: Path) -> None:
        content = json.loads((table / LINEAGE).read_text())
        (table / LINEAGE).write_text(json.dumps({**content, **changes}))

    return edit


def _seal(**changes: object) -> Callable[[Path], None]:
    def seal(table: Path) -> None:
        lineage = msgspec.structs.replace(read_lineage(table), **changes)
        (table / LINEAGE).write_bytes(msgspec.json.encode(sealed(lineage)))

    return seal


def _write(text: str) -> Callable[[Path], object]:
    return lambda table: (table / LINEAGE).write_text(text)


DAMAGES: dict[str, tuple[Callable[[Path], object], type[TableError], str]] = {
    "cut short": (_truncate, TableTorn, "has 8192 bytes, the lineage says"),
    "altered": (_alter, TableTorn, "has digest blake2b:"),
    "no data": (lambda t: (t / DATA).unlink(), TableTorn, "cannot be read"),
    "no lineage": (lambda t: (t / LINEAGE).unlink(), TableMissing, "no prediction table at"),
    "edited lineage": (_edit(bundle_digest="sha256:x"), TableTorn, "was changed after baking"),
    "not JSON": (_write("{"), TableTorn, "not valid JSON"),
    "not an object": (_write("[]"), TableTorn, "not valid JSON"),
    "deep JSON": (_write("[" * 100_000), TableTorn, "not valid JSON"),
    "huge lineage": (_write(" " * (2 << 20)), TableTorn, "more than the limit"),
    "field missing": (_write('{"format": 1}'), TableTorn, "missing required field"),
    "newer": (_edit(format=FORMAT + 1, what="is this"), TableTooNew, f"format {FORMAT + 1}"),
    "foreign": (_seal(bundle_digest="sha256:x"), TableForeign, "was baked by bundle sha256:x"),
    "other count": (_seal(keys=99), TableTorn, "holds 100 keys, the lineage says 99"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_table_that_is_not_sound_is_refused_with_what_is_wrong(damage: str, table: Path) -> None:
    spoil, kind, words = DAMAGES[damage]
    spoil(table)
    with pytest.raises(kind, match=words) as caught:
        open_table(table, bundle_digest=BUNDLE)
    assert type(caught.value) is kind
    assert str(table) in caught.value.message


def test_a_table_that_is_not_there_is_refused_with_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(TableMissing, match="no prediction table") as caught:
        open_table(tmp_path / "none")
    assert "parbake bake" in caught.value.hint
    assert not is_table(tmp_path / "none")


def test_a_file_that_lost_its_end_does_not_end_the_process_that_skips_the_checksum(table: Path) -> None:
    _truncate(table)
    script = (
        "import sys\nfrom parbake.tables.lmdb import open_table\nfrom parbake.errors import TableTorn\n"
        "try: open_table(sys.argv[1], verify=False)\nexcept TableTorn: sys.exit(7)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(table)], check=False).returncode == 7


def test_what_was_built_is_proven_before_it_is_published(tmp_path: Path) -> None:
    built = build(
        tmp_path / "staging", LAYOUT, [(KEYS, np.zeros((100, 8), np.uint8))], most_keys=100, most_bytes=800
    )
    lineage = msgspec.structs.replace(_lineage(built), keys=101)
    with pytest.raises(TableTorn, match="holds 100 keys"):
        publish(tmp_path / "staging", tmp_path / "t", lineage, replace=False)
    assert not (tmp_path / "t").exists()


def test_a_build_that_fails_leaves_nothing(place: Path) -> None:
    with pytest.raises(ValueError, match="order"):
        build(
            place / "staging",
            LAYOUT,
            [(KEYS[::-1], np.zeros((100, 8), np.uint8))],
            most_keys=100,
            most_bytes=800,
        )
    assert os.listdir(place) == []


def test_records_of_many_sizes_are_built_through_the_library(tmp_path: Path) -> None:
    layout = layout_of(Contract("c", (), (TensorSpec("y", "BYTES", (1,)),), (), "p", "o"))
    records = [bytes([i]) * (i * i) for i in range(100)]
    built = build(tmp_path / "s", layout, [(KEYS, records)], most_keys=100, most_bytes=sum(map(len, records)))
    publish(tmp_path / "s", tmp_path / "t", _lineage(built), replace=False)
    table = open_table(tmp_path / "t")
    assert [table.get(key.tobytes()) for key in KEYS] == records
    table.close()
