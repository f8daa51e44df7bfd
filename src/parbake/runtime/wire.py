"""The frames between a front and a runner: a fixed header, sizes, then raw tensor bytes.

Little-endian throughout. Request: ``length rows id tensors`` and, per tensor, its row shape and number
of bytes; then the bytes. Reply: ``length status id tensors seconds`` and the same. A reply that is not
`OK` has one "tensor" without shape: the message as UTF-8. ``length`` counts what follows it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from parbake.contract.tensors import Shape

OK: Final = 0
REJECTED: Final = 1
FAILED: Final = 2

BYE: Final = 0
"""Id of a reply to nothing: this model is put away now, and what the runner has not answered it has not read."""

MAX_FRAME_BYTES: Final = 1 << 31

_LENGTH = struct.Struct("<Q")
_REQUEST = struct.Struct("<QIQI")
_REPLY = struct.Struct("<QIQId")
_PART = struct.Struct("<BQ")


def request_frame(request_id: int, rows: int, raws: Sequence[bytes], shapes: Sequence[Shape]) -> list[bytes]:
    """The pieces of a request frame, to be written one after another without joining."""
    parts, size = _parts(raws, shapes)
    head = _REQUEST.pack(_REQUEST.size - 8 + len(parts) + size, rows, request_id, len(raws))
    return [head + parts, *raws]


def reply_frame(
    request_id: int, status: int, seconds: float, raws: Sequence[bytes], shapes: Sequence[Shape]
) -> list[bytes]:
    """The pieces of a reply frame; ``seconds`` is the time the model took."""
    parts, size = _parts(raws, shapes)
    head = _REPLY.pack(_REPLY.size - 8 + len(parts) + size, status, request_id, len(raws), seconds)
    return [head + parts, *raws]


def request_head(frame: bytes) -> tuple[int, int]:
    """Id and rows of a request frame; no rows is a probe. Raises ValueError for a torn one."""
    try:
        _, rows, request_id, _ = _REQUEST.unpack_from(frame)
    except struct.error as error:
        raise ValueError(f"a frame is torn: {error}") from error
    return request_id, rows


def frame_length(buffer: bytes | bytearray | memoryview) -> int | None:
    """Bytes of the first frame in the buffer (header and all), or None if that cannot be told yet."""
    if len(buffer) < 8:
        return None
    length: int = _LENGTH.unpack_from(buffer)[0]
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes is over the limit of {MAX_FRAME_BYTES}")
    return length + 8


def read_request(frame: bytes) -> tuple[int, int, list[bytes], list[Shape]]:
    """``id, rows, raws, shapes`` of a request frame. Raises ValueError for a torn one."""
    try:
        _, rows, request_id, count = _REQUEST.unpack_from(frame)
        raws, shapes = _tensors(frame, _REQUEST.size, count)
    except struct.error as error:
        raise ValueError(f"a frame is torn: {error}") from error
    return request_id, rows, raws, shapes


def read_reply(frame: bytes) -> tuple[int, int, float, list[bytes], list[Shape]]:
    """``id, status, seconds, raws, shapes`` of a reply frame. Raises ValueError for a torn one."""
    try:
        _, status, request_id, count, seconds = _REPLY.unpack_from(frame)
        raws, shapes = _tensors(frame, _REPLY.size, count)
    except struct.error as error:
        raise ValueError(f"a frame is torn: {error}") from error
    return request_id, status, seconds, raws, shapes


def _parts(raws: Sequence[bytes], shapes: Sequence[Shape]) -> tuple[bytes, int]:
    parts: list[bytes] = []
    size = 0
    for raw, shape in zip(raws, shapes, strict=True):
        parts.append(_PART.pack(len(shape), len(raw)))
        if shape:
            parts.append(struct.pack(f"<{len(shape)}q", *shape))
        size += len(raw)
    return b"".join(parts), size


def _tensors(frame: bytes, at: int, count: int) -> tuple[list[bytes], list[Shape]]:
    sizes: list[int] = []
    shapes: list[Shape] = []
    for _ in range(count):
        dimensions, size = _PART.unpack_from(frame, at)
        at += _PART.size
        shapes.append(struct.unpack_from(f"<{dimensions}q", frame, at))
        at += 8 * dimensions
        sizes.append(size)
    raws: list[bytes] = []
    for size in sizes:
        raws.append(frame[at : at + size])
        at += size
    if at != len(frame):
        raise ValueError(f"a frame of {len(frame)} bytes describes {at}")
    return raws, shapes
