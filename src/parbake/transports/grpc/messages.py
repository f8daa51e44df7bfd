"""The messages of inference.proto and health.proto, in a descriptor pool of their own.

Clients of the protocol register the same names in protobuf's default pool, which takes a name only once; with a
pool of our own, client and server can live in one process.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any, Final

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from parbake.errors import MalformedBody

INFERENCE: Final = "inference.GRPCInferenceService"
HEALTH: Final = "grpc.health.v1.Health"


@cache
def pool() -> DescriptorPool:
    """The pool with both files in it."""
    found = DescriptorPool()
    for file in FileDescriptorSet.FromString((files(__package__) / "descriptors.binpb").read_bytes()).file:
        found.Add(file)
    return found


@cache
def message(name: str) -> Any:
    """The class of a message, by its name in ``inference`` or its full name."""
    full = name if "." in name else f"inference.{name}"
    return GetMessageClass(pool().FindMessageTypeByName(full))


def parse(kind: Any, data: bytes) -> Any:
    """A message from its bytes. Raises `MalformedBody`."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise MalformedBody(f"the message is no {kind.DESCRIPTOR.full_name}") from error


def serialize(reply: Message) -> bytes:
    """The bytes of a message."""
    data: bytes = reply.SerializeToString()
    return data
