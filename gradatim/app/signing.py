"""A signed head of the chain of decisions: how it ended at one moment, by the holder of a key (Ed25519, RFC 8032).

A chain of hashes does not tell that its end was cut off or that all of it was written anew; a head that was signed with
a key which the server does not have, and kept elsewhere, does. It knows nothing of how the chain is made.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from gradatim.errors import ConfigError

SIGNATURE = "signature"


def make_key(path: Path) -> Path:
    """A new private key in ``path``, for its owner's eyes only, and the public one beside it, which is given back.
    ConfigError where one of them is there already or cannot be written."""
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    beside = path.with_name(path.name + ".pub")
    for taken in (path, beside):
        if taken.exists():
            raise ConfigError(f"{taken} is there already: a key is never overwritten; name another file")
    _create(path, private, 0o600)
    _create(beside, public, 0o644)
    return beside


def _create(path: Path, content: bytes, mode: int) -> None:
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
    except OSError as e:
        raise ConfigError(f"cannot write {path}: {e.strerror}") from e


def signed(facts: Mapping[str, Any], key: Path) -> dict[str, Any]:
    """The facts with their signature. ConfigError where ``key`` holds no Ed25519 private key."""
    pem = _read(key)
    try:
        private = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as e:
        raise ConfigError(f"{key} is no private key that can be read without a password") from e
    if not isinstance(private, Ed25519PrivateKey):
        raise ConfigError(f"{key} is no Ed25519 key: make one with `gradatim audit keygen`")
    return {**facts, SIGNATURE: base64.b64encode(private.sign(_canonical(facts))).decode()}


def verified(document: Path, key: Path) -> dict[str, Any]:
    """What a signed document says. ConfigError where its signature is not of the public key in ``key``, or either file
    cannot be read."""
    pem, content = _read(key), _read(document)
    try:
        public = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as e:
        raise ConfigError(f"{key} is no public key") from e
    if not isinstance(public, Ed25519PublicKey):
        raise ConfigError(f"{key} is no Ed25519 key: give the .pub file of `gradatim audit keygen`")
    try:
        said = json.loads(content)
        signature = base64.b64decode(said.pop(SIGNATURE), validate=True)
        public.verify(signature, _canonical(said))
    except InvalidSignature:
        raise ConfigError(f"{document} was not signed with the key of {key}, or was changed since") from None
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ConfigError(f"{document} is no signed head: make one with `gradatim audit sign`") from e
    return dict(said)


def _canonical(facts: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(facts), sort_keys=True, separators=(",", ":")).encode()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}") from e
