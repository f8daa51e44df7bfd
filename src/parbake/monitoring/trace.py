"""Recorded traffic without a server: read the keys of a trace file, or make traffic up with a fixed seed."""

from __future__ import annotations

import gzip
import lzma
import zlib
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import numpy as np
import numpy.typing as npt

from parbake.errors import InputFileError
from parbake.monitoring.profile import ids_of_numbers
from parbake.monitoring.sketches import Ids

MOST_BYTES: Final = 1024 * 1024 * 1024
"""Most bytes of a trace, unpacked."""

KEY_COLUMN: Final = "key"

_BINARY_SUFFIXES: Final = (".trace", ".bin", ".u32")
_TEXT_SUFFIXES: Final = (".txt", ".log", "")
_CHUNK: Final = 8 * 1024 * 1024


def read_trace(path: Path, column: str = "", most_bytes: int = MOST_BYTES) -> Ids:
    """The keys of a trace in order of arrival, one per request, as a `TrafficProfile` counts them.

    By suffix, each also packed as ``.xz`` or ``.gz``: ``.trace`` ``.bin`` ``.u32`` hold big-endian uint32 numbers;
    ``.csv`` and ``.parquet`` (not packed) have the key in ``column`` (without it: ``key``, or the only column);
    anything else is text with one key per line. Raises InputFileError.
    """
    if not path.is_file():
        raise InputFileError(
            f"there is no trace file {str(path)!r}", hint="give a file with one key per request"
        )
    suffixes = path.suffixes
    packed = suffixes[-1] if suffixes and suffixes[-1] in (".xz", ".gz") else ""
    if packed:
        suffixes = suffixes[:-1]
    kind = suffixes[-1].lower() if suffixes else ""
    if kind == ".parquet":
        if packed:
            raise InputFileError(
                "a Parquet trace is packed again", path=str(path), hint=f"unpack the {packed} first"
            )
        return _some(_column(_parquet(path, column, most_bytes)), path)
    data = _unpacked(path, packed, most_bytes)
    if kind in _BINARY_SUFFIXES:
        if len(data) % 4:
            raise InputFileError(
                f"a trace of 4-byte numbers has {len(data)} bytes",
                path=str(path),
                hint="the file is cut short",
            )
        return _some(ids_of_numbers(np.frombuffer(data, ">u4")), path)
    if kind == ".csv":
        return _some(_column(_csv(data, path, column)), path)
    lines = data.split(b"\n")
    if lines and not lines[-1]:
        lines.pop()
    return _some(_of_values([line.rstrip(b"\r") for line in lines]), path)


def zipf_keys(exponent: float, keys: int, requests: int, seed: int = 0) -> Ids:
    """Independent requests for ``keys`` keys, the n-th with a probability as 1 / n ** ``exponent``; 0 is flat."""
    return ids_of_numbers(_zipf_ranks(exponent, keys, requests, seed))


def shifting_keys(
    exponent: float, keys: int, requests: int, every: int, share: float = 0.2, seed: int = 0
) -> Ids:
    """Zipf requests whose head turns over: after every ``every`` requests, ``share`` of the ranks go to new keys."""
    if every < 1:
        raise InputFileError(
            f"the head is to turn over every {every} requests", hint="every must be at least 1"
        )
    ranks = _zipf_ranks(exponent, keys, requests, seed)
    turn = np.random.default_rng([seed, 1])
    owners = np.arange(keys, dtype=np.int64)
    fresh = keys
    shifted = np.empty(requests, np.int64)
    for start in range(0, requests, every):
        shifted[start : start + every] = owners[ranks[start : start + every]]
        leaving = np.flatnonzero(turn.random(keys) < share)
        owners[leaving] = np.arange(fresh, fresh + len(leaving))
        fresh += len(leaving)
    return ids_of_numbers(shifted)


def _zipf_ranks(exponent: float, keys: int, requests: int, seed: int) -> npt.NDArray[np.int64]:
    if keys < 1 or requests < 0 or exponent < 0:
        raise InputFileError(
            f"no traffic of {requests} requests for {keys} keys with exponent {exponent}",
            hint="keys must be at least 1, requests and exponent not negative",
        )
    weights = np.arange(1, keys + 1, dtype=np.float64) ** -exponent
    edges = np.cumsum(weights)
    drawn = np.random.default_rng(seed).random(requests) * edges[-1]
    ranks: npt.NDArray[np.int64] = np.searchsorted(edges, drawn, side="right").astype(np.int64)
    return np.minimum(ranks, keys - 1)


