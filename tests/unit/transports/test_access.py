"""Who may load and unload over the serving port."""

from __future__ import annotations

from typing import Any

import pytest

from parbake.errors import NotAllowed
from parbake.transports.access import Access, is_loopback


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("::1%lo", True), ("localhost", True),
        ("0.0.0.0", False), ("10.0.0.1", False), ("::", False), ("", False), ("example.org", False),
    ],
)  # fmt: skip
def test_what_counts_as_this_machine(address: str, expected: bool) -> None:
    assert is_loopback(address) is expected


def may(access: Access, peer: str = "127.0.0.1", authorization: str = "", **more: Any) -> bool:
    try:
        access.check(peer, authorization, **more)
    except NotAllowed:
        return False
    return True


def test_local_callers_may_while_the_server_listens_on_loopback_only() -> None:
    assert may(Access("local", "secret", True))
    assert not may(Access("local", "secret", False))
    assert not may(Access("local", "secret", True), peer="10.1.2.3")
    assert not may(Access("local", "secret", True), peer="")


def test_a_page_in_a_browser_and_a_proxy_are_never_local() -> None:
    assert not may(Access("local", "secret", True), browser=True)
    assert not may(Access("local", "secret", True), forwarded=True)
    assert may(Access("local", "secret", True), authorization="Bearer secret", browser=True, forwarded=True)


@pytest.mark.parametrize("rule", ["local", "token"])
def test_the_token_opens_from_anywhere(rule: Any) -> None:
    access = Access(rule, "secret", False)
    assert may(access, "10.1.2.3", "Bearer secret")
    assert may(access, "10.1.2.3", "bearer  secret ")
    for wrong in (
        "secret",
        "Basic secret",
        "Bearer Secret",
        "Bearer ",
        "Bearer s\xe9cret",
        "Bearer " + "x" * 10_000,
    ):
        assert not may(access, "10.1.2.3", wrong)


def test_an_empty_token_opens_nothing() -> None:
    assert not may(Access("token", "", True), authorization="Bearer ")


def test_off_is_off_for_everybody() -> None:
    assert not may(Access("off", "secret", True), authorization="Bearer secret")


def test_a_refusal_says_what_would_help() -> None:
    with pytest.raises(NotAllowed, match="need the admin token") as caught:
        Access("token", "secret", True).check("127.0.0.1", "")
    assert "authorization: Bearer" in caught.value.hint
    with pytest.raises(NotAllowed, match="switched off"):
        Access("off", "secret", True).check("127.0.0.1", "")
