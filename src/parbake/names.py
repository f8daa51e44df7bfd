"""What may name a deployment, a version or a model: no separators, nothing that a path could be made of.

And which name somebody meant who wrote another one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Annotated, Final

import msgspec

# `$` alone would let a newline at the end pass; JSON Schema has no `\Z`.
NAME_PATTERN: Final = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$(?!\n)")

_SHOWN_CHARS: Final = 80

Name = Annotated[str, msgspec.Meta(pattern=NAME_PATTERN.pattern)]
"""A string that msgspec accepts only if it fits `NAME_PATTERN`."""


def near(word: str, known: Iterable[str]) -> str:
    """The known word that is nearest, or "" where none is near."""
    return next(iter(get_close_matches(word[:_SHOWN_CHARS], list(known), n=1)), "")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``: did you mean 'every'?``, or "" where no known word is near."""
    close = near(word, known)
    return f": did you mean {close!r}?" if close else ""