def _unpacked(path: Path, packed: str, most_bytes: int) -> bytes:
    try:
        with _opened(path, packed) as file:
            parts: list[bytes] = []
            size = 0
            while chunk := file.read(_CHUNK):
                size += len(chunk)
                if size > most_bytes:
                    raise InputFileError(
                        f"a trace has more than {most_bytes} bytes", path=str(path), hint="give a part of it"
                    )
                parts.append(chunk)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise InputFileError(
            f"a trace cannot be read: {error}", path=str(path), hint="the file may be cut short"
        ) from error
    return b"".join(parts)


def _opened(path: Path, packed: str) -> BinaryIO:
    if packed == ".xz":
        return cast(BinaryIO, lzma.LZMAFile(path))
    return cast(BinaryIO, gzip.GzipFile(path)) if packed == ".gz" else path.open("rb")


def _parquet(path: Path, column: str, most_bytes: int) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            name = _chosen(file.schema_arrow.names, column, path)
            at = file.schema_arrow.names.index(name)
            if file.metadata.num_columns == len(file.schema_arrow.names):
                groups = range(file.metadata.num_row_groups)
                size = sum(file.metadata.row_group(g).column(at).total_uncompressed_size for g in groups)
                if size > most_bytes:
                    raise InputFileError(
                        f"a trace has more than {most_bytes} bytes", path=str(path), hint="give a part of it"
                    )
            return file.read([name]).column(name)
    except (OSError, pa.ArrowException) as error:
        raise InputFileError(
            f"a trace cannot be read: {error}", path=str(path), hint="is it a Parquet file?"
        ) from error


def _csv(data: bytes, path: Path, column: str) -> Any:
    import pyarrow as pa
    import pyarrow.csv

    try:
        # As text whatever it looks like: 007 and 7 are two keys.
        names = pa.csv.open_csv(pa.BufferReader(data)).schema.names
        name = _chosen(names, column, path)
        options = pa.csv.ConvertOptions(
            include_columns=[name], column_types={name: pa.string()}, null_values=[]
        )
        return pa.csv.read_csv(pa.BufferReader(data), convert_options=options).column(name)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputFileError(
            f"a trace cannot be read: {error}", path=str(path), hint="is it a CSV file with a header line?"
        ) from error


def _chosen(names: list[str], column: str, path: Path) -> str:
    wanted = column or (KEY_COLUMN if len(names) != 1 else names[0])
    if wanted not in names:
        raise InputFileError(
            f"a trace has no column {wanted!r}", path=str(path), hint=f"columns are {', '.join(names)}"
        )
    return wanted


def _column(column: Any) -> Ids:
    """One key per value that is not null."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = column.drop_null()
    if pa.types.is_integer(column.type):
        return ids_of_numbers(column.to_numpy())
    if pa.types.is_fixed_size_binary(column.type) and column.type.byte_width == 16:
        # As the prediction log has them: they are hashes already.
        from parbake.monitoring.log import key_ids

        return key_ids(column)
    found = pc.dictionary_encode(column).combine_chunks()
    if isinstance(found, pa.ChunkedArray):
        found = found.chunk(0) if found.num_chunks else pa.array([], pa.dictionary(pa.int32(), pa.string()))
    distinct = [
        value if isinstance(value, bytes) else str(value).encode() for value in found.dictionary.to_pylist()
    ]
    return _of_values(distinct)[found.indices.to_numpy()] if distinct else np.empty(0, np.uint64)


def _of_values(values: list[bytes]) -> Ids:
    """Hash values, each distinct one once."""
    ids: dict[bytes, int] = {}
    for value in values:
        if value not in ids:
            ids[value] = int.from_bytes(blake2b(value, digest_size=8).digest(), "big")
    return np.fromiter((ids[value] for value in values), np.uint64, len(values))


def _some(ids: Ids, path: Path) -> Ids:
    if not len(ids):
        raise InputFileError(
            "a trace has no requests", path=str(path), hint="give a file with one key per request"
        )
    return ids
