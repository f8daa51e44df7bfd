"""Ask the OSV database whether versions that requirements/*.txt pin have known vulnerabilities.

One question over all pins (https://google.github.io/osv.dev/post-v1-querybatch). Where the service cannot be reached
nothing is known, which is said and is no failure, unless ``--strict``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

FOLDER: Final = Path(__file__).parents[1] / "requirements"
URL: Final = "https://api.osv.dev/v1/querybatch"
TIMEOUT_S: Final = 5.0
PIN: Final = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;\\]+)", re.MULTILINE)

ACCEPTED: Final[dict[str, str]] = {}
"""Vulnerabilities that do not concern us, by their id, with the reason."""

Pin = tuple[str, str]


class Unknown(Exception):
    """The service did not answer, or not in a way that says anything."""


def pins(files: Iterable[Path]) -> list[Pin]:
    """Name and version of everything that is pinned."""
    found = {pin for file in files for pin in PIN.findall(file.read_text())}
    # As the index writes names.
    return sorted((re.sub(r"[-_.]+", "-", name).lower(), version) for name, version in found)


def known(wanted: list[Pin], url: str = URL, timeout_s: float = TIMEOUT_S) -> dict[Pin, list[str]]:
    """Ids of the vulnerabilities of each of these that has some. Raises `Unknown`."""
    queries = [
        {"package": {"name": name, "ecosystem": "PyPI"}, "version": version} for name, version in wanted
    ]
    request = urllib.request.Request(  # noqa: S310  the URL is ours
        url, json.dumps({"queries": queries}).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:  # noqa: S310
            results: list[Any] = json.load(response)["results"]
        found = [sorted(item["id"] for item in result.get("vulns", ())) for result in results]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise Unknown(str(error) or type(error).__name__) from error
    if len(found) != len(wanted):
        raise Unknown(f"{len(found)} answers to {len(wanted)} questions")
    return {pin: ids for pin, ids in zip(wanted, found, strict=True) if ids}


def main(arguments: list[str]) -> int:
    """Print what is known, and give the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--strict", action="store_true", help="fail where nothing is known")
    parser.add_argument("--url", default=URL, help="of the service")
    parser.add_argument("files", nargs="*", type=Path, help="lock files  [default: requirements/*.txt]")
    given = parser.parse_args(arguments)
    wanted = pins(given.files or sorted(FOLDER.glob("*.txt")))
    try:
        found = known(wanted, given.url)
    except Unknown as error:
        print(f"known vulnerabilities: unknown, as {given.url} did not say ({error})", file=sys.stderr)
        return 1 if given.strict else 0
    bad = {pin: [one for one in ids if one not in ACCEPTED] for pin, ids in found.items()}
    bad = {pin: ids for pin, ids in bad.items() if ids}
    for (name, version), ids in bad.items():
        print(f"error: {name} {version} has known vulnerabilities: {', '.join(ids)}", file=sys.stderr)
    if bad:
        print(
            "hint: make lock takes newer versions; https://osv.dev/ID says what each is about",
            file=sys.stderr,
        )
        return 1
    print(f"known vulnerabilities: none in {len(wanted)} pinned versions")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
