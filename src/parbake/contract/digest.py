"""Digests of large files, inputs and tables: 256 bits of BLAKE2b (RFC 7693), as ``b2sum -l 256`` prints them.

SHA-256 takes twice as long on processors without instructions for it.
"""

from __future__ import annotations

import hashlib
from typing import BinaryIO, Final

_BYTES: Final = 32
_READ_BYTES: Final = 1 << 20


def new_hash(start: bytes = b"") -> hashlib.blake2b:
    """A hash that has taken ``start`` in."""
    return hashlib.blake2b(start, digest_size=_BYTES)


def named(taken: hashlib.blake2b) -> str:
    """The digest of what a hash has taken in: ``blake2b:`` and hexadecimal digits."""
    return f"blake2b:{taken.hexdigest()}"


def digest_of_file(file: BinaryIO) -> str:
    """The digest of what is left of a file. Raises OSError."""
    taken = new_hash()
    while chunk := file.read(_READ_BYTES):
        taken.update(chunk)
    return named(taken)
