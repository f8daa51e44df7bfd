"""Compile the .proto files of the package to the descriptors that it loads. ``--check`` only says if they differ."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from google.protobuf.descriptor_pb2 import FileDescriptorSet

FOLDER = Path(__file__).parents[1] / "src" / "parbake" / "transports" / "grpc"
DESCRIPTORS = FOLDER / "descriptors.binpb"
PROTOS = ("inference.proto", "health.proto")


def compiled() -> FileDescriptorSet:
    """What the .proto files say."""
    from grpc_tools import protoc

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set.binpb"
        status = protoc.main(["protoc", f"--proto_path={FOLDER}", f"--descriptor_set_out={out}", *PROTOS])
        if status:
            raise SystemExit(f"error: protoc ended with {status}")
        return FileDescriptorSet.FromString(out.read_bytes())


def shipped() -> FileDescriptorSet:
    """What the package holds."""
    return FileDescriptorSet.FromString(DESCRIPTORS.read_bytes())


def main(arguments: list[str]) -> int:
    """Write the descriptors, or check them."""
    if arguments == ["--check"]:
        if DESCRIPTORS.exists() and shipped() == compiled():
            return 0
        print(f"error: {DESCRIPTORS.name} is out of date\nhint: python -m tools.protos", file=sys.stderr)
        return 1
    DESCRIPTORS.write_bytes(compiled().SerializeToString(deterministic=True))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
