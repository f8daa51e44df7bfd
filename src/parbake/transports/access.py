"""Who may change what is served over the serving port."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Literal

from parbake.errors import NotAllowed


@dataclass(frozen=True, slots=True)
class Access:
    """The rule for load and unload. ``loopback_only`` says that the server listens on a loopback address."""

    rule: Literal["local", "token", "off"]
    token: str
    loopback_only: bool

    def check(self, peer: str, authorization: str, *, browser: bool = False, forwarded: bool = False) -> None:
        """Raise `NotAllowed` unless the caller may. ``browser`` and ``forwarded`` callers are never local.

        A page in a browser on this machine, or a proxy on it, speaks for somebody else.
        """
        if self.rule == "off":
            raise NotAllowed("load and unload are switched off", hint="set repository_api to local or token")
        word, _, given = authorization.partition(" ")
        if (
            word.lower() == "bearer"
            and self.token
            and hmac.compare_digest(given.strip().encode(), self.token.encode())
        ):
            return
        local = self.rule == "local" and self.loopback_only and is_loopback(peer)
        if local and not browser and not forwarded:
            return
        raise NotAllowed(
            "load and unload need the admin token here",
            hint="send it as 'authorization: Bearer TOKEN', or use parbake reload on the server's machine",
        )


def is_loopback(address: str) -> bool:
    """Whether an address (or ``localhost``) is this machine's own."""
    if address == "localhost":
        return True
    try:
        return ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False
