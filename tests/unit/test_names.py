"""Names: what may become part of a URL and of a path."""

from __future__ import annotations

import msgspec
import pytest

from parbake.names import NAME_PATTERN, Name


@pytest.mark.parametrize("name", ["eta", "eta-2", "A.b_c", "7", "x" * 128])
def test_a_name_is_accepted(name: str) -> None:
    assert NAME_PATTERN.match(name)
    assert msgspec.convert(name, Name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "-x", "a/b", "a\\b", "a b", "é", "a\n", "x" * 129]
)
def test_what_could_lead_elsewhere_is_refused(name: str) -> None:
    assert not NAME_PATTERN.match(name)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(name, Name)
