"""What may name a deployment, a version or a model: no separators, nothing that a path could be made of."""

from __future__ import annotations

import re
from typing import Annotated, Final

import msgspec

# `$` alone would let a newline at the end pass; JSON Schema has no `\Z`.
NAME_PATTERN: Final = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$(?!\n)")

Name = Annotated[str, msgspec.Meta(pattern=NAME_PATTERN.pattern)]
"""A string that msgspec accepts only if it fits `NAME_PATTERN`."""
