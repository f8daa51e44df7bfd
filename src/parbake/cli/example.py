"""Read the file of example rows that a pack command names into what `parbake.pack` takes."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, Final

from parbake.errors import InputFileError

SUFFIXES: Final = (".npz", ".npy", ".parquet", ".csv", ".arrow", ".feather", ".jsonl", ".ndjson")

MAX_BYTES: Final = 1 << 30
"""Largest example: parity is checked on every row of it, so more would only be slow."""


def read_example(path: Path) -> object:
    """Arrays by input name (.npz), one array (.npy), or a pyarrow Table by column name (the others).

    Raises `InputFileError` for other kinds of files, for damaged ones, and for more than 1 GiB.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputFileError(f"{path}: the example is no {', '.join(SUFFIXES)} file")
    size = _bytes_of(path)
    if size > MAX_BYTES:
        raise InputFileError(
            f"{path} holds {size:,} bytes, more than the {MAX_BYTES:,} that an example may have",
            hint="some thousand typical rows are enough",
        )
    try:
        return _arrays(path) if suffix in (".npz", ".npy") else _table(path, suffix)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        # pyarrow's errors are ValueErrors, too.
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputFileError(f"{path} cannot be read: {first}", hint=_hint(first)) from error


def _bytes_of(path: Path) -> int:
    """Bytes of a file; of an .npz unpacked."""
    try:
        if path.suffix.lower() == ".npz":
            with zipfile.ZipFile(path) as archive:
                return sum(item.file_size for item in archive.infolist())
        return path.stat().st_size
    except (OSError, zipfile.BadZipFile) as error:
        raise InputFileError(f"{path} cannot be read: {error}") from error


def _arrays(path: Path) -> Any:
    import numpy as np

    loaded: Any = np.load(path, allow_pickle=False)
    if path.suffix.lower() == ".npy":
        return loaded
    with loaded:
        return {name: loaded[name] for name in loaded.files}


def _table(path: Path, suffix: str) -> Any:
    if suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path)
    if suffix == ".csv":
        import pyarrow.csv

        return pyarrow.csv.read_csv(path)
    if suffix in (".arrow", ".feather"):
        import pyarrow.feather

        return pyarrow.feather.read_table(path)
    import pyarrow.json

    return pyarrow.json.read_json(path)


def _hint(message: str) -> str:
    if "Object arrays" in message:
        return "save strings as numpy strings: array.astype(str)"
    return ""
