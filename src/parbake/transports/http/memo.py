"""Replies to bodies that come again to the byte, so that the JSON of a baked answer is read and written once."""

from __future__ import annotations

from typing import Final, TypeAlias

_LIMIT_BYTES: Final = 32 * 1024 * 1024
_ENTRY_BYTES: Final = 4096
_OVERHEAD_BYTES: Final = 400
"""What an entry takes besides its bytes: five objects, a tuple, and a place in a dict."""
_MARKS: Final = 1 << 17

Known: TypeAlias = tuple[bytes, bytes, bytes, bytes]
"""Key, record, reply, and the row where a log wants it: the same body has the same key, and the same record the
same reply."""


class ReplyMemo:
    """What the endpoints of one front remember, bounded by bytes over all of them.

    Only a body that has lately been here before is kept: to keep those that come once costs more than it saves.
    When the limit is reached everything is forgotten, which the bodies that come often do not feel.
    """

    def __init__(self, limit_bytes: int = _LIMIT_BYTES) -> None:
        self._limit_bytes = self._left = limit_bytes
        self._marks = bytearray(_MARKS)
        """A byte of the hash of each body that was lately here."""
        self._shelves: list[dict[bytes, Known]] = []

    def shelf(self) -> dict[bytes, Known]:
        """A place for one endpoint, to be read directly and filled by `offer`."""
        replies: dict[bytes, Known] = {}
        self._shelves.append(replies)
        return replies

    def remove(self, shelf: dict[bytes, Known]) -> None:
        """Nobody reads this shelf any more."""
        shelf.clear()
        self._shelves = [other for other in self._shelves if other is not shelf]

    def offer(self, shelf: dict[bytes, Known], body: bytes, known: Known) -> None:
        """Keep this on a shelf, if the body has been seen before and is not too long."""
        mark = hash(body)
        # Never 0, which is there before anybody was.
        place, mark = mark % _MARKS, mark // _MARKS & 0xFF | 1
        if self._marks[place] != mark:
            self._marks[place] = mark
            return
        size = len(body) + sum(map(len, known)) + _OVERHEAD_BYTES
        if size > _ENTRY_BYTES:
            return
        if size > self._left:
            for replies in self._shelves:
                replies.clear()
            self._left = self._limit_bytes
        self._left -= size
        shelf[body] = known
