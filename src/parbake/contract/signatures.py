"""Who vouches for a bundle: Ed25519 signatures of its digest, in a file beside its manifest.

The digest covers every file of the bundle, so a signature of the digest is one of all of them. ``signatures.json``
itself is no part of the bundle: to sign it does not change its digest, and several people may. RFC 8032 has the
signature scheme; keys are PEM files as ``openssl genpkey -algorithm ed25519`` writes them too.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec import Struct

from parbake.contract.bundle import SIGNATURES, StoredBundle
from parbake.errors import BundleTorn, BundleUnsigned, Conflict, MissingExtra, SettingsError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_MAX_BYTES: Final = 1024 * 1024
_PUBLIC_BYTES: Final = 32
_OTHERS_WRITE: Final = 0o022
_PEM: Final = re.compile(rb"-----BEGIN [A-Z ]+-----.+?-----END [A-Z ]+-----", re.DOTALL)


class Signature(Struct, frozen=True, forbid_unknown_fields=True):
    """One signature; keys and signatures are base64."""

    public_key: str
    """The 32 bytes of the Ed25519 key."""
    signed: str
    """When, as ISO 8601; it is signed too."""
    signature: str


class Signatures(Struct, frozen=True, forbid_unknown_fields=True):
    """``signatures.json``."""

    signatures: tuple[Signature, ...] = ()


@dataclass(frozen=True, slots=True)
class PublicKey:
    """Somebody's key, and what we call them: the name of the key's file."""

    name: str
    raw: bytes

    @property
    def id(self) -> str:
        """A short name for the key that it alone has."""
        return key_id(self.raw)


@dataclass(frozen=True, slots=True)
class Signed:
    """One signature of a bundle, looked at."""

    key_id: str
    signed: str
    valid: bool | None
    """Whether the key has signed this digest; None where the library to tell is not here."""
    name: str = ""
    """Whose key it is, if it is trusted; else ""."""


def key_id(raw: bytes) -> str:
    """The first 64 bits of the key's SHA-256, in hex."""
    return hashlib.sha256(raw).hexdigest()[:16]


def raw_key(signature: Signature) -> bytes:
    """The bytes of the key that a signature says it is by; none where these are no base64."""
    try:
        return base64.b64decode(signature.public_key, validate=True)
    except (binascii.Error, ValueError):
        return b""


def new_key(path: Path) -> PublicKey:
    """Make a pair: the private key at ``path``, for its owner only, and the public one at ``path.pub``.

    Raises `Conflict` where one of the files exists, `SettingsError` where they cannot be written.
    """
    from_library = _library()
    public_path = path.with_name(path.name + ".pub")
    for there in (path, public_path):
        if there.exists():
            raise Conflict(f"{there} exists", hint="a key that was used must not be lost: name another file")
    key = from_library.ed25519.Ed25519PrivateKey.generate()
    formats = from_library.serialization
    private = key.private_bytes(formats.Encoding.PEM, formats.PrivateFormat.PKCS8, formats.NoEncryption())
    public = key.public_key().public_bytes(formats.Encoding.PEM, formats.PublicFormat.SubjectPublicKeyInfo)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(private)
        public_path.write_bytes(public)
    except OSError as error:
        raise SettingsError(f"{path} cannot be written: {error.strerror}") from error
    return PublicKey(path.name, key.public_key().public_bytes_raw())


def sign(bundle: StoredBundle, key_file: Path) -> Signature:
    """Sign a bundle whose digest was verified, in the place of an earlier signature by the same key.

    Raises `SettingsError` where the key cannot be read, `BundleTorn` where other signatures cannot.
    """
    key = _private_key(key_file)
    raw = key.public_key().public_bytes_raw()
    signed = datetime.now(UTC).isoformat(timespec="seconds")
    made = Signature(
        base64.b64encode(raw).decode(),
        signed,
        base64.b64encode(key.sign(_message(bundle.digest, signed))).decode(),
    )
    others = tuple(one for one in read_signatures(bundle) if one.public_key != made.public_key)
    content = msgspec.json.format(msgspec.json.encode(Signatures((*others, made))))
    descriptor, staging = tempfile.mkstemp(prefix=f".{bundle.path.name}.", dir=bundle.path.parent)
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        Path(staging).chmod(0o644)
        # Beside the bundle until it is whole: nothing may lie in a bundle that does not belong there.
        Path(staging).rename(bundle.path / SIGNATURES)
    except BaseException:
        Path(staging).unlink(missing_ok=True)
        raise
    return made


