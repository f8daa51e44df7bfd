"""The bare loop and parser: uvloop and httptools, every request answered with the same bytes: ``server.py PORT``."""

from __future__ import annotations

import asyncio
import sys

import httptools
import uvloop

BODY = (
    b'{"model_name":"eta","model_version":"1",'
    b'"outputs":[{"name":"p","datatype":"FP32","shape":[1,2],"data":[0.5,0.5]}]}'
)
REPLY = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (
    len(BODY),
    BODY,
)


class Constant(asyncio.Protocol):
    """One connection."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = transport
        self._parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        """Parse."""
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        """Answer."""
        self._transport.write(REPLY)  # type: ignore[attr-defined]  # a stream transport


async def main(port: int) -> None:
    """Serve until killed."""
    server = await asyncio.get_running_loop().create_server(Constant, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
