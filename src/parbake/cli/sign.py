"""`parbake sign`: vouch for a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from parbake.cli.options import BUNDLE, Command, json_option
from parbake.cli.output import emit_json, say


@click.command(cls=Command, short_help="Sign a bundle, or make a key to sign with.")
@click.argument("bundle", type=BUNDLE, required=False)
@click.option(
    "--key", type=click.Path(path_type=Path, dir_okay=False), envvar="PARBAKE_SIGNING_KEY", metavar="FILE",
    help="Private key to sign with, as PEM.",
)  # fmt: skip
@click.option(
    "--new-key", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Make a pair: the private key in FILE, the public one in FILE.pub.",
)  # fmt: skip
@json_option
def command(bundle: Path | None, key: Path | None, new_key: Path | None, as_json: bool) -> None:
    """Sign a bundle with an Ed25519 key, after its files were held against its digest.

    A server that is started with --trusted-keys runs no bundle that none of these keys has signed. The signature
    lies in the bundle and is copied with it; the digest stays the same.
    """
    from parbake.contract import signatures

    if new_key is not None:
        if bundle is not None or key is not None:
            raise click.UsageError("--new-key only makes a pair: sign with a second command")
        public = signatures.new_key(new_key)
        if as_json:
            emit_json({"key": str(new_key), "public_key": f"{new_key}.pub", "id": public.id})
            return
        say(f"made key {public.id}: {new_key} signs, and stays secret; {new_key}.pub goes to the servers")
        return
    if bundle is None or key is None:
        raise click.UsageError("what to sign, and with which key? parbake sign BUNDLE --key FILE")
    from parbake.contract.bundle import read_bundle

    stored = read_bundle(bundle)
    made = signatures.sign(stored, key)
    found = signatures.key_id(signatures.raw_key(made))
    if as_json:
        emit_json({"bundle": str(bundle), "digest": stored.digest, "id": found, "signed": made.signed})
        return
    say(f"signed {stored.contract.name} {stored.digest[:19]}... with key {found}")
