"""Where a row was answered: the codes that serving notes and the prediction log writes."""

from __future__ import annotations

from typing import Final

TABLE: Final = 0
"""From the prediction table."""
HEAD: Final = 1
"""From the learned head."""
MODEL: Final = 2
"""By the model."""
JOINED: Final = 3
"""By the model, once for several identical requests; this was one of the others."""
DEFAULT: Final = 4
"""With the default that static mode has for keys that were never baked."""
REFUSED: Final = 5
"""Not answered."""
FALLBACK: Final = 6
"""In the model's place, because it could not."""

NAMES: Final = ("table", "head", "model", "joined", "default", "refused", "fallback")
