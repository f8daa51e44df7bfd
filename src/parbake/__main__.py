"""``python -m parbake`` is the ``parbake`` command."""

from __future__ import annotations

from parbake.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
