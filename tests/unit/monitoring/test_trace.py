"""Traces: every kind of file gives the same keys, and a file that is none is refused by name."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from parbake.errors import InputFileError
from parbake.monitoring.profile import exact_traffic
from parbake.monitoring.trace import read_trace, shifting_keys, zipf_keys

NUMBERS = np.array([7, 7, 1, 7, 2, 1], ">u4")


def counts(keys: np.ndarray) -> list[int]:
    """How often each key came, in the order of first appearance."""
    found: dict[int, int] = {}
    for key in keys.tolist():
        found[key] = found.get(key, 0) + 1
    return list(found.values())


def test_every_kind_of_file_gives_the_same_sequence(tmp_path: Path) -> None:
    raw = NUMBERS.tobytes()
    (tmp_path / "a.trace").write_bytes(raw)
    (tmp_path / "a.trace.xz").write_bytes(lzma.compress(raw))
    (tmp_path / "a.trace.gz").write_bytes(gzip.compress(raw))
    text = "".join(f"{n}\n" for n in NUMBERS)
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "crlf.txt.gz").write_bytes(gzip.compress(text.replace("\n", "\r\n").encode()))
    (tmp_path / "a.csv").write_text("time,key\n" + "".join(f"0,{n}\n" for n in NUMBERS))
    pq.write_table(pa.table({"key": NUMBERS.astype(np.int64)}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"user": [f"u{n}" for n in NUMBERS], "x": [1.0] * 6}), tmp_path / "b.parquet")
    for path in tmp_path.iterdir():
        keys = read_trace(path, "user" if path.name == "b.parquet" else "")
        assert counts(keys) == [3, 2, 1], path.name
        assert keys[0] == keys[1] == keys[3]


def test_text_keys_are_not_taken_for_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("key\n007\n7\n7.0\n")
    assert counts(read_trace(tmp_path / "a.csv")) == [1, 1, 1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.trace", b"12345", "has 5 bytes"),
        ("a.trace", b"", "no requests"),
        ("a.trace.xz", lzma.compress(NUMBERS.tobytes())[:-8], "cannot be read"),
        ("a.trace.gz", gzip.compress(NUMBERS.tobytes(), mtime=0)[:-9], "cannot be read"),
        ("a.trace.gz", b"nonsense", "cannot be read"),
        ("a.trace.xz", lzma.compress(bytes(1 << 20)), "more than 65536 bytes"),
        ("a.parquet", b"nonsense", "cannot be read"),
        ("a.csv", b"user,item\n1,2\n", "no column 'key'"),
        ("a.csv", b"", "cannot be read"),
    ],
)
def test_a_file_that_is_no_trace_is_refused_with_a_hint(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputFileError, match=message) as caught:
        read_trace(tmp_path / name, most_bytes=65536)
    assert caught.value.path == str(tmp_path / name)
    assert caught.value.hint


def test_a_missing_trace_is_named() -> None:
    with pytest.raises(InputFileError, match="no trace file '/nowhere'"):
        read_trace(Path("/nowhere"))


def test_made_up_traffic_is_the_same_for_the_same_seed_and_as_steep_as_asked() -> None:
    assert zipf_keys(1.0, 100, 500, seed=4).tolist() == zipf_keys(1.0, 100, 500, seed=4).tolist()
    assert zipf_keys(1.0, 100, 500, seed=4).tolist() != zipf_keys(1.0, 100, 500, seed=5).tolist()
    _, found = np.unique(zipf_keys(1.0, 1_000, 200_000), return_counts=True)
    expected = 200_000 / (1 / np.arange(1, 1_001)).sum()
    assert found.max() == pytest.approx(expected, rel=0.03)


def test_shifting_traffic_brings_new_keys_at_every_turn() -> None:
    keys = shifting_keys(1.0, 200, 8_000, every=2_000, share=0.5)
    first, last = set(keys[:2_000].tolist()), set(keys[-2_000:].tolist())
    assert len(first & last) < 0.4 * len(first)
    assert exact_traffic(keys).cardinality.value > 300
