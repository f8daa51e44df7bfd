"""Answers from the table over real connections: in order, each to its own, however requests come and callers go."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import uvloop

from parbake.app.bake import bake
from parbake.contract.bundle import StoredBundle
from parbake.testing import Server, serving
from parbake.transports import client
from tests.functions import write_scaled
from tests.traffic import Call, answer, bake_rows, infer, wait_for


def request(left: float, right: float, request_id: str = "") -> bytes:
    """One row for the doubler, as a whole HTTP request."""
    body: dict[str, object] = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [left, right]}]
    }
    if request_id:
        body["id"] = request_id
    content = json.dumps(body).encode()
    head = f"POST /v2/models/doubler/infer HTTP/1.1\r\nhost: a\r\ncontent-length: {len(content)}\r\n\r\n"
    return head.encode() + content


async def answers(reader: asyncio.StreamReader, count: int) -> list[tuple[int, object]]:
    """Status and values (or the code of the error) of the next replies."""
    found: list[tuple[int, object]] = []
    for _ in range(count):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
        reply = json.loads(await reader.readexactly(int(fields["content-length"])))
        status = int(head.split(" ")[1])
        found.append((status, reply["outputs"][0]["data"] if status == 200 else reply["code"]))
    return found


def hundred(bundle: StoredBundle, folder: Path) -> Path:
    """A table of the rows (0, 0) to (99, 99)."""
    rows = folder / "rows.csv"
    rows.write_text("left,right\n" + "".join(f"{i},{i}\n" for i in range(100)))
    bake(bundle.path, rows, folder / "table", workers=1)
    return folder / "table"


@pytest.mark.parametrize("mode", ["static", "hybrid"])
def test_everybody_gets_their_own_answers_in_order(
    mode: str, doubler_bundle: StoredBundle, tmp_path: Path
) -> None:
    # Baked rows, rows that are asked for again and again, and rows that are not baked (100 and above).
    asked = [[(i * 7 + c * 13) % 120 if i % 3 else 5 for i in range(150)] for c in range(40)]

    async def connection(server: Server, numbers: Sequence[int], at_once: int) -> list[tuple[int, object]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        found: list[tuple[int, object]] = []
        for start in range(0, len(numbers), at_once):
            some = numbers[start : start + at_once]
            writer.write(b"".join(request(i, i) for i in some))
            found += await answers(reader, len(some))
        writer.close()
        return found

    async def everybody(server: Server) -> list[list[tuple[int, object]]]:
        return await asyncio.gather(
            *(connection(server, numbers, (1, 2, 50)[c % 3]) for c, numbers in enumerate(asked))
        )

    def expected(number: int) -> tuple[int, object]:
        if mode == "static" and number >= 100:
            return 404, "key_not_baked"
        return 200, [2.0 * number, 2.0 * number]

    with serving(
        doubler_bundle.path, mode=mode, table=hundred(doubler_bundle, tmp_path), workers=1
    ) as server:
        found = uvloop.run(everybody(server))
    assert found == [[expected(i) for i in numbers] for numbers in asked]


def test_who_leaves_before_the_answer_disturbs_nobody(doubler_bundle: StoredBundle, tmp_path: Path) -> None:
    async def scene(server: Server) -> None:
        stayers = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(5)]
        for turn in range(30):
            leavers = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(5)]
            for (_, stayer), (_, leaver) in zip(stayers, leavers, strict=True):
                leaver.write(request(turn, turn) * 3)
                stayer.write(request(turn, turn))
            for _, leaver in leavers:
                leaver.transport.abort()
            for reader, _ in stayers:
                assert await answers(reader, 1) == [(200, [2.0 * turn, 2.0 * turn])]
        for _, stayer in stayers:
            stayer.close()

    with serving(
        doubler_bundle.path, mode="static", table=hundred(doubler_bundle, tmp_path), workers=1
    ) as server:
        uvloop.run(scene(server))
        assert server.stop() == 0
        assert "Traceback" not in server.log()


def test_who_sends_no_more_still_gets_all_answers(doubler_bundle: StoredBundle, tmp_path: Path) -> None:
    async def scene(server: Server) -> None:
        other = await asyncio.open_connection("127.0.0.1", server.port)
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"".join(request(i, i) for i in range(60)))
        writer.write_eof()
        assert await answers(reader, 60) == [(200, [2.0 * i, 2.0 * i]) for i in range(60)]
        assert await reader.read() == b""
        writer.close()
        other[1].close()

    with serving(
        doubler_bundle.path, mode="static", table=hundred(doubler_bundle, tmp_path), workers=1
    ) as server:
        uvloop.run(scene(server))


def test_a_drain_answers_what_was_asked(doubler_bundle: StoredBundle, tmp_path: Path) -> None:
    async def scene(server: Server) -> None:
        streams = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(20)]
        for reader, writer in streams:
            writer.write(request(1, 1))
            assert await answers(reader, 1) == [(200, [2.0, 2.0])]
        for _, writer in streams:
            writer.write(request(2, 2) + request(3, 3))
        server.process.terminate()
        for reader, writer in streams:
            assert await answers(reader, 1) == [(200, [4.0, 4.0])]
            writer.close()

    with serving(
        doubler_bundle.path, mode="static", table=hundred(doubler_bundle, tmp_path), workers=1
    ) as server:
        uvloop.run(scene(server))
        assert server.process.wait(30) == 0


def test_a_reply_that_is_remembered_is_given_no_longer_than_its_table_is_fresh(tmp_path: Path) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2, freshness_s=3.0)
    table = bake_rows(bundle, [(1, 2)], tmp_path / "table")
    url, body = "/v2/models/scaled/infer", infer((1, 2))
    with serving(bundle.path, "--table", str(table), mode="static") as server, Call(server.url) as call:

        def answered() -> bool:
            # Baked again, so that it is fresh however long the start has taken; and again where the machine is slow.
            bake_rows(bundle, [(1, 2)], table, replace=True)
            client.reload(port=server.port)
            replies = [call(url, body) for _ in range(5)]
            return [reply.status for reply in replies] == [200] * 5 and answer(replies[-1]) == [2, 4]

        wait_for(answered)
        wait_for(lambda: call(url, body).status != 200)
        assert call(url, body).status == 404