def read_signatures(bundle: StoredBundle) -> tuple[Signature, ...]:
    """The signatures beside a bundle, as they stand there. Raises `BundleTorn`."""
    path = bundle.path / SIGNATURES
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise BundleTorn(f"{path} cannot be read: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as handle:
        raw = handle.read(_MAX_BYTES + 1)
    if len(raw) > _MAX_BYTES:
        raise BundleTorn(f"{path} is larger than {_MAX_BYTES} bytes")
    try:
        return msgspec.json.decode(raw, type=Signatures).signatures
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleTorn(f"{path}: {error}", hint="remove the file, and sign again") from error


def read_trusted(path: Path) -> tuple[PublicKey, ...]:
    """The public keys of a PEM file, or of all ``*.pub`` and ``*.pem`` files of a folder.

    Raises `SettingsError` where there is none, one is something else, or others could put theirs there;
    `MissingExtra`.
    """
    library = _library()
    files = [path]
    try:
        if path.is_dir():
            files = sorted(item for item in path.iterdir() if item.suffix in (".pub", ".pem"))
            _refuse_open(path)
        found: list[PublicKey] = []
        for file in files:
            _refuse_open(file)
            blocks = _PEM.findall(file.read_bytes()[:_MAX_BYTES])
            for block in blocks or [b""]:
                try:
                    key = library.serialization.load_pem_public_key(block)
                except (ValueError, TypeError, library.UnsupportedAlgorithm) as error:
                    raise SettingsError(
                        f"{file} is no public key: {str(error).splitlines()[0]}",
                        hint="a PEM file, such as parbake sign --new-key FILE writes to FILE.pub",
                    ) from error
                if not isinstance(key, library.ed25519.Ed25519PublicKey):
                    raise SettingsError(
                        f"{file} is no Ed25519 key", hint="parbake sign --new-key FILE makes one"
                    )
                found.append(PublicKey(file.name.removesuffix(file.suffix), key.public_bytes_raw()))
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from error
    if not found:
        raise SettingsError(f"no public key in {path}", hint="it takes the .pub files of those who sign")
    return tuple(found)


def look_at(bundle: StoredBundle, trusted: Sequence[PublicKey] = ()) -> tuple[Signed, ...]:
    """Every signature of a bundle, verified. Raises `BundleTorn`; without the library nothing is known of validity."""
    names = {key.raw: key.name for key in trusted}
    found: list[Signed] = []
    for one in read_signatures(bundle):
        raw = raw_key(one)
        try:
            signature = base64.b64decode(one.signature, validate=True)
        except (binascii.Error, ValueError):
            signature = b""
        try:
            valid: bool | None = _valid(raw, signature, _message(bundle.digest, one.signed))
        except MissingExtra:
            valid = None
        found.append(Signed(key_id(raw), one.signed, valid, names.get(raw, "") if valid else ""))
    return tuple(found)


def check_signed(bundle: StoredBundle, trusted: Sequence[PublicKey]) -> Signed:
    """The first valid signature by a key that is trusted. Raises `BundleUnsigned`.

    It says something of the files only if they were held against the digest (``read_bundle(verify=True)``).
    """
    found = look_at(bundle, trusted)
    for one in found:
        if one.valid and one.name:
            return one
    if not found:
        why = "has no signature"
    elif any(one.valid for one in found):
        why = f"is signed by {', '.join(one.key_id for one in found if one.valid)}, whom nobody here trusts"
    else:
        why = "has a signature of something else"
    raise BundleUnsigned(
        f"{bundle.path} {why}",
        hint=f"parbake sign {bundle.path} --key FILE, by one of: {', '.join(key.name for key in trusted)}",
    )


def _message(digest: str, signed: str) -> bytes:
    """What is signed: the use of the key, so that a signature made for something else is none of a bundle."""
    return f"parbake bundle 1\n{digest}\n{signed}\n".encode()


def _valid(raw: bytes, signature: bytes, message: bytes) -> bool:
    library = _library()
    if len(raw) != _PUBLIC_BYTES:
        return False
    try:
        library.ed25519.Ed25519PublicKey.from_public_bytes(raw).verify(signature, message)
    except (library.InvalidSignature, ValueError):
        return False
    return True


def _private_key(path: Path) -> Ed25519PrivateKey:
    library = _library()
    try:
        content = path.read_bytes()[:_MAX_BYTES]
    except OSError as error:
        raise SettingsError(
            f"{path} cannot be read: {error.strerror}", hint=f"parbake sign --new-key {path} makes a pair"
        ) from error
    try:
        key = library.serialization.load_pem_private_key(content, None)
    except TypeError as error:
        raise SettingsError(
            f"{path} is encrypted with a password", hint="openssl pkey -in FILE -out /dev/shm/KEY decrypts it"
        ) from error
    except (ValueError, library.UnsupportedAlgorithm) as error:
        raise SettingsError(f"{path} is no private key in PEM", hint="not the .pub file") from error
    if not isinstance(key, library.ed25519.Ed25519PrivateKey):
        raise SettingsError(f"{path} is no Ed25519 key", hint="parbake sign --new-key FILE makes one")
    private: Ed25519PrivateKey = key
    return private


def _refuse_open(path: Path) -> None:
    if path.stat().st_mode & _OTHERS_WRITE:
        raise SettingsError(
            f"{path} can be written by others, who could trust whom they like", hint=f"chmod go-w {path}"
        )


class _Library:
    """The parts of `cryptography` that are needed."""

    def __init__(self) -> None:
        from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519

        self.serialization = serialization
        self.ed25519 = ed25519
        self.InvalidSignature = InvalidSignature
        self.UnsupportedAlgorithm = UnsupportedAlgorithm


def _library() -> _Library:
    try:
        return _Library()
    except ImportError as error:
        raise MissingExtra("cryptography", "signing") from error
